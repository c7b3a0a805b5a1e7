import json
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dit_sparse.eval import CONVENTIONS, compare, find_convention, psnr, ssim


def _clips(noise=0.05, shape=(4, 40, 52, 3), seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[1], : shape[2]]
    smooth = 0.5 + 0.4 * np.sin(x / 7)[..., None] * np.cos(y / 5 + np.arange(3)[:, None, None]).transpose(1, 2, 0)
    a = np.clip(smooth + 0.1 * rng.standard_normal(shape), 0, 1)
    scale = noise * np.arange(1, shape[0] + 1).reshape(-1, 1, 1, 1)
    return a, np.clip(a + scale * rng.standard_normal(shape), 0, 1)


@pytest.mark.parametrize("noise", [0.001, 0.05, 0.3])
def test_agrees_with_scikit_image(noise):
    a, b = _clips(noise)
    expected_psnr = np.mean([peak_signal_noise_ratio(x, y, data_range=1) for x, y in zip(a, b, strict=True)])
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    expected_ssim = np.mean(
        [structural_similarity(x, y, channel_axis=-1, **options) for x, y in zip(a, b, strict=True)]
    )
    assert psnr(a, b) == pytest.approx(expected_psnr, abs=1e-4)
    assert psnr(a, b, over="clip") == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-4)
    assert ssim(a, b) == pytest.approx(expected_ssim, abs=1e-4)


def test_the_two_conventions_differ():
    a, b = _clips()
    assert psnr(a, b) > psnr(a, b, over="clip") + 0.1


def _literal_ssim(x, y, weights):
    """SSIM of one frame whose windows reach over its border, where zeros are."""

    def mean(image):
        rows = correlate1d(image, weights, axis=0, mode="constant")
        return correlate1d(rows, weights, axis=1, mode="constant")

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    return np.mean((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx * mx + my * my + 1e-4) * (vx + vy + 9e-4)))


@pytest.mark.parametrize("name", ["svg", "fastvideo"])
def test_ssim_of_other_projects(name):
    a, b = _clips()
    weights = np.full(11, 1 / 11) if name == "svg" else np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    weights = weights / weights.sum()
    want = np.mean([_literal_ssim(x, y, weights) for x, y in zip(a, b, strict=True)])
    result = compare(a, b, convention=find_convention(name))
    assert result.ssim == pytest.approx(want, abs=1e-9)
    assert abs(result.ssim - ssim(a, b)) > 1e-3
    assert "zero padding" in result.convention


def test_an_identical_frame_by_convention():
    a, b = _clips()
    b[0] = a[0]
    found = {name: compare(a, b, convention=convention) for name, convention in CONVENTIONS.items()}
    rest = psnr(a[1:], b[1:])
    assert found["skimage"].psnr == found["fastvideo"].psnr == pytest.approx((100 + 3 * rest) / 4)
    assert math.isinf(found["svg"].psnr)
    assert {(result.identical, result.identical_frames) for result in found.values()} == {(False, 1)}
    assert found["svg"].to_dict()["psnr"] is None


def test_json_says_identical():
    a, b = _clips()
    record = json.loads(json.dumps(compare(a, a).to_dict(), allow_nan=False))
    assert (record["psnr"], record["identical"], record["identical_frames"]) == (None, True, 4)
    assert compare(a, b).to_dict()["psnr"] == compare(a, b).psnr


def test_an_unknown_convention_is_refused():
    with pytest.raises(ValueError, match="convention must be one of skimage, svg, fastvideo, got 'vbench'"):
        find_convention("vbench")


def test_known_value():
    a = torch.full((2, 16, 16, 3), 0.5)
    assert psnr(a, a + 0.1) == pytest.approx(20, abs=1e-4)


def test_identical_clips():
    a, _ = _clips()
    result = compare(a, a.copy())
    assert result.identical
    assert math.isinf(result.psnr)
    assert result.ssim == pytest.approx(1)
    assert result.frames == 4


def test_one_identical_frame_is_capped():
    a, b = _clips()
    b[0] = a[0]
    rest = psnr(a[1:], b[1:])
    assert psnr(a, b) == pytest.approx((100 + 3 * rest) / 4)
    assert not compare(a, b).identical


def test_uint8_torch_and_numpy_agree():
    a, b = ((clip * 255).astype(np.uint8) for clip in _clips())
    expected = compare(a / 255, b / 255)
    assert compare(a, b).psnr == pytest.approx(expected.psnr)
    assert compare(torch.from_numpy(a), torch.from_numpy(b)).ssim == pytest.approx(expected.ssim)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 16, 16, 3)), np.zeros((2, 16, 16, 3)), "one shape"),
        (np.zeros((16, 16, 3)), np.zeros((16, 16, 3)), r"\[T, H, W, 3\]"),
        (np.zeros((0, 16, 16, 3)), np.zeros((0, 16, 16, 3)), r"\[T, H, W, 3\]"),
        (np.full((1, 16, 16, 3), 2.0), np.zeros((1, 16, 16, 3)), r"\[0, 1\]"),
        (np.full((1, 16, 16, 3), np.nan), np.zeros((1, 16, 16, 3)), r"\[0, 1\]"),
        (np.zeros((1, 16, 16, 3), np.int64), np.zeros((1, 16, 16, 3), np.int64), "uint8 or float"),
    ],
)
def test_refuses_what_is_no_pair_of_clips(a, b, message):
    with pytest.raises(ValueError, match=message):
        compare(a, b)


def test_ssim_needs_room_for_its_window():
    with pytest.raises(ValueError, match="11x11"):
        ssim(np.zeros((1, 10, 16, 3)), np.zeros((1, 10, 16, 3)))
    with pytest.raises(ValueError, match="over"):
        psnr(np.zeros((1, 16, 16, 3)), np.zeros((1, 16, 16, 3)), over="pixels")
