//! What a pass of training leaves out at random: dropout and stochastic depth.

use candle_core::{Result, Tensor};

use crate::nn::argument;

/// What a pass of training leaves out of what layers add to the residual stream, for models that are trained with little
/// data, or long:
///
/// ```text
/// stream += keep · layer(norm(stream))          keep = element · sequence
/// ```
///
/// - Dropout (Srivastava et al. 2014, JMLR 15): each number by itself is left out with the probability `dropout`, else it is
///   divided by 1 - `dropout`.
/// - Stochastic depth (Huang et al. 2016, arXiv 1603.09382), as Vision Mamba is trained with it (`drop_path`): each sequence skips
///   a layer with a probability that rises evenly from 0 in the first layer to `stochastic_depth` in the last; else what the
///   layer adds is divided by 1 less that.
///
/// The expected value of what is added stays what it is. A model leaves out what it is
/// [told to](crate::nn::Backbone::with_drops) in every whole pass, [`forward`](crate::nn::Backbone::forward) and losses alike;
/// prompts, steps of decoding and a model without are not touched.
///
/// What is left out follows from `seed`, `step`, `part`, the number of the layer and the place in its output alone, by a hash
/// that is the same on every device: a pass that is repeated leaves out the same, and so does a run that goes on from a
/// checkpoint. It is drawn on the processor, and for a GPU copied there: a byte for each number of dropout, four for each step
/// of stochastic depth. A layer keeps them for the way back.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Drops {
    /// The probability with which a number is left out, 0 or more and below 1.
    pub dropout: f64,
    /// The probability with which a sequence skips the last layer, 0 or more and below 1. A model of one layer skips none.
    pub stochastic_depth: f64,
    /// What it follows from, together with `step` and `part`.
    pub seed: u64,
    /// The step of training.
    pub step: u64,
    /// The part of the step's batch.
    pub part: u64,
}

impl Drops {
    /// The same of a step of training and a part of its batch.
    pub fn at(self, step: usize, part: usize) -> Self {
        Self { step: step as u64, part: part as u64, ..self }
    }

    /// Whether something is left out.
    pub(crate) fn is_some(&self) -> bool {
        self.dropout > 0.0 || self.stochastic_depth > 0.0
    }

    pub(crate) fn check(&self) -> Result<()> {
        for (name, rate) in [("dropout", self.dropout), ("stochastic_depth", self.stochastic_depth)] {
            // Not `rate < 0 || rate >= 1`, which NaN would pass.
            if !(0.0..1.0).contains(&rate) {
                return Err(argument(name, "a probability of 0 or more and below 1", rate));
            }
        }
        Ok(())
    }

    /// Where random bits of a layer begin, for one of several purposes.
    fn stream(&self, layer: usize, purpose: u64) -> u64 {
        [self.step, self.part, layer as u64, purpose].into_iter().fold(mixed(self.seed), |key, word| mixed(key ^ word))
    }

    /// [`keep_of`](Self::keep_of) what is all that a layer adds.
    pub(crate) fn keep(
        &self,
        layer: usize,
        layers: usize,
        like: &Tensor,
        cu_seqlens: Option<&[usize]>,
    ) -> Result<Option<Keep>> {
        self.keep_of(0, layer, layers, like, cu_seqlens)
    }

