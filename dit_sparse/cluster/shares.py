"""What Ray gives each worker of a pool: GPUs, or a share of the cores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["choose_device", "shares"]

_CORES_A_RANK = 4


def choose_device(device: str, nodes: Sequence[Mapping[str, float]]) -> str:
    """ "cpu" or "cuda", as `device` asks for or, with "auto", as `nodes` have.

    Raises:
        ValueError: neither, or GPUs that no node has.
    """
    gpus = max((node.get("GPU", 0) for node in nodes), default=0)
    if device == "auto":
        return "cuda" if gpus >= 1 else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda with --ray, which chooses the GPU; got {device!r}")
    if device == "cuda" and gpus < 1:
        raise ValueError("--device cuda: the Ray cluster has no GPU; use --device cpu, or add nodes with GPUs")
    return device


def shares(
    device: str, workers: int | None, nodes: Sequence[Mapping[str, float]], ranks: int = 1
) -> tuple[int, dict[str, float]]:
    """How many workers, and what Ray gives each of them, which is always of one node.

    Args:
        device: "cpu" or "cuda".
        workers: how many; `None` is as many as there is room for.
        nodes: the resources of each, as Ray names them.
        ranks: processes of a worker, each with a GPU of its own.

    Raises:
        ValueError: more than the nodes have.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"--ray-workers must be at least 1, got {workers}")
    return (_gpus if device == "cuda" else _cores)(workers, nodes, ranks)


def _gpus(workers: int | None, nodes: Sequence[Mapping[str, float]], ranks: int) -> tuple[int, dict[str, float]]:
    counts = [int(node.get("GPU", 0)) for node in nodes]
    room, each = sum(count // ranks for count in counts), f"{ranks} ranks (--parallel) of a GPU each"
    if not room:
        raise ValueError(
            f"a worker of {each} needs {ranks} GPUs of one node, and the largest node has {max(counts)}: use fewer "
            "ranks, or --device cpu"
        )
    if workers is not None and workers > room and ranks == 1:
        raise ValueError(f"--ray-workers must be at most {room}, the GPUs of the cluster, got {workers}")
    if workers is not None and workers > room:
        have = " + ".join(str(count) for count in counts if count)
        raise ValueError(
            f"--ray-workers must be at most {room}, got {workers}: {workers} workers of {each} need {workers} x {ranks}"
            f" = {workers * ranks} GPUs, {ranks} of one node for each worker, and the nodes have {have}"
        )
    cores = min(node.get("CPU", 0) / count for node, count in zip(nodes, counts, strict=True) if count >= ranks)
    return workers or room, {"num_gpus": ranks, "num_cpus": _countable(min(1, cores) * ranks)}


def _cores(workers: int | None, nodes: Sequence[Mapping[str, float]], ranks: int) -> tuple[int, dict[str, float]]:
    counts = [node["CPU"] for node in nodes if node.get("CPU", 0) > 0]
    wanted = workers or sum(max(1, int(count / (_CORES_A_RANK * ranks))) for count in counts) or 1
    # The largest share of which so many fit; it divides the cores of some node.
    parts = {count / part for count in counts for part in range(1, wanted + 1)}
    share = max((part for part in parts if sum(int(c / part + 1e-9) for c in counts) >= wanted), default=0.0)
    return wanted, {"num_cpus": _countable(share)}


def _countable(cores: float) -> float:
    """What Ray takes, which also sets the worker's threads by it: whole numbers, and fractions below one."""
    return int(cores) if cores >= 1 else int(cores * 1000) / 1000
