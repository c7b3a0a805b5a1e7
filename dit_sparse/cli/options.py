"""Options and arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

SIZE, SAMPLING, OUTPUT, MACHINE, METRICS = "Size", "Sampling", "Output", "Machine", "Choice of orders"


def option(help: str, panel: str | None = None, *, default: str | bool = True, flag: str | None = None) -> Any:
    """An option; `default` is what the help shows as its default, in place of the value."""
    return typer.Option(*(() if flag is None else (flag,)), help=help, show_default=default, rich_help_panel=panel)


Json = Annotated[bool, option("Print JSON.", flag="--json")]
Prompt = Annotated[list[str] | None, option("A prompt itself, instead of a file.")]
Model = Annotated[str | None, option("Folder or hub id of a diffusers model.", default="the demo model")]
Height = Annotated[int | None, option("In pixels.", SIZE, default="the model's")]
Width = Annotated[int | None, option("In pixels.", SIZE, default="the model's")]
Frames = Annotated[int | None, option("Number of frames.", SIZE, default="the model's")]
Steps = Annotated[int | None, option("Denoising steps.", SAMPLING, default="the model's")]
Guidance = Annotated[float | None, option("Guidance scale.", SAMPLING, default="the model's")]
NegativePrompt = Annotated[str | None, option("What to avoid.", SAMPLING)]
Dtype = Annotated[str, option("auto, float32, float16 or bfloat16.", MACHINE)]
Device = Annotated[str, option("auto, cpu, cuda or cuda:N.", MACHINE)]
Parallel = Annotated[
    str | None,
    option("Ranks that share each video, such as ulysses=2 or ulysses=2,ring=2.", MACHINE, default="one"),
]
Ray = Annotated[
    str | None, option("Spread over a Ray cluster: auto, local or HOST:PORT.", MACHINE, default="this process")
]
RayWorkers = Annotated[
    int | None,
    option(
        "Ray workers, each with the model; with --parallel each is a group of ranks.",
        MACHINE,
        default="as many as have a GPU, or four cores, a rank",
    ),
]
Trace = Annotated[
    bool,
    typer.Option(
        "--trace/--no-trace",
        help="Write what each step, layer and head did, for `dit-sparse report`.",
        rich_help_panel=OUTPUT,
    ),
]
Offload = Annotated[str, option("none, model or group: keep weights off the GPU.", MACHINE)]


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """The numbers in `text`, with commas between them.

    Raises:
        ValueError: something else.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{flag} must be numbers with commas between them, such as 0.5,0.25, got {text!r}") from None


def prompt_file(positional: list[str] | None) -> Path | None:
    """The file that prompts are read from; `None` where they come from elsewhere."""
    return Path(positional[0]) if positional and positional[0] != "-" else None


def collect_prompts(positional: list[str], prompts: list[str] | None) -> list[str]:
    """The prompts of a file, or those given one by one.

    Raises:
        ValueError: both, neither, more than one file, or what is no prompt.
    """
    from dit_sparse.generate.prompts import clean_prompt, read_prompts

    if len(positional) > 1:
        raise ValueError(f"one prompt file is taken, got {len(positional)}: {', '.join(map(repr, positional))}")
    if positional and prompts:
        raise ValueError("give a prompt file or --prompt, not both")
    if not positional and not prompts:
        raise ValueError("no prompts: give a text file, - for standard input, or --prompt TEXT")
    return [clean_prompt(text) for text in prompts] if prompts else read_prompts(positional[0])
