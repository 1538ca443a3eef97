//! Causal convolutions of whole sequences, by Fourier transforms.

use realfft::{FftNum, RealFftPlanner};

/// The length of the transforms for sequences of `len`: twice as long, so that the end does not come round to the
/// start, and a power of two.
pub(crate) fn transform_len(len: usize) -> usize {
    (2 * len).next_power_of_two().max(2)
}

/// `y_t = Σ_k K_k u_{t-k}`, summed over `k` from 0 to `t`: both as long as the shorter of the two.
pub(crate) fn convolve<T: FftNum>(kernel: &[T], u: &[T]) -> Vec<T> {
    let len = kernel.len().min(u.len());
    if len == 0 {
        return Vec::new();
    }
    let size = transform_len(len);
    let mut planner = RealFftPlanner::new();
    let (forward, inverse) = (planner.plan_fft_forward(size), planner.plan_fft_inverse(size));
    let spectrum = |from: &[T]| {
        let (mut padded, mut spectrum) = (forward.make_input_vec(), forward.make_output_vec());
        padded[..len].copy_from_slice(&from[..len]);
        forward.process(&mut padded, &mut spectrum).expect("buffers of the plan's own lengths");
        spectrum
    };
    let (of_kernel, mut product) = (spectrum(kernel), spectrum(u));
    for (product, of_kernel) in product.iter_mut().zip(of_kernel) {
        *product = *product * of_kernel;
    }
    let mut out = inverse.make_output_vec();
    inverse.process(&mut product, &mut out).expect("the ends of a product of two real spectra are real");
    let scale = T::one() / T::from_usize(size).expect("a size is a number");
    out.truncate(len);
    for out in &mut out {
        *out = *out * scale;
    }
    out
}
