"""Writes the reference vectors that tests/support/vectors.rs reads: scan, conv and state_update .safetensors, here.

Run it again with

    pip install torch numpy safetensors
    python tests/vectors/generate.py

It needs no GPU and takes seconds. The results come from PyTorch alone: the equations of the crate's documentation in
float64, their gradients by autograd, the convolution by conv1d. Inputs are drawn in float32, each case from a generator
of its own, so that they mean the same to the crate and one case does not move another; the same PyTorch writes the same
bytes.

A tensor is named `case/tensor`. Inputs and the gradients that flow in (`d_out`, `d_final_state`) are float32; results
are float64, the gradient of `x` being `grad_x`. What a case has no tensor for is absent. The metadata's only key,
`options`, is a JSON object with the options of every case (one key, since safetensors writes several in any order).
"""

import json
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

FOLDER = Path(__file__).parent


class Case:
    """The float32 inputs of a case, drawn in the order in which they are asked for, and its results."""

    def __init__(self, name, **options):
        self.name, self.options = name, options
        self.random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        self.tensors = {}

    def add(self, name, tensor):
        """Adds a float32 input and returns it in float64, as a leaf of the graph."""
        assert tensor.dtype == torch.float32
        self.tensors[name] = tensor
        return tensor.double().requires_grad_()

    def normal(self, name, *shape, mean=0.0, deviation=1.0):
        return self.add(name, torch.randn(shape, generator=self.random) * deviation + mean)

    def uniform(self, name, *shape, low, high):
        return self.add(name, torch.rand(shape, generator=self.random) * (high - low) + low)

    def differentiate(self, inputs, out, final_state, with_final_state):
        """Adds the results, draws the gradients that flow in, and adds those that flow out."""
        self.tensors |= {"out": out.detach(), "final_state": final_state.detach()}
        loss = (out * self.normal("d_out", *out.shape)).sum()
        if with_final_state:
            loss = loss + (final_state * self.normal("d_final_state", *final_state.shape)).sum()
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        # An input that nothing depends on (an initial state pushed out, say) has a gradient of zero.
        gradients = torch.autograd.grad(loss, list(given.values()), allow_unused=True, materialize_grads=True)
        self.tensors |= {f"grad_{name}": gradient for name, gradient in zip(given, gradients)}


def save(operator, cases):
    tensors = {f"{case.name}/{name}": t.contiguous() for case in cases for name, t in case.tensors.items()}
    for name, tensor in tensors.items():
        assert tensor.isfinite().all(), name
    options = {case.name: case.options for case in cases}
    assert len(options) == len(cases), "two cases have one name"
    path = FOLDER / f"{operator}.safetensors"
    save_file(tensors, path, {"options": json.dumps(options, sort_keys=True)})
    print(f"{path.name}: {len(cases)} cases, {path.stat().st_size} bytes")


def sequences(x, cu_seqlens):
    """The (row, first step, end) of every sequence: the batch rows, or what is packed into the only row."""
    if cu_seqlens is None:
        return [(row, 0, x.shape[1]) for row in range(x.shape[0])]
    return [(0, *ends) for ends in zip(cu_seqlens, cu_seqlens[1:])]


