"""The command that makes a video again, from what its run wrote down."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

__all__ = ["generate_command"]

_SIZES = ("height", "width", "frames", "steps", "guidance", "negative_prompt", "dtype", "device", "format", "fps")


def generate_command(line: Mapping[str, Any], *, compare_dense: bool = False) -> str:
    """The `dit-sparse generate` command, for a shell, of the manifest line `line`.

    Parameters that have the method's default are left out, and those without effect beside others.
    """
    options = {"prompt": line["prompt"], "seed": line["seed"], "model": line["model"]}
    options |= _parameters(line["config"])
    options |= {name: line[name] for name in _SIZES if line.get(name) is not None}
    if line.get("offload", "none") != "none":
        options["offload"] = line["offload"]
    words = ["dit-sparse", "generate"]
    for name, value in options.items():
        flag, text = "--" + name.replace("_", "-"), _text(value)
        # A value that begins with a hyphen would be taken for an option.
        words += [f"{flag}={text}"] if text.startswith("-") or not text else [flag, text]
    return shlex.join([*words, *(["--compare-dense"] if compare_dense else [])])


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    from dit_sparse.schedule import Schedule

    try:
        defaults = Schedule.from_config({"method": config["method"]}).to_config()
        without_effect = set(Schedule.from_config(dict(config)).overridden)
    except ValueError:  # a method of a package that is not installed here
        defaults, without_effect = {}, set()
    if config.get("density") is not None:
        defaults.pop("density", None)  # it is what people look for first
    left_out = without_effect | {"version"}
    return {k: v for k, v in config.items() if k not in left_out and (k == "method" or v != defaults.get(k, ...))}


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)
