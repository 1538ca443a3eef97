//! The norm in `f64`, one group after another: the equations and nothing else.

use super::{BackwardInputs, Gradients, Inputs, Options, Output};
use crate::arguments::zeroed;
use crate::reference::{silu, silu_slope};
use crate::{Element, Result};

/// Runs the norm. The results are what exact arithmetic on the inputs would give, to about 15 digits; `residual_out` is
/// not rounded.
pub fn forward<X: Element, S: Element>(inputs: &Inputs<X, S>) -> Result<Output<f64, f64>> {
    let sizes = inputs.check::<X>()?.sizes;
    let mut output = Output { out: zeroed("x", &inputs.x.shape)?, residual_out: zeroed("x", &inputs.x.shape)? };
    for (row, group) in (0..sizes.rows).flat_map(|row| (0..sizes.groups()).map(move |group| (row, group))) {
        let columns = group * sizes.group_size..(group + 1) * sizes.group_size;
        let s = columns.clone().map(|j| {
            let residual = inputs.residual.map_or(0.0, |residual| f64::from(residual.at([row, j])));
            f64::from(inputs.x.at([row, j])) + residual
        });
        let z = inputs.z.map(|z| columns.clone().map(|j| f64::from(z.at([row, j]))).collect::<Vec<_>>());
        let group = Group::new(s.collect(), z, &inputs.options);
        for (i, j) in columns.enumerate() {
            let weight = inputs.weight.map_or(1.0, |weight| f64::from(weight.at([j])));
            let at = row * sizes.width + j;
            output.residual_out[at] = group.s[i];
            output.out[at] = group.v[i] * group.scale * weight * group.after(i);
        }
    }
    Ok(output)
}

/// All gradients. With `n = v/√(mean(v²) + eps)` and `g` the gradient of `n`, that of `v` is
/// `(g - n mean(g n))/√(mean(v²) + eps)`.
pub fn backward<X: Element, S: Element, O: Element>(
    inputs: &BackwardInputs<X, S, O>,
) -> Result<Gradients<f64, f64, f64>> {
    let sizes = inputs.check()?.sizes;
    let mut d_s: Vec<f64> = zeroed("s", &inputs.s.shape)?;
    let mut d_weight: Vec<f64> = zeroed("s", &inputs.s.shape[1..])?;
    let mut d_z: Option<Vec<f64>> = inputs.z.map(|_| zeroed("z", &inputs.s.shape)).transpose()?;
    for (row, group) in (0..sizes.rows).flat_map(|row| (0..sizes.groups()).map(move |group| (row, group))) {
        let columns = group * sizes.group_size..(group + 1) * sizes.group_size;
        let s = columns.clone().map(|j| f64::from(inputs.s.at([row, j]))).collect();
        let z = inputs.z.map(|z| columns.clone().map(|j| f64::from(z.at([row, j]))).collect::<Vec<_>>());
        let group = Group::new(s, z, &inputs.options);
        let weight = |j| inputs.weight.map_or(1.0, |weight| f64::from(weight.at([j])));
        let d_out = |j| f64::from(inputs.d_out.at([row, j]));
        let normed = |i: usize| group.v[i] * group.scale;
        let d_normed = |i: usize, j| d_out(j) * weight(j) * group.after(i);
        let along: f64 = columns.clone().enumerate().map(|(i, j)| d_normed(i, j) * normed(i)).sum();
        for (i, j) in columns.enumerate() {
            let at = row * sizes.width + j;
            let d_v = group.scale * (d_normed(i, j) - normed(i) * along / sizes.group_size as f64);
            d_weight[j] += d_out(j) * normed(i) * group.after(i);
            d_s[at] = d_v * group.before(i) + inputs.d_residual_out.map_or(0.0, |view| f64::from(view.at([row, j])));
            if let (Some(d_z), Some(z)) = (&mut d_z, &group.z) {
                let d_gate = if group.norm_first { d_out(j) * weight(j) * normed(i) } else { d_v * group.s[i] };
                d_z[at] = d_gate * silu_slope(z[i]);
            }
        }
    }
    Ok(Gradients { x: d_s.clone(), residual: d_s, weight: d_weight, z: d_z })
}

/// Columns that are normed together.
struct Group {
    s: Vec<f64>,
    z: Option<Vec<f64>>,
    /// What is normed, and what it is multiplied by for that.
    v: Vec<f64>,
    scale: f64,
    norm_first: bool,
}

impl Group {
    fn new(s: Vec<f64>, z: Option<Vec<f64>>, options: &Options) -> Self {
        let mut group = Self { v: s.clone(), s, z, scale: 1.0, norm_first: options.norm_before_gate };
        for i in 0..group.v.len() {
            group.v[i] *= group.before(i);
        }
        let mean = group.v.iter().map(|v| v * v).sum::<f64>() / group.v.len() as f64;
        group.scale = 1.0 / (mean + options.eps).sqrt();
        group
    }

    /// What column `i` is multiplied by before the norm.
    fn before(&self, i: usize) -> f64 {
        self.z.as_ref().filter(|_| !self.norm_first).map_or(1.0, |z| silu(z[i]))
    }

    /// And after it.
    fn after(&self, i: usize) -> f64 {
        self.z.as_ref().filter(|_| self.norm_first).map_or(1.0, |z| silu(z[i]))
    }
}
