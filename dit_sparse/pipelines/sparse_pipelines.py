"""The `Sparse*Pipeline` classes: diffusers pipelines that load and save with a schedule.

A saved folder keeps the parent's class name, so that plain diffusers opens it; the schedule lies beside it.
"""

import json
import os
from pathlib import Path
from typing import Any

from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    FluxPipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    WanImageToVideoPipeline,
    WanPipeline,
)

from dit_sparse.methods import AdaSpa
from dit_sparse.partials import replacing
from dit_sparse.pipelines.sparsify import session_of, sparsify
from dit_sparse.schedule import Schedule
from dit_sparse.types import Method

SIDECAR = "sparse_config.json"


class SparsePipelineMixin:
    """Put before a diffusers pipeline class in the bases."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        sparse: Method | Schedule | None = None,
        **kwargs: Any,
    ) -> Any:
        """diffusers' `from_pretrained`, then `sparsify`.

        Args:
            pretrained_model_name_or_path: folder or hub id of a dense or a sparse pipeline.
            sparse: a method or a schedule; `None` takes the one saved in the folder, or `AdaSpa()` without one.

        Raises:
            ValueError: a saved schedule that cannot be read.
        """
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        return sparsify(pipe, sparse or read_sidecar(pretrained_model_name_or_path) or AdaSpa())

    @classmethod
    def from_pipe(cls, pipeline: Any, *, sparse: Method | Schedule | None = None, **kwargs: Any) -> Any:
        """diffusers' `from_pipe`, then `sparsify`; the components are shared, so `pipeline` becomes sparse as well.

        Args:
            pipeline: a dense or a sparse pipeline of the same family.
            sparse: a method or a schedule; `None` takes `pipeline`'s own, or `AdaSpa()` without one.
        """
        session = session_of(pipeline)
        pipe = super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        return sparsify(pipe, sparse or (session.schedule if session else AdaSpa()))

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """diffusers' `save_config` under the parent's class name, with the schedule beside it.

        Raises:
            ValueError: `push_to_hub` is set: the upload would come before the class name is put right.
        """
        if push_to_hub:
            raise ValueError(
                "push_to_hub must be False in save_config, got True; use save_pretrained(push_to_hub=True)"
            )
        super().save_config(save_directory, **kwargs)  # type: ignore[misc]
        index = Path(save_directory) / self.config_name  # type: ignore[attr-defined]
        config = json.loads(index.read_text("utf-8"))
        config["_class_name"] = _dense_class(type(self)).__name__
        write_json(index, config)
        session = session_of(self)
        if session is not None:
            write_json(Path(save_directory) / SIDECAR, session.schedule.to_config())


class SparseWanPipeline(SparsePipelineMixin, WanPipeline):
    """`WanPipeline` with sparse attention switched on.

    Example:
        pipe = SparseWanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", sparse=AdaSpa(density=0.25))
    """


class SparseWanImageToVideoPipeline(SparsePipelineMixin, WanImageToVideoPipeline):
    """`WanImageToVideoPipeline` with sparse attention switched on."""


class SparseCogVideoXPipeline(SparsePipelineMixin, CogVideoXPipeline):
    """`CogVideoXPipeline` with sparse attention switched on."""


class SparseCogVideoXImageToVideoPipeline(SparsePipelineMixin, CogVideoXImageToVideoPipeline):
    """`CogVideoXImageToVideoPipeline` with sparse attention switched on."""


class SparseHunyuanVideoPipeline(SparsePipelineMixin, HunyuanVideoPipeline):
    """`HunyuanVideoPipeline` with sparse attention switched on."""


class SparseHunyuanVideoImageToVideoPipeline(SparsePipelineMixin, HunyuanVideoImageToVideoPipeline):
    """`HunyuanVideoImageToVideoPipeline` with sparse attention switched on."""


class SparseFluxPipeline(SparsePipelineMixin, FluxPipeline):
    """`FluxPipeline` with sparse attention switched on."""


def _dense_class(cls: type) -> type:
    """The diffusers class that a sparse one stands for."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))


def read_sidecar(folder: str | os.PathLike[str]) -> Schedule | None:
    """The schedule saved in `folder`, or `None` where there is none.

    Raises:
        ValueError: it is no JSON, or no schedule.
    """
    path = Path(folder) / SIDECAR
    if not path.is_file():
        return None
    try:
        return Schedule.from_config(json.loads(path.read_text("utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{SIDECAR} in {str(folder)!r} is no JSON: {error}; delete it or save again") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` through a temporary name."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
