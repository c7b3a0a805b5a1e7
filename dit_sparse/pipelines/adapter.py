"""What the toolkit must know about one model family."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dit_sparse.kernels import dense_attention
from dit_sparse.pipelines.attend_operator import attend_compiled, register
from dit_sparse.pipelines.layout import Layout
from dit_sparse.pipelines.session import Session
from dit_sparse.types import TokenGrid, TokenOrder

Inputs = Mapping[str, Any]
"""The arguments of a transformer's forward, by name."""


class SparseProcessor:
    """Put before a family's diffusers processor in the bases: hands self-attention to a session.

    Args:
        session: runs the attention.
        layer, num_layers: which transformer block of how many.
        original: the processor this one replaces; its settings are kept.
    """

    session: Session
    layer: int
    num_layers: int
    _attention_backend: AttentionBackendName | None

    def __init__(
        self, session: Session | None = None, layer: int = 0, num_layers: int = 0, original: Any = None
    ) -> None:
        if session is None:
            raise ValueError(
                f"{type(self).__name__} must be made by sparsify, got no session; unsparsify before you load an "
                "IP-adapter, which makes processors anew and cannot run sparse"
            )
        super().__init__()
        vars(self).update(vars(original))
        self.session = session
        self.layer = layer
        self.num_layers = num_layers
        self._number = register(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        twin._number = register(twin)
        return twin

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of `[B, H, N, D]` with any strides, as the session decides; `mask` is for the dense calls."""
        if torch.compiler.is_compiling():
            return attend_compiled(q, k, v, mask, self._number)
        return self.attend_eagerly(q, k, v, mask)

    def attend_eagerly(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            dense = functools.partial(self.dense, q, k, v, mask)
            return self.session.attend(self.layer, self.num_layers, q, k, v, dense)

        return self.session.attend_shard(self.layer, q, k, v, run)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The model's own attention of `[B, H, N, D]`; on a GPU by the fastest kernel.

        Where somebody has chosen a kernel, for this processor or for all of diffusers, it is that one.
        """
        if q.is_cuda and mask is None and uses_default_backend(self):
            return dense_attention(q, k, v)
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        options = {"attn_mask": mask, "backend": self._attention_backend}
        return dispatch_attention_fn(query, key, value, **options).transpose(1, 2)


class FamilyAdapter(ABC):
    """How one family of pipelines lets the toolkit in; stateless.

    Attributes:
        family: its name in messages.
        transformer_class: name of the diffusers class of its transformers.
        processors: our processor for each of the family's own.
        relies_on: other functions of diffusers that the adapter replaces or must know the source of, such as a block's
            forward.
        float32_vae: whether the VAE stays in float32 whatever the precision of the rest.
        context_parallel_plan: how diffusers' context parallelism cuts a forward's tensors, where diffusers has no plan
            that works; its own processors cannot run so cut.
        exact_timesteps: whether forwards get the timesteps as the scheduler has them, neither scaled nor rounded.
    """

    family: ClassVar[str]
    transformer_class: ClassVar[str]
    processors: ClassVar[Mapping[type, type[SparseProcessor]]]
    relies_on: ClassVar[tuple[Callable[..., Any], ...]] = ()
    float32_vae: ClassVar[bool] = False
    context_parallel_plan: ClassVar[Mapping[str, Any] | None] = None
    exact_timesteps: ClassVar[bool] = True

    @abstractmethod
    def attention_modules(self, transformer: Any) -> dict[str, Any]:
        """The self-attention modules that take sparse attention, in the order they run, by path."""

    @abstractmethod
    def layout(self, transformer: Any, inputs: Inputs) -> Layout:
        """How the sequences of a forward with `inputs` are laid out.

        Raises:
            ValueError: inputs that are no grid of tokens.
        """

    @abstractmethod
    def token_grid(self, pipe: Any, height: int, width: int, frames: int) -> TokenGrid:
        """The layout for a video of `height` x `width` pixels and `frames` frames, text at its longest.

        Raises:
            ValueError: a size that the VAE or the patches cannot take.
        """

    def takes_order(self, transformer: Any, inputs: Inputs) -> bool:
        """Whether `put_in_order` knows all in this forward that depends on a token's place; by default not."""
        return False

    def put_in_order(
        self, transformer: Any, order: TokenOrder, inputs: Inputs
    ) -> tuple[list[RemovableHandle], dict[str, Any]]:
        """Hooks that move tokens into `order` before the first block and back after the last, for one forward.

        Returns:
            The hooks, and the inputs that must be others than those given.
        """
        raise TypeError(f"{type(self).__name__} takes no order; ask takes_order first")

    def num_layers(self, transformer: Any) -> int:
        """How many transformer blocks take sparse attention."""
        return len(self.attention_modules(transformer))

    def check_parallel(self, transformer: Any, ulysses: int) -> None:
        """Whether the sequences of `transformer` can lie on several ranks, of which `ulysses` share its heads.

        Raises:
            ValueError: they cannot.
        """
        heads = transformer.config.num_attention_heads
        if ulysses > heads:
            raise ValueError(
                f"ulysses must be at most the model's {heads} heads, got {ulysses}; more ranks can work in a ring"
            )

    def install(self, transformer: Any, model: str, session: Session) -> dict[str, Any]:
        """Put sparse processors into the self-attention modules and return the replaced ones by module path.

        Raises:
            ValueError: a processor that is not the family's own, or tensor parallelism.
        """
        context_config(transformer)
        modules = self.attention_modules(transformer)
        for path, module in modules.items():
            self._check_processor(f"{model}.{path}", module.processor)
        originals = {path: module.processor for path, module in modules.items()}
        for layer, (path, module) in enumerate(modules.items()):
            sparse = self.processors[type(originals[path])]
            module.processor = sparse(session, layer, len(modules), originals[path])
        return originals

    def fuse(self, transformer: Any) -> None:  # noqa: B027  # a family need not have it
        """Speed up what stands around attention, where the family has anything for that."""

    def unfuse(self, transformer: Any) -> None:  # noqa: B027
        """Undo `fuse`."""

    def begin_forward(self, transformer: Any, inputs: Inputs) -> None:  # noqa: B027
        """Called before each forward; on a CPU a layer whose attention is dense must stay upstream's bit for bit."""

    def end_forward(self, transformer: Any) -> None:  # noqa: B027
        """Undo `begin_forward`; called after each forward, and before the next as it may have failed."""

    def follow(self, transformer: Any, session: Session, originals: dict[str, Any]) -> None:  # noqa: B027
        """Put sparse processors where diffusers itself has replaced them, and note in `originals` what it put there.

        Called before each forward and before they are taken off; only a family whose calls replace them needs it.
        """

    def check_installed(self, transformer: Any, model: str) -> None:
        """Before each forward: what was done to `transformer` after `install` must not run dense or wrong unseen.

        Raises:
            ValueError: a sparse processor was replaced.
        """
        for path, module in self.attention_modules(transformer).items():
            if not isinstance(module.processor, SparseProcessor):
                raise ValueError(
                    f"{model}.{path}.processor was replaced after sparsify, got {type(module.processor).__name__}; "
                    "unsparsify, make the change, then sparsify"
                )

    def _check_processor(self, path: str, processor: Any) -> None:
        if type(processor) not in self.processors:
            expected = " or ".join(cls.__name__ for cls in self.processors)
            raise ValueError(
                f"{path}.processor must be diffusers' {expected}, got {type(processor).__name__}; "
                "sparsify before installing another processor"
            )


def context_config(transformer: Any) -> Any:
    """The configuration of diffusers' context parallelism on `transformer`; `None` without any.

    Raises:
        ValueError: another parallelism.
    """
    config = getattr(transformer, "_parallel_config", None)
    context = getattr(config, "context_parallel_config", None)
    if config is not None and context is None:
        raise ValueError(
            f"parallelism must be off with sparse attention, got {type(config).__name__}; unsparsify, or use context "
            "parallelism"
        )
    return context


def modules_of(transformer: Any, name: str, *lists: str) -> dict[str, Any]:
    """The module `name` of every block in the `lists` of `transformer`, by path."""
    return {
        f"{blocks}.{i}.{name}": getattr(block, name)
        for blocks in lists
        for i, block in enumerate(getattr(transformer, blocks))
    }


def uses_default_backend(processor: Any) -> bool:
    """Whether nobody has chosen a dense attention kernel, neither for this processor nor for all of diffusers."""
    chosen, _ = _AttentionBackendRegistry.get_active_backend()
    return processor._attention_backend is None and chosen == AttentionBackendName.NATIVE


def moves(modules: Mapping[torch.nn.Module, tuple[int, Tensor]]) -> list[RemovableHandle]:
    """Hooks that move the tokens of modules' outputs: for each the dimension and the int64 index to take."""

    def hook(dim: int, index: Tensor) -> Any:
        def take(_: Any, __: Any, out: Any) -> Any:
            return tuple(take(_, __, part) for part in out) if isinstance(out, tuple) else out.index_select(dim, index)

        return take

    return [module.register_forward_hook(hook(dim, index)) for module, (dim, index) in modules.items()]


def check_size(name: str, got: int, multiple: int) -> None:
    """Raise ValueError unless `got` pixels are a multiple of `multiple`."""
    if got < multiple or got % multiple:
        near = max(multiple, got // multiple * multiple)
        raise ValueError(f"{name} must be a multiple of {multiple}, got {got}; try {near}")


def latent_frames(frames: int, temporal: int) -> int:
    """Latent frames of a video of `frames` frames under a VAE that takes `temporal` frames at a time after the first.

    Raises:
        ValueError: not one more than a multiple of `temporal`.
    """
    if frames < 1 or (frames - 1) % temporal:
        near = max(0, (frames - 1) // temporal) * temporal + 1
        raise ValueError(f"frames must be 1 more than a multiple of {temporal}, got {frames}; try {near}")
    return (frames - 1) // temporal + 1
