"""The weights of VBench's dimensions: which are missing, cut short or not the published ones, and where to get them."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from dit_sparse.vbench.dimensions import HUB_MODEL, Dimension, WeightFile
from dit_sparse.vbench.files import file_hash, remembered

__all__ = ["VARIABLE", "download", "problems", "weights_folder", "weights_hash"]

VARIABLE = "VBENCH_CACHE_DIR"
"""The environment variable by which VBench finds its weights."""

_CHUNK = 1 << 20


def weights_folder(folder: Path | None = None) -> Path:
    """`folder`, or what `VARIABLE` names, or VBench's own place in the user's cache."""
    return folder or Path(os.environ.get(VARIABLE) or Path.home() / ".cache" / "vbench")


def problems(dimension: Dimension, folder: Path) -> list[str]:
    """A line for each of `dimension`'s weights that is not in `folder`, or not whole there."""
    lines = [line for file in dimension.files if (line := _problem(file, folder)) is not None]
    if dimension.hub_model and not _hub_model_is_there():
        lines.append(f"{HUB_MODEL} is not in the Hugging Face cache: hf download {HUB_MODEL}")
    return [f"{dimension.name}: {line}" for line in lines]


def weights_hash(dimension: Dimension, folder: Path, cache: Path) -> str:
    """A hash that changes with any of `dimension`'s weights in `folder`; "" where it has none.

    Args:
        cache: folder that remembers the hashes of files by path, size and time.
    """
    if not dimension.files:
        return ""
    paths = [folder / file.path for file in dimension.files]
    # The time of a folder says nothing about the files in it.
    hashes = [remembered(path, None if path.is_dir() else cache, file_hash) for path in paths]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def download(dimensions: Iterable[Dimension], folder: Path) -> list[str]:
    """Fetch the weights of `dimensions` that `folder` lacks, and return their paths.

    Raises:
        ValueError: a file cannot be fetched, or is not the published one.
        OSError: `folder` cannot be written.
    """
    dimensions = tuple(dimensions)
    files = dict.fromkeys(file for dimension in dimensions for file in dimension.files)
    fetched = [file for file in files if not (folder / file.path).exists()]
    for file in fetched:
        _download(file, folder)
    if any(dimension.hub_model for dimension in dimensions) and not _hub_model_is_there():
        from huggingface_hub import snapshot_download

        snapshot_download(HUB_MODEL, allow_patterns=["*.json", "vocab.txt", "pytorch_model.bin"])
        return [*(file.path for file in fetched), HUB_MODEL]
    return [file.path for file in fetched]


def _problem(file: WeightFile, folder: Path) -> str | None:
    path = folder / file.path
    place = f"; it comes from {file.source} and is looked for below ${VARIABLE} or --weights (now {folder})"
    if file.path.endswith("/"):
        return None if (path / "hubconf.py").is_file() else f"{path} is missing{place}"
    if not path.is_file():
        return f"{path} is missing{place}"
    if not _whole(path):
        return f"{path} is cut short or damaged; remove it{place}"
    if file.sha256 and not file_hash(path).startswith(file.sha256):
        return f"{path} is not the published file (its SHA-256 must begin with {file.sha256[:8]}); remove it{place}"
    return None


def _whole(path: Path) -> bool:
    """Whether the end of a file that torch or gzip wrote is there."""
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"PK":
        # The list of a zip archive's members stands at its end.
        return zipfile.is_zipfile(path)
    if head == b"\x1f\x8b":
        try:
            with gzip.open(path) as packed:
                while packed.read(_CHUNK):
                    pass
        except (OSError, EOFError, zlib.error):
            return False
        return True
    return _torch_reads(path)


def _torch_reads(path: Path) -> bool:
    """Whether a file in torch's older format, which has no list of its parts, can be read to the end."""
    import pickle

    import torch

    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Classes that torch refuses to make stand in sound files too.
        return "Unsupported" in str(error) or "GLOBAL" in str(error)
    except (EOFError, RuntimeError, ValueError, OSError):
        return False
    return True


def _hub_model_is_there() -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(HUB_MODEL, "config.json"), str)


def _download(file: WeightFile, folder: Path) -> None:
    target = folder / file.path
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
        fetched = Path(scratch) / "fetched"
        _fetch(file.source, fetched)
        part = _unpack(fetched, file, Path(scratch) / "unpacked") if file.member else fetched
        if file.sha256 and not file_hash(part).startswith(file.sha256):
            raise ValueError(f"{file.source} gave another file than the published one ({file.sha256[:8]})")
        os.replace(part, target)


def _fetch(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url) as answer, target.open("wb") as out:
            length = answer.headers.get("Content-Length")
            shutil.copyfileobj(answer, out, _CHUNK)
    except OSError as error:
        raise ValueError(f"{url} cannot be fetched: {error}") from None
    if length is not None and target.stat().st_size != int(length):
        raise ValueError(f"{url} broke off after {target.stat().st_size} of {length} bytes")


def _unpack(archive: Path, file: WeightFile, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(archive) as packed:
            names = [name for name in packed.namelist() if name.startswith(file.member)]
            packed.extractall(folder, names)
    except zipfile.BadZipFile:
        raise ValueError(f"{file.source} is no zip archive") from None
    if not (folder / file.member).exists():
        raise ValueError(f"{file.source} has no {file.member}")
    return folder / file.member
