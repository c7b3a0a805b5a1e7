"""Which method and density suit a model: its own attention, sampled in a dense run, under every method's plans."""

from dit_sparse.analyze.command import analyze
from dit_sparse.analyze.recommend import Summary, recommend, summaries
from dit_sparse.analyze.sample import Analysis, Candidate, Measured, candidates

__all__ = [
    "Analysis",
    "Candidate",
    "Measured",
    "Summary",
    "analyze",
    "candidates",
    "recommend",
    "summaries",
]
