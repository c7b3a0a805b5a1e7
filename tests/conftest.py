"""What must be in the environment before anything is imported.

Without a GPU, Triton's kernels run under its interpreter. Tiny models would run dense, because nothing is faster there,
so tests have a table of costs in which sparse attention always pays.
"""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ["DIT_SPARSE_COSTS"] = str(Path(__file__).with_name("costs.json"))
