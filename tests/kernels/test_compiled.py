"""The GPU kernels compile for every kind of GPU and fit its shared memory; Triton's compiler needs no GPU for that."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from dit_sparse.kernels.moments import products_tile
from dit_sparse.kernels.triton_backend import configuration
from dit_sparse.kernels.triton_launch import padded
from dit_sparse.kernels.triton_skip import skip_configuration

PROGRAM = Path(__file__).with_name("compile_kernels.py")
# Bytes of shared memory that a thread block may have, by compute capability.
LIMITS = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 120: 101376}
PORTABLE = [
    (80, 128, 128, "bf16", True, "value"),
    (90, 128, 64, "bf16", False, "mean"),
    (100, 128, 128, "fp16", True, "none"),
    (120, 64, 64, "fp32", False, "value"),
]
HOPPER = [
    dict(dim=128, groups=2, pair=False, stages=(2, 2), early=True, partial=False, remainder="value"),
    dict(dim=128, groups=2, pair=True, stages=(2, 2), early=True, partial=True, remainder="value"),
    dict(dim=128, groups=1, pair=True, stages=(2, 1), early=False, partial=False, remainder="value"),
    dict(dim=64, groups=1, pair=False, stages=(3, 3), early=False, partial=True, remainder="mean"),
    dict(dim=64, groups=1, pair=True, stages=(3, 3), early=False, partial=False, remainder="none"),
]


@pytest.fixture(scope="module")
def compile_kernels() -> Iterator[Callable[[list[dict]], list[dict]]]:
    """What the compiler says of each job, `{"shared": bytes, "racing": bool, ...}`, from a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, str(PROGRAM)], text=True, env=environment, **pipes) as process:

        def ask(jobs: list[dict]) -> list[dict]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(jobs) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, "the compiler failed, see above"
            return json.loads(answer)

        yield ask


def assert_fit(jobs: list[dict], found: list[dict]) -> None:
    for job, one in zip(jobs, found, strict=True):
        assert one["shared"] <= LIMITS[job["target"]], job
        if job["target"] == 90:  # elsewhere there are none of the products that are searched
            assert not one["racing"], job


