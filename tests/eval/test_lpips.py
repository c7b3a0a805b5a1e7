"""LPIPS with random weights, against the network written out layer by layer in torch's own modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dit_sparse.eval import compare, find_convention
from dit_sparse.eval import lpips as module
from dit_sparse.eval.lpips import lpips

SIZES = {"alex": (64, 70), "vgg": (16, 20)}


def backbone(network: str) -> tuple[nn.Sequential, list[int]]:
    """The convolutions of AlexNet or VGG-16, and after which of its modules LPIPS looks."""
    if network == "alex":
        plan = [(3, 64, 11, 4, 2), "pool", (64, 192, 5, 1, 2), "pool", (192, 384, 3, 1, 1), (384, 256, 3, 1, 1)]
        plan += [(256, 256, 3, 1, 1)]
        pool, taps = nn.MaxPool2d(3, 2), [1, 4, 7, 9, 11]
    else:
        plan, before = [], 3
        for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            plan += ["pool"] if plan else []
            plan += [(before if place == 0 else width, width, 3, 1, 1) for place in range(count)]
            before = width
        pool, taps = nn.MaxPool2d(2, 2), [3, 8, 15, 22, 29]
    layers: list[nn.Module] = []
    for layer in plan:
        layers += [pool] if layer == "pool" else [nn.Conv2d(*layer), nn.ReLU()]
    return nn.Sequential(*layers), taps


@pytest.fixture(params=["alex", "vgg"])
def network(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, float, float]:
    """A network's name, and its distance of `clips` with and without rescaling; its random weights are on the disk."""
    torch.manual_seed(0)
    features, taps = backbone(request.param)
    for parameter in features.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    widths = [features[tap - 1].out_channels for tap in taps]
    heads = {f"lin{place}.model.1.weight": torch.rand(1, width, 1, 1) for place, width in enumerate(widths)}
    files = tmp_path / "backbone.pth", tmp_path / "heads.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, files[0])
    torch.save(heads, files[1])
    monkeypatch.setattr(module, "_files", lambda _: files)
    module._weights.cache_clear()

    def distance(scale: float, shift: float) -> float:
        total = 0.0
        for pair in zip(*clips(request.param), strict=True):
            seen = []
            for image in pair:
                x = torch.from_numpy(image).permute(2, 0, 1)[None].float() * scale + shift
                x = (x - torch.tensor([-0.03, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.45]).view(
                    3, 1, 1
                )
                seen.append([x := layer(x) for layer in features])
            for place, tap in enumerate(taps):
                a, b = (maps[tap][0] / maps[tap][0].norm(dim=0) for maps in seen)
                weighted = ((a - b).nan_to_num() ** 2 * heads[f"lin{place}.model.1.weight"][0]).sum(0)
                total += float(weighted.mean())
        return total / 2

    with torch.no_grad():
        return request.param, distance(2, -1), distance(1, 0)


def clips(network: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    a = rng.random((2, *SIZES[network], 3))
    return a, (a + 0.2 * rng.random(a.shape)).clip(0, 1)


def test_distance_is_that_of_the_network(network: tuple[str, float, float]) -> None:
    name, rescaled, plain = network
    a, b = clips(name)
    assert lpips(a, b, network=name) == pytest.approx(rescaled, rel=1e-4)
    assert lpips(a, b, network=name, rescaled=False) == pytest.approx(plain, rel=1e-4)
    assert lpips(a, a, network=name) == 0
    convention = find_convention("skimage" if name == "alex" else "svg")
    result = compare(a, b, convention=convention, lpips=True)
    assert result.lpips == pytest.approx(rescaled if name == "alex" else plain, rel=1e-4)
    assert ("AlexNet, colours in [-1,1]" if name == "alex" else "VGG-16, colours in [0,1]") in result.convention
    with pytest.raises(ValueError, match="pixels wide and high for LPIPS"):
        lpips(a[:, :12], b[:, :12], network=name)


def test_missing_and_damaged_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    module._weights.cache_clear()
    a, b = clips("alex")
    with pytest.raises(FileNotFoundError, match=r"needs .*/hub/checkpoints/alexnet-owt-7be5be79\.pth: download https"):
        lpips(a, b)
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth"):
        module.check_weights("vgg")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "alexnet-owt-7be5be79.pth").write_bytes(b"cut short")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'dit-sparse\[lpips\]'"):
        lpips(a, b)
    monkeypatch.setattr(module, "_files", lambda _: (folder / "alexnet-owt-7be5be79.pth",))
    with pytest.raises(ValueError, match="cannot be read as weights of LPIPS"):
        lpips(a, b)
