"""What the toolkit must know about one model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch.utils.hooks import RemovableHandle

from dit_sparse.pipelines.session import Session
from dit_sparse.types import TokenGrid, TokenOrder


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

    def fuse(self, transformer: Any) -> None:  # noqa: B027  # a family need not have it
        """Speed up what stands around attention, where the family has anything for that."""

    def unfuse(self, transformer: Any) -> None:  # noqa: B027
        """Undo `fuse`."""

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

    def takes_order(self, transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether `put_in_order` knows all in this forward that depends on a token's place; by default not."""
        return False

    def put_in_order(self, transformer: Any, order: TokenOrder) -> list[RemovableHandle]:
        """Hooks that move tokens into `order` before the first block and back after the last, for one forward."""
        raise TypeError(f"{type(self).__name__} takes no order; ask takes_order first")


def uses_default_backend(processor: Any) -> bool:
    """Whether nobody has chosen a dense attention kernel, neither for this processor nor for all of diffusers."""
    chosen, _ = _AttentionBackendRegistry.get_active_backend()
    return processor._attention_backend is None and chosen == AttentionBackendName.NATIVE


def is_watched(module: torch.nn.Module) -> bool:
    """Whether hooks of torch, accelerate or diffusers stand around `module`, which only its own call runs."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
