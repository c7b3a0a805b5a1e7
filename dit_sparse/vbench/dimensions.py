"""VBench's sixteen dimensions: how each is normalised and weighted, what it needs, and how its videos are averaged.

Source: VBench 0.1.5 and `scripts/constant.py` of its repository (Huang et al., arXiv 2311.17982).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "DIMENSIONS",
    "FILTER",
    "HUB_MODEL",
    "QUALITY_WEIGHT",
    "SEMANTIC_WEIGHT",
    "VERSION",
    "Dimension",
    "WeightFile",
    "find_dimensions",
]

VERSION = "0.1.5"
"""The release of VBench that all of this describes."""

QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1

HUB_MODEL = "bert-base-uncased"
"""What four dimensions take from the Hugging Face cache beside their own files."""

Average = Literal["video", "frame", "transition"]


@dataclass(frozen=True)
class WeightFile:
    """A file that a dimension reads, below the folder of VBench's weights.

    Args:
        path: relative; with a trailing slash it is a folder.
        source: where it is published.
        sha256: its hash or the beginning of it, where that is published.
        member: its path inside `source`, where that is a zip archive.
    """

    path: str
    source: str
    sha256: str = ""
    member: str = ""


@dataclass(frozen=True)
class Dimension:
    """What there is to know of one dimension.

    Args:
        low, high: the scores that are normalised to 0 and 1.
        weight: in the mean of its group.
        files: weights that it reads.
        hub_model: it needs `HUB_MODEL` too.
        packages: modules that no requirement of VBench brings.
        average: what the dimension's score is the mean over: videos, their frames, or pairs of neighbouring frames.
        scale: from a video's score to the dimension's.
        custom: whether VBench scores videos of other prompts by it.
        mp4_only: it reads no other kind of file.
    """

    name: str
    group: Literal["quality", "semantic"]
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    files: tuple[WeightFile, ...] = ()
    hub_model: bool = False
    packages: tuple[str, ...] = ()
    average: Average = "video"
    scale: float = 1.0
    custom: bool = True
    mp4_only: bool = False

    def normalise(self, score: float) -> float:
        """`score` on the scale of the leaderboard, where `low` is 0 and `high` is 1."""
        return (score - self.low) / (self.high - self.low)


_CLIP = "https://openaipublic.azureedge.net/clip/models"
_VIT_B_SHA = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_VIT_L_SHA = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
_HUB = "https://huggingface.co/OpenGVLab/VBench_Used_Models/resolve/main"

_VIT_B = WeightFile("clip_model/ViT-B-32.pt", f"{_CLIP}/{_VIT_B_SHA}/ViT-B-32.pt", _VIT_B_SHA)
_VIT_L = WeightFile("clip_model/ViT-L-14.pt", f"{_CLIP}/{_VIT_L_SHA}/ViT-L-14.pt", _VIT_L_SHA)
_AESTHETIC = WeightFile(
    "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
    "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth",
)
_AMT = WeightFile("amt_model/amt-s.pth", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth")
_RAFT = WeightFile(
    "raft_model/models/raft-things.pth",
    "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
    member="models/raft-things.pth",
)
_MUSIQ = WeightFile(
    "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
    "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
    "358bb6af",
)
_DINO_CODE = WeightFile(
    "dino_model/facebookresearch_dino_main/",
    "https://github.com/facebookresearch/dino/archive/refs/heads/main.zip",
    member="dino-main/",
)
_DINO = WeightFile(
    "dino_model/dino_vitbase16_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
)
_VICLIP = WeightFile("ViCLIP/ViClip-InternVid-10M-FLT.pth", f"{_HUB}/ViClip-InternVid-10M-FLT.pth")
_BPE = WeightFile(
    "ViCLIP/bpe_simple_vocab_16e6.txt.gz",
    "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
)
_UMT = WeightFile(
    "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth", f"{_HUB}/l16_ptk710_ftk710_ftk400_f16_res224.pth"
)
_GRIT = WeightFile(
    "grit_model/grit_b_densecap_objectdet.pth",
    "https://datarelease.blob.core.windows.net/grit/models/grit_b_densecap_objectdet.pth",
)
_TAG2TEXT = WeightFile(
    "caption_model/tag2text_swin_14m.pth",
    "https://huggingface.co/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth",
)


def _detection(name: str, average: Average = "video") -> Dimension:
    return Dimension(
        name,
        "semantic",
        files=(_GRIT,),
        hub_model=True,
        packages=("detectron2",),
        custom=False,
        average=average,
    )


_ALL = (
    Dimension("subject_consistency", "quality", 0.1462, files=(_DINO_CODE, _DINO), average="transition"),
    Dimension("background_consistency", "quality", 0.2615, files=(_VIT_B,), average="transition"),
    Dimension("temporal_flickering", "quality", 0.6293),
    Dimension("motion_smoothness", "quality", 0.706, 0.9975, files=(_AMT,), mp4_only=True),
    Dimension("dynamic_degree", "quality", weight=0.5, files=(_RAFT,), mp4_only=True),
    Dimension("aesthetic_quality", "quality", files=(_VIT_L, _AESTHETIC)),
    # A video's score is from 0 to 100, the dimension's from 0 to 1.
    Dimension("imaging_quality", "quality", files=(_MUSIQ,), scale=0.01),
    _detection("object_class", average="frame"),
    _detection("multiple_objects", average="frame"),
    Dimension("human_action", "semantic", files=(_UMT,)),
    _detection("color"),
    _detection("spatial_relationship", average="frame"),
    Dimension("scene", "semantic", 0.0, 0.8222, files=(_TAG2TEXT,), hub_model=True, average="frame", custom=False),
    Dimension("appearance_style", "semantic", 0.0009, 0.2855, files=(_VIT_B,), average="frame", custom=False),
    Dimension("temporal_style", "semantic", 0.0, 0.364, files=(_VICLIP, _BPE)),
    Dimension("overall_consistency", "semantic", 0.0, 0.364, files=(_VICLIP, _BPE)),
)

DIMENSIONS: dict[str, Dimension] = {dimension.name: dimension for dimension in _ALL}
"""The dimensions by name, in the order of the leaderboard."""

FILTER = Dimension("static_filter", "quality", files=(_RAFT,), mp4_only=True)
"""Not a score: picks the still videos that `temporal_flickering` is measured on."""


def find_dimensions(names: Sequence[str] | None, *, custom: bool = False) -> tuple[Dimension, ...]:
    """The dimensions called `names`, or all there are for official (or `custom`) videos.

    Raises:
        ValueError: no such dimension, or one that needs the official prompts.
    """
    if not names:
        return tuple(dimension for dimension in _ALL if dimension.custom or not custom)
    unknown = [name for name in names if name not in DIMENSIONS]
    if unknown:
        raise ValueError(f"no such VBench dimension: {', '.join(unknown)}; there are {', '.join(DIMENSIONS)}")
    chosen = tuple(DIMENSIONS[name] for name in dict.fromkeys(names))
    refused = [dimension.name for dimension in chosen if custom and not dimension.custom]
    if refused:
        raise ValueError(f"{', '.join(refused)}: needs VBench's own prompts; VBench does not score other videos by it")
    return chosen
