import re
import sys
from pathlib import Path

import pytest

from dit_sparse.vbench import environment
from dit_sparse.vbench.environment import find_environment, setup
from tests.vbench.standin import make_standin


def test_finds_vbench_and_what_it_lacks(standin, monkeypatch):
    found = find_environment(standin, ("detectron2", "json"))
    assert found.info.is_file()
    assert found.missing == ("detectron2",)
    monkeypatch.setenv("DIT_SPARSE_VBENCH_PYTHON", str(standin))
    assert find_environment().python == found.python


def test_says_what_is_wrong_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("DIT_SPARSE_VBENCH_PYTHON", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"no VBench: .*vbench-0.1.5/bin/python is missing; `dit-sparse vbench setup`"):
        find_environment()
    with pytest.raises(ValueError, match="has no VBench; "):
        find_environment(Path(sys.executable))
    with pytest.raises(ValueError, match=r"has VBench 0.1.4, and 0.1.5 is needed"):
        find_environment(make_standin(tmp_path / "old", "0.1.4"))
    (tmp_path / "no-python").touch()
    with pytest.raises(ValueError, match="is no Python that runs"):
        find_environment(tmp_path / "no-python")


def test_setup_leaves_other_folders_and_whole_environments_alone(tmp_path, monkeypatch):
    def failing(*_):
        raise AssertionError("it runs something")

    monkeypatch.setattr(environment, "_step", failing)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="holds something else than an environment"):
        setup(tmp_path, light=True, report=print)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_setup_is_done_once(real, monkeypatch):
    """The environment of the tests was made by it; one of other requirements is made anew."""
    if not (real.parents[1] / ".ready").exists():
        pytest.skip("the environment was not made by `dit-sparse vbench setup`")
    steps = []
    monkeypatch.setattr(environment, "_step", lambda command, what, report: steps.append(what))
    lines = []
    assert setup(real.parents[1], light=True, report=lines.append) == real
    assert steps == []
    assert "is ready in" in lines[0]


def test_setup_says_which_step_failed(tmp_path, monkeypatch):
    script = "import sys; print('ERROR: no such package', file=sys.stderr); sys.exit(1)"
    with pytest.raises(ValueError, match="installing failed: ERROR: no such package"):
        environment._step([sys.executable, "-c", script], "installing", lambda _: None)


def test_requirements_are_pinned_for_one_python():
    folder = Path(environment.__file__).parent
    for name in ("requirements.txt", "requirements-light.txt"):
        lines = [line for line in (folder / name).read_text("utf-8").splitlines() if not line.startswith("#")]
        assert "vbench==0.1.5" in lines
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    if sys.version_info[:2] != environment.PYTHON_VERSION:
        with pytest.raises(ValueError, match="use --python"):
            environment._check_python(Path(sys.executable))
