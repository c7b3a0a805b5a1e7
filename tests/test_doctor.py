import json

from dit_sparse import doctor, kernels


def test_report_is_json_with_versions_and_backends():
    report = json.loads(json.dumps(doctor.diagnose()))
    assert report["versions"]["torch"]
    assert report["cpu"]["cores"] >= 1
    assert report["backends"]
    assert report["ready"]
    assert report["costs"]
    for problem in report["problems"]:
        assert problem["what"]
        assert problem["fix"]


def test_names_what_is_missing_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(doctor, "_ffmpeg", lambda: None)
    monkeypatch.setattr(doctor, "_demo_model", lambda: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    problems = {problem["what"]: problem for problem in doctor.diagnose()["problems"]}
    assert "pip install imageio[ffmpeg]" in problems["no ffmpeg: --format mp4 cannot be written"]["fix"]
    assert any("demo model" in what for what in problems)


def test_is_not_ready_without_a_required_package(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "diffusers" else real(name))
    report = doctor.diagnose()
    assert not report["ready"]
    assert [problem["what"] for problem in report["problems"] if problem["required"]] == ["diffusers is not installed"]


def test_is_not_ready_without_any_backend(monkeypatch):
    class Unavailable:
        def unavailable(self, device):
            return "not here"

    monkeypatch.setattr(kernels, "BACKENDS", {"only": Unavailable()})
    report = doctor.diagnose()
    assert report["backends"] == {"only": "not here"}
    assert not report["ready"]
