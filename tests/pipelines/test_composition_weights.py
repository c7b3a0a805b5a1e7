"""What moves or changes weights beside sparse attention: offload, LoRA, fused projections, int8, the VAE's tiles."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

from dit_sparse import sparsify, statistics, unsparsify
from tests.pipelines.composed import ALL_DENSE, EVERY_BLOCK, HALF, composed, half_run, is_close
from tests.pipelines.families import Family

CPU = torch.device("cpu")

both_ways = pytest.mark.parametrize("compose_first", [True, False], ids=["other_first", "sparse_first"])


def check_composes(family: Family, compose: Callable[[Any], None], compose_first: bool) -> Any:
    """The sparse pipeline equals the plain one that `compose` was called on, in a second run too; returned sparse."""
    want = family.run(composed(family, compose, None))
    pipe = composed(family, compose, ALL_DENSE, compose_first=compose_first)
    assert torch.equal(family.run(pipe), want)
    pipe = composed(family, compose, EVERY_BLOCK, compose_first=compose_first)
    assert all(is_close(family.run(pipe), want) for _ in range(2))
    pipe = composed(family, compose, HALF, compose_first=compose_first)
    assert not is_close(family.run(pipe), want), "sparsity changed nothing"
    assert set(statistics(pipe).dense_calls) == {"warm-up"}
    assert {record.step for record in statistics(pipe).records} == {0, 1, 2, 3}
    return pipe


@both_ways
def test_model_offload(family, compose_first: bool) -> None:
    """After every run diffusers takes its hooks off and puts them on again."""
    pipe = check_composes(family, lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), compose_first)
    assert torch.equal(family.run(unsparsify(pipe)), family.dense())
    assert hasattr(pipe.transformer, "_hf_hook"), "unsparsify took the offload off"


@both_ways
def test_layers_offloaded_one_by_one(family, compose_first: bool) -> None:
    """What `enable_sequential_cpu_offload` does to the transformer."""
    pipe = check_composes(family, lambda pipe: accelerate.cpu_offload(pipe.transformer, CPU), compose_first)
    assert torch.equal(family.run(unsparsify(pipe)), family.dense())


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@both_ways
def test_group_offload(family, compose_first: bool, level: str) -> None:
    def offload(pipe: Any) -> None:
        pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=level, num_blocks_per_group=1)

    pipe = check_composes(family, offload, compose_first)
    assert torch.equal(family.run(unsparsify(pipe)), family.dense())


@both_ways
def test_layerwise_casting(family, compose_first: bool) -> None:
    """Weights rest in float8 and are cast by hooks around each layer."""

    def cast(pipe: Any) -> None:
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    assert not torch.equal(family.run(composed(family, cast, None)), family.dense())
    check_composes(family, cast, compose_first)


@both_ways
def test_fused_projections(family, compose_first: bool) -> None:
    def fuse(pipe: Any) -> None:
        pipe.transformer.fuse_qkv_projections()

    pipe = check_composes(family, fuse, compose_first)
    unsparsify(pipe).transformer.unfuse_qkv_projections()
    assert torch.equal(family.run(pipe), family.dense())


@both_ways
def test_vae_tiling_and_slicing(family, compose_first: bool) -> None:
    def tile(pipe: Any) -> None:
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()

    def decoded(pipe: Any) -> Tensor:
        return torch.as_tensor(family.run(pipe, ["a red ball"] * 2, output_type="np"))

    want = decoded(composed(family, tile, None))
    pipe = composed(family, tile, ALL_DENSE, compose_first=compose_first)
    assert torch.equal(decoded(pipe), want)
    family.run(sparsify(pipe, HALF))
    assert set(statistics(pipe).dense_calls) == {"warm-up"}


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Path]:
    peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install peft")
    folders: dict[str, Path] = {}

    def folder(family: Family) -> Path:
        """LoRA weights of rank 2 for all attention projections of a family, saved once."""
        if family.name not in folders:
            pipe = family.make()
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
                pipe.transformer.add_adapter(config)
            weights = peft.get_peft_model_state_dict(pipe.transformer)
            folders[family.name] = tmp_path_factory.mktemp(family.name)
            type(pipe).save_lora_weights(folders[family.name], transformer_lora_layers=weights)
        return folders[family.name]

    return folder


@pytest.mark.parametrize("fuse", [False, True], ids=["loaded", "fused"])
@both_ways
def test_lora(family, lora_folder, compose_first: bool, fuse: bool) -> None:
    def load(pipe: Any) -> None:
        pipe.load_lora_weights(lora_folder(family))
        if fuse:
            pipe.fuse_lora(components=["transformer"])

    assert not is_close(family.run(composed(family, load, None)), family.dense()), "LoRA changed nothing"
    pipe = check_composes(family, load, compose_first)
    if fuse:
        pipe.unfuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    equal = is_close if fuse else torch.equal
    assert equal(family.run(pipe), half_run(family))
    assert equal(family.run(unsparsify(pipe)), family.dense())


@both_ways
def test_int8_weights(family, compose_first: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="int8 weights need torchao: pip install torchao")

    def quantize(pipe: Any) -> None:
        quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())

    assert not torch.equal(family.run(composed(family, quantize, None)), family.dense())
    check_composes(family, quantize, compose_first)


def test_two_pipelines_of_one_text_encoder_and_vae(family) -> None:
    """Components that no attention of ours runs in are anybody's."""
    pipe = sparsify(family.make(), HALF)
    want = family.run(pipe)
    other = type(pipe)(**{**pipe.components, "transformer": family.make().transformer})
    other.scheduler = copy.deepcopy(pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(family.run(other), family.dense())
    assert torch.equal(family.run(pipe), want)
