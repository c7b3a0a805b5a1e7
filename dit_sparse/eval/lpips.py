"""LPIPS in torch alone, from weights that have to be on the disk: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["check_weights", "lpips"]

Network = Literal["alex", "vgg"]


class _Conv(NamedTuple):
    """A convolution and the ReLU after it: its place in torchvision's `features`, its stride and its padding."""

    place: int
    stride: int = 1
    padding: int = 1


# After a "tap" activations are compared; "pool" is max-pooling.
_Layer = _Conv | Literal["tap", "pool"]
_ALEX: tuple[_Layer, ...] = (
    *(_Conv(0, 4, 2), "tap", "pool", _Conv(3, 1, 2), "tap", "pool"),
    *(_Conv(6), "tap", _Conv(8), "tap", _Conv(10), "tap"),
)
_VGG: tuple[_Layer, ...] = (
    *(_Conv(0), _Conv(2), "tap", "pool", _Conv(5), _Conv(7), "tap", "pool"),
    *(_Conv(10), _Conv(12), _Conv(14), "tap", "pool"),
    *(_Conv(17), _Conv(19), _Conv(21), "tap", "pool"),
    *(_Conv(24), _Conv(26), _Conv(28), "tap"),
)
_LAYERS = {"alex": _ALEX, "vgg": _VGG}
_POOL = {"alex": (3, 2), "vgg": (2, 2)}
_BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_LEAST_SIDE = {"alex": 63, "vgg": 16}


def lpips(a: Tensor | np.ndarray, b: Tensor | np.ndarray, *, network: Network = "alex", rescaled: bool = True) -> float:
    """Learned perceptual distance of the clips `a` and `b`, `[T, H, W, 3]` uint8 or float in [0, 1], mean over frames.

    Args:
        network: "alex" or "vgg".
        rescaled: bring colours to [-1, 1], as the metric was trained; Sparse VideoGen's figures leave them in [0, 1].

    Raises:
        ValueError: shapes that differ or are no clips, values outside [0, 1], or frames too small for the network.
        FileNotFoundError: a file of weights is missing; the message names it.

    Source: Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (arXiv 1801.03924),
    version 0.1 of its weights.
    """
    from dit_sparse.eval.fidelity import frame_pairs

    if min(a.shape[1:3], default=0) < _LEAST_SIDE[network]:
        raise ValueError(
            f"frames must be at least {_LEAST_SIDE[network]} pixels wide and high for LPIPS, got {list(a.shape)}"
        )
    device = a.device if isinstance(a, Tensor) else torch.device("cpu")
    weights = _weights(network, device)
    distances = []
    with torch.no_grad():
        for x, y in frame_pairs(a, b):
            both = torch.stack([x, y]).float().permute(0, 3, 1, 2)
            distances.append(_distance(both * 2 - 1 if rescaled else both, network, weights))
    return sum(distances) / len(distances)


def check_weights(network: Network) -> None:
    """Raise FileNotFoundError where a file of weights of `network` is missing."""
    _files(network)


def _distance(images: Tensor, network: Network, weights: Mapping[str, Tensor]) -> float:
    """Distance of the two `images` `[2, 3, H, W]`."""
    shift, scale = (images.new_tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
    x, total, tap = (images - shift) / scale, 0.0, 0
    for layer in _LAYERS[network]:
        if layer == "pool":
            x = F.max_pool2d(x, *_POOL[network])
        elif layer == "tap":
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            difference = (unit[:1] - unit[1:]).square()
            total += F.conv2d(difference, weights[f"lin{tap}.model.1.weight"]).mean().item()
            tap += 1
        elif isinstance(layer, _Conv):
            kernel, bias = (weights[f"features.{layer.place}.{part}"] for part in ("weight", "bias"))
            x = F.conv2d(x, kernel, bias, layer.stride, layer.padding).relu()
    return total


@lru_cache(maxsize=2)
def _weights(network: Network, device: torch.device) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in _files(network):
        try:
            found |= torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # noqa: BLE001  # torch.load fails in many ways
            raise ValueError(f"{path} cannot be read as weights of LPIPS: {error}; download it anew") from None
    return found


def _files(network: Network) -> tuple[Path, Path]:
    """Weights of the backbone and of the metric's own layers."""
    name = _BACKBONES[network]
    home = os.environ.get("TORCH_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch")
    backbone = Path(home).expanduser() / "hub" / "checkpoints" / name
    if not backbone.is_file():
        raise FileNotFoundError(
            f"LPIPS needs {backbone}: download https://download.pytorch.org/models/{name} to it, or set TORCH_HOME"
        )
    package = importlib.util.find_spec("torchmetrics")
    if package is None or package.origin is None:
        raise FileNotFoundError(
            "LPIPS needs its own weights, which torchmetrics holds: pip install 'dit-sparse[lpips]'"
        )
    own = Path(package.origin).parent / "functional" / "image" / "lpips_models" / f"{network}.pth"
    if not own.is_file():
        raise FileNotFoundError(f"LPIPS needs {own}, which the installed torchmetrics lacks: install another release")
    return backbone, own
