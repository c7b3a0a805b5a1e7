"""Evaluation: how near a sparse video is to the dense one."""

from dit_sparse.eval.attention import cosine_similarity, mass_recall, relative_l1
from dit_sparse.eval.fidelity import CONVENTIONS, Convention, Fidelity, compare, find_convention, psnr, ssim

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Fidelity",
    "compare",
    "cosine_similarity",
    "find_convention",
    "mass_recall",
    "psnr",
    "relative_l1",
    "ssim",
]
