//! The forward pass.

use super::{OutputMut, Problem, ROWS, Staged, multiply, scale, weight_or_ones};
use crate::shared::Shared;
use crate::simd::{Isa, Kernel, Lanes, silu};
use crate::tasks;
use crate::{DType, Element};

pub(super) fn run<X: Element, S: Element, O: Element>(isa: Isa, problem: &Problem<X, S>, outputs: OutputMut<S, O>) {
    let width = problem.sizes.width;
    if outputs.out.is_empty() {
        // There may be more columns than can be counted through.
        return;
    }
    let weight = weight_or_ones(&problem.inputs.weight, width);
    let residual_out = outputs.residual_out.map(Shared::new);
    let out = Shared::new(outputs.out);
    tasks::for_each_init(
        problem.sizes.rows.div_ceil(ROWS),
        1,
        || Scratch { s: Staged::new(width), other: Staged::new(width), rounded: vec![S::from_f32(0.0); width] },
        |scratch, block| {
            let first = block * ROWS;
            let part = first * width..problem.sizes.rows.min(first + ROWS) * width;
            // SAFETY (both): the blocks of rows are disjoint, and this task alone works on this one.
            let residual_out = residual_out.as_ref().map(|all| unsafe { all.part(part.clone()) });
            let out = unsafe { out.part(part) };
            isa.run(Block { problem, weight: &weight, first, out, residual_out, scratch });
        },
    );
}

struct Scratch<S> {
    s: Staged,
    /// The residual, then the gate.
    other: Staged,
    rounded: Vec<S>,
}

/// The rows from `first` on.
struct Block<'t, 'a, X: Element, S: Element, O> {
    problem: &'t Problem<'a, X, S>,
    weight: &'t [f32],
    first: usize,
    out: &'t mut [O],
    residual_out: Option<&'t mut [S]>,
    scratch: &'t mut Scratch<S>,
}

impl<X: Element, S: Element, O: Element> Kernel for Block<'_, '_, X, S, O> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, simd: L) {
        let Self { problem, weight, first, out, mut residual_out, scratch } = self;
        let (inputs, sizes) = (&problem.inputs, problem.sizes);
        let (width, eps) = (sizes.width, inputs.options.eps as f32);
        let Scratch { s, other, rounded } = scratch;
        for (i, out) in out.chunks_exact_mut(width).enumerate() {
            let row = first + i;
            inputs.x.widen_row([row, 0], s.columns_mut());
            if let Some(residual) = &inputs.residual {
                residual.widen_row([row, 0], other.columns_mut());
                for (s, residual) in s.columns_mut().iter_mut().zip(other.columns()) {
                    *s += residual;
                }
            }
            let written = residual_out.as_mut().map(|rows| &mut rows[i * width..][..width]);
            if written.is_some() || S::DTYPE != DType::F32 {
                let rounded = written.unwrap_or(rounded);
                S::narrow(s.columns(), rounded);
                S::widen(rounded, s.columns_mut());
            }
            if let Some(z) = &inputs.z {
                z.widen_row([row, 0], other.columns_mut());
                for row in &mut other.rows {
                    for z in row.vectors_mut::<L>() {
                        *z = silu(simd, *z);
                    }
                }
                if !inputs.options.norm_before_gate {
                    multiply(s.columns_mut(), other.columns());
                }
            }
            let groups = s.columns_mut().chunks_exact_mut(sizes.group_size);
            for (columns, weight) in groups.zip(weight.chunks_exact(sizes.group_size)) {
                let scale = scale(columns, eps);
                for (x, weight) in columns.iter_mut().zip(weight) {
                    *x = *x * scale * weight;
                }
            }
            if inputs.z.is_some() && inputs.options.norm_before_gate {
                multiply(s.columns_mut(), other.columns());
            }
            O::narrow(s.columns(), out);
        }
    }
}
