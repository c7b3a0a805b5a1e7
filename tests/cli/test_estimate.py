"""`dit-sparse estimate`."""

import json

import pytest

from tests.cli.command import exit_code


def test_prints_time_memory_and_the_bottleneck(capsys):
    command = ["estimate", "--model", "wan2.1-14b", "--frames", "81", "--size", "720x1280", "--method", "adaspa"]
    command += ["--density", "0.2", "--gpus", "8", "--device", "h100"]
    assert exit_code(*command) == 0
    printed = capsys.readouterr().out
    for part in ("75,600 tokens", "8 x H100 (ulysses=8,ring=1)", "<- bottleneck", "memory a device", "prediction"):
        assert part in printed
    assert exit_code(*command, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["density"], found["gpus"]) == (75600, 0.2, 8)
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"])
    assert found["bottleneck"] in found["parts"]
    assert found["memory_bytes"]["total"] > 2 * 14e9


def test_a_checkpoint_takes_its_preset(capsys):
    assert exit_code("estimate", "--model", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["config"]["method"], found["config"]["warmup"]) == (32760, "lea", 0.2)
    assert found["config"]["density"] == 0.3
    assert found["density"] == pytest.approx(0.3 / 1.6), "of the sparse steps"
    assert (found["sparse_pays"], found["steps"]["search"]["count"]) == (True, 3)
    assert exit_code("estimate", "--model", "wan2.1-1.3b", "--density", "0.6") == 0
    assert "lea at density 0.512 in sparse steps" in capsys.readouterr().out


def test_refuses_in_one_line(capsys):
    for arguments in (["--gpus", "0"], ["--size", "721x1280"], ["--device", "moon"], ["--method", "moon"]):
        assert exit_code("estimate", "--model", "wan2.1-14b", *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
