"""Times whole models on a GPU beside mamba_ssm's, in one run, interleaved: steps of training, prompts, and decoding.

    python benches/peers/model.py --crate "COMMAND" --built FOLDER [--csv FILE]

COMMAND starts the crate's bench (cargo bench --features nn,candle-cuda --bench model --), which is told to `--serve`; FOLDER
is what build.py has left. See README.md beside this file.
"""

import argparse
import csv
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from gpu import Gone, Server

HERE = Path(__file__).resolve().parent
COLUMNS = ["what", "model", "dtype", "batch", "length", "crate_ms", "peer_ms", "ratio", "crate_peak_mib", "peer_peak_mib"]

# Cases as the bench has them, and how many times the peer's time is to be the crate's at least. `max` is the largest of
# BATCHES that the peer has memory for.
COMPARISONS = [
    ("train 130m bf16-f32 8 2048", 2),
    ("train 130m bf16 8 2048", 2),
    ("train 130m f32 8 2048", 1.5),
    ("train 130m bf16-f32 8 512", 2),
    ("prefill 130m bf16 64 512", None),
    ("prefill 130m bf16 1 512", None),
    ("prefill 130m bf16 1 65536", None),
    ("decode 130m bf16 1 1", 3),
    ("decode 130m bf16 64 1", 1.9),
    ("decode 1.4b bf16 1 1", None),
    ("decode 2.8b bf16 1 1", None),
    ("train 130m bf16-f32 1 65536", 2),
    ("train 1.4b bf16-f32 max 2048", 1.5),
]
BATCHES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]

# The part of a device's memory up to which both keep their models while the other works.
TOGETHER = 0.85


def with_batch(case, batch):
    what, model, dtype, _, length = case.split()
    return f"{what} {model} {dtype} {batch} {length}"


class Side:
    """One of the two programs, and what it holds of the device."""

    def __init__(self, name, command, limit):
        self.name, self.server, self.held = name, Server(command, limit), 0.0

    def ask(self, case, repeats, deadline):
        answer = self.server.ask(f"{case} {repeats}", min(self.server.limit, max(deadline - time.monotonic(), 1)))
        self.held = answer.get("reserved_mib", 0.0)
        return answer

    def release(self):
        self.held = 0.0
        return self.server.ask("release")


def attempt(side, case, repeats, deadline):
    """The answer, or why there is none."""
    try:
        return side.ask(case, repeats, deadline), None
    except Gone as failure:
        return None, str(failure)


def largest(side, case, deadline):
    """The largest batch that `side` runs a case with, or why there is none."""
    best = None
    for batch in BATCHES:
        answer, failure = attempt(side, with_batch(case, batch), 1, deadline)
        if answer is None:
            side.release()
            return best, failure
        best = batch
        print(f"    {side.name}, {with_batch(case, batch)}: {answer['ms']:.4g} ms, {memory(answer)}", flush=True)
    side.release()
    return best, None


def memory(answer):
    if "peak_mib" not in answer:
        return "no peak"
    again = f", asked again for memory {answer['retries']} times" if answer.get("retries") else ""
    return f"peak {answer['peak_mib']:.0f} MiB{again}"


def phases(answer):
    """Of a training step; of the rest there are none."""
    names = [name for name in ("forward", "backward", "optimizer") if f"{name}_ms" in answer]
    return ", ".join(f"{name} {answer[f'{name}_ms']:.4g}" for name in names)


def compare(crate, peer, case, arguments, deadline, total_mib):
    """Crate, peer, crate, peer: the medians of each, and of the ratios of each round. The first turn of each prepares."""
    first, failures = {}, {}
    for side in (crate, peer):
        first[side], failures[side] = attempt(side, case, 1, deadline)
        if side is crate:
            held = side.held
            side.release()
    together = held + peer.held < TOGETHER * total_mib
    if not together:
        peer.release()
    answers = {side: [] for side in (crate, peer)}
    for _ in range(arguments.rounds):
        for side in (crate, peer):
            if failures[side] is None:
                answer, failures[side] = attempt(side, case, arguments.repeats, deadline)
                if answer:
                    answers[side].append(answer)
                if not together:
                    side.release()
    for side in (crate, peer):
        side.release()
    ours, theirs = ([] if failures[side] else answers[side] for side in (crate, peer))
    if ours and theirs and ours[0]["parameters"] != theirs[0]["parameters"]:
        failures[peer] = f"{theirs[0]['parameters']} parameters where the crate has {ours[0]['parameters']}"
        theirs = []
    row = dict(zip(COLUMNS, case.split()))
    for name, side in (("crate", ours), ("peer", theirs)):
        if side:
            row[f"{name}_ms"] = f"{statistics.median(answer['ms'] for answer in side):.5g}"
        if side and "peak_mib" in side[0]:
            row[f"{name}_peak_mib"] = f"{max(answer['peak_mib'] for answer in side):.0f}"
    ratios = [theirs["ms"] / ours["ms"] for ours, theirs in zip(ours, theirs)]
    if ratios:
        row["ratio"] = f"{statistics.median(ratios):.3g}"
    return row, ratios, {"crate": (ours, failures[crate]), "peer": (theirs, failures[peer])}


