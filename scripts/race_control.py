"""What racecheck says of roles that share nothing but Triton's own handshake and, if asked, an mbarrier.

    compute-sanitizer --tool racecheck python scripts/race_control.py
    compute-sanitizer --tool racecheck python scripts/race_control.py --mbarrier

Triton tells waiting warps their role by a byte in shared memory, written before and read after a named barrier. What
is reported here, a read at the kernel's entry and writes around `warp_specialize`, is how the tool sees that handshake;
in the Hopper kernel anything beyond it would be ours.
"""

from __future__ import annotations

import argparse

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def write(out, ready, number: gl.constexpr, WARPS: gl.constexpr, MBARRIER: gl.constexpr):
    """Role `number` writes its numbers; the last one first, if the others wait for it."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    rows = gl.arange(0, 32 * WARPS, layout)
    if MBARRIER and number < 2:
        mbarrier.wait(ready, 0)
    gl.store(out + gl.program_id(0) * 384 + number * 128 + rows, gl.full([32 * WARPS], number + 1, gl.int32, layout))
    if MBARRIER and number == 2:
        mbarrier.arrive(ready, count=1)


@gluon.jit
def handshake_kernel(out, MBARRIER: gl.constexpr):
    """Two roles of four warps and one of one, as in `hopper_kernels.forward_kernel`."""
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if MBARRIER:
        mbarrier.init(ready, count=1)
        fence_async_shared()
    gl.warp_specialize(
        [(write, (out, ready, 0, 4, MBARRIER)), (write, (out, ready, 1, 4, MBARRIER)),
         (write, (out, ready, 2, 1, MBARRIER))],
        [4, 1], [24, 24],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbarrier", action="store_true", help="the first two roles wait for the third")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this check needs a CUDA device")
    out = torch.zeros(4, 3, 128, dtype=torch.int32, device="cuda")
    handshake_kernel[(4,)](out, options.mbarrier, num_warps=4)
    want = torch.zeros_like(out)
    want[:, 0], want[:, 1], want[:, 2, :32] = 1, 2, 3
    if not torch.equal(out, want):
        raise SystemExit("the roles did not write what they should")
    print("every role ran")


if __name__ == "__main__":
    main()
