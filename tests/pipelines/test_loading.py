"""Every way in which a model cannot be loaded is one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dit_sparse import AdaSpa, LeastError, Schedule
from dit_sparse.pipelines import ModelError, load_pipeline
from dit_sparse.pipelines.context_parallel import check_unloaded
from dit_sparse.pipelines.loading import unloaded_transformers


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_a_good_folder_loads(folder: Path) -> None:
    pipe = load_pipeline(folder, dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32


def _refused(folder: Path | str, *parts: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_pipeline(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert Path(folder).name in message
    for part in parts:
        assert part in message


def test_no_such_folder(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "existing folder or a hub id")


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    _refused(tmp_path / "weights.bin", "got the file")


def test_no_diffusers_model(tmp_path: Path) -> None:
    _refused(tmp_path, "model_index.json")


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\udce4"])
def test_a_damaged_index(folder: Path, content: str) -> None:
    (folder / "model_index.json").write_text(content, "utf-8", errors="surrogateescape")
    _refused(folder, "model_index.json")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "missing"])
def test_damaged_weights(folder: Path, part: str, damage: str) -> None:
    weights = next((folder / part).glob("*.safetensors"))
    if damage == "missing":
        weights.unlink()
    else:
        content = weights.read_bytes()
        weights.write_bytes(content[: len(content) // 2] if damage == "cut" else b"\xff" * 100)
    _refused(folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "scheduler", "text_encoder"])
def test_a_damaged_config(folder: Path, part: str) -> None:
    config = next(p for p in (folder / part).glob("*.json") if "config" in p.name)
    config.write_text("{ not json")
    _refused(folder)


def test_a_config_that_is_no_object(folder: Path) -> None:
    (folder / "transformer" / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"transformer/config.json that is no JSON object: \[\]"):
        load_pipeline(folder)


def test_a_config_with_more_layers_than_the_weights(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_layers": config["num_layers"] + 1}))
    with pytest.raises(ModelError, match="do not fill the model"):
        load_pipeline(folder)


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "ffn_dim": 48}))
    _refused(folder)


def test_a_family_that_is_not_supported(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    _refused(tmp_path / "ddpm", "DDPMPipeline", "Wan (WanTransformer3DModel)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "device must be a torch device"),
        ({"offload": "disk"}, "offload must be one of none, model, group"),
        ({"offload": "model"}, "needs a GPU"),
        pytest.param(
            {"device": "cuda"},
            "needs an NVIDIA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
)
def test_bad_placements(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pipeline(folder, **options)


def test_ranks_are_checked_by_the_config_alone(folder: Path) -> None:
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    heads = json.loads((folder / "transformer/config.json").read_text())["num_attention_heads"]
    check_unloaded(folder, Schedule(LeastError()), ulysses=heads)
    with pytest.raises(ValueError, match=f"ulysses must be at most the model's {heads} heads, got {heads + 1}"):
        check_unloaded(folder, Schedule(LeastError()), ulysses=heads + 1)
    with pytest.raises(ValueError, match="remainder must be 'none' in a ring"):
        check_unloaded(folder, Schedule(LeastError()), ring=2)
    with pytest.raises(ValueError, match=f"at most the model's {heads} heads for adaspa, got {2 * heads} ranks"):
        check_unloaded(folder, Schedule(AdaSpa()), ulysses=heads, ring=2)


def test_the_config_of_a_hub_id_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HunyuanVideo's checkpoints are older than a parameter that is looked at, so its default counts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert unloaded_transformers("some/model") == []
    repository = tmp_path / "models--some--model"
    (repository / "snapshots/0/transformer").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0")
    config = {"_class_name": "HunyuanVideoTransformer3DModel", "num_attention_heads": 5}
    (repository / "snapshots/0/transformer/config.json").write_text(json.dumps(config))
    check_unloaded("some/model", Schedule(AdaSpa()), ulysses=5)
    with pytest.raises(ValueError, match="at most the model's 5 heads, got 6"):
        check_unloaded("some/model", Schedule(AdaSpa()), ulysses=6)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"_class_name": "UNet2DModel"}', "\udce4", None])
def test_what_cannot_be_read_is_left_to_the_loading(folder: Path, content: str | None) -> None:
    (folder / "transformer/config.json").unlink()
    if content is not None:
        (folder / "transformer/config.json").write_text(content, "utf-8", errors="surrogateescape")
    assert unloaded_transformers(folder) == []


@pytest.mark.parametrize("name", ["wan2.1-14b", "a/b/c", "a/b c", "", "nowhere/../x"])
def test_what_is_no_hub_id_has_no_transformers_here(name: str) -> None:
    assert unloaded_transformers(name) == []
