"""Looks at everything that scoring needs before it begins: environment, weights, and every video."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dit_sparse.vbench import weights
from dit_sparse.vbench.dimensions import DIMENSIONS, FILTER, Dimension, find_dimensions
from dit_sparse.vbench.environment import Environment, find_environment
from dit_sparse.vbench.prompts import SAMPLES, Sample, read_prompts, samples
from dit_sparse.vbench.videos import Facts, Found, Video, disagreements, find_custom, find_samples, inspect

__all__ = ["FLICKERING", "Request", "Survey", "survey"]

FLICKERING = DIMENSIONS["temporal_flickering"]


@dataclass(frozen=True)
class Request:
    """What is to be scored, and how.

    Args:
        videos: a folder, or with `custom` also one file.
        dimensions: names; empty for all.
        custom: the videos are of other prompts than the official ones.
        prompts: with `custom`, prompts by file name.
        python: of VBench's environment, as `find_environment` takes it.
        weights: folder of VBench's weights, as `weights_folder` takes it.
        cache: folder that remembers what was found in files; `None` forgets.
        static_filter: measure flickering only on videos that hold still, as the protocol has it.
        allow_download: fetch weights that are missing.
        allow_partial: score what is there.
    """

    videos: Path
    dimensions: tuple[str, ...] = ()
    custom: bool = False
    prompts: Mapping[str, str] | None = None
    python: Path | None = None
    weights: Path | None = None
    cache: Path | None = None
    static_filter: bool = True
    allow_download: bool = False
    allow_partial: bool = False


@dataclass(frozen=True)
class Survey:
    """What was found. A video's name is that of its file without the ending.

    Args:
        dimensions: that are asked for.
        filters: flickering is measured on videos that `FILTER` picks.
        weights: their folder.
        wanted: names of the videos of each dimension, and of `FILTER` where it is applied.
        videos, facts: every video that can be used, and what is in it.
        missing: names of videos that are not there.
        unusable: by name, what is wrong with a video that cannot be used.
        unsuited: by dimension and name, why the dimension cannot take a video.
        blocking: lines on what keeps VBench from running.
        incomplete: lines on what the videos lack.
    """

    request: Request
    environment: Environment
    dimensions: tuple[Dimension, ...]
    filters: bool
    weights: Path
    wanted: Mapping[str, tuple[str, ...]]
    videos: Mapping[str, Video]
    facts: Mapping[str, Facts]
    missing: tuple[str, ...]
    unusable: Mapping[str, str]
    unsuited: Mapping[str, Mapping[str, str]]
    blocking: tuple[str, ...]
    incomplete: tuple[str, ...] = field(default=())

    def usable(self, dimension: Dimension) -> tuple[str, ...]:
        """Names of the videos that `dimension` can be measured on."""
        unsuited = self.unsuited[dimension.name]
        return tuple(name for name in self.wanted[dimension.name] if name in self.facts and name not in unsuited)


def survey(request: Request) -> Survey:
    """Find the videos and look into each, and check VBench's environment and weights.

    Raises:
        ValueError: no such folder, dimension or environment, or weights that cannot be fetched.
    """
    dimensions = find_dimensions(request.dimensions, custom=request.custom)
    filters = FLICKERING in dimensions and request.static_filter and not request.custom
    needed = (*dimensions, FILTER) if filters else dimensions
    packages = tuple(dict.fromkeys(package for dimension in needed for package in dimension.packages))
    environment = find_environment(request.python, packages)
    folder = weights.weights_folder(request.weights)
    if request.allow_download:
        weights.download(needed, folder)
    blocking = [
        f"{dimension.name}: {environment.python} has no {package}; see `dit-sparse vbench setup --help`"
        for dimension in needed
        for package in dimension.packages
        if package in environment.missing
    ]
    blocking += [line for dimension in needed for line in weights.problems(dimension, folder)]
    found, wanted = _find(request, dimensions, filters, environment)
    facts = _look_into(found, request.cache)
    unsuited = {dimension.name: _unsuited(found, dimension, wanted[dimension.name]) for dimension in needed}
    return Survey(
        request=request,
        environment=environment,
        dimensions=dimensions,
        filters=filters,
        weights=folder.absolute(),
        wanted=wanted,
        videos=found.videos,
        facts=facts,
        missing=tuple(found.missing),
        unusable=found.unusable,
        unsuited=unsuited,
        blocking=tuple(blocking),
        incomplete=tuple(_incomplete(found, facts, unsuited, custom=request.custom)),
    )


def _find(
    request: Request, dimensions: tuple[Dimension, ...], filters: bool, environment: Environment
) -> tuple[Found, dict[str, tuple[str, ...]]]:
    """The videos, and the names of those that each dimension wants."""
    if request.custom:
        found = find_custom(request.videos, request.prompts)
        names = (*found.videos, *found.unusable)
        return found, {dimension.name: names for dimension in dimensions}
    needed = samples(read_prompts(environment.info, dimensions), dimensions)
    # Without the filter VBench takes the first five of a prompt.
    needed = [sample for sample in needed if filters or sample.index < SAMPLES]
    wanted = {d.name: tuple(sample.stem for sample in needed if _takes(d, sample)) for d in dimensions}
    if filters:
        wanted[FILTER.name] = wanted[FLICKERING.name]
    return find_samples(request.videos, needed), wanted


def _takes(dimension: Dimension, sample: Sample) -> bool:
    return dimension.name in sample.prompt.dimensions and (sample.index < SAMPLES or dimension == FLICKERING)


def _look_into(found: Found, cache: Path | None) -> dict[str, Facts]:
    """Facts by name; videos that have none become unusable ones of `found`."""
    facts = {}
    paths = [video.path for video in found.videos.values()]
    for name, fact in zip(found.videos, inspect(paths, cache, os.cpu_count() or 1), strict=True):
        if isinstance(fact, ValueError):
            found.unusable[name] = str(fact)
        else:
            facts[name] = fact
    return facts


def _unsuited(found: Found, dimension: Dimension, names: tuple[str, ...]) -> dict[str, str]:
    """Why `dimension` cannot read some of the videos `names`, or would read them wrongly."""
    lines = {}
    for name in names:
        if name not in found.videos:
            continue
        path, prompt = found.videos[name].path, found.videos[name].prompt.text
        if dimension.mp4_only and path.suffix != ".mp4":
            lines[name] = f"{path.name}: {dimension.name} reads mp4 only"
        elif dimension.name == "human_action" and not (path.name.startswith(f"{prompt}-") and "person is " in prompt):
            lines[name] = f"{path.name}: human_action takes the action from a name such as 'A person is dancing-0.mp4'"
    return lines


def _incomplete(
    found: Found, facts: Mapping[str, Facts], unsuited: Mapping[str, Mapping[str, str]], *, custom: bool
) -> list[str]:
    lines = []
    if found.missing:
        total = len(found.missing) + len({*found.videos, *found.unusable})
        lines.append(f"{len(found.missing)} of {total} videos are missing, such as {found.missing[0]!r}")
    lines += found.unusable.values()
    lines += [line for by_name in unsuited.values() for line in by_name.values()]
    # Videos of one benchmark come of one setting.
    return lines if custom else lines + disagreements(facts)
