"""The attention of a pipeline as one operator of torch, which is all that a compiler sees of it.

What a call does, dense or sparse and under which plan, is decided when it runs, so one graph serves all layers and
steps. The operator finds its processor by a number in a tensor: a plain number would be compiled in.
"""

# The operator's schema is read from its annotations, so they must not be strings.

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["attend_compiled", "register"]


class Attends(Protocol):
    """A processor that runs attention."""

    def attend_eagerly(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor: ...


_numbers = itertools.count()
_processors: weakref.WeakValueDictionary[int, Attends] = weakref.WeakValueDictionary()


def register(processor: Attends) -> Tensor:
    """The int64 number, without dimensions, by which the operator finds `processor` while it lives."""
    number = next(_numbers)
    _processors[number] = processor
    return torch.tensor(number, device="cpu")  # reading it must not wait for a GPU


# A CUDA graph would replay what one step decided.
@torch.library.custom_op("dit_sparse::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, number: Tensor) -> Tensor:
    out = _processors[int(number)].attend_eagerly(q, k, v, mask)
    # A compiler wants to know the strides before.
    return out.transpose(1, 2).contiguous()


@_attend.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, number: Tensor) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[-1])


def attend_compiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, number: Tensor) -> Tensor:
    """`attend_eagerly` of the processor registered under `number`, inside a compiled graph; shapes as there."""
    return _attend(q, k, v, mask, number).transpose(1, 2)
