"""What the toolkit must know about one model family, and which families there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from dit_sparse.pipelines.session import Session
from dit_sparse.types import TokenGrid


class FamilyAdapter(ABC):
    """How one family of pipelines lets the toolkit in; stateless.

    Attributes:
        family: its name in messages.
        transformer_class: name of the diffusers class of its transformers.
    """

    family: ClassVar[str]
    transformer_class: ClassVar[str]

    @abstractmethod
    def install(self, transformer: Any, model: str, session: Session) -> dict[str, Any]:
        """Put sparse processors into the self-attention modules and return the replaced ones by module path.

        Raises:
            ValueError: a processor that is not the family's own, or context parallelism.
        """

    @abstractmethod
    def num_layers(self, transformer: Any) -> int:
        """How many transformer blocks take sparse attention."""

    @abstractmethod
    def grid_of_latents(self, transformer: Any, hidden_states: torch.Tensor) -> TokenGrid:
        """The layout of the sequence made of `hidden_states`, the transformer's first argument."""

    @abstractmethod
    def token_grid(self, pipe: Any, height: int, width: int, frames: int) -> TokenGrid:
        """The layout for a video of `height` x `width` pixels and `frames` frames.

        Raises:
            ValueError: a size that the VAE or the patches cannot take.
        """


def transformers_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The transformers of `pipe` by component name."""
    names = ("transformer", "transformer_2")
    return {name: module for name in names if (module := getattr(pipe, name, None)) is not None}


def adapter_for(pipe: Any) -> FamilyAdapter:
    """The adapter of `pipe`'s family, recognised by its transformer's class.

    Raises:
        ValueError: no transformer, or a family without an adapter; the supported ones are named.
    """
    from dit_sparse.pipelines.wan import WanAdapter

    families: dict[str, FamilyAdapter] = {WanAdapter.transformer_class: WanAdapter()}
    supported = ", ".join(f"{adapter.family} ({name})" for name, adapter in families.items())
    transformers = transformers_of(pipe)
    if not transformers:
        raise ValueError(f"pipeline must have a transformer, got {type(pipe).__name__}; supported: {supported}")
    # The classes are matched by name along the inheritance, so that a user's own subclass is recognised too.
    for cls in type(next(iter(transformers.values()))).__mro__:
        if cls.__name__ in families:
            return families[cls.__name__]
    got = type(next(iter(transformers.values()))).__name__
    raise ValueError(f"model family of {got} is not supported, got {type(pipe).__name__}; supported: {supported}")
