"""What holds for the arguments of every command."""

import json
from pathlib import Path

import pytest

from tests.cli.command import SMALL, assert_refused, exit_code, prompts_file


@pytest.mark.parametrize("option", ["--method", "--out", "--config", "--model", "--block", "--prompt", "--ray"])
@pytest.mark.parametrize("join", [lambda option: [option, ""], lambda option: [f"{option}="]], ids=["apart", "equals"])
def test_an_empty_value_is_refused(model, tmp_path, capsys, option, join):
    command = ["generate", prompts_file("a red ball"), "--model", model, *SMALL, *join(option)]
    assert_refused(tmp_path, capsys, command, f"error: {option} must not be empty: give it a value, or leave it out")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["calibrate", "--prompt", "a", "--method", ""], "--method"),
        (["calibrate", "--prompt", "a", "--out", ""], "--out"),
        (["compare", "p.txt", "--out="], "--out"),
        (["analyze", "--prompt", "a", "--out", ""], "--out"),
        (["inspect", ""], "an argument"),
        (["report", ""], "an argument"),
        (["vbench", "generate", "--out", ""], "--out"),
        (["generate", "--", ""], "an argument"),
        ([""], "an argument"),
    ],
)
def test_empty_arguments_of_other_commands(tmp_path, capsys, command, name):
    assert_refused(tmp_path, capsys, command, f"error: {name} must not be empty")


def test_a_negative_prompt_may_be_empty_and_the_last_of_an_option_counts(model):
    run = ["generate", "--prompt", "a", "--model", model, *SMALL, "--out", "first", "--method", "paro", "--block", "16"]
    assert exit_code(*run, "--negative-prompt", "", "--out", "last", "--method", "adaspa", "--block", "8") == 0
    (line,) = [json.loads(line) for line in Path("last/manifest.jsonl").read_text().splitlines()]
    assert (line["method"], line["config"]["block"], line["negative_prompt"]) == ("adaspa", 8, "")
    assert not Path("first").exists()
