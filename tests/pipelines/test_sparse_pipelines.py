"""`SparseWanPipeline`: load, save, reload, share components, and stay open to plain diffusers."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline

from dit_sparse import (
    AdaSpa,
    Neighborhood,
    Schedule,
    SparseCogVideoXPipeline,
    SparseFluxPipeline,
    SparseHunyuanVideoPipeline,
    SparseWanPipeline,
    sparsify,
    statistics,
    unsparsify,
)
from dit_sparse.pipelines import session_of
from tests.pipelines.families import FAMILIES

SCHEDULE = Schedule(AdaSpa(density=0.5, block=16), warmup=0.4, dense_layers=(1,))


@pytest.fixture
def small(render):
    """The tiny folder's VAE is an 8x one."""
    return lambda pipe: render(pipe, height=64, width=64, num_frames=9, steps=4)


def test_load_save_reload(tiny_folder, tmp_path, small) -> None:
    pipe = SparseWanPipeline.from_pretrained(tiny_folder, sparse=SCHEDULE)
    pipe.set_progress_bar_config(disable=True)
    want = small(pipe)
    assert statistics(pipe).sparse_density < 1
    pipe.save_pretrained(tmp_path / "saved")
    again = SparseWanPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert session_of(again).schedule == SCHEDULE
    assert torch.equal(small(again), want)


def test_a_saved_folder_opens_with_plain_diffusers(tiny_folder, tmp_path, small) -> None:
    pipe = SparseWanPipeline.from_pretrained(tiny_folder, sparse=SCHEDULE)
    pipe.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    plain = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    plain.set_progress_bar_config(disable=True)
    assert type(plain) is WanPipeline
    assert torch.equal(small(plain), small(unsparsify(pipe)))


def test_the_default_method_is_adaspa(tiny_folder) -> None:
    assert session_of(SparseWanPipeline.from_pretrained(tiny_folder)).schedule == Schedule(AdaSpa())


def test_from_pipe_shares_the_transformer(tiny_folder, small) -> None:
    dense = WanPipeline.from_pretrained(tiny_folder)
    dense.set_progress_bar_config(disable=True)
    want = small(dense)
    pipe = SparseWanPipeline.from_pipe(dense, sparse=SCHEDULE)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer is dense.transformer
    sparse = small(pipe)
    assert not torch.equal(sparse, want)
    assert torch.equal(small(dense), sparse)
    assert session_of(SparseWanPipeline.from_pipe(pipe)).schedule == SCHEDULE
    assert torch.equal(small(unsparsify(pipe)), want)


def test_sparsify_again_replaces_the_method(pipe, render) -> None:
    sparsify(pipe, SCHEDULE)
    method = Neighborhood(window=(1, 5, 7), tile=(1, 4, 4))
    sparsify(pipe, method)
    render(pipe)
    assert session_of(pipe).schedule == Schedule(method)
    assert len(session_of(pipe).previous) == 1


@pytest.mark.parametrize("content", ["{", '{"method": "adaspaa"}', '{"method": "adaspa", "densty": 1}', "[]", "\x00"])
def test_a_damaged_sidecar_is_an_error(tiny_folder, tmp_path, content: str) -> None:
    SparseWanPipeline.from_pretrained(tiny_folder, sparse=SCHEDULE).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "sparse_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"sparse_config\.json|did you mean|must be an object"):
        SparseWanPipeline.from_pretrained(tmp_path / "saved")


def test_a_config_is_not_pushed_before_it_is_right(tiny_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="use save_pretrained"):
        SparseWanPipeline.from_pretrained(tiny_folder).save_config(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("family", "sparse_class"),
    [
        ("cogvideox", SparseCogVideoXPipeline),
        ("hunyuan_video", SparseHunyuanVideoPipeline),
        ("flux", SparseFluxPipeline),
    ],
)
def test_the_other_families_load_save_and_share_too(family: str, sparse_class, tmp_path) -> None:
    case = next(case for case in FAMILIES if case.name == family)
    case.make().save_pretrained(tmp_path / "dense")
    dense = DiffusionPipeline.from_pretrained(tmp_path / "dense")
    dense.set_progress_bar_config(disable=True)
    want = case.run(dense)
    pipe = sparse_class.from_pretrained(tmp_path / "dense", sparse=SCHEDULE)
    pipe.set_progress_bar_config(disable=True)
    sparse = case.run(pipe)
    assert not torch.equal(sparse, want)
    pipe.save_pretrained(tmp_path / "saved")
    again = sparse_class.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert session_of(again).schedule == SCHEDULE
    assert torch.equal(case.run(again), sparse)
    plain = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    plain.set_progress_bar_config(disable=True)
    assert type(plain) is type(dense)
    assert torch.equal(case.run(plain), want)
    shared = sparse_class.from_pipe(dense, sparse=SCHEDULE)
    shared.set_progress_bar_config(disable=True)
    assert shared.transformer is dense.transformer
    assert torch.equal(case.run(shared), sparse)
