"""Time the GPU kernels: the same as `dit-sparse bench kernels`, for a checkout that is not installed.

python scripts/bench_kernels.py --out kernels.json                          # everything; some minutes on one GPU
python scripts/bench_kernels.py --shapes wan-1.3b,flux --sections kernels   # a part of it
"""

import sys

from dit_sparse.cli import main

main(["bench", "kernels", *sys.argv[1:]])