def test_the_portable_kernel_fits(compile_kernels) -> None:
    jobs = []
    for target, block, dim, dtype, partial, remainder in PORTABLE:
        itemsize = 4 if dtype == "fp32" else 2
        launch = configuration(block, block, dim, dim, itemsize, target // 10, LIMITS[target], partial)
        jobs.append(
            dict(
                kernel="triton",
                target=target,
                dtype=dtype,
                dim=dim,
                padded=padded(dim),
                partial=partial,
                remainder=remainder,
                block_m=launch.block_m,
                block_n=launch.block_n,
                warps=launch.num_warps,
                stages=launch.num_stages,
            )
        )
    assert_fit(jobs, compile_kernels(jobs))


def test_the_kernel_that_skips_fits(compile_kernels) -> None:
    jobs = []
    for target, block, dim, dtype, partial in (
        (86, 32, 64, "fp32", False),
        (90, 128, 128, "bf16", True),
    ):
        launch = skip_configuration(block, block, dim, dim, 4 if dtype == "fp32" else 2, LIMITS[target])
        assert launch is not None
        own = dict(zip(("block_m", "block_n", "warps", "stages"), launch, strict=True))
        jobs.append(
            dict(kernel="skip", target=target, dtype=dtype, dim=dim, padded=padded(dim), partial=partial, **own)
        )
    assert_fit(jobs, compile_kernels(jobs))


def test_the_kernel_that_routes_fits(compile_kernels) -> None:
    jobs = []
    for target, block, dtype in ((86, 64, "fp32"), (90, 128, "bf16"), (120, 64, "fp16")):
        size = 4 if dtype == "fp32" else 2
        launch = configuration(block, block, 128, 128, size, target // 10, LIMITS[target], False)
        own = dict(zip(("block_m", "block_n", "warps", "stages"), dataclasses.astuple(launch), strict=True))
        jobs.append(dict(kernel="routing", target=target, dtype=dtype, dim=128, padded=128, **own))
    assert_fit(jobs, compile_kernels(jobs))


def test_the_kernels_of_moments_fit(compile_kernels) -> None:
    jobs = [
        dict(kernel="moments", target=90, dtype="bf16", dim=128, padded=128, remainder="mean", warps=1, stages=3)
        | dict(block_n=8, span=1, single=True)
    ]
    for target, dim, dtype, largest in (
        (80, 128, "bf16", 128),
        (90, 128, "bf16", 512),
        (90, 128, "bf16", 256),
        (90, 128, "bf16", 128),
        (90, 128, "bf16", 64),
        (86, 128, "bf16", 64),
        (100, 128, "bf16", 64),
        (120, 128, "bf16", 256),
        (86, 256, "fp32", 64),
    ):
        tile = products_tile(largest, torch.float32 if dtype == "fp32" else torch.bfloat16, dim, target == 90)
        jobs.append(
            dict(
                kernel="moments",
                target=target,
                dtype=dtype,
                dim=dim,
                padded=padded(dim),
                remainder="value",
                single=largest <= tile.rows,
                block_n=tile.rows,
                span=tile.span,
                warps=tile.num_warps,
                stages=tile.num_stages,
            )
        )
    # With two stages the second of them would overwrite a tile too early.
    jobs.append(jobs[2] | dict(stages=2))
    *found, broken = compile_kernels(jobs)
    assert_fit(jobs[:-1], found)
    assert broken["racing"]


def test_the_kernel_of_weights_fits(compile_kernels) -> None:
    jobs = [
        dict(
            kernel="weights",
            target=target,
            dtype=dtype,
            dim=dim,
            padded=padded(dim),
            block=block,
            warps=4,
            stages=1,
        )
        for target, dim, dtype, block in ((90, 128, "bf16", 64), (86, 256, "fp16", 16))
    ]
    jobs.append(dict(kernel="shares", target=90, dtype="bf16", warps=4, stages=3))
    assert_fit(jobs, compile_kernels(jobs))


@pytest.mark.parametrize(("kernel", "rows", "warps", "wide"), [("errors", 128, 8, 64), ("changes", 64, 4, 32)])
def test_the_kernels_of_errors_fit(compile_kernels, kernel: str, rows: int, warps: int, wide: int) -> None:
    jobs = [
        dict(
            kernel=kernel,
            target=target,
            dtype=dtype,
            dim=dim,
            padded=padded(dim),
            block_m=32 if dtype == "fp32" else rows,
            block_n=block_n,
            warps=4 if dtype == "fp32" else warps,
            stages=2,
            slots=8,
            single=dim < 256,
        )
        for target, dim, dtype, block_n in ((90, 128, "bf16", 64), (86, 256, "bf16", wide), (80, 64, "fp32", 16))
    ]
    assert_fit(jobs, compile_kernels(jobs))


def test_the_hopper_kernel_fits_and_keeps_its_products_asynchronous(compile_kernels) -> None:
    jobs = [dict(kernel="hopper", target=90, registers=128 if job["groups"] == 1 else None, **job) for job in HOPPER]
    for job, found in zip(jobs, compile_kernels(jobs), strict=True):
        residents = 2 if job["groups"] == 1 else 1
        assert residents * (found["shared"] + 1024) <= 233472, job
        assert not found["serialized"], job
        assert found["products"] > 0, job


def test_the_search_on_hopper_fits_and_keeps_its_products_asynchronous(compile_kernels) -> None:
    jobs = [dict(kernel="search", target=90, dim=dim, slots=slots) for dim, slots in ((128, 16), (64, 8))]
    for job, found in zip(jobs, compile_kernels(jobs), strict=True):
        assert found["shared"] + 1024 <= 233472, job
        assert not found["serialized"], job
        assert found["products"] > 0, job


def test_the_kernels_of_the_choice_compile(compile_kernels) -> None:
    names = ("keys_kernel", "count_kernel", "ties_kernel", "keep_kernel")
    jobs = [dict(kernel="choice", target=80, name=name, block=512) for name in names]
    for found in compile_kernels(jobs):
        assert found["shared"] <= LIMITS[80]


@pytest.mark.parametrize("limit", [101376, 166912, 232448])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_some_tiles_fit_every_gpu(limit: int, dim: int, itemsize: int) -> None:
    for block in (16, 32, 64, 128, 256):
        launch = configuration(block, block, dim, dim, itemsize, 9, limit, True)
        need = itemsize * (launch.block_m * dim + launch.num_stages * launch.block_n * 2 * dim)
        assert need <= limit
        assert launch.block_m <= max(32, padded(block))
