//! Where the time of a training step goes, by what a user can take apart.

use candle_core::{Tensor, Var};

use crate::Result;
use crate::case::Case;
use crate::machine::Machine;
use crate::work::{Lap, Training};

/// A part of a step, in milliseconds of one of it.
pub struct Part {
    pub name: &'static str,
    /// How many of it a step has.
    pub count: usize,
    pub forward: f64,
    pub backward: f64,
}

impl Part {
    fn new(name: &'static str, count: usize, [forward, backward]: [f64; 2]) -> Self {
        Self { name, count, forward, backward }
    }

    /// Of a whole step.
    pub fn total(&self) -> f64 {
        self.count as f64 * (self.forward + self.backward)
    }
}

/// The parts of a step. A layer is half of what three layers take beyond one, so that it has all that a layer adds to a
/// model, the norm and the residual stream too; its block alone is timed as well. What is then left of a model of one layer,
/// without the embeddings, is last norm, head and loss. The optimizer's time is that of the model itself.
pub fn measure(machine: &Machine, case: &Case, repeats: usize) -> Result<Vec<Part>> {
    let config = case.model.config(machine.keeps);
    let n_layer = config.backbone.n_layer;
    let of_layers = |n_layer| {
        let mut config = config.clone();
        config.backbone.n_layer = n_layer;
        Training::new(&config, case, &machine.device)
    };
    let [_, _, optimizer] = phases(machine, repeats, &mut of_layers(n_layer)?)?;
    machine.trim()?;
    let [forward_3, backward_3, _] = phases(machine, repeats, &mut of_layers(3)?)?;
    machine.trim()?;

    let mut small = of_layers(1)?;
    let [forward_1, backward_1, _] = phases(machine, repeats, &mut small)?;
    let layer = [(forward_3 - forward_1) / 2.0, (backward_3 - backward_1) / 2.0];
    let embedding = both(machine, repeats, || Ok(small.model.embed(&small.ids)?))?;
    let block = {
        let shape = (case.batch, case.length, config.d_model());
        let x = Tensor::randn(0f32, 1.0, shape, &machine.device)?.to_dtype(case.mode.arithmetic())?;
        // A variable, so that its gradient is computed, as in a model.
        let x = Var::from_tensor(&x)?;
        let mixer = small.model.mixers().next().and_then(|mixer| mixer.as_mamba());
        let mixer = mixer.ok_or("the model has no Mamba block")?;
        both(machine, repeats, || Ok(mixer.forward(&x)?))?
    };

    let head = [forward_1 - layer[0] - embedding[0], backward_1 - layer[1] - embedding[1]];
    Ok(vec![
        Part::new("embedding", 1, embedding),
        Part::new("layer", n_layer, layer),
        Part::new("  of it the block", n_layer, block),
        Part::new("last norm, head, loss", 1, head),
        Part::new("optimizer", 1, [optimizer, 0.0]),
    ])
}

fn phases(machine: &Machine, repeats: usize, training: &mut Training) -> Result<[f64; 3]> {
    let laps = least(machine, repeats, |lap| training.phases(lap))?;
    Ok([laps[0], laps[1], laps[2]])
}

/// A forward and a backward pass, from a gradient of ones.
fn both(machine: &Machine, repeats: usize, forward: impl Fn() -> Result<Tensor>) -> Result<[f64; 2]> {
    let laps = least(machine, repeats, |lap| {
        let out = forward()?;
        lap()?;
        out.backward()?;
        lap()
    })?;
    Ok([laps[0], laps[1]])
}

/// The least of each lap, as differences of medians would have what else the machine does in them. The first two runs do
/// not count.
fn least(machine: &Machine, repeats: usize, mut run: impl FnMut(&mut Lap) -> Result<()>) -> Result<Vec<f64>> {
    (0..2).try_for_each(|_| machine.laps(&mut run).map(drop))?;
    let mut least = machine.laps(&mut run)?;
    for _ in 1..repeats.max(1) {
        let laps = machine.laps(&mut run)?;
        least.iter_mut().zip(laps).for_each(|(least, lap)| *least = least.min(lap));
    }
    Ok(least)
}
