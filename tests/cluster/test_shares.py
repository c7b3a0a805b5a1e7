"""What Ray gives each worker, and what is refused because no node has it."""

import pytest

from dit_sparse.cluster.shares import choose_device, shares

ONE_HOST, TWO_HOSTS = [{"CPU": 32, "GPU": 8}], [{"CPU": 32, "GPU": 4}, {"CPU": 32, "GPU": 3}, {"CPU": 8}]


@pytest.mark.parametrize(
    ("device", "workers", "nodes", "ranks", "expected"),
    [
        ("cuda", None, ONE_HOST, 1, (8, {"num_gpus": 1, "num_cpus": 1})),
        ("cuda", 2, [{"CPU": 4, "GPU": 8}], 1, (2, {"num_gpus": 1, "num_cpus": 0.5})),
        ("cuda", None, ONE_HOST, 3, (2, {"num_gpus": 3, "num_cpus": 3})),
        ("cuda", None, TWO_HOSTS, 2, (3, {"num_gpus": 2, "num_cpus": 2})),
        ("cuda", 1, TWO_HOSTS, 4, (1, {"num_gpus": 4, "num_cpus": 4})),
        ("cuda", None, [{"CPU": 6, "GPU": 8}], 2, (4, {"num_gpus": 2, "num_cpus": 1})),
        ("cpu", None, [{"CPU": 64}], 1, (16, {"num_cpus": 4})),
        ("cpu", None, [{"CPU": 64}], 2, (8, {"num_cpus": 8})),
        ("cpu", None, [{"CPU": 2}], 1, (1, {"num_cpus": 2})),
        ("cpu", None, [{"CPU": 2}], 4, (1, {"num_cpus": 2})),
        ("cpu", 3, [{"CPU": 2}], 1, (3, {"num_cpus": 0.666})),
        # No share is larger than a node, and as many fit as are wanted.
        ("cpu", 1, [{"CPU": 8}, {"CPU": 8}], 1, (1, {"num_cpus": 8})),
        ("cpu", 3, [{"CPU": 8}, {"CPU": 8}], 1, (3, {"num_cpus": 4})),
        ("cpu", 3, [{"CPU": 12}, {"CPU": 5}, {"memory": 1}], 1, (3, {"num_cpus": 5})),
    ],
)
def test_shares_of_a_cluster(device, workers, nodes, ranks, expected):
    assert shares(device, workers, nodes, ranks) == expected


@pytest.mark.parametrize("cores", [(2,), (7,), (49, 3), (64, 64, 2), (1, 1, 1)])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 49])
def test_every_worker_finds_a_node(cores, workers):
    _, resources = shares("cpu", workers, [{"CPU": float(count)} for count in cores])
    assert sum(int(count / resources["num_cpus"]) for count in cores) >= workers


@pytest.mark.parametrize(
    ("device", "workers", "nodes", "ranks", "message"),
    [
        ("cuda", None, [{"CPU": 4}], 1, "has no GPU"),
        ("cuda:1", None, [{"CPU": 4, "GPU": 2}], 1, "chooses the GPU"),
        ("auto", 3, [{"CPU": 4, "GPU": 2}], 1, "at most 2, the GPUs of the cluster, got 3"),
        ("cpu", 0, [{"CPU": 4}], 1, "at least 1"),
        ("auto", None, TWO_HOSTS, 5, "needs 5 GPUs of one node, and the largest node has 4"),
        ("auto", 4, ONE_HOST, 3, "at most 2, got 4: 4 workers .* 4 x 3 = 12 GPUs, .* the nodes have 8"),
        ("auto", 3, TWO_HOSTS, 3, "at most 2, got 3: 3 workers .* 3 x 3 = 9 GPUs, .* the nodes have 4 [+] 3"),
    ],
)
def test_refuses_what_the_cluster_does_not_have(device, workers, nodes, ranks, message):
    with pytest.raises(ValueError, match=message):
        shares(choose_device(device, nodes), workers, nodes, ranks)


def test_auto_takes_the_gpus_there_are():
    assert choose_device("auto", [{"CPU": 8}, {"GPU": 1}]) == "cuda"
    assert choose_device("auto", [{"CPU": 8}]) == "cpu"
