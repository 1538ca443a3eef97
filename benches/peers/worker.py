"""A peer that answers cases line by line, as `cargo bench --bench cuda -- --serve` does for the crate.

    python benches/peers/worker.py PEER [--built FOLDER] [--device cpu]

A line is a case and a number of repeats, `scan forward bf16 8 2048 2048 16 20`: batch, length, channels, states. The
answer is a line of JSON: median and least milliseconds of a call, and the calls between two events; or an `error`. `check`
holds the peer to a plain scan in float64. Kernels are timed as the crate's are: over inputs that together exceed the cache,
as one CUDA graph; what PyTorch runs operator by operator or compiles is timed call by call.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import unfused  # noqa: E402

BEYOND_CACHE = 256 << 20
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def sets(size):
    """As many sets of `size` bytes as exceed the cache, as the crate's bench counts them."""
    return min(max(-(-BEYOND_CACHE // max(size, 1)), 2), 2048)


def mixed_lengths(length):
    """Offsets of packed sequences, the same as the crate's bench packs."""
    offsets, i = [0], 0
    lengths = [37, 512, 1024, 77, 2048, 300, 16, 900, 4096, 131, 1, 640]
    while offsets[-1] < length:
        offsets.append(min(offsets[-1] + lengths[i % len(lengths)], length))
        i += 1
    return offsets


class Case:
    def __init__(self, text):
        self.operator, self.direction, dtype, *rest = text.split()
        self.batch, self.length, self.channels, self.last = map(int, rest[:4])
        self.variant, self.dtype = rest[4:], DTYPES[dtype]
        self.size = torch.empty((), dtype=self.dtype).element_size()
        self.count = self.batch * self.length * self.channels

    def unsupported(self):
        return ValueError(f"no {self.operator} {self.direction} {' '.join(self.variant)}")


class Peer:
    """What prepares cases: `prepare` gives a function of the number of a set, and how many sets there are."""

    graphs = True

    def __init__(self, device, built):
        self.device, self.built = device, built

    def random(self, *shape, low=-1.0, high=1.0, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=self.device).uniform_(low, high)

    def module(self, name):
        path = Path(self.built) / name / f"{name}.so"
        if not path.exists():
            raise FileNotFoundError(f"{name} is not built")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def scan_parameters(self, channels, states):
        a = -torch.arange(1.0, states + 1, device=self.device).repeat(channels, 1)
        return a, self.random(channels, low=0.5), self.random(channels, low=-0.5, high=0.5)


class Mamba(Peer):
    """mamba_ssm: its CUDA scan, on (B, D, L) with time contiguous, and its Triton kernel for decoding."""

    def prepare(self, case):
        if case.operator == "state" and case.direction == "update" and not case.variant:
            return self.state_update(case)
        if case.operator != "scan" or case.variant:
            raise case.unsupported()
        cuda = self.module("selective_scan_cuda")
        backward = case.direction == "backward"
        n = sets((4 if backward else 3) * case.count * case.size)
        draw = lambda low, high: self.random(
            n, case.batch, case.channels, case.length, low=low, high=high, dtype=case.dtype
        )
        u, delta, z = draw(-1, 1), draw(-5, -1), draw(-2, 2)
        b, c = (self.random(n, case.batch, 1, case.last, case.length, dtype=case.dtype) for _ in range(2))
        a, d, bias = self.scan_parameters(case.channels, case.last)
        forward = lambda i: cuda.fwd(u[i], delta[i], a, b[i], c[i], d, z[i], bias, True)
        if case.direction == "forward":
            return forward, n
        if not backward:
            raise case.unsupported()
        kept = [forward(i)[:2] for i in range(n)]
        d_out = draw(-1, 1)

        def run(i):
            out, x = kept[i]
            return cuda.bwd(u[i], delta[i], a, b[i], c[i], d, z[i], bias, d_out[i], x, out, None, True, False)

        return run, n

    def check(self):
        cuda = self.module("selective_scan_cuda")
        batch, channels, length, states = 2, 24, 70, 16
        u, delta, z, d_out = (self.random(batch, channels, length) for _ in range(4))
        b, c = (self.random(batch, 1, states, length) for _ in range(2))
        a, d, bias = self.scan_parameters(channels, states)
        out, x, gated = cuda.fwd(u, delta, a, b, c, d, z, bias, True)
        gradients = cuda.bwd(u, delta, a, b, c, d, z, bias, d_out, x, out, None, True, False)
        doubles = dict(u=u, delta=delta, a=a, b=b[:, 0], c=c[:, 0], z=z, d=d, delta_bias=bias)
        over_time = ("u", "delta", "b", "c", "z")
        doubles = {
            name: (x.transpose(1, 2) if name in over_time else x).double().requires_grad_()
            for name, x in doubles.items()
        }
        exact = unfused(**doubles)
        exact.backward(d_out.transpose(1, 2).double())
        hold("out", gated.transpose(1, 2), exact)
        for i, name in enumerate(("u", "delta", "a", "b", "c", "d", "delta_bias", "z")):
            got = gradients[i].squeeze(1) if name in "bc" else gradients[i]
            hold(f"the gradient of {name}", got.transpose(1, 2) if name in over_time else got, doubles[name].grad)

    def state_update(self, case):
        if case.length != 1:
            raise case.unsupported()
        update = self.triton_update()
        batch, channels, states = case.batch, case.channels, case.last
        n = sets(2 * 4 * batch * channels * states + (4 * batch * channels + 2 * batch * states) * case.size)
        u, dt, z = (self.random(n, batch, channels, dtype=case.dtype) for _ in range(3))
        b, c = (self.random(n, batch, states, dtype=case.dtype) for _ in range(2))
        pools = self.random(n, batch, channels, states)
        a, d, bias = self.scan_parameters(channels, states)
        return lambda i: update(pools[i], u[i], dt[i], a, b[i], c[i], d, z[i], bias, dt_softplus=True), n

    def triton_update(self):
        """The function alone: the package around it wants more than it needs."""
        root = max(Path(self.built).glob("mamba_ssm-*/mamba_ssm"))
        for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules.setdefault(name, package)
        if importlib.util.find_spec("einops") is None:
            # Only its own reference uses it.
            einops = types.ModuleType("einops")
            einops.rearrange = einops.repeat = None
            sys.modules["einops"] = einops
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        return selective_state_update


class CausalConv(Peer):
    """causal_conv1d, on channels-last memory, or with the variant `channels-first` on time-contiguous."""

    def prepare(self, case):
        if case.operator != "conv":
            raise case.unsupported()
        cuda = self.module("causal_conv1d_cuda")
        weight = self.random(case.channels, case.last, low=-0.5, high=0.5)
        bias = self.random(case.channels, low=-0.5, high=0.5)
        if case.direction == "update":
            return self.update(cuda, case, weight, bias)
        n = sets(case.count * case.size)
        first = "channels-first" in case.variant

        def draw():
            if first:
                return self.random(n, case.batch, case.channels, case.length, dtype=case.dtype)
            return self.random(n, case.batch, case.length, case.channels, dtype=case.dtype).transpose(2, 3)

        x = draw()
        index = None
        if "packed" in case.variant:
            offsets = mixed_lengths(case.length)
            numbers = [i for i in range(len(offsets) - 1) for _ in range(offsets[i + 1] - offsets[i])]
            index = torch.tensor([numbers], dtype=torch.int32, device=self.device)
        out = torch.empty_like(x[0])
        if case.direction == "forward":
            return lambda i: cuda.causal_conv1d_fwd(x[i], weight, bias, index, None, out, None, True), n
        if case.direction != "backward":
            raise case.unsupported()
        d_out = draw()

        def run(i):
            # As its own autograd function does.
            d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
            cuda.causal_conv1d_bwd(
                x[i], weight, bias, d_out[i], index, None, None, out, d_weight, d_bias, None, True
            )

        return run, n

    def update(self, cuda, case, weight, bias):
        if case.length != 1 or case.variant:
            raise case.unsupported()
        states = case.batch * case.channels * (case.last - 1)
        n = sets((2 * states + 2 * case.count) * case.size)
        x = self.random(n, case.batch, case.channels, 1, dtype=case.dtype)
        pools = self.random(n, case.batch, case.channels, case.last - 1, dtype=case.dtype)
        out = torch.empty_like(x[0])
        return lambda i: cuda.causal_conv1d_update(x[i], pools[i], weight, bias, out, True, None, None), n

    def check(self):
        cuda = self.module("causal_conv1d_cuda")
        batch, channels, length, width = 2, 24, 70, 4
        x = self.random(batch, length, channels).transpose(1, 2)
        weight, bias = self.random(channels, width), self.random(channels)
        out = torch.empty_like(x)
        cuda.causal_conv1d_fwd(x, weight, bias, None, None, out, None, True)
        padded = F.pad(x.double(), (width - 1, 0))
        hold("out", out, F.silu(F.conv1d(padded, weight.double()[:, None], bias.double(), groups=channels)))


def plain(scan):
    """A scan of f32 on inputs of another type."""

    def run(**inputs):
        dtype = inputs["u"].dtype
        return scan(**{name: x.float() for name, x in inputs.items()}).to(dtype)

    return run


class Eager(Peer):
    """The scan operator by operator."""

    graphs = False

    def scan(self):
        return plain(unfused)

    def inputs(self, case):
        activation = lambda low, high: self.random(
            case.batch, case.length, case.channels, low=low, high=high, dtype=case.dtype
        )
        a, d, bias = self.scan_parameters(case.channels, case.last)
        b, c = (self.random(case.batch, case.length, case.last, dtype=case.dtype) for _ in range(2))
        return dict(
            u=activation(-1, 1), delta=activation(-5, -1), a=a, b=b, c=c, z=activation(-2, 2), d=d, delta_bias=bias
        )

    def prepare(self, case):
        if case.operator != "scan" or case.variant:
            raise case.unsupported()
        scan, inputs = self.scan(), self.inputs(case)
        if case.direction == "forward":

            def run(_):
                with torch.no_grad():
                    scan(**inputs)

            return run, 1
        if case.direction != "backward":
            raise case.unsupported()
        for tensor in inputs.values():
            tensor.requires_grad_()
        out = scan(**inputs)
        d_out = torch.ones_like(out)
        return lambda _: torch.autograd.grad(out, list(inputs.values()), d_out, retain_graph=True), 1

    def check(self):
        case = Case("scan forward f32 2 70 24 16")
        inputs = self.inputs(case)
        with torch.no_grad():
            out = self.scan()(**inputs)
            hold("out", out, unfused(**{name: x.double() for name, x in inputs.items()}))


def associative(scan):
    """The scan with PyTorch's associative scan in place of the loop."""

    def run(u, delta, a, b, c, z, d, delta_bias):
        delta = F.softplus(delta + delta_bias)
        decay = torch.exp(delta[..., None] * a)
        entering = (delta * u)[..., None] * b[:, :, None]
        h = scan(decay, entering)
        return ((h * c[:, :, None]).sum(-1) + d * u) * F.silu(z)

    return run


def combine(left, right):
    return left[0] * right[0], left[1] * right[0] + right[1]


def doubling(decay, entering):
    """Hillis and Steele's scan: each turn reaches twice as far back."""
    reach = 1
    while reach < decay.shape[1]:
        before = F.pad(entering[:, :-reach], (0, 0, 0, 0, reach, 0))
        factor = F.pad(decay[:, :-reach], (0, 0, 0, 0, reach, 0), value=1.0)
        entering = decay * before + entering
        decay = decay * factor
        reach *= 2
    return entering


def built_in(mode):
    def scan(decay, entering):
        from torch._higher_order_ops.associative_scan import associative_scan

        return associative_scan(combine, (decay, entering), dim=1, combine_mode=mode)[1]

    return scan


class Compiled(Eager):
    """torch.compile of an associative scan: PyTorch's own, `pointwise` or `generic`, or by `doubling`."""

    SCANS = {"pointwise": built_in("pointwise"), "generic": built_in("generic"), "doubling": doubling}
    chosen = "pointwise"

    def prepare(self, case):
        self.chosen = case.variant.pop(0) if case.variant else "pointwise"
        torch._dynamo.reset()
        return super().prepare(case)

    def scan(self):
        compiled = torch.compile(plain(associative(self.SCANS[self.chosen])), dynamic=False)
        held = False

        def run(**inputs):
            nonlocal held
            out = compiled(**inputs)
            if not held:
                # Channels do not know of one another, so a few of them will do.
                held, few = True, slice(0, 64)
                of_few = {name: x[:1] if name in "bc" else x[:1, :, few] if x.dim() == 3 else x[few]
                          for name, x in inputs.items()}
                with torch.no_grad():
                    hold("out", out[:1, :, few], plain(unfused)(**of_few).double(), 2e-2)
            return out

        return run

    def check(self):
        """Each of the scans is checked where it is first run."""


class Attention(Peer):
    """FlashAttention through PyTorch: causal, `cudnn`'s kernel on request, one query over `keys-` so many."""

    def prepare(self, case):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if case.operator != "attention":
            raise case.unsupported()
        backend = SDPBackend.CUDNN_ATTENTION if "cudnn" in case.variant else SDPBackend.FLASH_ATTENTION
        words = [word for word in case.variant if word.startswith("keys-")]
        keys = int(words[0].removeprefix("keys-")) if words else case.length
        if keys != case.length and case.length != 1:
            raise case.unsupported()
        if self.device == "cpu":
            backend = SDPBackend.MATH
        n = sets((case.count + 2 * case.count // case.length * keys) * case.size)
        q, k, v = (
            self.random(n, case.batch, case.channels // case.last, length, case.last, dtype=case.dtype)
            for length in (case.length, keys, keys)
        )

        def forward(q, k, v):
            with sdpa_kernel(backend):
                # One query sees all keys.
                return F.scaled_dot_product_attention(q, k, v, is_causal=keys == case.length)

        if case.direction == "forward":

            def run(i):
                with torch.no_grad():
                    forward(q[i], k[i], v[i])

            return run, n
        if case.direction != "backward":
            raise case.unsupported()
        leaves = [[x[i].requires_grad_() for x in (q, k, v)] for i in range(n)]
        outs = [forward(*leaf) for leaf in leaves]
        d_out = torch.ones_like(outs[0])
        return lambda i: torch.autograd.grad(outs[i], leaves[i], d_out, retain_graph=True), n

    def check(self):
        """It is PyTorch's own, and computes something else."""


PEERS = {
    "mamba_ssm": Mamba,
    "causal_conv1d": CausalConv,
    "PyTorch eager": Eager,
    "PyTorch compiled": Compiled,
    "FlashAttention": Attention,
}


def hold(what, got, exact, tolerance=1e-3):
    """What is timed must be the same operator; how accurate it is, is not the question here."""
    error = ((got.double() - exact).norm() / exact.norm()).item()
    if not error < tolerance:
        raise AssertionError(f"{what} is off by {error:.1e}")


class Timed:
    def __init__(self, peer, case):
        self.device, self.graph, self.next = peer.device, None, 0
        self.run, self.sets = peer.prepare(case)
        for i in range(min(self.sets, 3)):
            self.run(i)
        self.calls = 1
        if self.device == "cpu":
            return
        torch.cuda.synchronize()
        if peer.graphs:
            try:
                self.capture()
            except Exception as error:
                self.graph, self.calls = None, 1
                print(f"timed call by call: {one_line(error)}", file=sys.stderr, flush=True)
                torch.cuda.synchronize()

    def capture(self):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for i in range(self.sets):
                self.run(i)
        graph.replay()
        torch.cuda.synchronize()
        self.graph, self.calls = graph, self.sets

    def once(self):
        if self.graph:
            self.graph.replay()
        else:
            self.run(self.next % self.sets)
            self.next += 1

    def measure(self, repeats):
        times = []
        for _ in range(max(repeats, 1)):
            if self.device == "cpu":
                start = time.perf_counter()
                self.once()
                times.append((time.perf_counter() - start) * 1e3)
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.once()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / self.calls)
        return {"ms": statistics.median(times), "min": min(times), "calls": self.calls}


def one_line(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def serve(peer, answers):
    prepared = (None, None)
    for line in sys.stdin:
        line = line.strip()
        try:
            if not line:
                continue
            if line in ("release", "check"):
                prepared = (None, None)
                if line == "check":
                    peer.check()
                if peer.device != "cpu":
                    torch.cuda.empty_cache()
                answer = {"version": torch.__version__}
            else:
                text, repeats = line.rsplit(" ", 1)
                if prepared[0] != text:
                    prepared = (None, None)
                    if peer.device != "cpu":
                        torch.cuda.empty_cache()
                    prepared = (text, Timed(peer, Case(text)))
                answer = prepared[1].measure(int(repeats))
        except Exception as error:
            prepared = (None, None)
            answer = {"error": one_line(error)}
        print(json.dumps(answer), file=answers, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--built", default=".", help="the folder of build.py")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    # Whatever libraries print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    peer = PEERS[arguments.peer](arguments.device, arguments.built)
    if arguments.device == "cpu":
        return serve(peer, answers)
    # A stream of its own: the default one cannot be captured, and a backward pass runs where its forward pass ran.
    with torch.cuda.stream(torch.cuda.Stream()):
        serve(peer, answers)


if __name__ == "__main__":
    main()
