"""A trace says what the statistics say, of every step, layer and head, and shows the masks that were used."""

from __future__ import annotations

import base64
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dit_sparse import AdaSpa, Neighborhood, Schedule, sparsify, statistics
from dit_sparse.pipelines import record_trace, session_of
from dit_sparse.pipelines.trace import PICTURE_SIZE


def _heads(mask: dict) -> np.ndarray:
    """`[H, R, C]` levels from 0 to 15."""
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask["png"]))))
    return picture.reshape(-1, *mask["size"]) // 17


def _density(track: dict, step: int) -> list:
    return [entry["heads"] for entry in track["density"] if entry["step"] <= step][-1]


def test_every_step_layer_and_head(pipe, render) -> None:
    sparsify(pipe, Schedule(AdaSpa(density=0.3, block=64), warmup=0.2, dense_layers=(1,), refresh=(0.8,)))
    with record_trace(pipe) as trace:
        render(pipe, steps=5)
        records = statistics(pipe).records
    found = json.loads(json.dumps(trace.to_dict(), allow_nan=False))

    cond, uncond = found["tracks"]
    assert (cond["branch"], uncond["branch"]) == ("cond", "uncond")
    words = [[cond["actions"][number] for number in row] for row in cond["layers"]]
    assert words == [["warm-up", "layer"], ["plan", "layer"], *[["reuse", "layer"]] * 2, ["plan", "layer"]]
    sparse = [r for r in records if r.density is not None]
    assert {(r.step, r.layer) for r in sparse} == {(step, 0) for step in range(1, 5)}
    for record in sparse:
        track = cond if record.branch == "cond" else uncond
        assert _density(track, record.step)[0] == pytest.approx(record.density.mean(0).tolist(), abs=1e-4)
        assert _density(track, record.step)[1] is None
    assert _density(cond, 0) == [None, None]

    steps = found["steps"]
    assert [step["step"] for step in steps] == list(range(5))
    assert all(s["seconds"] >= s["attention_seconds"] + s["plan_seconds"] > 0 for s in steps)
    assert [step["plan_seconds"] > 0 for step in steps] == [False, True, False, False, True]
    assert sum(s["attention_seconds"] for s in steps) == pytest.approx(statistics(pipe).attention_seconds)
    assert sum(s["density"] for s in steps) / 5 == pytest.approx(statistics(pipe).density)


def test_the_pictures_are_of_the_masks(pipe, render) -> None:
    sparsify(pipe, Schedule(AdaSpa(density=0.3, block=4), warmup=0.0))
    with record_trace(pipe) as trace:
        render(pipe, steps=2)
    masks = trace.to_dict()["masks"]
    plans = {key[2]: previous for key, previous in session_of(pipe).previous.items() if key[3] == "cond"}
    assert {(mask["layer"], mask["branch"]) for mask in masks} == {(0, "cond"), (1, "cond")}
    for mask in masks:
        previous = plans[mask["layer"]]
        kept = previous.plan.unpack().block_mask.kept_blocks[0]
        assert mask["blocks"] == list(kept.shape[1:])
        assert max(mask["blocks"]) > PICTURE_SIZE >= max(mask["size"])
        if mask["step"] != previous.step:
            continue
        levels = _heads(mask)
        assert len(levels) == 2
        for head, picture in zip(kept, levels, strict=True):
            # Windows as adaptive pooling has them: cells share blocks where sizes do not divide.
            rows, blocks = PICTURE_SIZE, head.shape[0]
            bounds = [(i * blocks // rows, -(-(i + 1) * blocks // rows)) for i in range(rows)]
            want = [[math.ceil(head[a:b, c:d].double().mean() * 15 - 1e-4) for c, d in bounds] for a, b in bounds]
            assert np.array_equal(picture, np.array(want))


def test_a_mask_of_the_grid_is_shown_whenever_it_was_made(pipe, render) -> None:
    sparsify(pipe, Schedule(Neighborhood(window=(3, 4, 4)), warmup=0.5))
    render(pipe, steps=2)
    with record_trace(pipe) as trace:
        render(pipe, steps=2)
    found = trace.to_dict()
    (mask,) = found["masks"]
    assert (mask["layer"], mask["model"], mask["branch"]) == (None, None, None)
    assert 0 < _heads(mask).mean() < 15
    assert [found["tracks"][0]["actions"][row[0]] for row in found["tracks"][0]["layers"]] == ["warm-up", "reuse"]


def test_only_a_few_steps_are_drawn(pipe, render) -> None:
    every = tuple(range(1, 8))
    sparsify(pipe, Schedule(AdaSpa(density=0.3, block=64), warmup=0.0, refresh=every))
    with record_trace(pipe) as trace:
        render(pipe, steps=8)
    assert sorted({mask["step"] for mask in trace.to_dict()["masks"]}) == [1, 2, 4, 6]


def test_recording_changes_nothing_and_ends(pipe, render) -> None:
    sparsify(pipe, Schedule(AdaSpa(density=0.3, block=64), warmup=0.0))
    before = render(pipe, steps=2)
    with record_trace(pipe) as trace:
        assert torch.equal(render(pipe, steps=2), before)
    assert session_of(pipe).on_plan is None
    inside = trace.to_dict()["steps"]
    assert len(inside) == 2
    assert all(step["seconds"] > 0 for step in inside)


def test_a_dense_pipeline_has_no_trace(pipe) -> None:
    with pytest.raises(ValueError, match="must be sparsified"), record_trace(pipe):
        pass
