"""Times the crate's operators on a GPU beside other implementations', in one run, interleaved.

    python benches/peers/gpu.py --crate "COMMAND" [--built FOLDER] [--csv FILE]

COMMAND starts the crate's bench (cargo bench --features candle-cuda --bench cuda --), which is told to `--serve`. See README.md
beside this file. A peer that fails gives a line that says so, and the rest goes on.
"""

import argparse
import csv
import json
import math
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CANDLE = "candle"
LENGTHS = "512,1024,2048,4096,8192,16384,32768,65536,131072"

# Peer, the crate's case, the peer's if its text differs, and how many times the peer's time is to be the crate's at
# least. Several values between commas stand for a case with each, as in the bench.
COMPARISONS = [
    ("mamba_ssm", "scan forward bf16 8 2048 2048 16", None, 2.5),
    ("mamba_ssm", "scan backward bf16 8 2048 2048 16", None, 4),
    ("mamba_ssm", "scan forward bf16 64 512 1536 16", None, 3),
    ("mamba_ssm", "scan backward bf16 64 512 1536 16", None, 4),
    ("mamba_ssm", "scan forward bf16 8 2000 2048 16", None, 4),
    ("mamba_ssm", "scan backward bf16 8 2000 2048 16", None, 6),
    ("mamba_ssm", "scan forward,backward bf16 2048 16 1536 16", None, 45),
    ("mamba_ssm", "scan forward bf16 1 65536 2048 16", None, 2),
    ("mamba_ssm", "scan backward bf16 1 65536 2048 16", None, 3),
    ("mamba_ssm", "scan forward bf16 1 2048 1024 16", None, 1.5),
    ("mamba_ssm", "scan backward bf16 1 2048 1024 16", None, 2),
    ("mamba_ssm", "scan forward bf16 1 524288 1024 16", None, 2),
    ("mamba_ssm", "scan backward bf16 1 524288 1024 16", None, 3),
    ("FlashAttention", f"scan forward bf16 1 {LENGTHS} 1024 16", "attention forward 64", 1),
    ("FlashAttention", "attention forward,backward bf16 1 512,2048,8192,32768 1024 64", None, None),
    ("FlashAttention", "attention forward,backward bf16 1 8192 1024 128", None, None),
    ("FlashAttention", "attention forward bf16 64 1 1024 64 keys-8192", None, None),
    ("PyTorch eager", "scan forward bf16 8 2048 2048 16", None, 400),
    ("PyTorch compiled", "scan forward bf16 8 2048 2048 16", "scan forward 16 pointwise", 20),
    ("PyTorch compiled", "scan forward bf16 8 2048 2048 16", "scan forward 16 generic", 20),
    ("PyTorch compiled", "scan forward bf16 8 2048 2048 16", "scan forward 16 doubling", 20),
    ("PyTorch eager", "scan backward bf16 8 2048 2048 16", None, None),
    ("causal_conv1d", "conv forward,backward bf16,f32 8 2048 2048 4", None, None),
    ("causal_conv1d", "conv forward,backward bf16 8 2048 2048 4", "conv forward 4 channels-first", None),
    ("causal_conv1d", "conv forward,backward bf16 64 512 1536 4", None, None),
    ("causal_conv1d", "conv forward,backward bf16 1 65536 2048 4", None, None),
    ("causal_conv1d", "conv forward,backward bf16 1 2048 1024 4", None, None),
    ("causal_conv1d", "conv forward,backward bf16 2048 16 1536 4", None, None),
    ("causal_conv1d", "conv forward,backward bf16 8 2000 2048 4", None, None),
    ("causal_conv1d", "conv forward,backward bf16 1 16384 2048 4 packed", None, None),
    ("causal_conv1d", "conv update bf16 1,8,64,512 1 5120 4", None, None),
    ("mamba_ssm", "state update bf16 1,8,64,256,512 1 5120 16", None, None),
    (CANDLE, "scan forward f32 1 512 1536 16", "candle forward 16", None),
    (CANDLE, "scan forward f32 8 512 1536 16", "candle forward 16", None),
    ("mamba_ssm", "scan forward,backward f32 8 2048 2048 16", None, None),
    ("mamba_ssm", "scan forward,backward f32 64 512 1536 16", None, None),
    ("mamba_ssm", "scan forward,backward bf16 8 1100 2048 16", None, None),
    ("mamba_ssm", "scan forward,backward bf16 8 2048 2048 64", None, None),
    ("mamba_ssm", "scan forward,backward bf16 1 512,1024,4096,8192,16384,32768,65536,131072,262144 1024 16", None, None),
    ("FlashAttention", "scan backward bf16 1 512,2048,8192,32768 1024 16", "attention backward 64", None),
    ("FlashAttention", "scan forward bf16 1 512,2048,8192,32768 1024 16", "attention forward 64 cudnn", None),
]  # fmt: skip

