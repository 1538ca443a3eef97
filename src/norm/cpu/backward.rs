//! The backward pass. With `v` what is normed, `r = 1/√(mean(v²) + eps)`, `n = v r` and `g` the gradient of `n`,
//!
//! ```text
//! d_v = r (g - n mean(g n))         d_weight = Σ d_out n        over rows
//! ```

use rayon::prelude::*;

use super::{BackwardProblem, GradientsMut, ROWS, Staged, dot, multiply, scale, weight_or_ones};
use crate::arguments::zeroed;
use crate::shared::Shared;
use crate::simd::{Isa, Kernel, Lanes, silu_grad};
use crate::{Element, Result};

pub(super) fn run<X: Element, S: Element, O: Element>(
    isa: Isa,
    problem: &BackwardProblem<X, S, O>,
    gradients: GradientsMut<X, S>,
) -> Result<()> {
    let (rows, width) = (problem.sizes.rows, problem.sizes.width);
    let blocks = rows.div_ceil(ROWS);
    if let GradientsMut { x: None, residual: None, weight: None, z: None } = &gradients {
        return Ok(());
    }
    if rows == 0 {
        // There may be more columns than can be counted through.
        gradients.weight.into_iter().for_each(|d_weight| d_weight.fill(0.0));
        return Ok(());
    }
    // What each block of rows leaves of the gradient of the weight.
    let mut partials: Vec<f32> = zeroed("s", &[if gradients.weight.is_some() { blocks } else { 0 }, width])?;
    let weight = weight_or_ones(&problem.inputs.weight, width);
    let d_x = gradients.x.map(Shared::new);
    let d_residual = gradients.residual.map(Shared::new);
    let d_z = gradients.z.map(Shared::new);
    let with_weight = gradients.weight.is_some();
    {
        let partials = Shared::new(&mut partials);
        (0..blocks).into_par_iter().for_each_init(
            || Scratch::new(width, problem.inputs.z.is_some()),
            |scratch, block| {
                let first = block * ROWS;
                let end = rows.min(first + ROWS);
                let range = first * width..end * width;
                // SAFETY (of all four): the blocks of rows are disjoint, and this task alone works on this one.
                let d_x = d_x.as_ref().map(|all| unsafe { all.part(range.clone()) });
                let d_residual = d_residual.as_ref().map(|all| unsafe { all.part(range.clone()) });
                let d_z = d_z.as_ref().map(|all| unsafe { all.part(range.clone()) });
                let d_weight = with_weight.then(|| unsafe { partials.part(block * width..(block + 1) * width) });
                let to = Gradients { d_x, d_residual, d_z, d_weight };
                isa.run(Block { problem, weight: &weight, first, count: end - first, to, scratch });
            },
        );
    }
    if let Some(d_weight) = gradients.weight {
        // In f64, so that the error does not grow with the number of blocks.
        let mut total = vec![0.0f64; width];
        for partial in partials.chunks_exact(width) {
            for (total, partial) in total.iter_mut().zip(partial) {
                *total += f64::from(*partial);
            }
        }
        for (to, total) in d_weight.iter_mut().zip(total) {
            *to = total as f32;
        }
    }
    Ok(())
}

/// Rows in a processor's cache.
struct Scratch {
    s: Staged,
    /// The gradient of the output, then of what comes out of the norm, then of what goes in.
    d: Staged,
    /// What is normed, then the norm of it.
    normed: Staged,
    /// The gate and its slope; of no columns where there is none.
    gate: Staged,
    slope: Staged,
    /// What else is added or multiplied by.
    other: Staged,
}

impl Scratch {
    fn new(width: usize, is_gated: bool) -> Self {
        let staged = || Staged::new(width);
        let of_gate = || Staged::new(if is_gated { width } else { 0 });
        Self { s: staged(), d: staged(), normed: staged(), gate: of_gate(), slope: of_gate(), other: staged() }
    }
}

/// Where the gradients of a block's rows go.
struct Gradients<'t, X, S> {
    d_x: Option<&'t mut [X]>,
    d_residual: Option<&'t mut [S]>,
    d_z: Option<&'t mut [X]>,
    d_weight: Option<&'t mut [f32]>,
}

