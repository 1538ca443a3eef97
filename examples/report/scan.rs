//! The selective scan, timed and held to the reference.

use std::time::Duration;

use rayon::prelude::*;
use selective_scan::scan::{Gradients, Output, OutputMut, ProjectionGradient, cpu, reference};
use selective_scan::{Element, Result, View};

use crate::common::{ScanData, touched};
use crate::measure::{self, Check, Deviation, FORWARD_BOUND, GRADIENT_BOUND, Measured};

/// Exact results of some of the channels.
pub struct Exact<'a, T> {
    pub data: &'a ScanData<T>,
    picks: Vec<usize>,
    channels: Vec<(Output<f64, f64>, Gradients<f64, f64>)>,
}

impl<'a, T: Element> Exact<'a, T> {
    /// Computes them for that many channels, spread over all, that it takes about a second.
    pub fn new(data: &'a ScanData<T>) -> Result<Self> {
        const STATE_STEPS: usize = 16 << 20;
        let count = (STATE_STEPS / (data.batch * data.len * data.d_state).max(1)).clamp(16, data.d_inner);
        let picks: Vec<_> = (0..count).map(|i| i * data.d_inner / count).collect();
        // Channels share B and C alone, so each can be computed by itself.
        let channels = picks
            .par_iter()
            .map(|&pick| {
                let channel = data.channels(&[pick]);
                let inputs = channel.inputs();
                let d_out = View::new(&channel.d_out, inputs.u.shape);
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
        let exact = self.channels.iter().map(exact);
        Deviation::of_channels(got, [self.data.d_inner, width], &self.picks, exact)
    }

    pub fn check_out<U: Element>(&self, out: &[U]) -> Check {
        self.deviation(out, 1, |(output, _)| &output.out).check(FORWARD_BOUND)
    }

    pub fn check_output(&self, output: &Output<T>) -> Check {
        let state = self.deviation(&output.final_state, self.data.d_state, |(exact, _)| &exact.final_state);
        Check::worst([self.check_out(&output.out), state.check(FORWARD_BOUND)])
    }

    /// `of_part` gives the gradients of another problem on the device that gave `gradients`.
    pub fn check_gradients<E>(
        &self,
        gradients: &Gradients<T>,
        of_part: impl FnOnce(&ScanData<T>) -> Result<Gradients<T>, E>,
    ) -> Result<Check, E> {
        let optional = |gradient: &Option<Vec<f32>>, exact: fn(&Gradients<f64, f64>) -> &Option<Vec<f64>>| {
            self.deviation(gradient.as_deref().unwrap_or_default(), 1, |(_, channel)| {
                exact(channel).as_deref().unwrap_or_default()
            })
        };
        let d_state = self.data.d_state;
        let mut deviations = vec![
            self.deviation(&gradients.u, 1, |(_, exact)| &exact.u),
            self.deviation(&gradients.delta, 1, |(_, exact)| &exact.delta),
            self.deviation(&gradients.a, d_state, |(_, exact)| &exact.a),
            self.deviation(gradients.z.as_deref().unwrap_or_default(), 1, |(_, exact)| {
                exact.z.as_deref().unwrap_or_default()
            }),
            optional(&gradients.d, |exact| &exact.d),
            optional(&gradients.delta_bias, |exact| &exact.delta_bias),
        ];

        // The gradients of B and C are sums over channels: they are checked on the problem of the picked channels.
        let part = self.data.channels(&self.picks);
        let of_part = of_part(&part)?;
        for (got, exact) in [(&of_part.b, exact_sum(self, |g| &g.b)), (&of_part.c, exact_sum(self, |g| &g.c))] {
            deviations.push(match got {
                ProjectionGradient::Varying(got) => Deviation::of(got, &exact),
                ProjectionGradient::Constant(got) => Deviation::of(got, &exact),
            });
        }
        Ok(Check::worst(deviations.iter().map(|deviation| deviation.check(GRADIENT_BOUND))))
    }
}

/// The sum over the picked channels of a projection's gradient.
fn exact_sum<T>(exact: &Exact<T>, projection: fn(&Gradients<f64, f64>) -> &ProjectionGradient<f64, f64>) -> Vec<f64> {
    let mut sum = Vec::new();
    for (_, channel) in &exact.channels {
        let (ProjectionGradient::Varying(part) | ProjectionGradient::Constant(part)) = projection(channel);
        sum.resize(part.len(), 0.0);
        for (sum, part) in sum.iter_mut().zip(part) {
            *sum += part;
        }
    }
    sum
}

/// Forward, without what backward would need.
pub fn forward<T: Element>(budget: Duration, exact: &Exact<T>) -> Result<Measured> {
    let data = exact.data;
    let inputs = data.inputs();
    let mut output = Output {
        out: touched::<T>(data.u.len()),
        final_state: touched::<f32>(data.batch * data.d_inner * data.d_state),
    };
    let mut result = Ok(());
    let seconds = measure::seconds(budget, || {
        let (out, final_state) = (&mut output.out[..], Some(&mut output.final_state[..]));
        result = cpu::forward(&inputs, OutputMut { out, final_state, checkpoints: None });
    });
    result?;
    Ok(Measured { seconds, check: exact.check_output(&output) })
}

/// Backward alone: the checkpoints are there.
pub fn backward<T: Element>(budget: Duration, exact: &Exact<T>) -> Result<Measured> {
    let data = exact.data;
    let inputs = data.inputs();
    let (_, checkpoints) = inputs.forward_with_checkpoints()?;
    let d_outputs = View::new(&data.d_out, inputs.u.shape).into();
    let mut gradients = Gradients::zeroed(&inputs)?;
    let mut result = Ok(());
    let seconds = measure::seconds(budget, || {
        result = cpu::backward(&inputs, checkpoints.as_slice(), d_outputs, gradients.as_mut());
    });
    result?;
    Ok(Measured { seconds, check: exact.check_gradients(&gradients, gradients_of)? })
}

/// All gradients of a problem, on the CPU.
fn gradients_of<T: Element>(data: &ScanData<T>) -> Result<Gradients<T>> {
    let inputs = data.inputs();
    let (_, checkpoints) = inputs.forward_with_checkpoints()?;
    inputs.backward(&checkpoints, View::new(&data.d_out, inputs.u.shape))
}
