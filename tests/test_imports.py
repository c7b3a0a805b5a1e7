"""Imports flow one way, and the package is light to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dit_sparse"

# Who may import whom: each entry sees itself and what its line names.
MAY_IMPORT = {
    "compact_kernel": set(),
    "compact": {"compact_kernel"},
    "partials": set(),
    "lost_ranks": set(),
    "head_shard": {"lost_ranks"},
    "block_mask": {"compact", "head_shard"},
    "token_order": {"head_shard"},
    "types": {"block_mask", "token_order", "head_shard"},
    "kernels": {"types", "block_mask"},
    "reorder": {"types", "block_mask", "kernels"},
    "masks": {"types", "block_mask", "kernels", "reorder"},
    "methods": {"types", "block_mask", "kernels", "reorder", "masks", "partials"},
    "schedule": {"types", "methods"},
    "course": {"types", "methods", "schedule"},
    "attention": {"types", "kernels"},
    "safety": {"types", "kernels", "attention"},
    "parallel": {"types", "block_mask", "kernels", "attention", "head_shard", "lost_ranks"},
    "cost": {"types"},
    "pipelines": {"types", "kernels", "methods", "schedule", "course", "attention", "cost", "parallel", "partials"},
    "demo": set(),
    "cluster": set(),
    "output_file": set(),
    "eval": {"types", "kernels", "reorder", "masks", "methods", "schedule", "course", "pipelines"},
    "bench": {
        "types",
        "block_mask",
        "kernels",
        "reorder",
        "masks",
        "methods",
        "schedule",
        "attention",
        "cost",
        "partials",
    },
    "presets": {"methods", "schedule", "course"},
    "generate": {
        *("types", "methods", "schedule", "presets", "pipelines", "demo", "eval", "cluster", "parallel", "lost_ranks"),
        "partials",
    },
    "compare": {"methods", "schedule", "pipelines", "bench", "eval", "generate", "partials"},
    "vbench": {"eval", "generate", "cluster", "partials"},
    "calibrate": {
        *("types", "block_mask", "kernels", "masks", "reorder", "methods", "schedule", "attention", "pipelines"),
        *("course", "eval", "generate", "compare", "partials"),
    },
    "report": {"schedule", "generate", "bench", "compare", "partials", "output_file"},
    "analyze": {
        *("types", "block_mask", "attention", "masks", "methods", "schedule", "pipelines", "bench", "generate"),
        *("calibrate", "output_file"),
    },
    "estimate": {"types", "methods", "schedule", "course", "presets", "cost"},
    "simulator": {"types", "masks", "methods"},
    "doctor": {"kernels", "demo", "cost"},
    "cli": {
        "simulator",
        "presets",
        "bench",
        "analyze",
        "calibrate",
        "compare",
        "cost",
        "methods",
        "schedule",
        "generate",
        "cluster",
        "estimate",
        "doctor",
        "report",
        "demo",
        "eval",
        "pipelines",
        "lost_ranks",
        "output_file",
        "vbench",
    },
}
# Everybody may read the version; nothing else lives in the package's own namespace.
FREE = {""}
# Files that are themselves imported where they are used; nothing may name them at its top.
LATE = {
    "best_within_kernels.py",
    "compact_kernel.py",
    "hopper_kernels.py",
    "hopper_producer.py",
    "hopper_search_kernels.py",
    "hopper_tiles.py",
    "modulate_kernel.py",
    "norm_rope_kernel.py",
    "output_error_kernel.py",
    "permute_kernel.py",
    "remainder_error_kernels.py",
    "remainder_kernels.py",
    "routed_kernel.py",
    "score_kernels.py",
    "skip_kernel.py",
    "triton_kernels.py",
}
OPTIONAL = {
    "fa3_fwd_interface",
    "flash_attn",
    "flashinfer",
    "triton",
    "xformers",
    "vbench",
    "ray",
    "torchmetrics",
    "torchvision",
}


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.append(node.module)
            if node.module == "dit_sparse":
                names += [f"dit_sparse.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
    return names


def test_every_unit_has_a_place_in_the_order() -> None:
    units = {_unit(path) for path in _files()} - {"__init__", "__main__"}
    assert units == set(MAY_IMPORT)


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    unit = _unit(path)
    if unit in ("__init__", "__main__"):
        return
    for name in _imports(ast.parse(path.read_text("utf-8"))):
        parts = name.split(".")
        if parts[0] == "dit_sparse":
            target = parts[1] if len(parts) > 1 else ""
            assert target == unit or target in MAY_IMPORT[unit] | FREE, f"{unit} must not import {name}"
        if parts[0] == "diffusers":
            assert unit in ("pipelines", "demo"), f"{unit} must not import diffusers"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_are_imported_where_used(path: Path) -> None:
    at_import = ast.Module(
        [n for n in ast.parse(path.read_text("utf-8")).body if not isinstance(n, ast.FunctionDef)], []
    )
    top_level = [node for node in at_import.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for name in _imports(ast.Module(top_level, [])):
        if path.name not in LATE:
            assert f"{name.rpartition('.')[2]}.py" not in LATE, f"{path.name} imports {name} at its top"
            assert name.split(".")[0] not in OPTIONAL, f"{path.name} imports {name} at its top"


def test_import_needs_neither_diffusers_nor_triton() -> None:
    code = "import sys, dit_sparse; from dit_sparse import sparse_attention, AdaSpa; print('diffusers' in sys.modules)"
    blocked = "import sys; sys.modules['triton'] = None; sys.modules['xformers'] = None; "
    done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
