"""The share of the keys that holds most of a query's attention."""

from __future__ import annotations

import pytest
import torch
from profile_floors import needed_share


@pytest.mark.parametrize(
    ("weights", "hold", "want"),
    [
        ([0.7, 0.1, 0.1, 0.1], 0.5, 0.25),
        ([0.1, 0.1, 0.7, 0.1], 0.75, 0.5),
        ([0.25, 0.25, 0.25, 0.25], 0.95, 1.0),
        ([0.0, 1.0, 0.0, 0.0], 1.0, 0.25),
    ],
)
def test_the_share_is_the_least_that_holds_enough(weights: list[float], hold: float, want: float) -> None:
    assert float(needed_share(torch.tensor(weights), hold)) == want
