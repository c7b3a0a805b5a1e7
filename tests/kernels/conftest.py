"""Triton's interpreter without work that it repeats."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

from dit_sparse.kernels.triton_launch import interpreted


@pytest.fixture(autouse=True, scope="package")
def _language_replaced_once_a_launch() -> Iterator[None]:
    """What stands in for Triton's language does so until the launch ends, so its helpers need not see to that again.

    They do otherwise, at every call, and search the whole language for it: half of a kernel's time.
    """
    if importlib.util.find_spec("triton") is None or not interpreted():
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    replaced: set[int] = set()

    def once(fn: FunctionType) -> Any:
        own = {id(x) for x in fn.__globals__.values() if x is language or x is language.core}
        if own and own <= replaced:
            return SimpleNamespace(restore=lambda: None)
        launches, scope = not replaced, replace(fn)
        replaced.update(own)
        if launches:
            restore = scope.restore
            scope.restore = lambda: (replaced.clear(), restore())
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", once)
        yield
