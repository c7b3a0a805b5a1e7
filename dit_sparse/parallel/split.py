"""How context parallelism cuts a joint sequence: every rank has a run of its text and a run of its video."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from dit_sparse.types import TokenGrid

__all__ = ["SequenceSplit"]


@dataclass(frozen=True)
class SequenceSplit:
    """The cuts of one sequence over `parts` ranks; where the tokens do not divide, the first ranks have one more.

    Args:
        grid: layout of the whole sequence, padding counted as text.
        parts: ranks.

    Raises:
        ValueError: fewer tokens of video or text than ranks.
    """

    grid: TokenGrid
    parts: int

    def __post_init__(self) -> None:
        for name, tokens in (("video", self.grid.video_len), ("text", self.grid.text_len)):
            if 0 < tokens < self.parts:
                raise ValueError(
                    f"{name} tokens must be at least the {self.parts} ranks, got {tokens}; use fewer ranks"
                )

    @property
    def is_even(self) -> bool:
        """Whether all ranks have equally many tokens of text and of video."""
        return self.grid.video_len % self.parts == 0 and self.grid.text_len % self.parts == 0

    @cached_property
    def video(self) -> tuple[int, ...]:
        """Where in the sequence each rank's video begins, and where the last one's ends."""
        return _bounds(self.grid.video_start, self.grid.video_len, self.parts)

    @cached_property
    def text(self) -> tuple[int, ...]:
        """Where in the sequence each rank's text begins, and where the last one's ends."""
        return _bounds(self.grid.text_start, self.grid.text_len, self.parts)

    def runs(self, part: int, parts: int = 1) -> list[tuple[int, int]]:
        """Runs `(start, end)` of the sequence that ranks `part` to `part + parts` hold, in the order they hold them."""
        text, video = ((b[part], b[part + parts]) for b in (self.text, self.video))
        ordered = [text, video] if self.grid.text_first else [video, text]
        return [run for run in ordered if run[0] < run[1]]


def _bounds(start: int, tokens: int, parts: int) -> tuple[int, ...]:
    each, more = divmod(tokens, parts)
    return tuple(start + part * each + min(part, more) for part in range(parts + 1))
