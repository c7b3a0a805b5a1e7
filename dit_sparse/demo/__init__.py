"""The bundled demo model: where it lies, how it likes to be called, and the words it knows.

Importing this module needs neither torch nor diffusers; open the model with

    WanPipeline.from_pretrained(demo_model_path())(prompt, **demo_defaults)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

__all__ = ["demo_defaults", "demo_model_path", "unknown_words"]

demo_defaults: Mapping[str, int | float] = MappingProxyType(
    {"height": 96, "width": 128, "num_frames": 29, "num_inference_steps": 20, "guidance_scale": 3.5}
)
"""The size in pixels and frames, the steps and the guidance that the demo model was trained and measured for."""


def demo_model_path() -> Path:
    """Return the folder of the bundled demo model, in diffusers' format.

    Raises:
        FileNotFoundError: the package was installed without its model files.
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"the demo model is missing from {folder}: reinstall dit-sparse, or train it with scripts/train_demo.py"
        )
    return folder


def unknown_words(prompt: str) -> list[str]:
    """Return the words of `prompt` that the demo model's tokenizer maps to `<unk>`, each once, in order of appearance.

    The demo model ignores such words: a prompt of unknown words alone gives an arbitrary clip.
    """
    words = re.findall(r"\w+", prompt.lower())
    return list(dict.fromkeys(word for word in words if word not in _known_words()))


@lru_cache(maxsize=1)
def _known_words() -> frozenset[str]:
    tokenizer = json.loads((demo_model_path() / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    return frozenset(tokenizer["model"]["vocab"])
