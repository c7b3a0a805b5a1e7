"""Methods against dense attention on one model: `make_cases`, `prepare`, then `run`."""

from dit_sparse.compare.cases import Case, floor_cases, make_cases, read_plan
from dit_sparse.compare.record import read_record
from dit_sparse.compare.run import Job, Listener, prepare, run

__all__ = ["Case", "Job", "Listener", "floor_cases", "make_cases", "prepare", "read_plan", "read_record", "run"]
