"""Which transformers a pipeline has, and what `sparsify` left on them and on it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module

INSTALLED = "_dit_sparse"
"""The attribute of a transformer with what is installed there, and of a pipeline with the session that follows it."""

TRANSFORMERS = ("transformer", "transformer_2")
"""What pipelines call theirs."""


def transformers_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The transformers of `pipe` by component name, taken out of `torch.compile`."""
    return {name: unwrap_module(module) for name in TRANSFORMERS if (module := getattr(pipe, name, None)) is not None}


def dense_transformers(pipe: Any) -> list[str]:
    """Names of those on which nothing is installed."""
    return [name for name, transformer in transformers_of(pipe).items() if not hasattr(transformer, INSTALLED)]