COLUMNS = ["peer", "case", "peer's case", "crate ms", "peer ms", "ratio", "least", "most", "goal", "reached",
           "bound ms", "bound by", "part of bound"]  # fmt: skip


def expand(text):
    texts = [""]
    for word in reversed(text.split()):
        texts = [f"{value} {rest}".strip() for value in word.split(",") for rest in texts]
    return texts


def peers_case(case, change):
    """The peer's case: other words for operator and direction, the last number and what follows it."""
    if change is None:
        return case
    operator, direction, last, *variant = change.split()
    words = case.split()
    # A backward case stays one.
    words[0] = operator
    words[1] = words[1] if words[1] in ("forward", "backward") else direction
    return " ".join([*words[:6], last, *variant])


class Gone(Exception):
    pass


class Server:
    """A process that answers lines; one that has died or hung is started again for the next."""

    def __init__(self, command, limit):
        self.command, self.limit, self.process = command, limit, None

    def start(self):
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )
        self.answers = queue.Queue()

        def read(stdout, answers):
            for line in stdout:
                if line.startswith("{"):
                    answers.put(line)
            answers.put(None)

        threading.Thread(target=read, args=(self.process.stdout, self.answers), daemon=True).start()

    def ask(self, line, limit=None):
        if self.process is None:
            self.start()
        limit = limit or self.limit
        try:
            print(line, file=self.process.stdin, flush=True)
            answer = self.answers.get(timeout=max(limit, 1))
        except queue.Empty:
            self.stop()
            raise Gone(f"no answer within {limit:.0f} s") from None
        except OSError:
            answer = None
        if answer is None:
            self.process.wait()
            status = self.process.returncode
            self.stop()
            raise Gone(f"the process ended with status {status}")
        answer = json.loads(answer)
        if "error" in answer:
            raise Gone(answer["error"])
        return answer

    def stop(self):
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()
            self.process = None


def repeats(first, budget=150.0):
    """As many as take `budget` milliseconds, by a first measurement."""
    each = first["ms"] * first.get("calls", 1)
    return max(3, min(20, math.ceil(budget / max(each, 1e-3))))


def compare(crate, peer, case, change, rounds, limit):
    """Crate, peer, crate, peer: the medians of each, and of the ratios of each round."""
    other = peers_case(case, change)
    crate_first = crate.ask(f"{case} 3")
    peer_first = peer.ask(f"{other} 3", limit)
    ours, theirs, ratios = [], [], []
    for _ in range(rounds):
        ours.append(crate.ask(f"{case} {repeats(crate_first)}"))
        theirs.append(peer.ask(f"{other} {repeats(peer_first)}", limit))
        ratios.append(theirs[-1]["ms"] / ours[-1]["ms"])
    middle = lambda answers: statistics.median(answer["ms"] for answer in answers)
    ms = middle(ours)
    bound = crate_first.get("bound", 0.0)
    return {
        "crate ms": f"{ms:.5g}",
        "peer ms": f"{middle(theirs):.5g}",
        "ratio": statistics.median(ratios),
        "least": f"{min(ratios):.3g}",
        "most": f"{max(ratios):.3g}",
        "bound ms": f"{bound:.5g}",
        "bound by": crate_first.get("by", ""),
        "part of bound": f"{bound / ms:.3f}",
    }


def about(crate):
    """What goes at the head of the table."""
    lines = ["python benches/peers/gpu.py " + shlex.join(sys.argv[1:])]
    limits = crate.ask("limits")
    lines.append(
        f"{limits['device']}: {limits['special'] / 1e12:.3f} T exponentials/s, {limits['issue'] / 1e12:.2f} T "
        f"instructions of warps/s, copy {limits['copy'] / 1e9:.0f} GB/s, {limits['clock'] / 1e6:.0f} MHz, all measured"
    )
    try:
        fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        lines += subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        pass
    return lines


