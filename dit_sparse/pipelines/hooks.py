"""The hook on a transformer's forward that tells the session where it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch.utils.hooks import RemovableHandle

from dit_sparse.parallel import ContextParallel
from dit_sparse.pipelines.adapter import FamilyAdapter
from dit_sparse.pipelines.context_parallel import check_spread, context_of, cut_anyhow, cut_as_before
from dit_sparse.pipelines.session import Session
from dit_sparse.pipelines.statistics import Stopwatch


class SiteHook:
    """Derives the token grid and the guidance branch of each forward and hands them to the session.

    Where the method has one order for all layers, tokens are put into it once, before the first block.

    It is a hook of torch and not of diffusers, because those of accelerate and diffusers replace `forward`, and the one
    that is taken off first, as model offload is after every run, takes the others along.

    Args:
        transformer, model: the module, and its name in the pipeline.
        session: is told.
        adapter: knows the family.
        originals: the processors that the sparse ones stand in for, by module path; kept up to date.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        model: str,
        session: Session,
        adapter: FamilyAdapter,
        originals: dict[str, Any],
    ) -> None:
        self.model = model
        self.session = session
        self.adapter = adapter
        self.originals = originals
        self._parallel: ContextParallel | None = None
        self._cuts: bool | None = None
        self._branch: str | None = None
        self._moves: list[RemovableHandle] = []
        self._handles = [
            transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            transformer.register_forward_hook(self._after),
        ]
        self._names_branches = hasattr(transformer, "cache_context")
        if self._names_branches:
            self._set_context: Any = transformer.cache_context
            transformer.cache_context = self._context  # type: ignore[assignment]

    def remove(self, transformer: torch.nn.Module) -> None:
        """Take it off, and the sparse processors."""
        self.adapter.follow(transformer, self.session, self.originals)
        for path, processor in self.originals.items():
            transformer.get_submodule(path).processor = processor
            if hasattr(processor, "_parallel_config"):
                processor._parallel_config = getattr(transformer, "_parallel_config", None)
        self._stop_moving()
        self._stop_cutting(transformer)
        for handle in self._handles:
            handle.remove()
        if self._names_branches:
            del transformer.cache_context

    @contextmanager
    def _context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """diffusers' `cache_context`, by which pipelines name the guidance branch."""
        self._branch = name
        try:
            with self._set_context(name, **kwargs):
                yield
        finally:
            self._branch = None

    @torch.compiler.disable
    def _before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # A forward before this one may have failed.
        self._stop_moving()
        self._stop_cutting(module)
        self.adapter.end_forward(module)
        self.adapter.follow(module, self.session, self.originals)
        self.adapter.check_installed(module, self.model)
        inputs = _by_name(module, args, kwargs)
        layout = self.adapter.layout(module, inputs)
        latents = inputs["hidden_states"]
        self._parallel = context_of(module, self.adapter, self._parallel)
        # Ranks cut tokens by their place in the sequence's own order, and can move them when they have all of them.
        movable = self.adapter.takes_order(module, inputs) if self._parallel is None else self._parallel.mesh.ring == 1
        device = latents.device if movable else None
        timestep = inputs.get("timestep") if self.adapter.exact_timesteps else None
        order = self.session.begin_forward(layout, self.model, self._branch, device, self._parallel, latents, timestep)
        self.adapter.begin_forward(module, inputs)
        if self._parallel is not None:
            # All ranks have the same schedule, as they have just found, so this fails on all or none.
            check_spread(module, self.session.schedule)
            self._cuts = cut_anyhow(module, layout)
        if order is None:
            return args, kwargs
        # Hooks of this forward alone: modules may be replaced between two, by LoRA for one.
        self._moves, moved = self.adapter.put_in_order(module, order, inputs)
        return (args, kwargs) if not moved else ((), inputs | moved)

    @torch.compiler.disable
    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._stop_moving()
        self._stop_cutting(module)
        self.adapter.end_forward(module)
        self.session.end_forward()

    def _stop_cutting(self, module: torch.nn.Module) -> None:
        if self._cuts is not None:
            cut_as_before(module, self._cuts)
            self._cuts = None

    def _stop_moving(self) -> None:
        for handle in self._moves:
            handle.remove()
        self._moves = []


def _by_name(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the forward by name; the class's signature, because hooks replace the instance's."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def reset_caches(transformer: torch.nn.Module) -> None:
    """Let caches such as FirstBlockCache forget what they kept under another attention."""
    HookRegistry.check_if_exists_or_initialize(transformer).reset_stateful_hooks()


class CallRecorder:
    """Tells a session of every call of attention modules that stay upstream's own.

    The recorded time is that of the whole module, projections included.

    Args:
        modules, model: the attention of every layer by its path, and the name of their transformer in the pipeline.
        session: is told.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module], model: str, session: Session) -> None:
        self.model = model
        self.session = session
        self._watches: dict[int, Stopwatch] = {}
        self._handles: list[RemovableHandle] = []
        for layer, module in enumerate(modules.values()):
            before, after = functools.partial(self._before, layer), functools.partial(self._after, layer)
            self._handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]

    def remove(self, transformer: torch.nn.Module) -> None:
        """Take it off."""
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable
    def _before(self, layer: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        self._watches[layer] = Stopwatch(next(tensors).device)

    @torch.compiler.disable
    def _after(self, layer: int, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.session.record_upstream_call(layer, self.model, self._watches.pop(layer).stop())
