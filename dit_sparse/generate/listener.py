"""How a run tells what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_sparse.generate.request import Clip

if TYPE_CHECKING:
    from dit_sparse.generate.run import Job

__all__ = ["Listener"]


class Listener:
    """Is told how a run goes; the methods do nothing unless overridden."""

    def started(self, job: Job) -> None:
        """Before the first video."""

    def rendering(self, clip: Clip, what: str, steps: int) -> None:
        """Before each call of the pipeline: the "warm-up", or the "sparse" or "dense" rendering of `clip`."""

    def stepped(self) -> None:
        """After each denoising step."""

    def finished(self, clip: Clip, line: dict[str, Any]) -> None:
        """After a video is written; `line` is its line in the manifest."""

    def failed(self, clip: Clip, error: Exception) -> None:
        """After a video could not be made."""
