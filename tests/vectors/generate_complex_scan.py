"""Writes complex_scan.safetensors, here: the scan with complex states, as generate.py writes the real one's vectors.

    python tests/vectors/generate_complex_scan.py

The results come from PyTorch alone, in complex128: the equations of the crate's documentation, which are those of
mamba_ssm's selective_scan_ref for a complex A, with gradients by autograd. Complex tensors are passed as real ones whose
last dimension has the two parts of each number beside one another.
"""

import math

import torch
import torch.nn.functional as F

from generate import Case, per_channel, save, sequences


def numbers(tensor):
    """The complex numbers of pairs of neighbours."""
    return torch.view_as_complex(tensor.reshape(*tensor.shape[:-1], -1, 2))


def parts(tensor):
    return torch.view_as_real(tensor).flatten(-2)


def scan_case(
    name,
    shape=(2, 7, 5, 3),
    groups=1,
    constant="",
    gate=False,
    skip=False,
    bias=False,
    softplus=False,
    reverse=False,
    initial_state=False,
    final_gradient=False,
    cu_seqlens=None,
):
    case = Case(name, delta_softplus=softplus, reverse=reverse, cu_seqlens=cu_seqlens)
    batch, length, channels, states = shape
    low, high = (-3.0, 2.0) if softplus else (0.02, 0.8)
    varying, fixed = (batch, length, groups, 2 * states), (channels, 2 * states)
    decays = -(torch.rand((channels, states), generator=case.random) * 2.7 + 0.3)
    turns = (torch.rand((channels, states), generator=case.random) * 2 - 1) * 2 * math.pi
    found = sequences(torch.empty(batch, length), cu_seqlens)
    inputs = dict(
        u=case.normal("u", batch, length, channels),
        delta=case.uniform("delta", batch, length, channels, low=low, high=high),
        a=case.add("a", torch.stack([decays, turns], -1).flatten(-2)),
        b=case.normal("b", *(fixed if "b" in constant else varying)),
        c=case.normal("c", *(fixed if "c" in constant else varying)),
        z=case.normal("z", batch, length, channels, deviation=2.0) if gate else None,
        d=case.normal("d", channels) if skip else None,
        delta_bias=case.normal("delta_bias", channels, deviation=0.5) if bias else None,
        initial_state=case.normal("initial_state", len(found), channels, 2 * states) if initial_state else None,
    )
    delta = inputs["delta"] + inputs["delta_bias"] if bias else inputs["delta"]
    if softplus:
        delta = F.softplus(delta, beta=1, threshold=20)
    a = numbers(inputs["a"])
    rows, finals = {}, []
    for i, (row, start, end) in enumerate(found):
        h = torch.zeros(channels, states, dtype=torch.complex128)
        if initial_state:
            h = numbers(inputs["initial_state"][i])
        steps = range(start, end)
        for t in reversed(steps) if reverse else steps:
            b, c = (numbers(per_channel(inputs[name], row, t, channels)) for name in ("b", "c"))
            step = delta[row, t][:, None]
            h = torch.exp(step * a) * h + step * b * inputs["u"][row, t][:, None]
            rows[row, t] = 2 * (c * h).sum(-1).real
        finals.append(parts(h))
    y = torch.stack([torch.stack([rows[row, t] for t in range(length)]) for row in range(batch)])
    if skip:
        y = y + inputs["d"] * inputs["u"]
    if gate:
        y = y * F.silu(inputs["z"])
    case.differentiate(inputs, y, torch.stack(finals), final_gradient)
    return case


if __name__ == "__main__":
    everything = dict(gate=True, skip=True, bias=True, softplus=True, initial_state=True, final_gradient=True)
    save(
        "complex_scan",
        [
            scan_case("plain"),
            scan_case("one_step", (1, 1, 1, 1)),
            scan_case("groups", (2, 6, 6, 2), groups=3),
            scan_case("constant_b", constant="b"),
            scan_case("constant_c", constant="c", groups=1),
            scan_case("constant_both", constant="bc"),
            scan_case("gate", gate=True),
            scan_case("skip", skip=True),
            scan_case("softplus", softplus=True, bias=True),
            scan_case("reverse", reverse=True, initial_state=True, final_gradient=True),
            scan_case("state", initial_state=True, final_gradient=True),
            scan_case("everything", (2, 9, 10, 4), groups=2, **everything),
            scan_case("long", (1, 70, 9, 2), **everything),
            scan_case("packed", (1, 12, 4, 3), cu_seqlens=[0, 3, 3, 10, 12], **everything),
            scan_case("packed_back", (1, 12, 4, 3), cu_seqlens=[0, 5, 12], reverse=True, **everything),
        ],
    )
