"""Sums of block masses on disk, one layer's map in memory at a time."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Place = tuple[str, int, int]
"""Transformer, layer and slot."""


class MassStore:
    """Means of float32 maps by place, in a file of `folder`.

    Args:
        folder: an existing folder with room for all of them.
        expected: how many places there will be, to see in time whether they fit.

    Attributes:
        folder: where the file is.
    """

    def __init__(self, folder: Path, expected: int) -> None:
        self._file = (folder / "masses").open("w+b")
        self.folder = folder
        self._expected = expected
        self._where: dict[Place, tuple[int, torch.Size]] = {}
        self._counts: Counter[Place] = Counter()
        self._end = 0

    @property
    def places(self) -> list[Place]:
        return sorted(self._where)

    def slots(self, model: str) -> list[int]:
        """The slots of a transformer, which all its layers share."""
        return sorted({slot for name, _, slot in self._where if name == model})

    def add(self, place: Place, mass: Tensor) -> None:
        """Add `mass` `[1, H, M, M]` to what there is at `place`.

        Raises:
            ValueError: the disk has no room for all places.
        """
        mass = mass.float().cpu()
        if place not in self._where:
            if not self._where:
                self._check_room(mass.nbytes * self._expected)
            self._where[place] = self._end, mass.shape
            self._end += mass.nbytes
        else:
            mass = mass + self._read(place)
        self._file.seek(self._where[place][0])
        mass.contiguous().numpy().tofile(self._file)
        self._counts[place] += 1

    def mean(self, place: Place) -> Tensor:
        """The mean of what was added at `place`, `[1, H, M, M]` float32."""
        return self._read(place).div_(self._counts[place])

    def __enter__(self) -> MassStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self, place: Place) -> Tensor:
        start, shape = self._where[place]
        self._file.seek(start)
        return torch.from_numpy(np.fromfile(self._file, np.float32, shape.numel())).view(shape)

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"calibration needs {needed / 1e9:.1f} GB beside the plan file, got {free / 1e9:.1f} GB free; "
                "calibrate with fewer steps, or share masks from an earlier step on"
            )
