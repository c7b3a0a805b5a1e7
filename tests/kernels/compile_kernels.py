"""Compiles GPU kernels without a GPU; test_compiled.py runs it and writes lists of jobs, a line of JSON each."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from dit_sparse.kernels import (
    best_within_kernels,
    hopper_kernels,
    hopper_search_kernels,
    output_error_kernel,
    remainder_error_kernels,
    remainder_kernels,
    routed_kernel,
    skip_kernel,
    triton_kernels,
)

ROW_STRIDES = [f"{name}_{dim}" for name in "qkvo" for dim in ("sb", "sh", "sn")]
ROW_STRIDES += [f"{name}_{dim}" for name in ("mk", "mv", "slope", "x", "m", "vm", "p") for dim in ("sb", "sh", "sm")]
ROW_STRIDES += ["slope_sd", "x_sn", "p_sd"]
DATA = ("q", "k", "v", "out", "x", "mean_k", "mean_v", "slopes", "products", "means", "rounded", "v_rounded")
NUMBERS = ("scale", "floor", "largest_spread", "base")
FLOATS = ("lse", "bias", "spread", "mean", "square", "v_mean", "norms", "overlaps", "errors", "sums")
LISTS = ("counts", "indices", "partial_counts", "partial_indices", "bits", "q_offsets", "k_offsets", "offsets", "taken")
LISTS += ("places", "skips")


def signature(kernel, constants: dict, special: dict[str, str], data: str) -> dict[str, str]:
    """Types of a kernel's arguments by their names."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in special:
            types[name] = special[name]
        elif name in LISTS:
            types[name] = "*i32"
        elif name in (*NUMBERS, *FLOATS):
            types[name] = "fp32" if name in NUMBERS else "*fp32"
        else:
            types[name] = f"*{data}" if name in DATA else "i32"
    return types


def portable(job: dict):
    constants = dict(
        D=job["dim"], DV=job["dim"], BLOCK_D=job["padded"], BLOCK_DV=job["padded"], BLOCK_M=job["block_m"],
        BLOCK_N=job["block_n"], Q_TILES=1, K_TILES=1, PARTIAL=job["partial"], RETURN_LSE=True,
        MEANS=job["remainder"] != "none", SLOPES=job["remainder"] == "value", UPCAST=False,
    )  # fmt: skip
    return triton_source(triton_kernels.forward_kernel, constants, job), options_of(job)


def skipping(job: dict):
    constants = dict(
        D=job["dim"], DV=job["dim"], BLOCK_D=job["padded"], BLOCK_DV=job["padded"], BLOCK_M=job["block_m"],
        BLOCK_N=job["block_n"], PARTIAL=job["partial"], RETURN_LSE=True, UPCAST=False,
    )  # fmt: skip
    return triton_source(skip_kernel.skip_kernel, constants, job), options_of(job)


def routing(job: dict):
    constants = dict(
        D=job["dim"], DV=job["dim"], BLOCK_D=job["padded"], BLOCK_DV=job["padded"], BLOCK_M=job["block_m"],
        BLOCK_N=job["block_n"], K_TILES=1, TILE=min(64, job["block_n"]), MEANS=True, UPCAST=False,
    )  # fmt: skip
    special = {"needed": "*fp32"} | dict.fromkeys(("sizes", "forced", "stand_ins", "pairs"), "*i32") | {"chosen": "*u8"}
    return triton_source(routed_kernel.routed_kernel, constants, job, special), options_of(job)


def moments(job: dict):
    sizes = dict(D=job["dim"], DV=job["dim"], BLOCK_D=job["padded"], BLOCK_DV=min(128, job["padded"]))
    sizes |= dict(BLOCK_N=job["block_n"], ROUNDED=True)
    if job["remainder"] == "value":
        kernel = remainder_kernels.products_kernel
        sizes |= dict(PARTS=-(-job["dim"] // 128), SPAN=job["span"], SINGLE=job["single"], UPCAST=False)
    else:
        kernel = remainder_kernels.sums_kernel
        sizes |= dict(BLOCK_DV=job["padded"], PARTS=4, CENTRED=True, VALUES=True)
    return triton_source(kernel, sizes, job), options_of(job)


def weights(job: dict):
    constants = dict(
        D=job["dim"], BLOCK_D=job["padded"], BLOCK_M=job["block"], BLOCK_N=job["block"], MASS=True, SCORES=True,
        LEVELS=True, UPCAST=False,
    )  # fmt: skip
    special = {"kept": "*u8", "levels": "*i8", "scores": "*fp32"}
    special |= dict.fromkeys(("q_mean", "q_square", "k_mean", "k_square"), "*fp32")
    return triton_source(remainder_kernels.weigh_kernel, constants, job, special), options_of(job)


def shares(job: dict):
    special = {"levels": "*i8", "scores": "*fp32", "weights": f"*{job['dtype']}"}
    constants = dict(BLOCK_M=4, BLOCK_N=512, LEVELS=True)
    return triton_source(remainder_kernels.share_kernel, constants, job, special), options_of(job)


def errors(job: dict):
    constants = dict(
        D=job["dim"], BLOCK_D=job["padded"], BLOCK_M=job["block_m"], BLOCK_N=job["block_n"], SPAN=64, UPCAST=False
    )
    return triton_source(remainder_error_kernels.remainder_error_kernel, constants, job), options_of(job)


def changes(job: dict):
    constants = dict(
        SLOTS=job["slots"], D=job["dim"], DV=job["dim"], BLOCK_D=job["padded"], BLOCK_DV=job["padded"],
        BLOCK_M=job["block_m"], BLOCK_N=job["block_n"], SPAN=32, SINGLE=job["single"], UPCAST=False,
    )  # fmt: skip
    return triton_source(output_error_kernel.output_error_kernel, constants, job), options_of(job)


def choice(job: dict):
    kernel = getattr(best_within_kernels, job["name"])
    sizes = dict(PASS=7, PASSES=8, ROWS=16, BLOCK=job["block"])
    constants = {name: value for name, value in sizes.items() if name in kernel.arg_names}
    special = dict.fromkeys(("counts", "free", "ties", "before"), "*i64") | {"budgets": "*fp64", "mass": "*fp32"}
    special |= dict.fromkeys(("keys", "q_sizes", "k_sizes"), "*i32")
    special |= dict.fromkeys(("q_text", "k_text", "kept"), "*u8")
    return ASTSource(kernel, signature(kernel, constants, special, "fp32"), constexprs=constants), dict(num_warps=8)


def options_of(job: dict) -> dict[str, int]:
    return dict(num_warps=job["warps"], num_stages=job["stages"])


def triton_source(kernel, constants: dict, job: dict, special: dict[str, str] | None = None) -> ASTSource:
    types = signature(kernel, constants, special or {}, job["dtype"])
    # What a launch finds out of its arguments: tensors and their rows begin at multiples of 16.
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name][0] == "*" or name in ROW_STRIDES]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return ASTSource(kernel, types, constexprs=constants, attrs=attributes)


