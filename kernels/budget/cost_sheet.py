#!/usr/bin/env python3
"""Writes docs/cost-sheet.md: what each kernel executes and moves, beside the least that it could.

    SIMULATED_DEVICE/run python3 kernels/budget/cost_sheet.py [COST]

COST is the example `cost`, which is built if not given. It runs one operator each time, on a simulated device that writes
its counts to the file in CUDA_SIM_STATS. All counts are of PTX, before ptxas has made machine code of it; kernels that do
the same work differ by a few per cent there. `budget.py` counts machine code.
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHEET = ROOT / "docs" / "cost-sheet.md"

BATCH, LENGTH, CHANNELS, STATES = 1, 512, 2048, 16
ELEMENTS = BATCH * LENGTH * CHANNELS
PROJECTIONS = 2 * 2 * BATCH * LENGTH * STATES  # bytes of B and C in bf16
PARAMETERS = 4 * CHANNELS * (STATES + 2)  # of A, D and the bias
SEGMENTS = LENGTH // 64  # as a plan splits this shape
SPLIT = (SEGMENTS - 1) / SEGMENTS  # the part that is run over for chunk states: all but a last or first segment
REACHED = 4 * (SEGMENTS - 1) * CHANNELS * (STATES + 1)  # bytes of those

# The least for each kernel, by the beginning of its name (the first that fits): the part of the elements that it runs over, instructions for
# each (step, channel, state) and for each (step, channel), special functions likewise, and bytes in all, each read and
# written once.
#
# Forward: Δ·A, its exponential, Δu·B, two multiply-adds; and two exponentials, a logarithm and a reciprocal of the step
# for softplus and gate. Bytes: u, Δ, z and out.
# Chunk state: without the sum over C, and without the gate, which leaves an exponential and a logarithm. Bytes: u and Δ, and
# what each segment but the last reaches.
# Backward: the forward's five, and a multiply-add each for the gradient of the state, Δu, Δ and A; a product each for
# those of B, C, the decay and the decay's logarithm; half a product of the tensor cores, which adds 128 terms, for two
# sums over channels of 32 each. For the step the forward's four, and the derivatives of softplus (a reciprocal). Bytes:
# what forward reads, ∂out, three gradients, and the states kept each 64 steps.
# Backward chunk state: Δ·A, exponential, C·∂y with what came, decay. Bytes: Δ, z, ∂out, and what each segment but the first hands on.
# S4D, with a pair for each state: the recurrence's complex multiply-add of four and C's of two, without exponentials; backward
# the states again, C̄·∂y, the decay's of four, two for ∂u, and the sums for Ā, B̄ and C, eight. For the step D's multiply-add,
# and backward the gradients of D and u. (The kernels do neither: a chunk is products on the tensor cores.) Bytes: u and out;
# backward u, ∂out and ∂u.
# Complex states, all of it in f64, which is counted with the others: ΔA, 16 instructions for its exponential and 17 for sine and
# cosine, their product, Δu·B, a multiply-add of four and C's of two; backward those but C's, C̄·∂y, two each for the terms of ∂B,
# ∂C and ∂u, four for the slope through the decay and for that by it, three for ∂Δ and two for ∂A. For the step an exponential
# and a logarithm of 20 each, and one of 20 with a quotient of 8 for the gate; backward the derivatives of both, a quotient
# each. Bytes as of the scan, whose B and C are twice as large.
# Convolution: a multiply-add for each tap and the five instructions of SiLU (two of them special functions); backward the
# same again for the input's gradient and a multiply-add for each weight's. Bytes: x and out; backward ∂out and ∂x instead.
# Optimizer, on bf16 with masters: a product and a sum in f64 for the norm; for the step four products and two sums of the
# moments, a root, a quotient (three instructions each beside the special one) and six products and sums. Bytes: the gradient;
# with it the master and two moments, read and written, and the rounded value.
# Updates, of 64 rows and one token: the forward's instructions, and the states read and written.
# Cross entropy, of L rows and D tokens: a comparison, a difference from the greatest, its product with log2(e), an exponential
# and a sum; all but the comparison again for the gradient. Bytes: logits, and the gradient in their place.
# Norm, of f32 sums and bf16 results: an addition, a multiply-add, two products; backward a product, two multiply-adds for the
# sums, a product and a multiply-add for the weight's gradient, a multiply-add and a product, and what is added. Bytes: x,
# residual, sum and out; backward the sum, its gradient, the result's gradient, and what is written.
# Attention, with heads of 64 and each pair of a query and a key that it sees: its share in products of the tensor cores, of 2,048
# terms each, of which forward has two, the backward kernel over queries five (two of them for the mean alone), that over keys four;
# forward a multiply-add for what is to be an exponential, this, a comparison and a sum; backward the multiply-add, the exponential, a
# difference and a product, and over queries the first two and a multiply-add once more. Decoding has 64 rows over as many keys as
# there are steps, with four heads of queries to one of keys, whose rows fill a quarter of a product. Bytes: q, k, v and out; backward q,
# k, v, ∂out and what is written; in decoding keys and values.
# Embedding, of a vocabulary of four times as many tokens: an addition for each element. Bytes: the rows read, the matrix
# written; of the sort, which has an instruction for each id, ids, positions and starts.
# Sampling, of f32 logits: a comparison for the highest; a difference, a product, a polynomial of five products and sums, and a sum
# for weights. Bytes: the logits, by each kernel.
TAPS, ROWS = 4, 64
VOCABULARY = 4 * BATCH * LENGTH
ROW_PART = ROWS * CHANNELS / ELEMENTS
D_HEAD, GROUP = 64, 4
HEADS = CHANNELS // D_HEAD
SEEN = HEADS * LENGTH * (LENGTH + 1) / 2 / ELEMENTS  # keys that queries see, for each element
SEEN_DECODING = ROWS * HEADS * LENGTH / ELEMENTS
CACHE = 2 * 2 * ROWS * LENGTH * HEADS // GROUP * D_HEAD  # bytes of keys and values


def attention(seen, products, others, exponentials, size):
    """The least of a kernel of attention, which has so many of each for a pair of a query and a key."""
    return (1, (0, seen * (products * D_HEAD * 32 / 2048 + others)), (0, seen * exponentials), size)


PAIRS = 4 * CHANNELS * (6 * STATES + 2)  # bytes of S4D's step sizes, A, B, C and D
COMPLEX_PARAMETERS = 4 * CHANNELS * (2 * STATES + 2)
LEAST = {
    "s4d_forward": (1, (6, 1), (0, 0), 4 * ELEMENTS + PAIRS),
    "s4d_backward_states": (1, (14, 2), (0, 0), 4 * ELEMENTS + 2 * PAIRS),
    "s4d_backward": (1, (14, 2), (0, 0), 6 * ELEMENTS + 2 * PAIRS),
    "s4d_update": (ROW_PART, (6, 1), (0, 0), ROWS * CHANNELS * (4 + 2 * 8 * STATES) + 4 * CHANNELS * (8 * STATES + 1)),
    "complex_scan_forward": (1, (45, 72), (0, 0), 8 * ELEMENTS + 2 * PROJECTIONS + COMPLEX_PARAMETERS),
    "complex_scan_backward": (1, (64, 88), (0, 0), 14 * ELEMENTS + 4 * PROJECTIONS + 2 * COMPLEX_PARAMETERS),
    "complex_scan_update": (ROW_PART, (45, 72), (0, 0),
                            ROWS * CHANNELS * (8 + 2 * 8 * STATES) + 2 * 4 * ROWS * STATES + COMPLEX_PARAMETERS),
    "attention_forward": attention(SEEN, 2, 4, 1, 8 * ELEMENTS + 4 * LENGTH * HEADS),
    "attention_backward_queries": attention(SEEN, 5, 7, 2, 10 * ELEMENTS + 12 * LENGTH * HEADS),
    "attention_backward_keys": attention(SEEN, 4, 4, 1, 12 * ELEMENTS + 8 * LENGTH * HEADS),
    "attention_split": attention(SEEN_DECODING, 2 * 16 / GROUP, 4 * 16 / GROUP, 16 / GROUP, CACHE),
    "conv_forward": (1, (0, TAPS + 5), (0, 2), 4 * ELEMENTS + 4 * CHANNELS * (TAPS + 1)),
    "conv_backward": (1, (0, 3 * TAPS + 8), (0, 2), 6 * ELEMENTS + 8 * CHANNELS * (TAPS + 1)),
    "conv_update": (ROW_PART, (0, TAPS + 5), (0, 2),
                    ROWS * CHANNELS * (4 + 2 * 2 * (TAPS - 1)) + 4 * CHANNELS * (TAPS + 1)),
    "rms_norm_forward": (1, (0, 4), (0, 0), 12 * ELEMENTS + 4 * CHANNELS),
    "rms_norm_backward": (1, (0, 8), (0, 0), 14 * ELEMENTS + 8 * CHANNELS),
    "embedding_sum": (1, (0, 1), (0, 0), 2 * ELEMENTS + 4 * VOCABULARY * CHANNELS),
    "embedding_sort": (1 / CHANNELS, (0, 1), (0, 0), 12 * BATCH * LENGTH + 8 * VOCABULARY),
    "state_update": (ROW_PART, (5, 4), (1, 4),
                     ROWS * CHANNELS * (8 + 2 * 4 * STATES) + 2 * 2 * ROWS * STATES + PARAMETERS),
    "loss_cross_entropy": (1, (0, 9), (0, 2), 4 * ELEMENTS + 8 * LENGTH),
    "sampling_maximum": (1, (0, 1), (0, 0), 4 * ELEMENTS),
    "sampling_choose": (1, (0, 13), (0, 0), 4 * ELEMENTS),
    "optimizer_squares": (1, (0, 2), (0, 0), 2 * ELEMENTS),
    "optimizer_update": (1, (0, 18), (0, 2), 28 * ELEMENTS),
    "scan_forward": (1, (5, 4), (1, 4), 8 * ELEMENTS + PROJECTIONS + PARAMETERS),
    "scan_chunk_state": (SPLIT, (4, 2), (1, 2), SPLIT * (4 * ELEMENTS + PROJECTIONS / 2) + PARAMETERS + REACHED),
    "scan_backward_chunk_state": (SPLIT, (4, 4), (1, 4),
                                  SPLIT * (6 * ELEMENTS + PROJECTIONS / 2) + PARAMETERS + REACHED),
    "scan_backward": (1, (13.5, 5), (1, 5), 14 * ELEMENTS + 4 * ELEMENTS * STATES / 64 + PROJECTIONS + PARAMETERS),
}

# The kernels that go through all states of all steps.
SEQUENCE_KERNELS = ("scan", "s4d_forward", "s4d_backward_states", "s4d_backward", "complex_scan_forward", "complex_scan_backward")

# The classes of the simulator, as they are shown.
UNITS = {
    "fp32": ("fp32", "half_x2"),
    "special": ("mufu",),
    "convert": ("conversion",),
    "integer": ("int_alu",),
    "shuffle": ("shuffle", "vote"),
    "tensor": ("tensor_mma",),
    "shared": ("shared_load", "shared_store", "shared_atomic"),
    "global": ("global_load", "global_store", "async_copy", "atomic"),
    "other": ("branch", "barrier", "fp64", "local", "other"),
}


def counts(cost, operator):
    with tempfile.NamedTemporaryFile(suffix=".json") as stats:
        environment = os.environ | {"CUDA_SIM_STATS": stats.name}
        subprocess.run([cost, *operator.split()], env=environment, check=True)
        text = pathlib.Path(stats.name).read_text()
    if not text:
        sys.exit("nothing was counted: run this on the simulated device")
    return json.loads(text)["kernels"]


def ratio(value, least):
    return f"{value / least:.2f}" if least else "-"


def rows(operator, kernel):
    """A row of each of the three tables."""
    name, by_class = kernel["name"], kernel["instructions"]
    first = f"| {operator} | `{name}` | "
    # Parameters are operands of machine instructions.
    issued = kernel["warp_instructions"] - by_class["param_const"]
    least = next((least for start, least in LEAST.items() if name.startswith(start)), None)
    per_32 = ELEMENTS / 32
    moved = kernel["unique_bytes_read"] + kernel["unique_bytes_written"]
    sectors = 32 * (kernel["global_sectors"] + kernel["atomic_sectors"])
    shared = sum(by_class[one] for one in UNITS["shared"])

    units = [f"{sum(by_class[one] for one in parts) / 1000:,.0f}" for parts in UNITS.values()]
    work = [f"{issued / 1000:,.0f}",
            f"{issued / per_32 / STATES:.2f}" if name.startswith(SEQUENCE_KERNELS) else "-"]
    memory = [f"{sectors / 1e6:.2f}", f"{sectors / ELEMENTS:.2f}", f"{moved / 1e6:.2f}",
              f"{kernel['shared_wavefronts'] / 1000:,.0f}", ratio(kernel["shared_wavefronts"], shared),
              f"{kernel['local_bytes']:,}"]
    times = sorted(kernel["model_us"].items(), key=lambda one: -one[1])
    bound = [f"{kernel['blocks']:,}", f"{kernel['lower_bound_us']:.2f}", kernel["bound_by"],
             ", ".join(f"{pipe} {time:.2f}" for pipe, time in times[1:4])]
    if least:
        part, (per_state, per_step), (special, special_step), least_bytes = least
        instructions = part * (per_state * STATES + per_step) * per_32
        functions = part * (special * STATES + special_step) * per_32
        work += [f"{instructions / 1000:,.0f}", ratio(issued, instructions), f"{functions / 1000:,.0f}",
                 ratio(by_class["mufu"], functions)]
        memory += [f"{least_bytes / 1e6:.2f}", ratio(moved, least_bytes), ratio(sectors, least_bytes)]
    else:
        work += ["-"] * 4
        memory += ["-"] * 3
    return [first + " | ".join(cells) + " |" for cells in (units + work, memory, bound)]


def head(*columns):
    return "| operator | kernel | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns)


INTRODUCTION = f"""# Cost sheet