def per_channel(projection, row, t, channels):
    """B or C of one step as (D, N): each group's row for all of its channels, or what is constant."""
    if projection.dim() == 2:
        return projection
    return projection[row, t].repeat_interleave(channels // projection.shape[2], dim=0)


def draw(
    case,
    shape,
    *,
    groups=1,
    constant="",
    gate=False,
    skip=False,
    bias=False,
    softplus=False,
    deltas=None,
    decays=(0.3, 3.0),
):
    """What the scan and the state update both read, and the step sizes; `constant` names the constant ones of b, c."""
    batch, length, channels, states = shape
    low, high = deltas or ((-3.0, 2.0) if softplus else (0.02, 0.8))
    varying, fixed = (batch, length, groups, states), (channels, states)
    inputs = dict(
        u=case.normal("u", batch, length, channels),
        delta=case.uniform("delta", batch, length, channels, low=low, high=high),
        a=case.uniform("a", channels, states, low=-decays[1], high=-decays[0]),
        b=case.normal("b", *(fixed if "b" in constant else varying)),
        c=case.normal("c", *(fixed if "c" in constant else varying)),
        z=case.normal("z", batch, length, channels, deviation=2.0) if gate else None,
        d=case.normal("d", channels) if skip else None,
        delta_bias=case.normal("delta_bias", channels, deviation=0.5) if bias else None,
    )
    sizes = inputs["delta"] + inputs["delta_bias"] if bias else inputs["delta"]
    return inputs, F.softplus(sizes, beta=1, threshold=20) if softplus else sizes


def step(inputs, sizes, zero_order_hold, h, row, t):
    """The state (D, N) after step t of a batch row, and what it reads as."""
    delta, a = sizes[row, t][:, None], inputs["a"]
    b, c = (per_channel(inputs[name], row, t, len(a)) for name in ("b", "c"))
    b_bar = torch.expm1(delta * a) / a * b if zero_order_hold else delta * b
    h = torch.exp(delta * a) * h + b_bar * inputs["u"][row, t][:, None]
    return h, (c * h).sum(-1)


def skip_and_gate(inputs, y):
    if inputs["d"] is not None:
        y = y + inputs["d"] * inputs["u"]
    return y if inputs["z"] is None else y * F.silu(inputs["z"])


def scan_case(
    name,
    shape=(2, 7, 5, 4),
    zero_order_hold=False,
    reverse=False,
    initial_state=False,
    final_gradient=False,
    cu_seqlens=None,
    **draws,
):
    _, _, channels, states = shape
    softplus = draws.get("softplus", False)
    case = Case(name, delta_softplus=softplus, zero_order_hold=zero_order_hold, reverse=reverse, cu_seqlens=cu_seqlens)
    inputs, sizes = draw(case, shape, **draws)
    spans = sequences(inputs["u"], cu_seqlens)
    h0 = case.normal("initial_state", len(spans), channels, states) if initial_state else None

    ys, finals = [], []
    for index, (row, start, end) in enumerate(spans):
        h = h0[index] if initial_state else torch.zeros(channels, states, dtype=torch.float64)
        reads = {}
        for t in reversed(range(start, end)) if reverse else range(start, end):
            h, reads[t] = step(inputs, sizes, zero_order_hold, h, row, t)
        ys += [reads[t] for t in range(start, end)]
        finals.append(h)
    out = skip_and_gate(inputs, torch.stack(ys).reshape(inputs["u"].shape))
    case.differentiate(inputs | {"initial_state": h0}, out, torch.stack(finals), final_gradient)
    return case


ALL = dict(softplus=True, bias=True, skip=True, gate=True)  # what a Mamba block asks for
STATES = dict(initial_state=True, final_gradient=True)

SCANS = [
    scan_case("plain"),
    scan_case("softplus_bias_skip_gate", (2, 9, 19, 4), **ALL),
    scan_case("two_groups", (2, 6, 6, 4), groups=2),
    scan_case("three_groups", (1, 5, 9, 3), groups=3, **ALL),
    scan_case("constant_b", constant="b", **ALL),
    scan_case("constant_c", constant="c", **ALL),
    scan_case("constant_b_and_c", constant="bc", **ALL, **STATES),
    scan_case("zero_order_hold", zero_order_hold=True),
    scan_case("zero_order_hold_all", (2, 70, 4, 5), zero_order_hold=True, **ALL, **STATES),
    scan_case("zero_order_hold_constant_b", zero_order_hold=True, constant="b", reverse=True, **ALL),
    scan_case("reverse", (2, 11, 5, 4), reverse=True, **STATES),
    scan_case("packed", (1, 17, 5, 4), cu_seqlens=[0, 3, 3, 10, 17], **ALL, **STATES),
    scan_case("packed_reverse", (1, 150, 3, 4), cu_seqlens=[0, 70, 70, 75, 150], reverse=True, **ALL, **STATES),
    scan_case("initial_state", initial_state=True),
    scan_case("final_gradient", final_gradient=True),
    scan_case("initial_and_final_state", (2, 8, 5, 4), **ALL, **STATES),
    scan_case("ragged", (1, 133, 5, 16), **ALL, **STATES),
    scan_case("ragged_slow_decay", (1, 133, 5, 16), deltas=(0.001, 0.02), decays=(0.01, 1.0), **STATES),
    scan_case("ragged_two_groups_reverse", (2, 67, 34, 2), groups=2, reverse=True, **ALL, **STATES),
    scan_case("one_state", (2, 20, 5, 1), **ALL, **STATES),
    scan_case("many_states", (1, 20, 4, 64), **ALL, **STATES),
    scan_case("one_step", (3, 1, 5, 16), **ALL, **STATES),
    scan_case("softplus_is_identity", (1, 24, 5, 4), deltas=(10.0, 45.0), decays=(0.002, 0.1), **ALL, **STATES),
]


def conv_case(
    name,
    shape=(2, 12, 5),
    width=4,
    silu=False,
    bias=False,
    reverse=False,
    initial_state=False,
    final_gradient=False,
    cu_seqlens=None,
):
    """States hold inputs in the order in which the convolution meets them: in reverse, that of falling time."""
    batch, length, channels = shape
    case = Case(name, silu=silu, reverse=reverse, cu_seqlens=cu_seqlens)
    x = case.normal("x", batch, length, channels)
    weight = case.normal("weight", channels, width)
    offset = case.normal("bias", channels) if bias else None
    spans = sequences(x, cu_seqlens)
    x0 = case.normal("initial_state", len(spans), width - 1, channels) if initial_state else None

    outs, finals = [], []
    for index, (row, start, end) in enumerate(spans):
        before = x0[index] if initial_state else torch.zeros(width - 1, channels, dtype=torch.float64)
        piece = x[row, start:end]
        line = torch.cat([before, piece.flip(0) if reverse else piece])
        if end > start:  # conv1d refuses an input that is shorter than the kernel
            y = F.conv1d(line.T[None], weight[:, None], offset, groups=channels)[0].T
            y = y.flip(0) if reverse else y
            outs.append(F.silu(y) if silu else y)
        finals.append(line[len(line) - (width - 1) :])
    inputs = dict(x=x, weight=weight, bias=offset, initial_state=x0)
    case.differentiate(inputs, torch.cat(outs).reshape(x.shape), torch.stack(finals), final_gradient)
    return case


CONVS = [
    *(
        conv_case(f"width_{width}{'_silu' * silu}", width=width, silu=silu, bias=silu)
        for width in (2, 3, 4, 8)
        for silu in (False, True)
    ),
    *(
        conv_case(f"width_{width}_states", (2, 9, 19), width=width, silu=True, bias=True, **STATES)
        for width in (2, 3, 4, 8)
    ),
    conv_case("bias", bias=True),
    conv_case("silu", silu=True),
    conv_case("initial_state", initial_state=True),
    conv_case("final_gradient", final_gradient=True),
    conv_case("shorter_than_the_state", (2, 3, 5), width=8, silu=True, bias=True, **STATES),
    conv_case("shorter_than_the_state_no_initial", (2, 2, 5), width=4, final_gradient=True),
    conv_case("one_step", (3, 1, 5), width=4, silu=True, bias=True, **STATES),
    conv_case("packed", (1, 17, 5), silu=True, bias=True, cu_seqlens=[0, 2, 2, 10, 17], **STATES),
    conv_case("packed_no_initial", (1, 17, 5), cu_seqlens=[0, 2, 2, 10, 17]),
    conv_case("reverse", (2, 12, 5), silu=True, bias=True, reverse=True, **STATES),
    conv_case("packed_reverse", (1, 17, 5), width=3, reverse=True, cu_seqlens=[0, 1, 1, 10, 17], **STATES),
    conv_case("ragged", (1, 133, 18), silu=True, bias=True, **STATES),
]


def state_update_case(name, shape=(3, 1, 5, 4), zero_order_hold=False, pool=None, slots=None, **draws):
    """A pool of `pool` states with the slot of every row (none if negative), or one state per row.

    `state` is the pool before, `final_state` after, and `token_states` each row's state after each of its tokens.
    """
    batch, tokens, channels, states = shape
    case = Case(name, delta_softplus=draws.get("softplus", False), zero_order_hold=zero_order_hold, slots=slots)
    state = case.normal("state", pool or batch, channels, states)
    inputs, sizes = draw(case, shape, **draws)

    y = torch.zeros(batch, tokens, channels, dtype=torch.float64)
    token_states = torch.zeros(batch, tokens, channels, states, dtype=torch.float64)
    pool_after = state.detach().clone()
    slots = slots or range(batch)
    with torch.no_grad():
        for row, slot in enumerate(slots):
            for k in range(tokens) if slot >= 0 else ():
                h, y[row, k] = step(inputs, sizes, zero_order_hold, pool_after[slot], row, k)
                pool_after[slot] = token_states[row, k] = h
        out = skip_and_gate(inputs, y) * torch.tensor([[[slot >= 0]] for slot in slots])
    case.tensors |= {"out": out, "final_state": pool_after, "token_states": token_states}
    return case


STATE_UPDATES = [
    state_update_case("plain"),
    state_update_case("softplus_bias_skip_gate", (2, 1, 19, 16), **ALL),
    state_update_case("three_tokens", (2, 3, 5, 4)),
    state_update_case("three_tokens_all", (2, 3, 19, 16), **ALL),
    state_update_case("two_groups", (2, 3, 6, 4), groups=2, **ALL),
    state_update_case("constant_b", (2, 3, 5, 4), constant="b", **ALL),
    state_update_case("constant_c", (2, 3, 5, 4), constant="c", **ALL),
    state_update_case("constant_b_and_c", (2, 3, 5, 4), constant="bc", **ALL),
    state_update_case("zero_order_hold", (2, 3, 5, 4), zero_order_hold=True, **ALL),
    state_update_case("slots", (3, 1, 5, 4), pool=5, slots=[4, 0, 2], **ALL),
    state_update_case("padding_slots", (4, 3, 5, 4), pool=5, slots=[3, -1, 1, -1], **ALL),
    state_update_case("one_state", (2, 3, 5, 1), **ALL),
    state_update_case("many_states", (1, 3, 4, 64), **ALL),
]


if __name__ == "__main__":
    save("scan", SCANS)
    save("conv", CONVS)
    save("state_update", STATE_UPDATES)
