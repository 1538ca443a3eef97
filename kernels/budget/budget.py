#!/usr/bin/env python3
"""Compiles the kernels for sm_90 and holds them to their budgets.

    python3 kernels/budget/budget.py [--strict] [--json FILE] [--built FOLDER]

It needs nvcc, cuobjdump and nvdisasm, in $CUDA_HOME/bin or on the PATH, and no Python package. With --built it takes the
fatbins of a build of the crate for sm_90 (CUDA_COMPUTE_CAP=90) out of cargo's folder, and does not time nvcc. What it prints:

- of each kernel: registers, bytes spilled (both ways), static shared memory, and dynamic where it is one struct;
- of the main loops of the scan with at most 16 states and of S4D, bf16: machine instructions for each (time step, channel, state), by
  class, which are those of a warp for 32 of them. They are counted in the machine code, along the longest path around the
  loop (sass.py says how loops are found). Left out are ways that only a warp takes in which a product of zero and infinity
  has come up (the kernel then sums each step alone: an inner loop of the backward's tile loop), those for S4D's tiles that
  are not whole or not finite and for more than 32 pairs (inner loops, too), and ways for a warp that has come apart;
- the number of kernels, and how long nvcc takes on two cores.

Exit code 1 if a rule is broken: a fast kernel (all but the `general` ones, and those that compute in f64: S4D's tables and
gradients of parameters, and the scan with complex states, whose sines of large angles take local memory) spills or uses local
memory, or a kernel has an atomic on floating-point numbers. Instruction and time budgets are reported, and fail with --strict only.
"""
import argparse
import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import sass

ROOT = pathlib.Path(__file__).resolve().parents[2]
ARCH = "90"

# A budget in instructions for each (time step, channel, state), and one for the build in seconds.
FORWARD, BACKWARD, SPLIT, BUILD = 7.5, 26.0, 1.9, 120.0
# Of S4D, for each (step, channel, pair), where a scan would take six forward. The longest path has ways in it that a usual
# tile does not take: loads of channels one by one, the masks of one that is not finite and, backward, all three ways in which
# a tile comes in (one that comes in boxes executes 8.0 instructions by Nsight Compute).
S4D_FORWARD, S4D_BACKWARD = 5.0, 9.0


def constants(folder):
    """The constants of `kernels/<folder>/params.cuh` by name, those of a namespace within as `namespace::NAME`."""
    values, spaces = {}, []
    text = (ROOT / "kernels" / folder / "params.cuh").read_text()
    for space, end, listed in re.findall(r"^namespace (\w+) \{$|^(\})$|^constexpr \w+ ([^;]+);", text, re.M):
        if space:
            spaces.append(space)
        elif end:
            spaces.pop()
        for name, value in re.findall(r"(\w+) = ([^,]+)", listed):
            within = "::".join(spaces[1:])
            known = {key.rpartition("::")[2]: one for key, one in values.items() if key.rpartition("::")[0] in ("", within)}
            values[f"{within}::{name}".removeprefix("::")] = eval(f"({value})".replace("/", "//"), {"QUAD": 4} | known)
    return values


# The steps of a tile and the channels of a lane in each fast forward kernel of at most 16 states. A lane carries 4 states of
# each; one of the backward kernel of two channels, with tiles of 8 steps in chunks of 64.
SCAN = constants("scan")
TILES = {"one": (SCAN["forward::ONE_TILE"], 1), "four": (SCAN["forward::FOUR_TILE"], 4)}
STATES, CHUNK = SCAN["STATE_VEC"], SCAN["CHUNK_STEPS"]
BACKWARD_TILE, BACKWARD_CHANNELS = SCAN["backward::TILE"], SCAN["backward::CHANNELS_PER_LANE"]
COMPLEX_SCAN = constants("complex_scan")
# A warp of S4D has a tile of one channel.
S4D = constants("s4d")
S4D_UNITS = S4D["TILE"] * S4D["PAIRS"] // 32

FLOAT_ATOMIC = r"(RED|REDG|ATOM|ATOMG|ATOMS)\.(.*\.)?(F16|F32|F64|BF16)(x\d)?(\.|_|$).*|REDAS.*F.*"


