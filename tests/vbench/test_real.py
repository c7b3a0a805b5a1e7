"""VBench itself, in its own environment."""

import ast
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dit_sparse.generate.video import write_video
from dit_sparse.vbench import (
    DIMENSIONS,
    Request,
    read_scores,
    score,
    survey,
    worker,
)
from dit_sparse.vbench.environment import find_environment
from dit_sparse.vbench.files import read_json
from dit_sparse.vbench.results import read_plan, result_file


def _clips() -> dict[str, np.ndarray]:
    """A still, a moving and a noisy video of 17 frames."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:64, :96]
    scene = np.stack([x * 2.5, y * 4, 255 - x * 2.5], -1).astype(np.uint8)
    scene[20:40, 30:50] = 255
    noise = random.integers(-60, 60, (17, *scene.shape))
    return {
        "still": np.stack([scene] * 17),
        "moving": np.stack([np.roll(scene, 3 * step, 1) for step in range(17)]),
        "noisy": (scene + noise).clip(0, 255).astype(np.uint8),
    }


def test_flickering_as_vbench_measures_it(real, tmp_path):
    videos, out = tmp_path / "videos", tmp_path / "scores"
    videos.mkdir()
    for name, pixels in _clips().items():
        write_video(pixels, videos / f"{name}.mp4", format="mp4", fps=16)
    (videos / "broken.mp4").write_bytes((videos / "noisy.mp4").read_bytes()[:700])
    request = Request(videos, ("temporal_flickering",), True, python=real)
    with pytest.raises(ValueError, match=r"broken\.mp4: "):
        score(survey(request), out)
    (videos / "broken.mp4").unlink()
    found = survey(request)
    outcome = score(found, out)
    assert (outcome.made, outcome.failures) == (3, [])
    plan = read_plan(out, "temporal_flickering")
    results = {name: read_json(result_file(out, plan.dimension, key)) for name, key in plan.keys.items()}
    for name, result in results.items():
        assert result["score"] == pytest.approx(found.facts[name].flickering, abs=1e-6)
        assert result["frames"] == 17
        assert result["versions"]["vbench"] == "0.1.5"
    assert results["noisy"]["score"] < results["moving"]["score"] < 0.99 < results["still"]["score"] <= 1
    (row,) = read_scores(out).dimensions
    assert row.score == pytest.approx(np.mean([result["score"] for result in results.values()]))
    assert row.normalised == pytest.approx((row.score - 0.6293) / (1 - 0.6293))


def test_the_names_that_are_relied_upon_are_there(real):
    """Weights and loaders that dimensions without weights here would be scored by."""
    package = find_environment(real).info.parent
    sources = {path: path.read_text("utf-8") for path in package.glob("*.py")}
    everything = "\n".join(sources.values())
    for dimension in DIMENSIONS.values():
        for file in dimension.files:
            assert Path(file.path).name in everything, file.path
        module = ast.parse(sources[package / f"{dimension.name}.py"])
        names = _names(module)
        assert f"compute_{dimension.name}" in names
        assert all(loader.split(".")[0] in names for loader in worker.LOADERS.get(dimension.name, ()))
    captioning = ast.parse((package / "third_party" / "grit_model.py").read_text("utf-8"))
    methods = {node.name for node in ast.walk(captioning) if isinstance(node, ast.FunctionDef)}
    assert {"initialize_model", "initialize_model_det"} <= methods


_DIRECT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import worker
worker.torchvision_without_operators()
import torch
from easydict import EasyDict
from vbench.third_party.RAFT.core.raft import RAFT
from vbench.utils import init_submodules
from vbench.dynamic_degree import compute_dynamic_degree

torch.manual_seed(0)
options = EasyDict(small=False, mixed_precision=False, alternate_corr=False)
raft = Path(sys.argv[2]) / "raft_model" / "models" / "raft-things.pth"
raft.parent.mkdir(parents=True)
torch.save({f"module.{name}": value for name, value in RAFT(options).state_dict().items()}, raft)
names = ["dynamic_degree"]
Path("info.json").write_text(json.dumps([{"prompt_en": "", "dimension": names, "video_list": sys.argv[3:]}]))
device, loaded = torch.device("cpu"), init_submodules(names, local=True)
dynamic = compute_dynamic_degree("info.json", device, loaded["dynamic_degree"])[0]
still = worker.static_filter(device)({"path": sys.argv[-1]})
print(json.dumps([dynamic, still["score"]]))
"""


def test_a_dimension_is_that_of_one_call_of_vbench(real, weights, tmp_path):
    """VBench over all videos at once, and a call a video merged; RAFT has random weights."""
    videos, out = tmp_path / "videos", tmp_path / "scores"
    videos.mkdir()
    for index, (frames, pixels) in enumerate(zip((3, 2, 2), _clips().values(), strict=True)):
        write_video(pixels[:frames, :, :64], videos / f"{index}.mp4", format="mp4", fps=8)
    paths = [str(videos / f"{index}.mp4") for index in range(3)]
    command = [real, "-I", "-c", _DIRECT, str(Path(worker.__file__).parent), str(weights), *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected, still = json.loads(done.stdout.splitlines()[-1])
    # The filter, which VBench has for GPUs alone.
    assert still in (0, 1)
    outcome = score(survey(Request(videos, ("dynamic_degree",), True, python=real)), out)
    assert outcome.failures == []
    assert read_scores(out).dimensions[0].score == pytest.approx(expected, rel=1e-6)


def _names(module: ast.Module) -> set[str]:
    names = {node.name for node in module.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    imports = [node for node in module.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return names | {alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names}


def test_custom_videos_are_those_that_vbench_takes(real):
    """VBench refuses six dimensions for other videos, and so must the table of dimensions."""
    source = (find_environment(real).info.parent / "__init__.py").read_text("utf-8")
    refused = {name for name in DIMENSIONS if not DIMENSIONS[name].custom}
    (check,) = (
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "check_dimension_requires_extra_info"
    )
    lists = [ast.literal_eval(node) for node in ast.walk(check) if isinstance(node, ast.List)]
    assert [set(entries) for entries in lists] == [refused]
