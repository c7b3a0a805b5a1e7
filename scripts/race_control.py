"""What racecheck says of warp specialisation alone: a kernel whose roles share nothing but Triton's own handshake.

    compute-sanitizer --tool racecheck python scripts/race_control.py

Triton tells waiting warps their role by a byte in shared memory, written before and read after a named barrier. What
is reported here, a read at the kernel's entry and writes around `warp_specialize`, is how the tool sees that handshake;
in the Hopper kernel anything beyond it would be ours.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def write(out, number: gl.constexpr, WARPS: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    rows = gl.arange(0, 32 * WARPS, layout)
    gl.store(out + gl.program_id(0) * 512 + number * 128 + rows, gl.full([32 * WARPS], number + 1, gl.int32, layout))


@gluon.jit
def handshake_kernel(out):
    """Two roles of four warps and one of one, as in `hopper_kernels.forward_kernel`; each writes its own numbers."""
    gl.warp_specialize([(write, (out, 0, 4)), (write, (out, 1, 4)), (write, (out, 2, 1))], [4, 1], [24, 24])


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("this check needs a CUDA device")
    out = torch.zeros(4, 4, 128, dtype=torch.int32, device="cuda")
    handshake_kernel[(4,)](out, num_warps=4)
    want = torch.zeros_like(out)
    want[:, 0], want[:, 1], want[:, 2, :32] = 1, 2, 3
    if not torch.equal(out, want):
        raise SystemExit("the roles did not write what they should")
    print("every role ran")


if __name__ == "__main__":
    main()
