"""How the sequences of one forward are laid out, padded prompts included."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from dit_sparse.types import TokenGrid


class Group(NamedTuple):
    """Samples of a batch whose prompts have one length.

    Args:
        rows: their places in the batch; a slice where they are all of it.
        grid: their layout without padding.
    """

    rows: slice | list[int]
    grid: TokenGrid


@dataclass(frozen=True)
class Layout:
    """The sequences of one forward.

    Args:
        grid: their layout, padding counted as text.
        text_lens: real text tokens of each sample, where prompts are padded at the end of the sequence; `None` where
            nothing is padded.

    Raises:
        ValueError: padded text that does not come last, or a length that the text does not have.
    """

    grid: TokenGrid
    text_lens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.text_lens is None:
            return
        if self.grid.text_first:
            raise ValueError(f"padded text must come last, got the grid {self.grid}")
        if not all(0 <= length <= self.grid.text_len for length in self.text_lens):
            raise ValueError(f"text_lens must be from 0 to {self.grid.text_len}, got {self.text_lens}")

    @cached_property
    def groups(self) -> list[Group]:
        """The batch by real length, shortest first; padding lies behind what each group has."""
        lengths = sorted(set(self.text_lens or ()))
        if len(lengths) <= 1:
            length = lengths[0] if lengths else self.grid.text_len
            return [Group(slice(None), replace(self.grid, text_len=length))]
        assert self.text_lens is not None
        return [
            Group([row for row, own in enumerate(self.text_lens) if own == length], replace(self.grid, text_len=length))
            for length in lengths
        ]

    @property
    def is_padded(self) -> bool:
        """Whether any sample has padding."""
        return any(group.grid != self.grid for group in self.groups)