/// The `count` rows from `first` on.
struct Block<'t, 'a, X: Element, S: Element, O: Element> {
    problem: &'t BackwardProblem<'a, X, S, O>,
    weight: &'t [f32],
    first: usize,
    count: usize,
    to: Gradients<'t, X, S>,
    scratch: &'t mut Scratch,
}

impl<X: Element, S: Element, O: Element> Kernel for Block<'_, '_, X, S, O> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, simd: L) {
        let Self { problem, weight, first, count, mut to, scratch } = self;
        let (inputs, width) = (&problem.inputs, problem.sizes.width);
        let norm_first = inputs.options.norm_before_gate;
        let Scratch { s, d, normed, gate, slope, other } = scratch;
        for i in 0..count {
            let row = first + i;
            inputs.s.widen_row([row, 0], s.columns_mut());
            inputs.d_out.widen_row([row, 0], d.columns_mut());
            normed.columns_mut().copy_from_slice(s.columns());
            if let Some(z) = &inputs.z {
                z.widen_row([row, 0], gate.columns_mut());
                for (gate, slope) in gate.rows.iter_mut().zip(&mut slope.rows) {
                    for (gate, slope) in gate.vectors_mut::<L>().iter_mut().zip(slope.vectors_mut::<L>()) {
                        (*gate, *slope) = silu_grad(simd, *gate);
                    }
                }
                if norm_first {
                    // What the gate's slope is multiplied by, less the norm.
                    product(d.columns(), weight, other.columns_mut());
                    multiply(d.columns_mut(), gate.columns());
                } else {
                    multiply(normed.columns_mut(), gate.columns());
                }
            }
            let d_weight = to.d_weight.as_deref_mut();
            norm_row(problem, weight, d.columns_mut(), normed.columns_mut(), d_weight);
            if inputs.z.is_some() {
                if norm_first {
                    multiply(other.columns_mut(), normed.columns());
                } else {
                    product(d.columns(), s.columns(), other.columns_mut());
                    multiply(d.columns_mut(), gate.columns());
                }
                if let Some(d_z) = &mut to.d_z {
                    multiply(other.columns_mut(), slope.columns());
                    X::narrow(other.columns(), &mut d_z[i * width..][..width]);
                }
            }
            if let Some(view) = &inputs.d_residual_out {
                view.widen_row([row, 0], other.columns_mut());
                for (d, more) in d.columns_mut().iter_mut().zip(other.columns()) {
                    *d += more;
                }
            }
            if let Some(d_x) = &mut to.d_x {
                X::narrow(d.columns(), &mut d_x[i * width..][..width]);
            }
            if let Some(d_residual) = &mut to.d_residual {
                S::narrow(d.columns(), &mut d_residual[i * width..][..width]);
            }
        }
    }
}

/// Norms a row, `normed`, and replaces the gradient of the weighted norm, `d`, by that of what was normed; adds to the
/// gradient of the weight.
#[inline(always)]
fn norm_row<X: Element, S: Element, O: Element>(
    problem: &BackwardProblem<X, S, O>,
    weight: &[f32],
    d: &mut [f32],
    normed: &mut [f32],
    mut d_weight: Option<&mut [f32]>,
) {
    let (group_size, eps) = (problem.sizes.group_size, problem.inputs.options.eps as f32);
    for first in (0..problem.sizes.width).step_by(group_size) {
        let columns = first..first + group_size;
        let (d, normed, weight) = (&mut d[columns.clone()], &mut normed[columns.clone()], &weight[columns.clone()]);
        let scale = scale(normed, eps);
        for x in &mut *normed {
            *x *= scale;
        }
        if let Some(d_weight) = &mut d_weight {
            for ((to, d), normed) in d_weight[columns].iter_mut().zip(&*d).zip(&*normed) {
                *to += d * normed;
            }
        }
        multiply(d, weight);
        let along = dot(d, normed) / group_size as f32;
        for (d, normed) in d.iter_mut().zip(&*normed) {
            *d = scale * (*d - normed * along);
        }
    }
}

#[inline(always)]
fn product(a: &[f32], b: &[f32], to: &mut [f32]) {
    for ((to, a), b) in to.iter_mut().zip(a).zip(b) {
        *to = a * b;
    }
}