def layout(*shape: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(shape), gl.bfloat16)


def descriptor(*shape: int, data: str = "bf16") -> str:
    return f"tensordesc<{data}{list(shape)!r},{layout(*shape)!r}>"


def search(job: dict):
    box = (64, job["dim"])
    constants = dict(
        SLOTS=job["slots"], D=job["dim"], BLOCK_N=64, STAGES=4, FLAT=layout(*box), PRODUCER_REGISTERS=24,
        CONSUMER_REGISTERS=240,
    )  # fmt: skip
    special = dict.fromkeys(("k_desc", "v_desc"), descriptor(1, 1, *box))
    kernel = hopper_search_kernels.search_kernel
    return GluonASTSource(kernel, signature(kernel, constants, special, "bf16"), constexprs=constants), {"num_warps": 4}


def hopper(job: dict):
    constants = dict(
        GROUPS=job["groups"], D=job["dim"], BLOCK_N=128, K_TILES=1, PAIR=job["pair"], Q_TILES=1,
        STAGES_K=job["stages"][0], STAGES_V=job["stages"][1], Q_IN_REGISTERS=job["early"] or job["dim"] == 64,
        PARTIAL=job["partial"], RETURN_LSE=True, EARLY=job["early"], FLAT=layout(128, job["dim"]),
        MEANS=job["remainder"] != "none", SLOPES=job["remainder"] == "value", PRODUCER_REGISTERS=24,
        CONSUMER_REGISTERS=240,
    )  # fmt: skip
    box = descriptor(1, 1, 64, 64) if job["pair"] else descriptor(1, 1, 128, job["dim"])
    rows = descriptor(1, 1, 64, job["dim"])
    special = {"q_desc": rows, "o_desc": rows}
    special |= dict.fromkeys(("k_desc", "v_desc", "mean_k_desc", "mean_v_desc", "slope_desc", "bias_desc"), box)
    if job["remainder"] != "none":
        special["bias_desc"] = descriptor(1, 1, 1, 128, data="fp16")
    kernel = hopper_kernels.forward_kernel
    options = dict(num_warps=4) | ({} if job["registers"] is None else {"maxnreg": job["registers"]})
    return GluonASTSource(kernel, signature(kernel, constants, special, "bf16"), constexprs=constants), options


def racing(program: str) -> bool:
    """Whether copies may overwrite what a product in flight still reads.

    Triton (3.6 to 3.9) gives a tile in a loop no slot to spare for that where other code reads it too.
    """
    tiles = dict(re.findall(r"(%\S+) = ttg\.memdesc_index (%[^\s\[]+)", program))
    tiles |= {new: tiles.get(old, old) for new, old in re.findall(r"(%\S+) = ttg\.memdesc_trans (%\S+)", program)}
    copied = {tiles.get(to) for to in re.findall(r"async_copy_global_to_local %\S+, (%\S+)", program)}
    loaded = {tiles.get(x) for x in re.findall(r"ttg\.local_load (%\S+)", program)}
    products = re.findall(r"ttng\.warp_group_dot (%\S+), (%\S+),", program)
    multiplied = {tiles.get(x) for pair in products for x in pair}
    in_flight = re.search(r"warp_group_dot_wait .*pendings = [1-9]", program) is not None
    return in_flight and bool((copied & loaded & multiplied) - {None})


def report(job: dict) -> dict:
    kinds = {"triton": portable, "moments": moments, "errors": errors, "changes": changes, "hopper": hopper}
    kinds |= {"weights": weights, "shares": shares, "choice": choice, "search": search, "skip": skipping}
    kinds |= {"routing": routing}
    source, options = kinds[job["kernel"]](job)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", job["target"], 32), options=options)
    assert "registers" in log.getvalue(), "the assembler's log is empty"
    return {
        "shared": compiled.metadata.shared,
        "products": compiled.asm["ptx"].count("wgmma.mma_async"),
        "serialized": "serialized" in log.getvalue(),
        "racing": racing(compiled.asm["ttgir"]),
    }


if __name__ == "__main__":
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    for line in sys.stdin:
        found = [report(job) for job in json.loads(line)]
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