def tool(name):
    folders = [os.path.join(os.environ[key], "bin") for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    path = shutil.which(name, path=os.pathsep.join(folders + [os.environ.get("PATH", "")]))
    return path or sys.exit(f"{name} was not found: set CUDA_HOME, or put it on the PATH")


def flags():
    """What build.rs gives nvcc, read there so that the two cannot come to differ."""
    listed = re.search(r"let mut flags: Vec<_> = \[(.*?)\]", (ROOT / "build.rs").read_text())
    if not listed:
        sys.exit("build.rs no longer lists nvcc's flags where this script looks for them")
    return re.findall(r'"([^"]+)"', listed[1])


def output_of(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


class Kernel:
    def __init__(self, name, source, registers, shared, local, spilled):
        self.name, self.source, self.code = name, source, []
        self.registers, self.shared, self.local, self.spilled = registers, shared, local, spilled

    @property
    def is_fast(self):
        of_f64 = self.name.startswith("complex_scan") or self.name in ("s4d_tables", "s4d_gradients", "s4d_recurrence")
        return "general" not in self.name and not of_f64

    def instructions(self):
        return [one for one in self.code if not isinstance(one, str)]

    def dynamic_shared(self):
        """Bytes of a kernel whose dynamic shared memory is one struct."""
        size = 4 if self.name.endswith("_f32") else 2
        kernel, prefix = self.source.stem, ""
        if self.source.parent.name in ("s4d", "complex_scan"):
            return (S4D if self.source.parent.name == "s4d" else COMPLEX_SCAN).get(f"{kernel}::SMEM", 0)
        if match := re.match(r"scan_forward_few_channels_(one|two)_", self.name):
            prefix = match[1].upper() + "_"
        fixed = SCAN.get(f"{kernel}::{prefix}SMEM", 0) if self.source.parent.name == "scan" else 0
        return fixed + size * SCAN.get(f"{kernel}::{prefix}SMEM_PER_BYTE", 0) if fixed else 0


def compiled(folder):
    """Sources with fatbins and nvcc's messages, and nvcc's time for them with two at a time, for one architecture and PTX as
    build.rs makes them."""
    nvcc, common = tool("nvcc"), flags()

    def build(source):
        fatbin = folder / f"{source.parent.name}_{source.stem}.fatbin"
        code = [f"-gencode=arch=compute_{ARCH},code={code}_{ARCH}" for code in ("sm", "compute")]
        log = output_of(nvcc, *common, *code, "-fatbin", "-o", fatbin, source)
        return source, fatbin, log

    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(build, sources()))
    return built, time.monotonic() - start


def sources():
    """The longest first, so that none is left to compile alone at the end."""
    return sorted((ROOT / "kernels").glob("*/*.cu"), key=lambda path: -path.stat().st_size)


def of_cargo(target):
    """What build.rs has made of each source, the newest where several builds have it."""
    def newest(source):
        name = f"*/build/selective-scan-*/out/{source.parent.name}/{source.stem}.fatbin"
        made = [path for path in target.glob(name) if path.stat().st_size and path.with_suffix(".log").exists()]
        if not made:
            sys.exit(f"{target} has no fatbin of {source.relative_to(ROOT)}: build the crate with its feature `cuda` first")
        fatbin = max(made, key=lambda path: path.stat().st_mtime)
        named = fatbin.with_suffix(".d").read_text().partition(": ")[2].replace("\\\n", " ").split()
        if any((ROOT / path).stat().st_mtime > fatbin.stat().st_mtime for path in named):
            sys.exit(f"{fatbin} is older than what it is made of: build the crate again")
        return source, fatbin, fatbin.with_suffix(".log").read_text()

    return [newest(source) for source in sources()]


def kernels_of(built, folder):
    kernels = {}
    for source, fatbin, log in built:
        cubins = folder / f"{source.parent.name}_{source.stem}"
        cubins.mkdir()
        subprocess.run([tool("cuobjdump"), "-xelf", "all", fatbin], cwd=cubins, check=True, capture_output=True)
        spills = {
            name: int(stores) + int(loads)
            for name, stores, loads in re.findall(
                r"Function properties for (\w+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        }
        for cubin in cubins.iterdir():
            usage = output_of(tool("cuobjdump"), "--dump-resource-usage", cubin)
            pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
            for name, registers, stack, shared, local in re.findall(pattern, usage):
                # The driver keeps 1 KiB of each block's shared memory for itself, which cuobjdump counts in.
                kernels[name] = Kernel(name, source, int(registers), max(0, int(shared) - 1024), int(stack) + int(local),
                                       spills.get(name, 0))
            for name, code in sass.parse(output_of(tool("nvdisasm"), "-c", "-g", cubin)).items():
                if name in kernels:
                    kernels[name].code = code
    for kernel in kernels.values():
        if not kernel.instructions():
            sys.exit(f"no machine code of {kernel.name} was found, so nothing can be said of it")
    return kernels


def per_unit(counts, units):
    return collections.Counter({name: count / units for name, count in counts.items()})


def forward_loop(kernel, variant):
    """The tile loop: the innermost that synchronises. The step loop within is gone around as often as it takes for one
    exponential of each state."""
    steps, channels = TILES[variant]
    units = steps * channels * STATES
    found = sass.loops(kernel.code)
    tiles = [loop for loop in found if loop.count(r"BAR.*")]
    tile = min(tiles, key=lambda loop: len(loop.instructions))

    def trips(loop):
        times = units / max(1, loop.count(r"MUFU\.EX2"))
        if times != int(times):
            raise ValueError(f"{kernel.name}: a loop within the tile's with {loop.count('MUFU.EX2')} exponentials")
        return times

    return per_unit(sass.cost(tile, found, trips), units)


def backward_loops(kernel):
    """The tile loop, which alone uses the tensor cores and shuffles; the loop before it that finds the states and decays of
    all tiles, one exponential each; and what surrounds both in the chunk of 64 steps."""
    units = BACKWARD_TILE * BACKWARD_CHANNELS * STATES
    found = sass.loops(kernel.code)
    tiles = [loop for loop in found if loop.count(r".MMA.*") and loop.count("SHFL.*")]
    tile = min(tiles, key=lambda loop: len(loop.instructions))
    part = min((loop for loop in found if tile in sass.inside(loop, found)), key=lambda loop: len(loop.body))

    # One goes through a tile at a time, and where more states are kept another through two.
    def going_through(tiles):
        within = [loop for loop in found if loop is not tile and loop.header in part.body]
        return [loop for loop in within if loop.count(r"MUFU\.EX2") == tiles * units and not loop.count("SHFL.*")]

    states, of_two = going_through(1), going_through(2)
    if len(states) != 1:
        raise ValueError(f"{kernel.name}: {len(states)} loops look like that which finds states")
    # The loop within sums each step alone, and is rarely gone around.
    within = sass.cost(tile, found, lambda loop: None)
    around = sass.cost(part, found, lambda loop: 0 if loop in (tile, *states, *of_two) else 1)
    return {
        "tiles, back": per_unit(within, units),
        "tiles, states": per_unit(sass.cost(states[0], found, lambda loop: 1), units * CHUNK / (CHUNK - BACKWARD_TILE)),
        "staging": per_unit(around, CHUNK * BACKWARD_CHANNELS * STATES),
    }


def s4d_loop(kernel):
    """The loop over tiles, which synchronises. Loops within are rare, but for that of backward over eight pairs at a time."""
    found = sass.loops(kernel.code)
    tiles = [loop for loop in found if loop.count(r"BAR.*") and loop.count(r".MMA.*")]
    innermost = [loop for loop in tiles if not any(other in tiles for other in sass.inside(loop, found))]
    tile = max(innermost, key=lambda loop: loop.count(r".MMA.*"))

    def trips(loop):
        return S4D["PAIRS"] // 8 if loop.count(r".MMA.*") else None

    return per_unit(sass.cost(tile, found, trips), S4D_UNITS)


def table(head, rows):
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))
    print()


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--strict", action="store_true", help="missed budgets fail too")
    arguments.add_argument("--built", metavar="FOLDER", type=pathlib.Path, help="cargo's folder (target) of a build")
    arguments.add_argument("--json", metavar="FILE", help="write the figures there as well")
    arguments = arguments.parse_args()
    sys.setrecursionlimit(100_000)

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        built, seconds = (of_cargo(arguments.built.resolve()), None) if arguments.built else compiled(folder)
        kernels = kernels_of(built, folder)
    broken, missed, figures = [], [], {"kernels": {}, "loops": {}, "build_seconds": seconds and round(seconds, 1)}

    rows = []
    for kernel in sorted(kernels.values(), key=lambda kernel: (kernel.source, kernel.name)):
        local = sum(sass.classify(one.opcode) == "local" for one in kernel.instructions())
        atomics = sorted({one.opcode for one in kernel.instructions() if re.fullmatch(FLOAT_ATOMIC, one.opcode)})
        if kernel.is_fast and (kernel.spilled or local):
            broken.append(f"{kernel.name} spills {kernel.spilled} bytes, in {local} instructions on local memory")
        if atomics:
            broken.append(f"{kernel.name} has atomics on floating-point numbers: {', '.join(atomics)}")
        rows.append([kernel.name, str(kernel.registers), str(kernel.spilled), str(local), str(kernel.shared),
                     str(kernel.dynamic_shared() or "-"), str(len(kernel.instructions()))])
        figures["kernels"][kernel.name] = {
            "registers": kernel.registers, "spilled": kernel.spilled, "local": local, "shared": kernel.shared}
    table(["kernel (sm_90)", "registers", "spilled", "local", "shared", "dynamic", "instructions"], rows)

    loops = {}
    for variant in TILES:
        for pass_ in ("forward", "chunk_state"):
            if kernel := kernels.get(f"scan_{pass_}_{variant}_bf16"):
                loops[f"{kernel.name}, tiles"] = forward_loop(kernel, variant)
    backward = kernels.get("scan_backward_fast_bf16")
    if backward:
        for name, counts in backward_loops(backward).items():
            loops[f"{backward.name}, {name}"] = counts
    for name in ("s4d_forward_bf16", "s4d_chunk_state_bf16", "s4d_backward_states_bf16", "s4d_backward_bf16"):
        if kernel := kernels.get(name):
            loops[f"{name}, tiles"] = s4d_loop(kernel)
    shown = [name for name in [*sass.CLASSES, "integer"] if any(counts[name] for counts in loops.values())]
    table(["instructions per step, channel, state", "all", *shown],
          [[name, f"{sum(counts.values()):.2f}", *(f"{counts[one]:.2f}" if counts[one] else "-" for one in shown)]
           for name, counts in loops.items()])
    figures["loops"] = {name: dict(counts, all=sum(counts.values())) for name, counts in loops.items()}

    def total(name):
        return sum(loops[name].values())

    judged = []

    def judge(what, value, budget, unit=""):
        met = value <= budget
        judged.append([what, f"{value:.2f}{unit}", f"{budget:g}{unit}", f"{value / budget:.2f}", "met" if met else "MISSED"])
        if not met:
            missed.append(what)

    for variant in TILES:
        forward, chunk_state = f"scan_forward_{variant}_bf16, tiles", f"scan_chunk_state_{variant}_bf16, tiles"
        if forward in loops:
            judge(f"scan forward, {variant}", total(forward), FORWARD)
        if forward in loops and chunk_state in loops:
            judge(f"split / unsplit forward, {variant}", (total(forward) + total(chunk_state)) / total(forward), SPLIT)
    if backward:
        judge("scan backward, both tile loops", total("scan_backward_fast_bf16, tiles, back")
              + total("scan_backward_fast_bf16, tiles, states"), BACKWARD)
    if "s4d_forward_bf16, tiles" in loops:
        judge("S4D forward", total("s4d_forward_bf16, tiles"), S4D_FORWARD)
    if "s4d_backward_bf16, tiles" in loops:
        judge("S4D backward, both kernels",
              total("s4d_backward_states_bf16, tiles") + total("s4d_backward_bf16, tiles"), S4D_BACKWARD)
    if seconds is not None:
        judge("nvcc, two at a time", seconds, BUILD, " s")
    table(["budget", "is", "may be", "ratio", ""], judged)

    print(f"{len(kernels)} kernels in {len({kernel.source for kernel in kernels.values()})} files")
    print("no atomic on floating-point numbers" if not any("atomics" in one for one in broken) else "")
    for one in broken:
        print(f"BROKEN: {one}")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=1))
    sys.exit(bool(broken or (arguments.strict and missed)))


if __name__ == "__main__":
    main()
