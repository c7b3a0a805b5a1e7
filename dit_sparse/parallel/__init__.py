"""One sequence over several ranks: exchanges, rings, plans by head, and how heads are spread; knows no model."""

from dit_sparse.parallel.agree import Agreement
from dit_sparse.parallel.context import ContextParallel, Mesh
from dit_sparse.parallel.split import SequenceSplit

__all__ = ["Agreement", "ContextParallel", "Mesh", "SequenceSplit"]
