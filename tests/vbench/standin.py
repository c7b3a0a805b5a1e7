"""A stand-in for VBench's environment: the layout and functions of 0.1.5, with scores that a test can predict.

A video's prompt says what becomes of it: "boom" raises, "skip" is left out, "crash" ends the process, "wget" asks for
a download, "absent" has nothing to judge. Its score is the number in the prompt, or one half.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from dit_sparse.generate.video import write_video

_UTILS = """
import json, os, subprocess, time
CACHE_DIR = os.environ["VBENCH_CACHE_DIR"]

def note(what):
    with open(os.path.join(CACHE_DIR, "calls.txt"), "a") as file:
        file.write(what + "\\n")

def init_submodules(dimensions, local=False, read_frame=False):
    assert local
    return {name: {"path": os.path.join(CACHE_DIR, "weights.pth")} for name in dimensions}

def load_dimension_info(path, dimension, lang):
    with open(path) as file:
        (entry,) = json.load(file)
    assert dimension in entry["dimension"]
    return entry["video_list"], entry

def load_video(path):
    return [None] * (9 if "long" in path else 5)

def judge(dimension, path, info):
    prompt = info["prompt_en"]
    print("VBench prints to standard output")
    note(f"{dimension} {path}")
    time.sleep(0.25 * prompt.count("slow"))
    if "boom" in prompt:
        raise RuntimeError("no such luck")
    if "crash" in prompt:
        os._exit(7)
    if "wget" in prompt:
        subprocess.run(["wget", "https://example.org/weights.pth"], check=True)
    if "connect" in prompt:
        import urllib.request
        urllib.request.urlopen("http://127.0.0.1:9/weights.pth")
    if "absent" in prompt:
        1 / 0
    import re
    found = re.search(r"0[.]\\d+", prompt)
    score = float(found.group()) if found else 0.5
    return [] if "skip" in prompt else [{"video_path": path, "video_results": score}]
"""

_MODULE = """
from vbench.utils import load_dimension_info, load_video, judge, note

class hub:
    @staticmethod
    def load(**options):
        note("load")

class torch:
    hub = hub

clip = hub

def MUSIQ(**options):
    note("load")

class DenseCaptioning:
    def __init__(self, device):
        note("load")
    def initialize_model(self, **options):
        note("initialize")
    initialize_model_det = initialize_model

def get_aesthetic_model(path):
    note("load")

def compute_{name}(json_dir, device, submodules, **options):
    {load}
    (path,), info = load_dimension_info(json_dir, "{name}", "en")
    results = judge("{name}", path, info)
    {extra}
    return float("nan"), results
"""
_LOADS = {
    "color": 'DenseCaptioning("cpu").initialize_model(a=object())',
    "imaging_quality": "MUSIQ(path=object())",
    "subject_consistency": "torch.hub.load(path=object())",
}
_EXTRAS = {
    "object_class": 'results[0]["frame_count"] = 16',
    "appearance_style": 'results[0]["frame_results"] = [0.5] * len(load_video(path))',
    "subject_consistency": "load_video(path)",
}
_FILTER = """
from vbench.utils import note
class StaticFilter:
    def __init__(self, arguments, device):
        note("load")
    def infer(self, path):
        note("static_filter " + path)
        return "moves" not in path
import torch
"""

NAMES = ("aesthetic_quality", "appearance_style", "color", "imaging_quality", "object_class", "subject_consistency")
INFO = [
    {"prompt_en": "a still cup", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red cup", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a cat", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
    {"prompt_en": "a façade", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
    {
        "prompt_en": "a façade",
        "dimension": ["appearance_style"],
        "auxiliary_info": {"appearance_style": {"appearance_style": "Ukiyo"}},
    },
]


def make_standin(folder: Path, version: str = "0.1.5") -> Path:
    """Make the environment in `folder`, and return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    package = site / "vbench"
    (package / "cli").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "cli" / "__init__.py").touch()
    (package / "cli" / "static_filter.py").write_text(_FILTER)
    (package / "utils.py").write_text(_UTILS)
    (package / "VBench_full_info.json").write_text(json.dumps(INFO))
    for name in (*NAMES, "temporal_flickering"):
        code = _MODULE.format(name=name, load=_LOADS.get(name, "pass"), extra=_EXTRAS.get(name, "pass"))
        (package / f"{name}.py").write_text(code)
    (site / "torch.py").write_text("device = str\ndef load(*a, **k): pass\n")
    (site / "torchvision.py").touch()
    (site / "easydict.py").write_text("EasyDict = dict\n")
    metadata = site / f"vbench-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vbench\nVersion: {version}\n")
    return folder / "bin" / "python"


def make_videos(folder: Path, *names: str, frames: int = 3, fps: int = 8, size: int = 16) -> None:
    """Small videos under `names`, each unlike the others in its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        data = _video(Path(name).suffix[1:], frames, fps, size)
        # A box that nobody reads, and what follows the end of a GIF.
        box = name.encode()
        (folder / name).write_bytes(data + (len(box) + 8).to_bytes(4, "big") + b"free" + box)


@functools.cache
def _video(format: str, frames: int, fps: int, size: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (frames, size, size, 3)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"video.{format}"
        write_video(pixels, path, format=format, fps=fps)
        return path.read_bytes()


def calls(weights: Path) -> list[str]:
    """What the stand-in was asked to do so far, with file names for paths."""
    path = weights / "calls.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [re.sub(r"(\S+) .*/", r"\1 ", line) for line in lines]
