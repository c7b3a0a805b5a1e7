"""Which model families there are."""

from __future__ import annotations

from typing import Any

from dit_sparse.pipelines.adapter import FamilyAdapter
from dit_sparse.pipelines.cogvideox import CogVideoXAdapter
from dit_sparse.pipelines.flux import FluxAdapter
from dit_sparse.pipelines.hunyuan_video import HunyuanVideoAdapter
from dit_sparse.pipelines.installed import transformers_of
from dit_sparse.pipelines.ltx_video import LTXVideoAdapter
from dit_sparse.pipelines.wan import WanAdapter

_ADAPTERS: tuple[FamilyAdapter, ...] = (
    WanAdapter(),
    CogVideoXAdapter(),
    HunyuanVideoAdapter(),
    FluxAdapter(),
    LTXVideoAdapter(),
)
FAMILIES = {adapter.transformer_class: adapter for adapter in _ADAPTERS}


def adapter_for(pipe: Any) -> FamilyAdapter:
    """The adapter of `pipe`'s family, recognised by its transformer's class.

    Raises:
        ValueError: no transformer, or a family without an adapter; the supported ones are named.
    """
    supported = ", ".join(f"{adapter.family} ({name})" for name, adapter in FAMILIES.items())
    transformers = transformers_of(pipe)
    if not transformers:
        raise ValueError(f"pipeline must have a transformer, got {type(pipe).__name__}; supported: {supported}")
    # The classes are matched by name along the inheritance, so that a user's own subclass is recognised too.
    for cls in type(next(iter(transformers.values()))).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    got = type(next(iter(transformers.values()))).__name__
    raise ValueError(f"model family of {got} is not supported, got {type(pipe).__name__}; supported: {supported}")
