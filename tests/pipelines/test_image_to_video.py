"""Image-to-video pipelines of Wan, CogVideoX and HunyuanVideo run sparse, in Wan 2.1's, 2.2's and TI2V's form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    HunyuanVideoImageToVideoPipeline,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from torch import Tensor

from dit_sparse import (
    AdaSpa,
    LeastError,
    Schedule,
    SparseCogVideoXImageToVideoPipeline,
    SparseHunyuanVideoImageToVideoPipeline,
    SparseWanImageToVideoPipeline,
    TokenGrid,
    sparsify,
    statistics,
    unsparsify,
)
from dit_sparse.course import step_densities
from dit_sparse.pipelines import session_of
from tests.pipelines.families import METHODS
from tests.pipelines.tiny import TEXT_DIM, tiny_wan
from tests.pipelines.tiny_families import POOLED_DIM, tiny_cogvideox, tiny_hunyuan_video, widened

Make = Callable[[], Any]


def wan_transformer(channels: int, **options: Any) -> WanTransformer3DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return widened(
            WanTransformer3DModel(
                patch_size=options.pop("patch_size", (1, 1, 1)),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=channels,
                out_channels=8,
                text_dim=TEXT_DIM,
                freq_dim=32,
                ffn_dim=64,
                num_layers=2,
                **options,
            )
        )


def wan(**options: Any) -> WanImageToVideoPipeline:
    """Latents, a mask of 4 channels and the image's latents make 20 channels."""
    parts = dict(tiny_wan(fine=True).components)
    parts.update({"transformer": wan_transformer(20), "transformer_2": None, **options})
    return WanImageToVideoPipeline(**parts)


def wan_2_1() -> WanImageToVideoPipeline:
    return wan(transformer=wan_transformer(20, image_dim=16, added_kv_proj_dim=24))


def wan_2_2() -> WanImageToVideoPipeline:
    return wan(transformer_2=wan_transformer(20), boundary_ratio=0.7)


def wan_ti2v() -> WanImageToVideoPipeline:
    return wan(transformer=wan_transformer(8, patch_size=(1, 2, 2)), expand_timesteps=True)


def cogvideox() -> CogVideoXImageToVideoPipeline:
    dense = tiny_cogvideox()
    transformer = tiny_cogvideox(in_channels=8).transformer
    return CogVideoXImageToVideoPipeline(**{**dense.components, "transformer": transformer})


def hunyuan(kind: str, channels: int) -> HunyuanVideoImageToVideoPipeline:
    dense = tiny_hunyuan_video(image_condition_type=kind, in_channels=channels)
    return HunyuanVideoImageToVideoPipeline(**dense.components, image_processor=None)


def run(pipe: Any) -> Tensor:
    """Latents of 4 steps: 3x8x12 tokens."""
    small = isinstance(pipe, (WanImageToVideoPipeline, CogVideoXImageToVideoPipeline))
    height, width = (32, 48) if small else (64, 96)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"prompt": "a red ball", "max_sequence_length": 16}
    if isinstance(pipe, WanImageToVideoPipeline) and pipe.transformer.config.image_dim is not None:
        embeds = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))
        pipe.encode_image = lambda image, device: embeds  # in place of a CLIP
        options["max_sequence_length"] = 512  # so many text tokens are written into Wan's cross-attention
    if isinstance(pipe, HunyuanVideoImageToVideoPipeline):
        generator = torch.Generator().manual_seed(1)
        options = {
            "prompt_embeds": torch.randn(1, 12, TEXT_DIM, generator=generator),
            "pooled_prompt_embeds": torch.randn(1, POOLED_DIM, generator=generator),
            "prompt_attention_mask": torch.tensor([[1] * 9 + [0] * 3]),
        }
    return pipe(
        image=Image.new("RGB", (width, height), (200, 30, 60)),
        height=height,
        width=width,
        num_frames=9,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **options,
    ).frames


