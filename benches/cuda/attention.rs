//! Causal attention, as wide as `d_inner`.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use selective_scan::attention::{GradientsMut, Inputs, KeyRange, OutputGradients, OutputMut, cuda};
use selective_scan::cuda::Cuda;
use selective_scan::{Element, View};

use crate::Result;
use crate::case::{Case, mixed_lengths};
use crate::timing::{Prepared, Sets, Work, sets, zeros};

struct Data<T> {
    queries: [usize; 4],
    kept: [usize; 4],
    q: Sets<T>,
    k: Sets<T>,
    v: Sets<T>,
    cu_seqlens: Option<Vec<usize>>,
    keys: Option<Vec<KeyRange>>,
}

impl<T: Element> Data<T> {
    fn inputs(&self, i: usize) -> Inputs<'_, T, Cuda> {
        Inputs {
            cu_seqlens: self.cu_seqlens.as_deref(),
            keys: self.keys.as_deref(),
            ..Inputs::new(self.q.view(i, self.queries), self.k.view(i, self.kept), self.v.view(i, self.kept))
        }
    }
}

/// `last` is the size of a head. Variants: `kv-heads-` as many heads of keys and values, `keys-` so many of each sequence in place of
/// one for each query, and `packed` sequences of mixed lengths.
pub fn prepare<T: Element>(stream: &Arc<CudaStream>, case: &Case) -> Result<Prepared> {
    let Case { batch, len, d_inner, last: d_head, .. } = *case;
    let heads = d_inner / d_head.max(1);
    let mut rest = case.clone();
    let kv_heads = rest.take_number("kv-heads-")?.unwrap_or(heads);
    let steps = rest.take_number("keys-")?;
    let cu_seqlens = rest.take("packed").then(|| mixed_lengths(len));
    rest.finish()?;
    let queries = [batch, len, heads, d_head];
    let kept = [batch, steps.unwrap_or(len), kv_heads, d_head];
    let [count, kept_count] = [queries, kept].map(|shape| shape.iter().product::<usize>());
    let is_backward = match case.direction.as_str() {
        "forward" => false,
        "backward" => true,
        other => return Err(format!("attention has no direction `{other}`").into()),
    };
    // Backward reads the output, its gradient and the inputs, and writes a gradient of each.
    let tensors = if is_backward { [4, 4] } else { [2, 2] };
    let bytes = (tensors[0] * count + tensors[1] * kept_count) * size_of::<T>();
    let sets = sets(bytes);
    let draw = |len| Sets::<T>::uniform(stream, sets, len, [-1.0, 1.0]);
    let ranges = |length| (0..batch).map(|row| KeyRange { row, start: 0, length }).collect();
    let data = Data {
        queries,
        kept,
        q: draw(count)?,
        k: draw(kept_count)?,
        v: draw(kept_count)?,
        cu_seqlens,
        keys: steps.map(ranges),
    };
    // Where sequences are listed, a table of them is copied from the host.
    let can_capture = data.cu_seqlens.is_none() && data.keys.is_none();
    let work = Work::new(count, 0, [0.0, 0.0], [0.0, 0.0], bytes);
    let on = stream.clone();
    let mut out = zeros::<T>(stream, count)?;
    let mut lse = zeros::<f32>(stream, count / d_head)?;
    let run: Box<dyn FnMut(usize) -> Result<()>> = if is_backward {
        let d_out = draw(count)?;
        cuda::forward(stream, &data.inputs(0), OutputMut { out: &mut out, lse: &mut lse })?;
        let zeroed = |count| -> Result<CudaSlice<T>> { zeros(stream, count) };
        let [mut d_q, mut d_k, mut d_v] = [zeroed(count)?, zeroed(kept_count)?, zeroed(kept_count)?];
        Box::new(move |i| {
            // All sets are the same numbers, moved, or as good as.
            let gradients_of = OutputGradients {
                out: View::on_device(&out, queries),
                lse: View::on_device(&lse, [batch, len, heads]),
                d_out: d_out.view(i, queries),
            };
            let gradients = GradientsMut { q: &mut d_q, k: &mut d_k, v: &mut d_v };
            Ok(cuda::backward(&on, &data.inputs(i), gradients_of, gradients)?)
        })
    } else {
        Box::new(move |i| Ok(cuda::forward(&on, &data.inputs(i), OutputMut { out: &mut out, lse: &mut lse })?))
    };
    Ok(Prepared { stream: stream.clone(), sets, can_capture, work, run })
}
