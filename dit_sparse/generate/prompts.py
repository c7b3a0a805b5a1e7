"""Reads prompt files: UTF-8, one prompt a line, blank lines and `#` comments skipped."""

from __future__ import annotations

import re
import sys
from pathlib import Path

__all__ = ["clean_prompt", "parse_prompts", "read_prompts"]

_LINE_ENDS = re.compile(r"\r\n|\n|\r")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def read_prompts(source: str | Path) -> list[str]:
    """Prompts of the file `source`, in order; `-` is standard input.

    Raises:
        ValueError: no such file, a closed standard input, not UTF-8 text (with the line), or no prompt in it.
    """
    if str(source) == "-" and sys.stdin is None:
        raise ValueError("standard input is closed: give a text file, or --prompt TEXT")
    if str(source) == "-":
        return parse_prompts(sys.stdin.buffer.read(), "standard input")
    path = Path(source)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"no such prompt file: {source} (for a single prompt use --prompt)") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"prompt file {str(source)!r} cannot be read: {reason}") from None
    return parse_prompts(data, f"prompt file {source}")


def parse_prompts(data: bytes, name: str) -> list[str]:
    """Prompts in the bytes `data`; `name` is what error messages call them.

    Raises:
        ValueError: not UTF-8 text (with the line), or no prompt in it.
    """
    lines = _LINE_ENDS.split(_decode(data, name))
    for number, line in enumerate(lines, 1):
        if found := _CONTROL.search(line):
            code = f"\\x{ord(found.group()):02x}"
            raise ValueError(f"{name}, line {number}: control character {code}; it must be a UTF-8 text file")
    stripped = (line.strip() for line in lines)
    prompts = [line for line in stripped if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{name} holds no prompt: write one a line (blank lines and # comments are skipped)")
    return prompts


def clean_prompt(text: str) -> str:
    """One prompt from the command line, on one line.

    Raises:
        ValueError: it is blank, has control characters or is not UTF-8.
    """
    prompt = " ".join(part.strip() for part in _LINE_ENDS.split(text)).strip()
    if not prompt:
        raise ValueError("--prompt is empty: write what the video shows")
    if _CONTROL.search(prompt):
        raise ValueError("--prompt has control characters: it must be plain text")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("--prompt is not UTF-8 text") from None
    return prompt


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The decoder counts from behind the byte order mark, if there is one.
        start = error.start + len(data) - len(error.object)
        line = len(re.findall(rb"\r\n|\n|\r", data[:start])) + 1
        hint = (
            "it looks like UTF-16; save it as UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "save it as UTF-8"
        )
        raise ValueError(f"{name}, line {line}: byte 0x{data[start]:02x} is not UTF-8 text ({hint})") from None