What the kernels execute and move at B {BATCH}, L {LENGTH}, D {CHANNELS:,}, N {STATES}, bf16, with softplus, D, z and bias, as
the simulated device counts it, and the least that would do; the convolution has {TAPS} taps, and updates take {ROWS} rows.
Written by `kernels/budget/cost_sheet.py`, which says how the least is counted; nothing here is timed.

Instructions are those of warps, in thousands, of PTX, parameters left out. Bytes of sectors are what global accesses ask
of the caches, 32 bytes at a time; DRAM bytes are each distinct byte once. A shared access of a warp takes 1 wavefront for
each 128 bytes, so up to 4 where lanes move 16 bytes, and more only where lanes meet in a bank.
"""

# By hand, from benches/results/h200-times.csv and the counts above scaled to its shapes.
MEASURED = """\
Beside an H200 (`benches/results/h200-times.csv`), with the counts above scaled to shapes that fill it:

| operator | shape | model, ms | measured, ms | ratio |
|---|---|---|---|---|
| scan forward, one channel a lane | 8 x 2,048 x 2,048 | 0.161 (special) | 0.221 | 1.37 |
| scan forward, one channel a lane | 64 x 512 x 1,536 | 0.241 (special) | 0.309 | 1.28 |
| scan forward, four channels a lane | 2,048 x 16 x 1,536 | 0.242 (special) | 0.339 | 1.40 |
| scan forward, one state a lane | 1 x 2,048 x 1,024 | 0.0187 (issue) | 0.0284 | **1.52** |
| scan forward, two states a lane | 1 x 65,536 x 2,048 | 0.99 (issue) | 1.23 | 1.24 |
| scan backward | 8 x 2,048 x 2,048 | 0.495 (issue) | 0.90 | **1.82** |
| convolution forward | 8 x 2,048 x 2,048 | 0.032 (memory) | 0.038 | 1.19 |
| convolution backward | 8 x 2,048 x 2,048 | 0.048 (memory) | 0.058 | 1.21 |
| state update | 256 x 5,120 | 0.043 (memory) | 0.050 | 1.16 |

