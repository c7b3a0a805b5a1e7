"""The command line's root, its exit codes, and how errors are told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer

BAD_INPUT = 2
INTERRUPTED = 130

# Newer typers carry their own copy of click, so the class is reached by a way that both kinds share.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="dit-sparse",
    help="Sparse attention for Hugging Face diffusers' video transformers.",
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if show_version:
        sys.stdout.write(f"dit-sparse {version('dit-sparse')}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code: 0, 1 (a video failed), 2 (bad input) or 130 (Ctrl-C)."""
    try:
        code = app(args=arguments, prog_name="dit-sparse", standalone_mode=False)
    except _UsageError as error:
        print_error(error.format_message())  # type: ignore[attr-defined]
        code = BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted")
        code = INTERRUPTED
    sys.exit(code or 0)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors of the checks before a run into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print_error(str(error))
        raise typer.Exit(BAD_INPUT) from None


def print_error(message: str) -> None:
    """Write `message` as the one line that an error is."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")


def print_json(value: Any) -> None:
    """Write `value` as JSON to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
