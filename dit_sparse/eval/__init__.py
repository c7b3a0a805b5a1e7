"""Evaluation: how near a sparse video is to the dense one."""

from dit_sparse.eval.fidelity import Fidelity, compare, psnr, ssim

__all__ = ["Fidelity", "compare", "psnr", "ssim"]
