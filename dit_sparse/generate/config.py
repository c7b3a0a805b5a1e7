"""Builds the schedule from a config file and command-line options; the options win."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_sparse.schedule import Schedule

__all__ = ["DEFAULT_METHOD", "build_schedule", "flag", "read_config", "split_arguments"]

DEFAULT_METHOD = "adaspa"
_SCHEDULE_OPTIONS = (
    "warmup",
    "dense_layers",
    "refresh",
    "ramp",
    "remainder",
    "skip_factor",
    "drift",
    "noise_densities",
    "noise_slope",
    "layer_densities",
    "layer_thresholds",
    "strict",
    "never_slower",
)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Divide leftover `arguments` into positional ones and `--name value` or `--name=value` options; the last counts.

    Raises:
        ValueError: an option without a value, or with one hyphen.
    """
    positional: list[str] = []
    options: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or argument == "-":
            positional.append(argument)
            continue
        option, equals, value = argument.partition("=")
        if not option.startswith("--") or len(option) < 3:
            raise ValueError(f"no such option: {argument}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"no such option, or no value after it: {option}")
            value = rest.pop(0)
        options[option[2:].replace("-", "_")] = value
    return positional, options


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        ValueError: no such file, not JSON (with line and column), or not an object.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        config = json.loads(text, parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise ValueError(f"no such config file: {path}") from None
    except OSError as error:
        raise ValueError(f"config file {path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"config file {path} is not valid JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise ValueError(f"config file {path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"config file {path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f'config file {path} must hold an object such as {{"method": "adaspa"}}')
    return config


def build_schedule(
    method: str | None,
    config_path: Path | None,
    options: dict[str, str],
    other_options: Iterable[str] = (),
    preset: Schedule | None = None,
) -> Schedule:
    """Schedule of `method` with the parameters in `config_path`, overridden by `options` (name to text).

    Args:
        method: a method's name; `None` takes the config's, or `DEFAULT_METHOD`.
        other_options: names of the command's own options, for suggestions.
        preset: what there is before `options`, where neither a method nor a config is given.

    Raises:
        ValueError: an unknown method, option or key (the nearest is named), a bad value, or an option that would have
            no effect.
    """
    from dit_sparse.methods import find_method, parameters, parse_parameter
    from dit_sparse.schedule import Schedule

    config = {} if preset is None else preset.to_config()
    if config_path is not None:
        config = read_config(config_path)
        if "methods" in config:
            raise ValueError(
                f"config file {config_path} is one for `dit-sparse compare`: this command takes a single method, "
                f'such as {{"method": "{DEFAULT_METHOD}"}}'
            )
    if method is not None and config.get("method", method) != method:
        # The version is that of the other method's parameters.
        config.pop("version", None)
    config["method"] = method or config.get("method", DEFAULT_METHOD)
    if not isinstance(config["method"], str):
        raise ValueError(f"method must be a name such as {DEFAULT_METHOD!r}, got {config['method']!r}")
    cls = find_method(config["method"])
    own = [parameter.name for parameter in parameters(cls)]
    for name, text in options.items():
        if name in own:
            config[name] = parse_parameter(cls, name, text)
        elif name in _SCHEDULE_OPTIONS:
            config[name] = parse_parameter(Schedule, name, text)
        else:
            raise ValueError(_unknown_option(name, cls.name, own, other_options))
    try:
        schedule = Schedule.from_config(config)
    except ValueError as error:
        raise ValueError(f"config file {config_path}: {error}" if config_path else str(error)) from None
    _refuse_overridden(schedule, options)
    return schedule


def _refuse_overridden(schedule: Schedule, options: Mapping[str, str]) -> None:
    """Raise ValueError for one of `options` that has no effect beside another parameter, wherever that comes from."""
    overridden = schedule.overridden
    for name, text in options.items():
        if (by := overridden.get(name)) is not None:
            value = getattr(schedule if hasattr(schedule, by) else schedule.method, by)
            raise ValueError(
                f"{flag(name)} {text} would have no effect beside {flag(by)} {value!r:.60}, which decides: "
                f"leave it out, or give {flag(by)} none"
            )


def _unknown_option(name: str, method: str, own: list[str], other_options: Iterable[str]) -> str:
    if name in other_options:
        listing = ", ".join(map(flag, own)) or "no parameter"
        return f"method {method} takes no {flag(name)} (it has {listing})"
    known = [*own, *_SCHEDULE_OPTIONS, *other_options]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"did you mean {flag(close[0])}? " if close else ""
    listing = ", ".join(map(flag, (*own, *_SCHEDULE_OPTIONS)))
    return f"no such option: {flag(name)}; {guess}method {method} takes {listing}"


def flag(name: str) -> str:
    """The option of a command line that sets the parameter `name`."""
    return "--" + name.replace("_", "-")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
