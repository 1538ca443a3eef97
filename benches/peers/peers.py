"""Times the selective scan on CPU beside PyTorch's, eager and compiled, in one run and on the same shapes.

See README.md beside this file. The shapes are those that the crate's own report prints, so that both always match.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CRATE, EAGER, COMPILED = "this crate", "PyTorch eager", "PyTorch compiled"


def unfused(u, delta, a, b, c, z, d, delta_bias):
    """The scan as tensor operations: every step's decay and input first, of shape (B, L, D, N), then step by step.

    u, delta, z: (B, L, D); a: (D, N); b, c: (B, L, N); d, delta_bias: (D).
    """
    import torch
    import torch.nn.functional as F

    delta = F.softplus(delta + delta_bias)
    decay = torch.exp(delta[..., None] * a)
    entering = (delta * u)[..., None] * b[:, :, None]
    h = torch.zeros_like(entering[:, 0])
    ys = []
    # Unbound once: the gradient of indexing by t would be a tensor of the whole size for every t.
    for decay_t, entering_t, c_t in zip(decay.unbind(1), entering.unbind(1), c[:, :, None].unbind(1)):
        h = decay_t * h + entering_t
        ys.append((h * c_t).sum(-1))
    return (torch.stack(ys, 1) + d * u) * F.silu(z)


def draw(batch, length, channels, states):
    """Random inputs of the same kind as the crate's report times: how many exponentials underflow matters."""
    import torch

    torch.manual_seed(0)
    activation, projection = (batch, length, channels), (batch, length, states)
    step_sizes = torch.exp(torch.empty(channels).uniform_(math.log(0.001), math.log(0.1)))
    inputs = dict(
        u=torch.randn(activation),
        delta=torch.randn(activation) + 6.0 * (torch.rand(activation) < 1 / 256),
        a=-torch.arange(1.0, states + 1).repeat(channels, 1),
        b=torch.randn(projection),
        c=torch.randn(projection),
        z=torch.randn(activation),
        d=1.0 + 0.1 * torch.randn(channels),
        delta_bias=step_sizes.expm1().log(),
    )
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def check():
    """Holds `unfused` to a vector of the crate's tests: what is timed is the same operator."""
    from safetensors.torch import load_file

    prefix = "softplus_bias_skip_gate/"
    vectors = load_file(ROOT / "tests/vectors/scan.safetensors")
    case = {name.removeprefix(prefix): x.double() for name, x in vectors.items() if name.startswith(prefix)}
    names = ("u", "delta", "a", "b", "c", "z", "d", "delta_bias")
    inputs = {name: case[name].requires_grad_() for name in names}
    b, c = inputs["b"].squeeze(2), inputs["c"].squeeze(2)  # one group
    out = unfused(**inputs | {"b": b, "c": c})
    out.backward(case["d_out"])
    results = {"out": out} | {f"grad_{name}": inputs[name].grad for name in names}
    for name, got in results.items():
        error = ((got - case[name]).norm() / case[name].norm()).item()
        assert error < 1e-12, f"{name} of the unfused scan is off by {error:.1e}"


def median_seconds(prepare, run, budget=5.0):
    """The median over a few runs after a warm-up; `prepare` is not timed."""
    times = []
    run(prepare())
    start = time.perf_counter()
    while len(times) < 3 or (len(times) < 21 and time.perf_counter() - start < budget):
        prepared = prepare()
        before = time.perf_counter()
        run(prepared)
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def work(implementation, threads, shape):
    """Times one implementation on one shape: {direction: seconds, or in words why there are none}."""
    import torch

    torch.set_num_threads(threads)
    inputs = draw(*shape)
    scan = unfused
    if implementation == COMPILED:
        torch._dynamo.config.cache_size_limit = 64
        scan = torch.compile(unfused, dynamic=False)
    d_out = torch.randn_like(inputs["u"])

    def forward(_):
        with torch.no_grad():
            scan(**inputs)

    def with_graph():
        for tensor in inputs.values():
            tensor.grad = None
        return scan(**inputs)

    timings = {
        "forward": lambda: median_seconds(lambda: None, forward),
        "backward": lambda: median_seconds(with_graph, lambda out: out.backward(d_out)),
    }
    for direction, timing in timings.items():
        try:
            result = timing()
        except Exception as error:  # without a C++ compiler, say: that is a row of the table, not the end
            result = f"failed: {str(error).strip().splitlines()[0][:120]}"
        # At once, so that a forward pass counts even if compiling the backward pass takes too long.
        print(json.dumps({direction: result}), flush=True)


