"""The command line's root, its exit codes, and how errors are told."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
_MAY_BE_EMPTY = ("--negative-prompt",)
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EBADF)

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
    """Run the command line and leave with its exit code.

    It is 0, 1 (a video failed, or output cannot be written), 2 (bad input) or 130 (Ctrl-C).
    """
    _open_closed_streams()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _refuse_empty(arguments)
        code = app(args=arguments, prog_name="dit-sparse", standalone_mode=False)
        sys.stdout.flush()
    except _UsageError as error:
        print_error(error.format_message())  # type: ignore[attr-defined]
        code = BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        print_error("interrupted")
        code = INTERRUPTED
    except OSError as error:
        # Only errors of a stream have no file name; all that is said of files is said by the commands.
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise
        print_error(f"output cannot be written: {error.strerror}")
        _drop_output()
        code = FAILED
    sys.exit(code or 0)


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise the error of bad usage for an empty value, as `--out "$OUT"` has it where the shell knows no OUT.

    Left to themselves some would be taken for a default, and an empty path for the working directory.
    """
    for before, argument in zip(("", *arguments), arguments, strict=False):
        option, equals, value = argument.partition("=")
        name = before if not argument else option
        empty = not argument or (option.startswith("--") and equals and not value)
        if empty and name not in _MAY_BE_EMPTY:
            if name.startswith("--") and name != "--":
                raise _UsageError(f"{name} must not be empty: give it a value, or leave it out")
            raise _UsageError("an argument must not be empty, got ''")


def _open_closed_streams() -> None:
    """Python has None for output that the shell closed (`>&-`), which nothing could be printed to."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 until the process ends


def _drop_output() -> None:
    """Send what waits in standard output nowhere: Python would try it again at its end, and fail again."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


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