CASES: dict[str, tuple[Make, type, TokenGrid]] = {
    "wan 2.1": (wan_2_1, SparseWanImageToVideoPipeline, TokenGrid(3, 8, 12)),
    "wan 2.2": (wan_2_2, SparseWanImageToVideoPipeline, TokenGrid(3, 8, 12)),
    "wan ti2v": (wan_ti2v, SparseWanImageToVideoPipeline, TokenGrid(3, 4, 6)),
    "cogvideox": (cogvideox, SparseCogVideoXImageToVideoPipeline, TokenGrid(3, 8, 12, 16, text_first=True)),
    "hunyuan concat": (
        lambda: hunyuan("latent_concat", 9),
        SparseHunyuanVideoImageToVideoPipeline,
        TokenGrid(3, 8, 12, 9),
    ),
    "hunyuan replace": (
        lambda: hunyuan("token_replace", 4),
        SparseHunyuanVideoImageToVideoPipeline,
        TokenGrid(3, 8, 12, 9),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_image_to_video_runs_sparse_and_goes_back(case: str) -> None:
    make, sparse_class, grid = CASES[case]
    pipe = make()
    want = run(pipe)
    assert torch.equal(run(sparsify(pipe, Schedule(AdaSpa(), dense_layers=(0, 1)))), want)
    got = run(sparsify(pipe, AdaSpa(density=0.5, block=8)))
    found = statistics(pipe)
    assert 0.3 < found.sparse_density < 0.75
    assert set(found.dense_calls) <= {"warm-up", "search"}
    assert {key[0] for key in session_of(pipe).previous} == {grid}
    assert not torch.equal(got, want)
    again = sparse_class.from_pipe(pipe)
    assert torch.equal(run(again), got)
    assert torch.equal(run(unsparsify(pipe)), want)


@pytest.mark.parametrize("case", CASES)
def test_our_own_method_runs_as_presets_have_it(case: str) -> None:
    """After dense steps, with the first layer dense, and with the remainder, which is closer to dense than without."""
    make, _, grid = CASES[case]
    schedule = Schedule(LeastError(density=0.3, tile=(1, 2, 4), rows=4), warmup=0.25, dense_layers=(0,))
    pipe = make()
    want = run(pipe)
    errors = {}
    for remainder in ("method", "none"):
        errors[remainder] = (run(sparsify(pipe, replace(schedule, remainder=remainder))) - want).norm()  # type: ignore[arg-type]
        found, plans = statistics(pipe), session_of(pipe).previous
        assert set(found.dense_calls) == {"warm-up", "layer"}
        assert {(key[0], key[2]) for key in plans} == {(grid, 1)}
        # Both guidance branches have one plan, of the batch that holds them both or of the first.
        assert len(plans) == len({record.model for record in found.records if record.step >= 1})
        # The density of a run without warm-up, less what the dense step would have had more.
        assert found.sparse_density == pytest.approx(step_densities(schedule, 4)[-1], abs=0.03)
    assert 0 < errors["method"] < errors["none"]


@pytest.mark.parametrize("case", CASES)
def test_a_fixed_order_gives_the_same_video_moved_once_or_at_every_call(case: str, monkeypatch) -> None:
    from dit_sparse.pipelines.families import adapter_for

    pipe = CASES[case][0]()
    got = run(sparsify(pipe, METHODS[0]))
    monkeypatch.setattr(type(adapter_for(pipe)), "takes_order", lambda *_: False)
    want = run(sparsify(pipe, METHODS[0]))
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_wan_2_2s_two_transformers_have_plans_of_their_own() -> None:
    pipe = wan_2_2()
    run(sparsify(pipe, Schedule(AdaSpa(density=0.5, block=8), warmup=0.25)))
    records = statistics(pipe).records
    assert {record.model for record in records} == {"transformer", "transformer_2"}
    assert sorted({record.step for record in records}) == [0, 1, 2, 3]
    assert {key[1] for key in session_of(pipe).previous} == {"transformer", "transformer_2"}
