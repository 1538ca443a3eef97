"""The polynomial coefficients of src/simd/math.rs, and of kernels/common/math.cuh for decays near 1, by Remez' exchange. Needs numpy and mpmath."""

import numpy as np
from mpmath import atanh, cos, log, lu_solve, matrix, mp, mpf, nstr, pi, sqrt

mp.dps = 40


def remez(function, low, high, degree, weight):
    """The polynomial p that minimises the largest |weight * (p - function)| on [low, high], and that error."""
    low, high = mpf(low), mpf(high)
    count = degree + 2
    nodes = [(low + high) / 2 - (high - low) / 2 * cos(pi * i / (count - 1)) for i in range(count)]
    grid = [low + (high - low) * i / 4000 for i in range(4001)]
    for _ in range(20):
        system, values = matrix(count, count), matrix(count, 1)
        for i, x in enumerate(nodes):
            for j in range(degree + 1):
                system[i, j] = x**j
            system[i, degree + 1] = (-1) ** i / weight(x)
            values[i] = function(x)
        coefficients = list(lu_solve(system, values))[: degree + 1]
        peaks = []  # the largest error of each run of one sign
        for x in grid:
            error = weight(x) * (sum(c * x**j for j, c in enumerate(coefficients)) - function(x))
            if not peaks or (error > 0) != (peaks[-1][1] > 0):
                peaks.append((x, error))
            elif abs(error) > abs(peaks[-1][1]):
                peaks[-1] = (x, error)
        while len(peaks) > count:
            peaks.pop(0 if abs(peaks[0][1]) < abs(peaks[-1][1]) else -1)
        assert len(peaks) == count, "the error no longer alternates: choose a smoother weight"
        nodes = [x for x, _ in peaks]
    return coefficients, max(abs(error) for _, error in peaks)


def show(name, coefficients, error):
    print(f"{name}: error {nstr(error, 3)}")
    print("   ", ", ".join(repr(np.float32(float(c))) for c in coefficients))


def exp2m1_rest(f):
    """((2^f - 1)/f - ln 2)/f: the constant ln 2 is kept exact, so that tiny exponents have no systematic error."""
    if abs(f) < mpf("1e-8"):
        return log(2) ** 2 / 2 + log(2) ** 3 / 6 * f
    return ((mpf(2) ** f - 1) / f - log(2)) / f


def atanh_ratio(v):
    """2 atanh(sqrt v)/sqrt v, with which log1p(e) = s * atanh_ratio(s^2), s = e/(2 + e)."""
    return 2 * atanh(sqrt(v)) / sqrt(v) if v > 0 else mpf(2)


if __name__ == "__main__":
    for degree in (3, 4):
        weight = lambda f: sqrt(f**4 + mpf("0.0004")) / mpf(2) ** f
        c, e = remez(exp2m1_rest, -0.5, 0.5, degree, weight)
        show(f"EXP2M1, ln 2 and then, degree {degree}", c, e)
    weight = lambda f: sqrt(f**2 + mpf("0.0001"))
    show("EXP2M1 near 1, ln 2 and then", *remez(exp2m1_rest, -1 / mpf(16), 1 / mpf(16), 1, weight))
    for degree in (3, 4):
        show(f"ATANH, degree {degree}", *remez(atanh_ratio, 0, mpf(1) / 9, degree, lambda v: 1 / atanh_ratio(v)))
