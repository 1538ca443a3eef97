//! Exponentials of complex numbers that lose nothing: for small arguments, and for long times.

use num_complex::Complex64;

/// `e^z - 1`, without cancellation for small `z`.
pub(crate) fn exp_m1(z: Complex64) -> Complex64 {
    let (sin, cos) = z.im.sin_cos();
    let half = (0.5 * z.im).sin();
    Complex64::new(z.re.exp_m1() * cos - 2.0 * half * half, z.re.exp() * sin)
}

/// `(e^z - 1)/z`, which is 1 at 0.
pub(crate) fn exp_m1_over(z: Complex64) -> Complex64 {
    if z == Complex64::ZERO { Complex64::ONE } else { exp_m1(z) / z }
}

/// The derivative of [`exp_m1_over`], `(e^z (z - 1) + 1)/z²`, which is 1/2 at 0.
pub(crate) fn exp_m1_over_slope(z: Complex64) -> Complex64 {
    // The quotient loses 2^-53/|z|² to cancellation, and the series' remainder is |z|^12/12!·(11/12): below 1/4 the
    // series is exact to 2^-53.
    if z.norm() < 0.25 {
        // Σ z^k (k + 1)/(k + 2)!
        let (mut sum, mut power, mut factorial) = (Complex64::ZERO, Complex64::ONE, 2.0);
        for k in 0..12 {
            sum += power * (f64::from(k) + 1.0) / factorial;
            power *= z;
            factorial *= f64::from(k) + 3.0;
        }
        return sum;
    }
    (z.exp() - exp_m1_over(z)) / z
}

/// `exp(steps · delta · a)`, to the last digits however many steps there are.
///
/// The angle of `k` steps is `k·Δ·Im(a)`, and only what is left of it modulo 2π matters. Rounded to one `f64`, an angle
/// of 1e8 is off by 1e-8, and in `f32` nothing is left. So both products are kept in two parts, the rounded product and
/// what rounding took from it. The sine and cosine of the first part are exact, and the second is small.
pub(crate) fn exp_steps(a: Complex64, delta: f64, steps: f64) -> Complex64 {
    if steps == 0.0 {
        return Complex64::ONE;
    }
    let step = delta * a.im;
    let step_rest = delta.mul_add(a.im, -step);
    let angle = steps * step;
    let rest = steps.mul_add(step, -angle) + steps * step_rest;
    let (sin, cos) = angle.sin_cos();
    let size = (steps * (delta * a.re)).exp();
    // Beyond the first order nothing is left: the rest is 2^-53 of an angle.
    Complex64::new(size * (cos - rest * sin), size * (sin + rest * cos))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: Complex64, want: Complex64, tolerance: f64) {
        assert!((got - want).norm() <= tolerance * want.norm(), "{got} instead of {want}");
    }

    #[test]
    fn small_arguments_lose_nothing() {
        // Three terms of the series are exact to 1e-18 here.
        let z = Complex64::new(3e-7, -5e-7);
        close(exp_m1(z), z + z * z / 2.0 + z * z * z / 6.0, 1e-15);
        close(exp_m1_over(z), 1.0 + z / 2.0 + z * z / 6.0, 1e-15);
        close(exp_m1_over_slope(z), 0.5 + z / 3.0 + z * z / 8.0, 1e-15);
        // What 1 - 2 sin²(y/2) loses near a whole turn is the angle's own rounding, 2^-53 of 2π.
        close(exp_m1(Complex64::new(0.5, 2.0)), Complex64::new(0.5, 2.0).exp() - 1.0, 1e-15);
    }

    #[test]
    fn the_slope_is_the_same_on_both_sides_of_the_switch() {
        for angle in 0..12 {
            let at = |size: f64| Complex64::from_polar(size, f64::from(angle) * 0.5);
            // The quotient loses 2^-53·16 there, and the two points are 1e-12 apart.
            close(exp_m1_over_slope(at(0.25 - 1e-12)), exp_m1_over_slope(at(0.25 + 1e-12)), 1e-14 + 1e-11);
            let z = at(1.5);
            let difference = (exp_m1_over(z + 1e-6) - exp_m1_over(z - 1e-6)) / 2e-6;
            close(exp_m1_over_slope(z), difference, 1e-9);
        }
    }

    /// A million steps of an angle whose turns are known: 2π times a fraction whose product with the step count is
    /// exact.
    #[test]
    fn many_steps_keep_their_angle() {
        let steps = f64::from(1 << 20);
        // exp(k·Δ·a) by repeated squaring, whose error doubles each time: 2^20 · 2^-53 at most.
        for (delta, im) in [(0.37, 811.0), (1e-3, std::f64::consts::PI * 31.0), (0.1, -1e4)] {
            let a = Complex64::new(-1e-7, im);
            let got = exp_steps(a, delta, steps);
            // Δ·Im(a) in two parts, the second turned in at each squaring with its weight.
            let step = delta * im;
            let rest = delta.mul_add(im, -step);
            let mut power = Complex64::from_polar(1.0, step) * Complex64::new(1.0, rest);
            for _ in 0..20 {
                power *= power;
                power /= power.norm();
            }
            close(got, power * (steps * delta * a.re).exp(), 1e-9);
            // One rounding of the angle would show: it is off by 2^-53 of up to 1e9.
            let half = exp_steps(a, delta, steps / 2.0);
            close(half * half, got, 1e-14);
        }
    }
}
