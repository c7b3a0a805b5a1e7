"""What is said when a rank of torch.distributed is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["RankLostError", "told_of_losses"]


class RankLostError(RuntimeError):
    """A rank of the group has died, or did not answer in time."""


@contextmanager
def told_of_losses(doing: str) -> Iterator[None]:
    """Turn what torch.distributed raises when a rank is gone into one sentence."""
    import torch

    try:
        yield
    except (RankLostError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RankLostError(
            f"{doing} failed, because a rank of the sequence-parallel group died or did not answer in time: start all "
            f"ranks again ({reason[:300]})"
        ) from error