def peer(implementation, threads, shape, limit):
    """`work` in a process of its own, which can be stopped and starts with the right number of threads."""
    command = [sys.executable, __file__, "--work", implementation, str(threads), json.dumps(shape)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    reason = "failed"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        try:
            output, _ = run.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, 9)  # the compiler's workers too
            output, _ = run.communicate()
            reason = f"not done within {limit} s, compilation included"
        if run.returncode and reason == "failed":
            reason = f"failed: exit status {run.returncode}"
    results = dict(forward=reason, backward=reason)
    for line in output.splitlines():
        if line.startswith("{"):
            results |= json.loads(line)
    return results


def report(threads, longest):
    """The rows of the crate's report that have peers, as {(direction, shape): seconds}."""
    command = ["cargo", "run", "--release", "--quiet", "--example", "report", "--", "--json", "--dtype", "f32"]
    command += ["--quick", "--model", "130m", "--max-length", str(longest), "--threads", str(threads)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"the crate's report failed with status {run.returncode}")
    rows = {
        (row["direction"], tuple(row[key] for key in "bldn")): row["seconds"]
        for row in json.loads(run.stdout)
        if (row["op"], row["device"], row["dtype"], row["threads"]) == ("selective_scan", "cpu", "f32", threads)
    }
    return rows or sys.exit("the crate's report has no selective scan in f32 on the CPU")


def measure(threads, longest, limit):
    """Crate, eager, compiled, crate: {(direction, shape): {implementation: [seconds or words]}}."""
    results = defaultdict(lambda: defaultdict(list))

    def add(implementation, times):
        for key, seconds in times.items():
            results[key][implementation].append(seconds)

    say = lambda what: print(f"{threads} threads: {what}", file=sys.stderr, flush=True)
    say(CRATE)
    first = report(threads, longest)
    add(CRATE, first)
    for implementation in (EAGER, COMPILED):
        for shape in sorted({shape for _, shape in first}):
            say(f"{implementation}, (B, L, D, N) = {shape}")
            times = peer(implementation, threads, shape, limit)
            add(implementation, {(direction, shape): x for direction, x in times.items()})
    say(f"{CRATE} again")
    add(CRATE, report(threads, longest))
    return results


def table(all_results):
    lines = [
        "| threads | B, L, D, N | direction | implementation | seconds | ns per (step, channel, state) | times this crate |",
        "|---|---|---|---|---|---|---|",
    ]
    for threads, results in all_results.items():
        for direction, shape in sorted(results, key=lambda key: (key[1], key[0] != "forward")):
            implementations = results[direction, shape]
            start = f"| {threads} | {', '.join(map(str, shape))} | {direction} |"
            crate = statistics.median(implementations[CRATE])
            for implementation, samples in implementations.items():
                times = [x for x in samples if not isinstance(x, str)]
                if times:
                    seconds = statistics.median(times)
                    nanoseconds = seconds / math.prod(shape) * 1e9
                    cells = f"{seconds:.4g} | {nanoseconds:.3g} | {seconds / crate:.3g}"
                else:
                    cells = f"{samples[0].replace('|', '/')} | – | –"
                lines.append(f"{start} {implementation} | {cells} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no sequence longer than 512 steps")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--limit", type=int, default=900, help="seconds for a peer on a shape, compilation included")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        implementation, threads, shape = arguments.work
        return work(implementation, int(threads), json.loads(shape))

    import torch

    check()
    longest = 512 if arguments.quick else 2048
    results = {threads: measure(threads, longest, arguments.limit) for threads in arguments.threads}
    print(f"PyTorch {torch.__version__}, f32, with softplus, bias, skip connection and gate.\n")
    print(table(results))


if __name__ == "__main__":
    main()