def about(device, torch_version):
    """What goes at the head of the table."""
    lines = [f"python benches/peers/model.py {shlex.join(sys.argv[1:])}"]
    lines.append(
        f"{device}; mamba_ssm on PyTorch {torch_version}; milliseconds of a step, a prompt or a token, medians; f32 products "
        "are TF32 on both sides; peaks of allocated memory in the timed calls"
    )
    try:
        fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total"
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        lines += subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        pass
    return lines


class Table:
    def __init__(self, path, head):
        self.file = open(path, "w", newline="") if path else None
        for line in head:
            print(f"# {line}", flush=True)
            if self.file:
                print(f"# {line}", file=self.file)
        if self.file:
            self.writer = csv.DictWriter(self.file, COLUMNS)
            self.writer.writeheader()

    def add(self, row, ratios, sides, goal):
        case = " ".join(row[column] for column in COLUMNS[:5])
        reached = ""
        if goal:
            reached = " not measured" if not ratios else " reached" if statistics.median(ratios) >= goal else " MISSED"
            reached = f" (goal {goal}:{reached})"
        spread = f" ({min(ratios):.3g} to {max(ratios):.3g})" if ratios else ""
        print(
            f"{case:30} crate {row.get('crate_ms', '-'):>8} ms {row.get('crate_peak_mib', '-'):>6} MiB   "
            f"peer {row.get('peer_ms', '-'):>8} ms {row.get('peer_peak_mib', '-'):>6} MiB   "
            f"ratio {row.get('ratio', '-')}{spread}{reached}"
        )
        for name, (answers, failure) in sides.items():
            if failure:
                print(f"    {name} failed: {failure}")
            elif phases(answers[-1]):
                print(f"    {name}: {phases(answers[-1])}; {memory(answers[-1])}")
        sys.stdout.flush()
        if self.file:
            self.writer.writerow(row)
            self.file.flush()


def run(arguments, selected):
    limit, deadline = arguments.answer_limit, time.monotonic() + arguments.limit
    worker = [sys.executable, str(HERE / "model_worker.py"), "--built", str(arguments.built), "--device", arguments.device]
    crate = Side("crate", shlex.split(arguments.crate) + ["--serve"], limit)
    peer = Side("peer", worker, limit)
    try:
        of_peer = peer.release()
        table = Table(arguments.csv, about(crate.release()["device"], of_peer["torch"]))
        for case, goal in selected:
            if deadline - time.monotonic() < 10:
                print(f"{case}: not run, out of time")
                continue
            batches = [None]
            if " max " in case:
                theirs, failure = largest(peer, case, deadline)
                if theirs is None:
                    print(f"{case}: the peer failed: {failure}")
                    continue
                batches = [theirs]
            for batch in batches:
                one = with_batch(case, batch) if batch else case
                row, ratios, sides = compare(crate, peer, one, arguments, deadline, of_peer["total_mib"])
                table.add(row, ratios, sides, goal)
                # Where the crate has not the memory for the peer's batch, the largest that it has memory for.
                if batch and batch == batches[0] and sides["crate"][1]:
                    ours, _ = largest(crate, case, deadline)
                    batches += [ours] if ours and ours < batch else []
    finally:
        for side in (crate, peer):
            side.server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crate", default="cargo bench --quiet --features nn,candle-cuda --bench model --")
    parser.add_argument("--built", type=Path, default=Path("."), help="where build.py has left mamba-ssm and causal-conv1d")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="turns of crate and peer")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs in a turn")
    parser.add_argument("--filter", default="", help="only cases that contain this")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which nothing more is begun")
    parser.add_argument("--answer-limit", type=float, default=200, help="seconds for one answer, compilation included")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print what would be compared")
    parser.add_argument("cases", nargs="*", help="cases to compare instead of the usual, each in quotes")
    arguments = parser.parse_args()
    goals = dict(COMPARISONS)
    cases = arguments.cases or [case for case, _ in COMPARISONS]
    selected = [(case, goals.get(case)) for case in cases if arguments.filter in case]
    if not arguments.dry_run:
        return run(arguments, selected)
    for case, goal in selected:
        print(f"{case:30} goal {goal or '-'}")


if __name__ == "__main__":
    main()
