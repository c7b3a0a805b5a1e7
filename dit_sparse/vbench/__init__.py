"""VBench: its prompts, videos for them, scores in its own environment, and the leaderboard's table."""

from dit_sparse.vbench.dimensions import DIMENSIONS, VERSION, find_dimensions
from dit_sparse.vbench.job import JobReport, ScoreItem, ScoreJob, run_job
from dit_sparse.vbench.preflight import Request, Survey, survey
from dit_sparse.vbench.scoring import score
from dit_sparse.vbench.table import Scores, read_scores, totals

__all__ = [
    "DIMENSIONS",
    "VERSION",
    "JobReport",
    "Request",
    "ScoreItem",
    "ScoreJob",
    "Scores",
    "Survey",
    "find_dimensions",
    "read_scores",
    "run_job",
    "score",
    "survey",
    "totals",
]
