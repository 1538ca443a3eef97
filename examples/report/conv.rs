//! The causal convolution, timed and held to the reference.

use std::time::Duration;

use rayon::prelude::*;
use selective_scan::conv::{Gradients, Output, OutputMut, cpu, reference};
use selective_scan::{Element, Result, View};

use crate::common::{ConvData, touched};
use crate::measure::{self, Check, Deviation, FORWARD_BOUND, GRADIENT_BOUND, Measured};

/// Exact results of some of the channels.
pub struct Exact<'a, T> {
    pub data: &'a ConvData<T>,
    picks: Vec<usize>,
    channels: Vec<(Output<f64, f64>, Gradients<f64, f64>)>,
}

impl<'a, T: Element> Exact<'a, T> {
    /// Computes them for that many channels, spread over all, that it takes about a second.
    pub fn new(data: &'a ConvData<T>) -> Result<Self> {
        const STEPS: usize = 4 << 20;
        let count = (STEPS / (data.batch * data.len).max(1)).clamp(16, data.d_inner);
        let picks: Vec<_> = (0..count).map(|i| i * data.d_inner / count).collect();
        let channels = picks
            .par_iter()
            .map(|&pick| {
                let channel = data.channels(&[pick]);
                let inputs = channel.inputs();
                let d_out = View::new(&channel.d_out, inputs.x.shape);
                Ok((reference::forward(&inputs)?, reference::backward(&inputs, d_out)?))
            })
            .collect::<Result<_>>()?;
        Ok(Self { data, picks, channels })
    }

    fn deviation<U: Element>(
        &self,
        got: &[U],
        width: usize,
        exact: impl Fn(&(Output<f64, f64>, Gradients<f64, f64>)) -> &[f64],
    ) -> Deviation {
        Deviation::of_channels(got, [self.data.d_inner, width], &self.picks, self.channels.iter().map(exact))
    }

    pub fn check_output(&self, output: &Output<T>) -> Check {
        let out = self.deviation(&output.out, 1, |(exact, _)| &exact.out);
        let state = self.deviation(&output.final_state, 1, |(exact, _)| &exact.final_state);
        Check::worst([out.check(FORWARD_BOUND), state.check(FORWARD_BOUND)])
    }

    pub fn check_gradients(&self, gradients: &Gradients<T>) -> Check {
        let deviations = [
            self.deviation(&gradients.x, 1, |(_, exact)| &exact.x),
            self.deviation(&gradients.weight, self.data.width, |(_, exact)| &exact.weight),
            self.deviation(gradients.bias.as_deref().unwrap_or_default(), 1, |(_, exact)| {
                exact.bias.as_deref().unwrap_or_default()
            }),
        ];
        Check::worst(deviations.iter().map(|deviation| deviation.check(GRADIENT_BOUND)))
    }
}

pub fn forward<T: Element>(budget: Duration, exact: &Exact<T>) -> Result<Measured> {
    let data = exact.data;
    let inputs = data.inputs();
    let mut output = Output {
        out: touched::<T>(data.x.len()),
        final_state: touched::<f32>(data.batch * (data.width - 1) * data.d_inner),
    };
    let mut result = Ok(());
    let seconds = measure::seconds(budget, || {
        let (out, final_state) = (&mut output.out[..], Some(&mut output.final_state[..]));
        result = cpu::forward(&inputs, OutputMut { out, final_state });
    });
    result?;
    Ok(Measured { seconds, check: exact.check_output(&output) })
}

pub fn backward<T: Element>(budget: Duration, exact: &Exact<T>) -> Result<Measured> {
    let inputs = exact.data.inputs();
    let d_outputs = View::new(&exact.data.d_out, inputs.x.shape).into();
    let mut gradients = Gradients::zeroed(&inputs)?;
    let mut result = Ok(());
    let seconds = measure::seconds(budget, || {
        result = cpu::backward(&inputs, d_outputs, gradients.as_mut());
    });
    result?;
    Ok(Measured { seconds, check: exact.check_gradients(&gradients) })
}
