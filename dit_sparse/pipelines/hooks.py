"""The hook on a transformer's forward that tells the session where it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from torch.utils.hooks import RemovableHandle

from dit_sparse.pipelines.adapter import FamilyAdapter
from dit_sparse.pipelines.session import Session
from dit_sparse.pipelines.statistics import Stopwatch

HOOK_NAME = "dit_sparse"


class _NoState(BaseState):
    """The hook keeps no state in the registry; it only wants the name of the cache context."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to reset."""


class SiteHook(ModelHook):
    """Derives the token grid and the guidance branch of each forward and hands them to the session.

    Where the method has one order for all layers, tokens are put into it once, before the first block.
    """

    # diffusers sets the cache context, which names the branch, on stateful hooks alone.
    _is_stateful = True

    def __init__(self, session: Session, adapter: FamilyAdapter, model: str) -> None:
        super().__init__()
        self.session = session
        self.adapter = adapter
        self.model = model
        self.context = StateManager(_NoState)
        self._moves: list[RemovableHandle] = []

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._stop_moving()  # a forward before this one may have failed
        self.adapter.check_installed(module, self.model)
        inputs = _by_name(module, args, kwargs)
        context = self.context._context
        branch = None if context is None else context.name
        layout = self.adapter.layout(module, inputs)
        movable = self.adapter.takes_order(module, inputs)
        device = inputs["hidden_states"].device if movable else None
        order = self.session.begin_forward(layout, self.model, branch, device)
        if order is None:
            return args, kwargs
        # Hooks of this forward alone: modules may be replaced between two, by LoRA for one.
        self._moves, moved = self.adapter.put_in_order(module, order, inputs)
        return (args, kwargs) if not moved else ((), inputs | moved)

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        self._stop_moving()
        self.session.end_forward()
        return output

    def deinitalize_hook(self, module: torch.nn.Module) -> torch.nn.Module:  # diffusers spells it so
        self._stop_moving()
        return module

    def _stop_moving(self) -> None:
        for handle in self._moves:
            handle.remove()
        self._moves = []

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self.context.reset()
        return module


def _by_name(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the forward by name; the class's signature, because hooks replace the instance's."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | kwargs


def add_site_hook(transformer: torch.nn.Module, session: Session, adapter: FamilyAdapter, model: str) -> None:
    """Register the hook on `transformer`."""
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.register_hook(SiteHook(session, adapter, model), HOOK_NAME)


class CallRecorder:
    """Tells a session of every call of attention modules that stay upstream's own.

    The recorded time is that of the whole module, projections included.

    Args:
        modules: in the order they run.
        model: which transformer of the pipeline they belong to.
        session: is told.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], model: str, session: Session) -> None:
        self.model = model
        self.session = session
        self._handles = [handle for layer, module in enumerate(modules) for handle in self._hooks(layer, module)]

    def remove(self, transformer: torch.nn.Module) -> None:
        """Take it off."""
        for handle in self._handles:
            handle.remove()

    def _hooks(self, layer: int, module: torch.nn.Module) -> list[RemovableHandle]:
        watches: list[Stopwatch] = []

        @torch.compiler.disable
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            watches[:] = [Stopwatch(next(tensors).device)]

        @torch.compiler.disable
        def after(*_: Any) -> None:
            self.session.record_upstream_call(layer, self.model, watches.pop().stop())

        return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]


def remove_site_hook(transformer: torch.nn.Module) -> None:
    """Take the hook off `transformer`."""
    HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(HOOK_NAME, recurse=False)
