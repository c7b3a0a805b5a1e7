"""Commands that only print, and those that do not exist."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.cli.command import exit_code


def test_lists_methods(capsys):
    assert exit_code("methods", "--json") == 0
    listing = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert set(listing) >= {"dense", "neighborhood", "adaspa", "paro"}
    assert "density" in [parameter["name"] for parameter in listing["adaspa"]["parameters"]]
    assert exit_code("methods") == 0
    assert "--density" in capsys.readouterr().out


def test_doctor_measures_first_where_that_is_asked_for(capsys, monkeypatch, tmp_path):
    from dit_sparse.bench import costs
    from dit_sparse.cost import TABLE_VARIABLE

    monkeypatch.delenv(TABLE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    grids = tuple(costs.TokenGrid(2, 8, width) for width in (8, 16, 32))
    small = functools.partial(costs.measure_costs, rounds=1, sizes=costs.Sizes(1, 16, grids), methods=["adaspa"])
    monkeypatch.setattr(costs, "measure_costs", small)
    table = costs.user_table()
    assert exit_code("doctor", "--measure", "--json") == 0
    output = capsys.readouterr()
    assert f"measured costs are in {table}" in output.err
    assert json.loads(output.out)["costs"] == json.loads(table.read_text())["cpu"]["source"]


def test_doctor(capsys):
    assert exit_code("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["ready"]
    assert exit_code("doctor") == 0
    assert "generate can run" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["generat"], ["--verson"], ["methods", "x"]])
def test_bad_commands(capsys, command):
    assert exit_code(*command) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_starts_without_torch(option):
    code = f"import sys; sys.argv = ['x', {option!r}]\nfrom dit_sparse.cli import main\ntry: main()\nfinally:"
    code += " assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    assert "dit-sparse" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_bench_kernels_says_that_it_needs_a_gpu(capsys):
    assert exit_code("bench", "kernels") == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_neighborhood_prints_nattens_case(capsys):
    setting = ("--grid", "30x48x80", "--window", "18x24x24", "--stride", "16x8x8", "--tile", "2x8x8")
    assert exit_code("neighborhood", *setting) == 0
    out = capsys.readouterr().out
    assert "density 0.0900, ideal speed-up 11.11x" in out
    assert "72,900" in out
    assert exit_code("neighborhood", *setting, "--json") == 0
    tile = json.loads(capsys.readouterr().out)["tile"]
    assert (tile["tiles"], tile["visited"], tile["partial"]) == (810_000, 72_900, 0)


def test_neighborhood_lists_settings_near_a_density(capsys):
    assert (
        exit_code("neighborhood", "--grid", "24x32", "--density", "0.25", "--causal", "false,true,false", "--json") == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["grid"] == [1, 24, 32]
    assert report["causal"] == [False, True, False]
    assert all(abs(s["density"] / 0.25 - 1) < 0.11 for s in report["suggestions"])
    assert exit_code("neighborhood", "--grid", "8x24x32", "--density", "0.25") == 0
    assert "best settings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--grid", "12"), "--grid must be two or three sizes"),
        (("--grid", "4x8x8", "--window", "9x8x8"), "must be at most the grid's 4"),
        (("--grid", "4x8x8", "--stride", "much"), "--stride must be"),
        (("--grid", "4x8x8", "--density", "2"), "density must be above 0 and at most 1"),
        (
            ("--grid", "999999x999999x999999", "--density", ".5"),
            "--grid must have at most 1024 tokens along an axis and 16",
        ),
        (("--grid", "1024x1024x1024", "--density", ".5"), "16,777,216 in all, got '1024x1024x1024'"),
    ],
)
def test_neighborhood_refuses_what_does_not_fit(arguments, message, capsys):
    assert exit_code("neighborhood", *arguments) == 2
    assert message in capsys.readouterr().err


_RUN = "from dit_sparse.cli import main; main()"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="has no full device")
def test_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", _RUN, "--version"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: output cannot be written: No space left on device\n"


def test_closed_streams():
    def run(redirection, *command):
        shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-c", _RUN, *command]
        return subprocess.run(shell, capture_output=True, text=True)

    done = run("<&-", "generate", "-")
    assert (done.returncode, done.stderr) == (
        2,
        "error: standard input is closed: give a text file, or --prompt TEXT\n",
    )
    done = run(">&-", "--version")
    assert (done.returncode, done.stderr) == (0, "")
