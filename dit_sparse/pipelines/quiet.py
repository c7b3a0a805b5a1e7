"""Keeps the libraries under the pipelines from writing into the command line's own output."""

from __future__ import annotations

import logging

import diffusers.utils.logging
import transformers.utils.logging
from huggingface_hub.utils import enable_progress_bars


def quiet_libraries() -> None:
    """Silence the notes and loading bars of diffusers, transformers and torch; downloads still show theirs.

    It changes the whole process, so only programs call it, never the library itself.
    """
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    # transformers switches the hub's bars off together with its own.
    enable_progress_bars()
    logging.getLogger("torch").setLevel(logging.ERROR)
