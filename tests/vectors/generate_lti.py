"""Writes the reference vectors of linear time-invariant systems, lti.safetensors, that tests/suite/lti/vectors.rs reads.

Run it again with

    pip install torch numpy safetensors
    python tests/vectors/generate_lti.py

The form of the file is that of generate.py. The results come from PyTorch alone, the formulas of the papers in float64 and
complex128, gradients by autograd: S4D (Gu, Gupta, Goel and Ré 2022, arXiv 2206.11893) as a convolution with its Vandermonde
kernel, written out as a sum, with what the initial state adds; S4 (Gu, Goel and Ré 2022, arXiv 2111.00396) as the powers of a
dense complex matrix with both numbers of each pair; discretizations by matrix_exp of the augmented matrix and by solve; HiPPO's
matrices as the papers print them. Complex tensors are stored as view_as_real gives them, the last two dimensions joined.
"""

import torch

from generate import Case, save


def complex_of(tensor):
    """(.., 2 N) float64 as (.., N) complex128."""
    return torch.view_as_complex(tensor.unflatten(-1, (-1, 2)))


def real_of(tensor):
    return torch.view_as_real(tensor).flatten(-2)


def discretize(a, b, delta, rule):
    """A bar and B bar of diagonal systems; delta is (D, 1)."""
    z = delta * a
    if rule == "zero_order_hold":
        return torch.exp(z), (torch.exp(z) - 1) / a * b
    if rule == "bilinear":
        return (1 + z / 2) / (1 - z / 2), delta / (1 - z / 2) * b
    return 1 + z, delta * b


def s4d_case(name, shape, rule="zero_order_hold", reverse=False, cu_seqlens=None, skip=True, state=True):
    batch, length, d_inner, pairs = shape
    case = Case(f"s4d_{name}", rule=rule, reverse=reverse, cu_seqlens=cu_seqlens)
    bounds = cu_seqlens or [0, length]
    sequences = len(bounds) - 1 if cu_seqlens else batch
    inputs = {"u": case.normal("u", batch, length, d_inner)}
    inputs["log_delta"] = case.uniform("log_delta", d_inner, low=-5.0, high=-1.0)
    decay = torch.rand(d_inner, pairs, generator=case.random) * 2 + 0.1
    frequency = torch.randn(d_inner, pairs, generator=case.random) * 20
    inputs["a"] = case.add("a", torch.stack([-decay, frequency], -1).flatten(-2))
    inputs["b"] = case.normal("b", d_inner, 2 * pairs)
    inputs["c"] = case.normal("c", d_inner, 2 * pairs)
    inputs["d"] = case.normal("d", d_inner) if skip else None
    inputs["initial_state"] = case.normal("initial_state", sequences, d_inner, 2 * pairs) if state else None

    a, b, c = (complex_of(inputs[name]) for name in ("a", "b", "c"))
    a_bar, b_bar = discretize(a, b, inputs["log_delta"].exp()[:, None], rule)
    outs, finals = [], []
    for row in range(batch):
        parts = []
        for i, (start, end) in enumerate(zip(bounds, bounds[1:])):
            u = inputs["u"][row, start:end]
            u = u.flip(0) if reverse else u
            steps = end - start
            powers = a_bar[None] ** torch.arange(steps + 1)[:, None, None]  # (steps + 1, D, N)
            kernel = 2 * (c * b_bar * powers[:steps]).sum(-1).real  # (steps, D)
            y = torch.stack([(kernel[: t + 1].flip(0) * u[: t + 1]).sum(0) for t in range(steps)]) if steps else u
            final = (powers[:steps].flip(0) * b_bar * u[..., None]).sum(0)
            if state:
                initial = complex_of(inputs["initial_state"])[i if cu_seqlens else row]
                y = y + 2 * (c * powers[1:] * initial).sum(-1).real
                final = final + powers[steps] * initial
            if skip:
                y = y + inputs["d"] * u
            parts.append(y.flip(0) if reverse else y)
            finals.append(real_of(final))
        outs.append(torch.cat(parts))
    case.differentiate(inputs, torch.stack(outs), torch.stack(finals), with_final_state=state)
    return case


def s4_case(name, shape, length):
    """The kernel of Λ - P P* from C~ = C (I + A bar^L), its gradients, and C."""
    d_inner, pairs, rank = shape
    case = Case(f"s4_{name}", length=length)
    inputs = {"log_delta": case.uniform("log_delta", d_inner, low=-4.0, high=-1.0)}
    decay = torch.rand(d_inner, pairs, generator=case.random) + 0.2
    frequency = torch.rand(d_inner, pairs, generator=case.random) * 20
    inputs["a"] = case.add("a", torch.stack([-decay, frequency], -1).flatten(-2))
    inputs["p"] = case.normal("p", d_inner, rank, 2 * pairs, deviation=0.7)
    inputs["b"] = case.normal("b", d_inner, 2 * pairs)
    inputs["c"] = case.normal("c", d_inner, 2 * pairs)
    both = lambda x: torch.cat([x, x.conj()], -1)
    lambda_, p, b, c = (both(complex_of(inputs[name])) for name in ("a", "p", "b", "c"))
    kernels, originals = [], []
    for i in range(d_inner):
        matrix = torch.diag(lambda_[i]) - p[i].T @ p[i].conj()
        delta, identity = inputs["log_delta"][i].exp(), torch.eye(2 * pairs, dtype=torch.complex128)
        left = identity - delta / 2 * matrix
        a_bar = torch.linalg.solve(left, identity + delta / 2 * matrix)
        b_bar = torch.linalg.solve(left, delta * b[i])
        power = torch.linalg.matrix_power(a_bar, length)
        original = torch.linalg.solve((identity + power).T, c[i])
        kernel, x = [], b_bar
        for _ in range(length):
            kernel.append((original * x).sum().real)
            x = a_bar @ x
        kernels.append(torch.stack(kernel))
        originals.append(real_of(original[:pairs]))
    case.differentiate(inputs, torch.stack(kernels), torch.stack(originals), with_final_state=False)
    # Kernels and C have names of their own.
    case.tensors["kernel"], case.tensors["original"] = case.tensors.pop("out"), case.tensors.pop("final_state")
    return case


