"""How far queries and keys have moved since a plan was made, read without waiting for the device.

Source: HEART (arXiv 2605.14513), temporal mask reuse: |q - q'| + |k - k'| of the mean queries and keys of a head.
Differs from the paper: as a share of |q'| + |k'|, so that one bound suits all layers and models; the heads of a layer
together, because they share a plan; on a GPU the answer is taken up at the next step, so that nothing waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DriftMeter:
    """The drift of one layer and branch since their plan.

    Args:
        q, k: `[B, H, N, D]` that the plan was made of.
        branch: the guidance branch that they are of. Others may share the plan, but not the drift.
    """

    def __init__(self, q: Tensor, k: Tensor, branch: str = "") -> None:
        self.branch = branch
        self._anchor = _means(q, k)
        self._size = self._anchor.abs().sum()
        self._arriving: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._known: float | None = None

    def measure(self, q: Tensor, k: Tensor) -> None:
        """Look at the `q, k` of a later step; what is found is there for the next `read` after it has arrived."""
        drift = (_means(q, k) - self._anchor).abs().sum() / self._size
        if not drift.is_cuda:
            self._arriving = drift, None
            return
        host = torch.empty((), dtype=drift.dtype, pin_memory=True)
        host.copy_(drift, non_blocking=True)
        self._arriving = host, torch.cuda.current_stream(drift.device).record_event()

    def read(self) -> float | None:
        """The last drift that has arrived; `None` before the first."""
        if self._arriving is not None:
            value, done = self._arriving
            if done is None or done.query():
                self._known, self._arriving = float(value), None
        return self._known


def _means(q: Tensor, k: Tensor) -> Tensor:
    """`[2, B, H, D]` float32 means over the tokens."""
    return torch.stack([x.mean(2, dtype=torch.float32) for x in (q, k)])
