"""Notices when diffusers has changed what an adapter replaces or relies on."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import diffusers

if TYPE_CHECKING:
    from dit_sparse.pipelines.adapter import FamilyAdapter

Function = Callable[..., Any]

# The fingerprints that `scripts/check_diffusers.py` prints, of every release that pyproject admits.
WRITTEN_FOR: dict[str, tuple[str, ...]] = {
    "transformers.transformer_wan.WanAttnProcessor.__call__": ("a084ccede676688c",),
    "transformers.transformer_wan.WanTransformer3DModel.forward": ("32dc8ab7993af52d",),
    "transformers.transformer_wan.WanTransformerBlock.forward": ("0585a218c0842272",),
    "transformers.transformer_wan._get_qkv_projections": ("d712493cf1de7a31",),
    "attention_processor.CogVideoXAttnProcessor2_0.__call__": ("4242220cefa248dd",),
    "attention_processor.FusedCogVideoXAttnProcessor2_0.__call__": ("794569d93df383a8",),
    "transformers.cogvideox_transformer_3d.CogVideoXTransformer3DModel.forward": ("972d4ee917e4e2af",),
    "transformers.cogvideox_transformer_3d.CogVideoXBlock.forward": ("9d09db202a0a0fe6",),
    "transformers.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0.__call__": ("c2d5255318ef57d4",),
    "transformers.transformer_hunyuan_video.HunyuanVideoTransformer3DModel.forward": ("8a0e0b72b6045c6a",),
    "transformers.transformer_hunyuan_video.HunyuanVideoTransformerBlock.forward": ("98fbfbdcd77438a2",),
    "transformers.transformer_hunyuan_video.HunyuanVideoSingleTransformerBlock.forward": ("e6f3ea29054dfb48",),
    "transformers.transformer_flux.FluxAttnProcessor.__call__": ("70862a992df2bc2b",),
    "transformers.transformer_flux.FluxTransformer2DModel.forward": ("3d37019188f8a2c8",),
    "transformers.transformer_flux.FluxTransformerBlock.forward": ("c7036138564cff0d",),
    "transformers.transformer_flux.FluxSingleTransformerBlock.forward": ("6de94782d3c83de0",),
    "transformers.transformer_ltx.LTXVideoAttnProcessor.__call__": ("78517be82dc26323",),
    "transformers.transformer_ltx.LTXVideoTransformer3DModel.forward": ("aed956fc083edd28",),
    "transformers.transformer_ltx.LTXVideoTransformerBlock.forward": ("f6c111a704671d6d",),
}


def changes(adapter: FamilyAdapter) -> list[str]:
    """What in diffusers is no longer as `adapter` was written for; one phrase each, none where all is well.

    A processor that we replace must have our signature, because diffusers passes arguments by position or filters them
    by name, and every function the adapter replaces or relies on must have a source that is known. Where the source
    cannot be read, as in a frozen program, the signatures alone decide.
    """
    found = []
    for upstream, ours in adapter.processors.items():
        names, expected = _arguments(upstream.__call__), _arguments(ours.__call__)
        if names != expected:
            taken, wanted = ", ".join(names), ", ".join(expected)
            found.append(f"{upstream.__name__}.__call__ takes ({taken}) instead of ({wanted})")
    for path, source in fingerprints(adapter).items():
        if source is not None and source not in WRITTEN_FOR.get(path, ()):
            found.append(f"{path} has another source")
    return found


def message(adapter: FamilyAdapter, changed: list[str]) -> str:
    """What to tell people of `changed`, as `changes` gives it."""
    return (
        f"{adapter.family} cannot run sparse: dit-sparse was not written for diffusers {diffusers.__version__}: "
        f"{'; '.join(changed)}; install a release that its requirements admit"
    )


def fingerprints(adapter: FamilyAdapter) -> dict[str, str | None]:
    """The fingerprint of each function of the installed diffusers that `adapter` replaces or relies on, by its path."""
    calls = {f"{_module(cls)}.{cls.__name__}.__call__": cls.__call__ for cls in adapter.processors}
    others = {f"{_module(function)}.{function.__qualname__}": function for function in adapter.relies_on}
    return {path: fingerprint(function) for path, function in (calls | others).items()}


@functools.cache
def fingerprint(function: Function) -> str | None:
    """Hash of what `function` does: its syntax tree without annotations, docstrings, comments and layout.

    The same on every version of Python; `None` where the source cannot be read.
    """
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None
    return hashlib.sha256(_plain(ast.parse(source)).encode()).hexdigest()[:16]


def _plain(node: Any) -> str:
    if isinstance(node, list):
        return f"[{','.join(_plain(item) for item in node if not _is_docstring(item))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    # Versions of Python differ in fields that are empty.
    fields = [(name, value) for name, value in ast.iter_fields(node) if name not in ("annotation", "returns", "ctx")]
    inner = ",".join(f"{name}={_plain(value)}" for name, value in fields if value not in (None, []))
    return f"{type(node).__name__}({inner})"


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _arguments(function: Function) -> list[str]:
    return list(inspect.signature(function).parameters)


def _module(of: Any) -> str:
    return of.__module__.removeprefix("diffusers.models.")