def dense_case(name, order, rule, singular=False):
    """A dense system's recurrence, by the exponential of the augmented matrix or by solving."""
    case = Case(f"dense_{name}", rule=rule)
    a = case.normal("a", order, order) - torch.eye(order)
    if singular:
        case.tensors["a"][-1] = 0.0
        a = case.tensors["a"].double()
    else:
        case.tensors["a"] = a.detach().float()
        a = case.tensors["a"].double()
    b = case.normal("b", order).detach()
    delta = case.uniform("delta", 1, low=0.01, high=0.5).detach()
    identity = torch.eye(order, dtype=torch.float64)
    if rule == "zero_order_hold":
        both = torch.zeros(order + 1, order + 1, dtype=torch.float64)
        both[:order, :order], both[:order, order] = a * delta, b * delta
        both = torch.linalg.matrix_exp(both)
        a_bar, b_bar = both[:order, :order], both[:order, order]
    elif rule == "bilinear":
        left = identity - delta / 2 * a
        a_bar, b_bar = torch.linalg.solve(left, identity + delta / 2 * a), torch.linalg.solve(left, delta * b)
    else:
        a_bar, b_bar = identity + delta * a, delta * b
    case.tensors |= {"a_bar": a_bar.contiguous(), "b_bar": b_bar.contiguous()}
    return case


def hippo_case(measure, order):
    """A, and the eigenvalues of its normal part with positive imaginary parts, in their order."""
    case = Case(f"hippo_{measure}_{order}", measure=measure, order=order)
    a = torch.zeros(order, order, dtype=torch.float64)
    for n in range(order):
        for k in range(order):
            root = ((2 * n + 1) * (2 * k + 1)) ** 0.5
            if measure == "legs":
                a[n, k] = -root if n > k else -(n + 1) if n == k else 0.0
            elif measure == "legt":
                a[n, k] = -root * (1.0 if k <= n else (-1.0) ** (n - k))
            # As the papers print it, the sine before its cosine's next: n and k count 0, s1, c1 there; here cosines are even.
            elif n == k == 0:
                a[n, k] = -2.0
            elif (n == 0 and k % 2 == 0) or (k == 0 and n % 2 == 0):
                a[n, k] = -2 * 2**0.5
            elif n % 2 == 0 and k % 2 == 0:
                a[n, k] = -4.0
            elif k == n + 1 and n % 2 == 0:
                a[n, k] = -2 * torch.pi * (n // 2)
            elif n == k + 1 and k % 2 == 0:
                a[n, k] = 2 * torch.pi * (k // 2)
    normal = a.clone()
    if measure == "legs":
        root = torch.sqrt(torch.arange(order) + 0.5).double()
        normal += root[:, None] * root
    elif measure == "legt":
        root = torch.sqrt(2 * torch.arange(order).double() + 1)
        for parity in (0, 1):
            half = root * (torch.arange(order) % 2 == parity)
            normal += half[:, None] * half
    else:
        at_zero = torch.tensor([1.0] + [2**0.5 if n % 2 == 0 else 0.0 for n in range(1, order)], dtype=torch.float64)
        normal += 2 * at_zero[:, None] * at_zero
    eigenvalues = torch.linalg.eigvals(normal).imag.sort().values[order // 2 :]
    case.tensors |= {"matrix": a, "frequencies": eigenvalues.contiguous()}
    return case


CASES = [
    s4d_case("plain", (2, 13, 5, 4)),
    s4d_case("bilinear", (2, 13, 5, 4), rule="bilinear"),
    s4d_case("euler", (1, 9, 3, 2), rule="euler"),
    s4d_case("reverse", (2, 19, 3, 4), reverse=True),
    s4d_case("packed", (1, 40, 3, 3), cu_seqlens=[0, 7, 7, 24, 40]),
    s4d_case("packed_reverse", (1, 40, 3, 3), cu_seqlens=[0, 17, 33, 40], reverse=True),
    s4d_case("without_state", (2, 50, 17, 2), state=False, skip=False),
    s4d_case("many_pairs", (1, 33, 2, 32)),
    s4d_case("one_pair", (3, 16, 4, 1), rule="bilinear", reverse=True),
    s4_case("even", (2, 4, 1), 16),
    s4_case("odd", (2, 4, 1), 15),
    s4_case("rank_two", (2, 3, 2), 24),
    s4_case("rank_zero", (1, 3, 0), 8),
    dense_case("hold", 6, "zero_order_hold"),
    dense_case("hold_singular", 5, "zero_order_hold", singular=True),
    dense_case("bilinear", 6, "bilinear"),
    dense_case("euler", 4, "euler"),
    hippo_case("legs", 16),
    hippo_case("legt", 16),
    hippo_case("fourier", 16),
]


if __name__ == "__main__":
    save("lti", CASES)
