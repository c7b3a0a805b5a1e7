"""Time and memory of a run on GPUs that are not here: published models, measured devices, a cost model."""

from dit_sparse.estimate.machines import MACHINES, Machine, find_machine
from dit_sparse.estimate.predict import Estimate, Mesh, Run, estimate
from dit_sparse.estimate.report import print_estimate
from dit_sparse.estimate.shapes import SHAPES, ModelShape, find_shape

__all__ = [
    "MACHINES",
    "SHAPES",
    "Estimate",
    "Machine",
    "Mesh",
    "ModelShape",
    "Run",
    "estimate",
    "find_machine",
    "find_shape",
    "print_estimate",
]
