"""A VAE's convolutions by oneDNN: as torch's own, only where they can be, and taken off again."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch.nn import Conv3d

from dit_sparse import AdaSpa, Schedule, sparsify, unsparsify
from dit_sparse.pipelines.conv3d import OneDnn


@pytest.fixture
def calls(monkeypatch) -> list[torch.Tensor]:
    """Inputs of oneDNN's convolutions."""
    seen, convolve = [], torch.mkldnn_convolution

    def spy(x: torch.Tensor, *arguments) -> torch.Tensor:
        seen.append(x)
        return convolve(x, *arguments)

    monkeypatch.setattr(torch, "mkldnn_convolution", spy)
    return seen


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1}, {"stride": (1, 2, 2)}, {"dilation": 2}, {"groups": 2}, {"bias": False, "padding": (0, 1, 2)}],
    ids=str,
)
@torch.no_grad()
def test_it_computes_what_torch_does(options, calls) -> None:
    conv, x = Conv3d(4, 6, (3, 3, 3), **options), torch.randn(1, 4, 6, 9, 11)
    exact = copy.deepcopy(conv).double()(x.double())
    torchs = (conv(x) - exact).abs().max()
    OneDnn(lambda: True).install(conv)
    assert (conv(x) - exact).abs().max() <= 2 * torchs + 1e-6
    assert len(calls) == 1


@pytest.mark.parametrize(
    "case", ["double", "reflect", "same", "one token", "gradient", "switched off", "autocast", "own"]
)
def test_the_rest_stays_torchs(case, calls) -> None:
    options = {"reflect": {"padding": 1, "padding_mode": "reflect"}, "same": {"padding": "same"}}
    conv = Conv3d(4, 6, 1 if case == "one token" else 3, **options.get(case, {}))
    conv, x = conv.to(torch.float64 if case == "double" else torch.float32), torch.randn(1, 4, 6, 9, 11)
    x = x.to(conv.weight.dtype)
    off = torch.backends.mkldnn.flags(enabled=False, allow_tf32=False) if case == "switched off" else nullcontext()
    if case == "own":  # as who wants seamless tiles changes it
        conv._conv_forward = lambda x, weight, bias: torch.nn.functional.conv3d(x + 1, weight, bias)
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast")
    with torch.set_grad_enabled(case == "gradient"), off, mixed:
        want = conv(x)
        OneDnn(lambda: True).install(conv)
        assert torch.equal(conv(x), want)
    assert not calls


def test_a_sparse_run_is_decoded_so_and_a_dense_one_is_not(pipe, render, calls) -> None:
    latents = torch.randn(1, 8, 3, 4, 6)
    with torch.no_grad():
        want = pipe.vae.decode(latents).sample
        render(sparsify(pipe, Schedule(AdaSpa(block=16), warmup=1)))
        assert torch.equal(pipe.vae.decode(latents).sample, want)
        assert not calls
        render(sparsify(pipe, AdaSpa(block=16)))
        got = pipe.vae.decode(latents).sample
        assert calls
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()
        calls.clear()
        pipe.vae.encode(torch.zeros(1, 3, 5, 16, 16))
        unsparsify(pipe)
        assert torch.equal(pipe.vae.decode(latents).sample, want)
        assert not calls


def test_a_copy_follows_its_own_pipeline(pipe, render, calls) -> None:
    render(sparsify(pipe, AdaSpa(block=16)))
    twin, latents = copy.deepcopy(pipe), torch.randn(1, 8, 3, 4, 6)
    with torch.no_grad():
        twin.vae.decode(latents)
        assert not calls, "it has not run yet"
        for parameter in twin.vae.decoder.conv_out.parameters():
            parameter.zero_()
        render(twin)
        assert not twin.vae.decode(latents).sample.any()
        assert calls
        assert pipe.vae.decode(latents).sample.any()


def test_only_what_was_changed_is_changed_back(pipe, render, calls) -> None:
    """However the pipelines share parts: the decoder that was given is the one that is restored."""
    latents, vae = torch.randn(1, 8, 3, 4, 6), pipe.vae
    render(sparsify(pipe, AdaSpa(block=16)))
    assert pickle.loads(pickle.dumps(vae.decoder)) is not None
    pipe.vae = copy.deepcopy(vae)
    unsparsify(pipe)
    with torch.no_grad():
        vae.decode(latents)
    assert not calls
    assert not vae.decoder._forward_pre_hooks
    assert not vae.decoder._forward_hooks
    assert not any("_conv_forward" in module.__dict__ for module in vae.modules())


def test_a_copy_is_restored_by_itself(pipe, render, calls) -> None:
    twin, latents = copy.deepcopy(sparsify(pipe, AdaSpa(block=16))), torch.randn(1, 8, 3, 4, 6)
    unsparsify(twin)
    assert not twin.vae.decoder._forward_pre_hooks
    render(pipe)
    with torch.no_grad():
        twin.vae.decode(latents)
        assert not calls
        pipe.vae.decode(latents)
        assert calls
