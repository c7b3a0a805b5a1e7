"""SVOO against profiles, cosines and turns written out token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse import Site, Svoo, TokenGrid
from dit_sparse.reorder import co_clusters, spread_tokens
from dit_sparse.types import AttentionPlan, Previous
from tests.methods.layouts import DEMO, GRIDS, check_text_and_rows, inputs, smooth_inputs
from tests.methods.test_svg2 import literal_mask


def assign(tokens: Tensor, centroids: Tensor, others: Tensor) -> list[int]:
    """Each token to the centroid whose products with `others` have the largest cosine with its own."""
    labels = []
    for token in tokens:
        own = others @ token
        cosines = [float(own @ (others @ c) / own.norm() / (others @ c).norm()) for c in centroids]
        labels.append(max(range(len(cosines)), key=lambda j, found=cosines: found[j]))
    return labels


def moved(tokens: Tensor, labels: list[int], centroids: Tensor) -> Tensor:
    own = [[t for t, label in enumerate(labels) if label == j] for j in range(len(centroids))]
    return torch.stack([tokens[group].mean(0) if group else centroids[j] for j, group in enumerate(own)])


def test_co_clusters_take_turns() -> None:
    q, k = (x.double() for x in inputs(TokenGrid(2, 5, 6))[:2])
    starts = spread_tokens(q, 4), spread_tokens(k, 9)
    got = co_clusters(q, k, *starts, 2)
    for b in range(2):
        for h in range(2):
            queries, keys, q_centroids, k_centroids = (x[b, h] for x in (q, k, *starts))
            for _ in range(2):
                k_labels = assign(keys, k_centroids, q_centroids)
                k_centroids = moved(keys, k_labels, k_centroids)
                q_labels = assign(queries, q_centroids, k_centroids)
                q_centroids = moved(queries, q_labels, q_centroids)
            assert got[0][b, h].tolist() == q_labels
            assert got[1][b, h].tolist() == k_labels


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pairs_are_chosen_as_in_svg2_above_the_layers_floor(grid: TokenGrid) -> None:
    q, k, v = inputs(grid)
    method = Svoo(top_p=0.4, q_tokens=9, k_tokens=5, floors=(0.01, 0.5))
    plans = [method.plan(q, k, v, Site(grid, layer, 2), None) for layer in (0, 1)]
    for plan, share in zip(plans, (0.01, 0.5), strict=True):
        least = max(1, int(share * round(grid.video_len / 5)))
        assert torch.equal(plan.token_mask(), literal_mask(plan, q, k, grid, 0.4, least))
        check_text_and_rows(plan, grid)
    assert not torch.equal(plans[0].token_mask(), plans[1].token_mask())


def test_clusters_are_kept_while_pairs_are_chosen_anew() -> None:
    grid = GRIDS[1]
    q, k, v = inputs(grid)
    later = [x.flip(1) for x in (q, k, v)]
    method = Svoo(q_tokens=9, k_tokens=5, recluster=0.4)

    def plan(step: int, previous: AttentionPlan | None, at: int, tensors: list[Tensor]) -> AttentionPlan:
        given = None if previous is None else Previous(previous.pack(), None, at)
        return method.plan(*tensors, Site(grid, step=step, num_steps=10), given)

    first = plan(0, None, 0, [q, k, v])
    second = plan(3, first, 0, later)
    assert second.q_order is first.q_order
    assert second.kv_order is first.kv_order
    assert not torch.equal(second.token_mask(), first.token_mask())
    third = plan(4, second, 3, later)
    assert not torch.equal(third.kv_order.index, second.kv_order.index)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_the_density_is_met_where_it_is_the_control(density: float) -> None:
    plan = Svoo(density=density).plan(*smooth_inputs(DEMO), Site(DEMO), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


def test_floors_of_another_model_are_refused() -> None:
    q, k, v = inputs(GRIDS[0])
    with pytest.raises(ValueError, match="floors must have one for each of 3 layers, got 2"):
        Svoo(floors=(0.1, 0.1), q_tokens=9, k_tokens=5).plan(q, k, v, Site(GRIDS[0], 0, 3), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floors": (0.0,)}, "floors"),
        ({"floors": ()}, "floors"),
        ({"recluster": 0}, "recluster"),
        ({"top_p": 2}, "top_p"),
    ],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Svoo(**options)  # type: ignore[arg-type]


def test_no_iteration_is_refused() -> None:
    q, k, _ = inputs(GRIDS[0])
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        co_clusters(q, k, q[:, :, :2], k[:, :, :2], 0)
