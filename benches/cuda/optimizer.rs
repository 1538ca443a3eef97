//! A step of AdamW over the parameters of a model.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};
use selective_scan::cuda::Cuda;
use selective_scan::optimizer::{Gradient, Group, Layout, Moments, Options, Parameter, Values, cuda};
use selective_scan::{DType, Element, View, ViewMut};

use crate::Result;
use crate::case::Case;
use crate::timing::{Prepared, Work, uniform, zeros};

/// The elements of each parameter of a Mamba: `batch` layers, `len` tokens, d_inner and d_state.
fn sizes(case: &Case) -> Vec<usize> {
    let Case { batch: layers, len: vocab, d_inner, last: d_state, .. } = *case;
    let (d_model, dt_rank) = (d_inner / 2, d_inner.div_ceil(32));
    let layer = [
        2 * d_inner * d_model,
        4 * d_inner,
        d_inner,
        (dt_rank + 2 * d_state) * d_inner,
        d_inner * dt_rank,
        d_inner,
        d_inner * d_state,
        d_inner,
        d_model * d_inner,
        d_model,
    ];
    let layers = std::iter::repeat_n(layer, layers).flatten();
    layers.chain([vocab * d_model, d_model]).collect()
}

/// A type of parameters and their gradients.
pub trait Trained: Element {
    fn values(view: ViewMut<'_, Self, 1, Cuda>) -> Values<'_, Cuda>;
    fn gradient(view: View<'_, Self, 1, Cuda>) -> Gradient<'_, Cuda>;
}

macro_rules! trained {
    ($($type:ty: $variant:ident),*) => {$(
        impl Trained for $type {
            fn values(view: ViewMut<'_, Self, 1, Cuda>) -> Values<'_, Cuda> {
                Values::$variant(view)
            }

            fn gradient(view: View<'_, Self, 1, Cuda>) -> Gradient<'_, Cuda> {
                Gradient::$variant(view)
            }
        }
    )*};
}

trained!(f32: F32, half::f16: F16, half::bf16: Bf16);

/// Direction `step`: both passes, with clipping.
pub fn step<T: Trained>(stream: &Arc<CudaStream>, case: &Case) -> Result<Prepared> {
    case.finish()?;
    if case.direction != "step" {
        return Err(format!("an optimizer has no direction `{}`", case.direction).into());
    }
    let sizes = sizes(case);
    let layout = Layout::new(sizes.iter().map(|&len| (T::DTYPE, len)))?;
    let draw = |&len: &usize| uniform::<T>(stream, len, [-1.0, 1.0]);
    let mut values: Vec<CudaSlice<T>> = sizes.iter().map(draw).collect::<Result<_>>()?;
    let gradients: Vec<CudaSlice<T>> = sizes.iter().map(draw).collect::<Result<_>>()?;
    let [mut mean, mut mean_square] = [zeros::<f32>(stream, layout.moments)?, zeros::<f32>(stream, layout.moments)?];
    let mut master = zeros::<f32>(stream, layout.masters)?;
    let mut counts = stream.alloc_zeros::<i64>(3)?;
    let (mut scale, mut norm) = (stream.clone_htod(&[1f32])?, zeros::<f32>(stream, 1)?);

    // Moments are read and written; of gradients the norm must be known before they are read again.
    let element = if T::DTYPE == DType::F32 { 2 * size_of::<T>() } else { 8 + size_of::<T>() };
    let count: usize = sizes.iter().sum();
    let work = Work::new(count, 0, [0.0, 30.0], [0.0, 2.0], count * (element + 2 * size_of::<T>() + 16));
    let (options, on) = (Options { clip: Some(1.0), ..Options::default() }, stream.clone());
    let run = Box::new(move |_| {
        let read: Vec<_> =
            gradients.iter().map(|gradient| T::gradient(View::on_device(gradient, [gradient.len()]))).collect();
        let status = cuda::StatusMut { counts: &mut counts, scale: &mut scale };
        let factors = cuda::begin(&on, &options, &read, status, &mut norm)?;
        let parameters = values.iter_mut().enumerate().map(|(i, values)| {
            let len = values.len();
            let group = Group { learning_rate: 1.0, weight_decay: 0.1 };
            let values = T::values(ViewMut::on_device(values, [len]));
            Parameter { values, gradient: read[i], place: layout.places[i], group }
        });
        let moments = Moments { mean: &mut mean, mean_square: &mut mean_square, master: &mut master };
        Ok(cuda::update(&on, &options, 1e-3, &factors, parameters, moments)?)
    });
    Ok(Prepared { stream: stream.clone(), sets: 1, can_capture: true, work, run })
}
