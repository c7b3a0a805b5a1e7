"""Without a GPU, Triton's kernels run under its interpreter; it decides so when it is first imported."""

import os
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