    /// What a branch of a layer, one of `layers`, is multiplied by: of `(batch, length, d_model)`, where the sequences are the rows or lie
    /// in one of them one after another; none if nothing is left out.
    fn keep_of(
        &self,
        branch: u64,
        layer: usize,
        layers: usize,
        like: &Tensor,
        cu_seqlens: Option<&[usize]>,
    ) -> Result<Option<Keep>> {
        let (batch, length, d_model) = like.dims3()?;
        let rows = batch * length;
        let elements = match self.dropout {
            0.0 => None,
            rate => {
                let (stream, threshold) = (self.stream(layer, 2 * branch), threshold(rate));
                let mut bytes = Vec::new();
                let count = rows * d_model;
                if bytes.try_reserve_exact(count).is_err() {
                    return Err(argument("dropout", "a choice for each number that fits in memory", count));
                }
                bytes.extend((0..count as u64).map(|at| u8::from(is_kept(stream, at, threshold))));
                Some((Tensor::from_vec(bytes, (batch, length, d_model), like.device())?, 1.0 / (1.0 - rate)))
            }
        };
        let rate = self.stochastic_depth * layer as f64 / layers.saturating_sub(1).max(1) as f64;
        let sequences = match rate {
            0.0 => None,
            rate => {
                let (stream, threshold, kept) =
                    (self.stream(layer, 2 * branch + 1), threshold(rate), (1.0 / (1.0 - rate)) as f32);
                let factor = |sequence: usize| if is_kept(stream, sequence as u64, threshold) { kept } else { 0.0 };
                let factors: Vec<f32> = match cu_seqlens {
                    None => (0..rows).map(|row| factor(row / length)).collect(),
                    Some(ends) => {
                        let lengths = ends.windows(2).map(|ends| ends[1] - ends[0]);
                        lengths.enumerate().flat_map(|(i, length)| std::iter::repeat_n(factor(i), length)).collect()
                    }
                };
                Some(Tensor::from_vec(factors, (batch, length, 1), like.device())?)
            }
        };
        Ok((elements.is_some() || sequences.is_some()).then_some(Keep { elements, sequences }))
    }
}

/// What a layer's output is multiplied by before it is added.
pub(crate) struct Keep {
    /// Ones and zeros of `u8`, `(batch, length, d_model)`, and what the ones stand for.
    elements: Option<(Tensor, f64)>,
    /// `(batch, length, 1)` of `f32`.
    sequences: Option<Tensor>,
}

impl Keep {
    /// The product with it, of `(batch, length, d_model)`, in its type. Differentiable.
    pub fn of(&self, x: &Tensor) -> Result<Tensor> {
        let mut product = x.clone();
        if let Some((kept, factor)) = &self.elements {
            product = (product * kept.to_dtype(x.dtype())?)?.affine(*factor, 0.0)?;
        }
        match &self.sequences {
            Some(factors) => product.broadcast_mul(&factors.to_dtype(x.dtype())?),
            None => Ok(product),
        }
    }
}

/// Random bits from here on leave out.
fn threshold(rate: f64) -> u64 {
    // Below 2^32, as a rate is below 1.
    (rate * (1u64 << 32) as f64) as u64
}

fn is_kept(stream: u64, at: u64, threshold: u64) -> bool {
    mixed(stream.wrapping_add(at.wrapping_mul(GOLDEN))) >> 32 >= threshold
}

/// 2^64 over the golden ratio, an odd number.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of SplitMix64 (Steele, Lea and Flood 2014), of which each bit depends on every bit of its input.
fn mixed(word: u64) -> u64 {
    let word = word.wrapping_add(GOLDEN);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// What is left out in a run of layers: which they are, and of how many.
#[derive(Clone, Copy, Default)]
pub(super) struct LeftOut {
    pub drops: Drops,
    /// The number of the first of them.
    pub first: usize,
    /// All of the model's.
    pub layers: usize,
    /// Which of what a layer adds: 0 what its mixer does, 1 its feed-forward part.
    pub branch: u64,
}

impl LeftOut {
    /// The same of the layers from `index` of the run on.
    pub fn from(self, index: usize) -> Self {
        Self { first: self.first + index, ..self }
    }

    /// The same of what feed-forward parts add.
    pub fn of_feed_forward(self) -> Self {
        Self { branch: 1, ..self }
    }

    /// The stream with what layer `index` of the run adds, or what is kept of it. Differentiable.
    pub fn add(&self, index: usize, stream: &Tensor, y: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Tensor> {
        let y = y.to_dtype(stream.dtype())?;
        match self.keep(index, stream, cu_seqlens)? {
            Some(keep) => stream + keep.of(&y)?,
            None => stream + y,
        }
    }

    /// What layer `index` of the run is multiplied by.
    pub fn keep(&self, index: usize, stream: &Tensor, cu_seqlens: Option<&[usize]>) -> Result<Option<Keep>> {
        match self.drops.is_some() {
            true => self.drops.keep_of(self.branch, self.first + index, self.layers, stream, cu_seqlens),
            false => Ok(None),
        }
    }
}
