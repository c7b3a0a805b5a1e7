"""Runs the command line inside a test."""

from pathlib import Path

import pytest

from dit_sparse import cli

SMALL = ["--height", "64", "--width", "64", "--frames", "9", "--steps", "2", "--device", "cpu"]


def exit_code(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def prompts_file(*prompts: str) -> str:
    Path("prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    return "prompts.txt"


def assert_refused(folder, capsys, command, message):
    before = tree(folder)
    assert exit_code(*command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert any(part in line for part in message.split("|"))
    assert tree(folder) == before