Backward is out by more than half because the model knows nothing of latency: two warps to a scheduler are all that 255
registers allow, and they use 0.58 of the issue slots; nor of the clock, which is a tenth lower where tensor cores are used
(`benches/tuning.md`). Where lanes have one state, three warps to a scheduler of three kinds meet in every tile, and wait for
each other. Lanes of one or two states execute more and ask the caches for more, of which blocks of 8 channels
waste half a sector: they are planned only where whole channels would leave the device empty or sequences be split."""

MODEL = """The time of each unit alone on an H200, scaled to its busiest processor; latency is not modelled, so this is a lower bound
and shows what would bind.
"""


def main():
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    cost = pathlib.Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else target / "release/examples/cost"
    if len(sys.argv) == 1:
        build = ["cargo", "build", "--release", "--locked", "--features", "cuda,lti", "--example", "cost"]
        subprocess.run(build, cwd=ROOT, check=True)
    operators = subprocess.run([cost, "--list"], capture_output=True, text=True, check=True).stdout.splitlines()
    tables = ([], [], [])
    for operator in operators:
        for kernel in counts(cost, operator):
            # Backward runs forward first, which has rows of its own; `upload` copies a table.
            is_first = "backward" in operator and kernel["name"].startswith(("scan_forward", "scan_chunk_state"))
            if is_first or kernel["name"] == "upload":
                continue
            for table, row in zip(tables, rows(operator, kernel)):
                table.append(row)
    instructions, memory, bound = ("\n".join(table) for table in tables)
    text = "\n".join([
        INTRODUCTION,
        "## Instructions",
        "",
        head(*UNITS, "all", "for 32 (step, channel, state)", "least", "ratio", "least special", "ratio"),
        instructions,
        "",
        "## Memory",
        "",
        head("sectors, MB", "bytes for (step, channel)", "DRAM, MB", "shared wavefronts", "for each access", "local bytes",
             "least, MB", "DRAM ratio", "sector ratio"),
        memory,
        "",
        "## What would bind",
        "",
        MODEL,
        head("blocks", "bound, µs", "by", "next, µs"),
        bound,
        "",
        MEASURED,
        "",
    ])
    SHEET.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