def note(row):
    """What the peer does differently."""
    words = row["peer's case"].split()[7:]
    return f" [{' '.join(words)}]" if words else ""


class Table:
    def __init__(self, path, head):
        self.file = open(path, "w", newline="") if path else None
        self.rows = []
        for line in head:
            print(f"# {line}", flush=True)
            if self.file:
                print(f"# {line}", file=self.file)
        if self.file:
            self.writer = csv.DictWriter(self.file, COLUMNS)
            self.writer.writeheader()

    def add(self, row):
        self.rows.append(row)
        goal = f" (goal {row['goal']})" if row.get("goal") else ""
        print(
            f"{row['peer']:17} {row['case']:42} crate {row.get('crate ms', '-'):>9} ms   peer {row.get('peer ms', '-'):>9} "
            f"ms   {row['ratio']}{goal} {row.get('reached', '')}{note(row)}",
            flush=True,
        )
        if self.file:
            self.writer.writerow(row)
            self.file.flush()


def run(arguments, selected):
    crate_command = shlex.split(arguments.crate) + ["--serve"]
    crate = Server(crate_command, arguments.answer_limit)
    deadline = time.monotonic() + arguments.limit
    worker = [sys.executable, str(HERE / "worker.py")]
    options = ["--built", str(arguments.built), "--device", arguments.device]
    peer, name, broken = None, None, None
    try:
        table = Table(arguments.csv, about(crate))
        for peer_name, case, change, goal in selected:
            if peer_name != name:
                if peer is not None:
                    peer.stop()
                name, broken = peer_name, None
                command = crate_command if name == CANDLE else [*worker, name, *options]
                peer = Server(command, arguments.answer_limit)
                try:
                    peer.ask("limits" if name == CANDLE else "check")
                except Gone as failure:
                    broken = failure
            row = {"peer": name, "case": case, "peer's case": peers_case(case, change), "goal": goal or ""}
            left = deadline - time.monotonic()
            try:
                if broken:
                    raise broken
                if left < 10:
                    raise Gone("not run: out of time")
                row |= compare(crate, peer, case, change, arguments.rounds, min(arguments.answer_limit, left))
                if goal:
                    row["reached"] = "yes" if row["ratio"] >= goal else "NO"
                row["ratio"] = f"{row['ratio']:.3g}"
            except Gone as failure:
                row["ratio"] = f"failed: {failure}"
            table.add(row)
    finally:
        for server in (crate, peer):
            if server is not None:
                server.stop()
    failed = sum(row["ratio"].startswith("failed") for row in table.rows)
    goals = [row for row in table.rows if row["goal"]]
    reached = sum(row.get("reached") == "yes" for row in goals)
    missed = sum(row.get("reached") == "NO" for row in goals)
    print(
        f"{len(table.rows)} comparisons, {failed} failed; of {len(goals)} goals {reached} were reached, {missed} missed "
        f"and {len(goals) - reached - missed} not measured"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--crate", default="cargo bench --quiet --features candle-cuda --bench cuda --")
    parser.add_argument("--built", type=Path, default=Path("."), help="where build.py has left mamba-ssm and causal-conv1d")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rounds", type=int, default=5, help="turns of crate and peer")
    parser.add_argument("--peers", default="", help="only these, between commas")
    parser.add_argument("--filter", default="", help="only cases that contain this")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which nothing more is begun")
    parser.add_argument("--answer-limit", type=float, default=150, help="seconds for one answer, compilation included")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print what would be compared")
    arguments = parser.parse_args()
    wanted = arguments.peers.split(",") if arguments.peers else None
    selected = [
        (peer, case, change, goal)
        for peer, text, change, goal in COMPARISONS
        for case in expand(text)
        if (wanted is None or peer in wanted) and arguments.filter in case
    ]
    # One process for all of a peer's, in the order in which the peers first come.
    order = list(dict.fromkeys(peer for peer, *_ in selected))
    if not arguments.dry_run:
        selected.sort(key=lambda one: order.index(one[0]))
        return run(arguments, selected)
    for peer, case, change, goal in selected:
        print(f"{peer:17} {case}  |  {peers_case(case, change)}  |  goal {goal or '-'}")


if __name__ == "__main__":
    main()
