"""Videos from prompt files: `prepare` a `Request`, then `run` it, while you `hold` its folder."""

from dit_sparse.generate.config import build_schedule
from dit_sparse.generate.hold import hold
from dit_sparse.generate.listener import Listener
from dit_sparse.generate.prompts import read_prompts
from dit_sparse.generate.request import Request
from dit_sparse.generate.run import Job, Outcome, prepare, run

__all__ = ["Job", "Listener", "Outcome", "Request", "build_schedule", "hold", "prepare", "read_prompts", "run"]
