//! The scan written in candle's own operators, every step a handful of them.

use candle_core::{D, DType, Result, Tensor};
use selective_scan::Discretization;
use selective_scan::candle::Scan;

/// Output and final state, as `f64`, in which they are computed: what is left of the error is the other side's.
pub fn scan(scan: &Scan) -> Result<(Tensor, Tensor)> {
    let double = |tensor: &Tensor| tensor.to_dtype(DType::F64);
    let optional = |tensor: Option<&Tensor>| tensor.map(double).transpose();
    let (batch, len, d_inner) = scan.u.dims3()?;
    let (u, a) = (double(scan.u)?, double(scan.a)?);
    let d_state = a.dim(1)?;
    let mut delta = double(scan.delta)?;
    if let Some(bias) = optional(scan.delta_bias)? {
        delta = delta.broadcast_add(&bias)?;
    }
    if scan.options.delta_softplus {
        delta = (delta.exp()? + 1.0)?.log()?;
    }
    // (batch, length, d_inner, d_state), whatever the shape they come in.
    let [b, c] = [scan.b, scan.c].map(|projection| {
        let projection = match projection.rank() {
            2 => double(projection)?.reshape((1, 1, d_inner, d_state))?,
            rank => {
                let grouped = if rank == 3 { projection.unsqueeze(2)? } else { projection.clone() };
                let channels = d_inner / grouped.dim(2)?;
                let (batch, len, groups, d_state) = grouped.dims4()?;
                let shape = (batch, len, groups, channels, d_state);
                double(&grouped)?.unsqueeze(3)?.broadcast_as(shape)?.reshape((batch, len, d_inner, d_state))?
            }
        };
        projection.broadcast_as((batch, len, d_inner, d_state))
    });
    let (b, c) = (b?, c?);
    let initial_state = optional(scan.initial_state)?;

    // Dense rows run together; a packed row is cut into its sequences.
    let whole = [0, len];
    let cuts = scan.cu_seqlens.unwrap_or(&whole);
    let (mut outputs, mut states) = (Vec::new(), Vec::new());
    for (i, cut) in cuts.windows(2).enumerate() {
        let mut state = match (&initial_state, scan.cu_seqlens) {
            (Some(state), Some(_)) => state.narrow(0, i, 1)?,
            (Some(state), None) => state.clone(),
            (None, _) => Tensor::zeros((batch, d_inner, d_state), DType::F64, u.device())?,
        };
        let mut steps: Vec<_> = (cut[0]..cut[1]).collect();
        if scan.options.reverse {
            steps.reverse();
        }
        let mut outs = Vec::new();
        for t in steps {
            let [u, delta] = [&u, &delta].map(|x| x.narrow(1, t, 1)?.squeeze(1)?.unsqueeze(D::Minus1));
            let (u, delta) = (u?, delta?);
            let [b, c] = [&b, &c].map(|x| x.narrow(1, t, 1)?.squeeze(1));
            let decay = delta.broadcast_mul(&a)?.exp()?;
            let weight = match scan.options.discretization {
                Discretization::Euler => delta.broadcast_mul(&b?)?,
                Discretization::ZeroOrderHold => ((&decay - 1.0)?.broadcast_div(&a)? * b?)?,
                other => return Err(candle_core::Error::msg(format_args!("{other:?}: none of this yardstick's"))),
            };
            state = ((decay * state)? + weight.broadcast_mul(&u)?)?;
            outs.push((&state * c?)?.sum(D::Minus1)?.unsqueeze(1)?);
        }
        if scan.options.reverse {
            outs.reverse();
        }
        outputs.extend(outs);
        states.push(state);
    }
    let mut out = Tensor::cat(&outputs, 1)?;
    if let Some(d) = optional(scan.d)? {
        out = (out + u.broadcast_mul(&d)?)?;
    }
    if let Some(z) = optional(scan.z)? {
        out = (out * z.silu()?)?;
    }
    Ok((out, Tensor::cat(&states, 0)?))
}
