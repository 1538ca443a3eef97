//! The work itself, as a user of the crate writes it.

use candle_core::{DType, Device, Result as CandleResult, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::nn::decode::{Decoder, DecoderOptions, Generator, GeneratorOptions, Request};
use selective_scan::nn::train::{AdamW, AdamWConfig, LossOptions};
use selective_scan::nn::{Cache, LanguageModel, LanguageModelConfig};
use selective_scan::sampling::Settings;

use crate::Result;
use crate::case::{Case, Mode, What};

/// Small, so that a model which learns random tokens by heart does so slowly.
const LEARNING_RATE: f64 = 1e-4;

/// Called after each phase.
pub type Lap<'a> = dyn FnMut() -> Result<()> + 'a;

/// What a case does again and again.
pub enum Work {
    Train(Box<Training>),
    Prefill(Prefill),
    Decode(Decoding),
    Serve(Box<Serving>),
}

impl Work {
    pub fn new(config: &LanguageModelConfig, case: &Case, device: &Device) -> Result<Self> {
        Ok(match case.what {
            What::Train => Self::Train(Box::new(Training::new(config, case, device)?)),
            What::Prefill => Self::Prefill(Prefill::new(config, case, device)?),
            What::Decode => Self::Decode(Decoding::new(config, case, device)?),
            What::Serve => Self::Serve(Box::new(Serving::new(config, case, device)?)),
        })
    }

    /// The number of parameters, by which another program's model is seen to be the same.
    pub fn parameters(&self) -> usize {
        let model = match self {
            Self::Train(training) => &training.model,
            Self::Prefill(prefill) => &prefill.model,
            Self::Decode(decoding) => decoding.decoder.model(),
            Self::Serve(serving) => serving.generator.decoder().model(),
        };
        let mut count = 0;
        model.visit(&mut |_, tensor| count += tensor.elem_count());
        count
    }

    pub fn run(&mut self) -> Result<()> {
        match self {
            Self::Train(training) => training.step(),
            Self::Prefill(prefill) => prefill.run(),
            Self::Decode(decoding) => decoding.run(),
            Self::Serve(serving) => serving.run(serving.length),
        }
    }
}

/// Training on the same random tokens in every step.
pub struct Training {
    pub model: LanguageModel,
    optimizer: AdamW,
    /// `(batch, length)`, on the processor, where a user's text is: what lies on a GPU would be waited for.
    pub ids: Tensor,
    next: Tensor,
}

impl Training {
    pub const PHASES: [&str; 3] = ["forward", "backward", "optimizer"];

    pub fn new(config: &LanguageModelConfig, case: &Case, device: &Device) -> Result<Self> {
        let (model, variables) = random_model(config, case.mode, device)?;
        let optimizer = AdamW::new(&variables, AdamWConfig::default())?;
        let tokens = random_tokens(config, [case.batch, case.length + 1])?;
        let ids = tokens.narrow(1, 0, case.length)?.contiguous()?;
        let next = tokens.narrow(1, 1, case.length)?.contiguous()?;
        Ok(Self { model, optimizer, ids, next })
    }

    /// One step of training, as `Trainer` takes it.
    fn step(&mut self) -> Result<()> {
        let (_, gradients) = self.model.loss_and_gradients(&self.ids, None, &self.next, &LossOptions::default())?;
        self.optimizer.step(&gradients, LEARNING_RATE)?;
        Ok(())
    }

    /// The same through candle's graph, where forward and backward are apart; `lap` is called after each of
    /// [`PHASES`](Self::PHASES). It takes a little longer.
    pub fn phases(&mut self, lap: &mut Lap) -> Result<()> {
        let loss = self.model.loss(&self.ids, &self.next, &LossOptions::default())?;
        lap()?;
        let gradients = loss.backward()?;
        lap()?;
        self.optimizer.step(&gradients, LEARNING_RATE)?;
        lap()
    }
}

/// Prompts that are read from zero states on.
pub struct Prefill {
    model: LanguageModel,
    cache: Cache,
    ids: Tensor,
}

impl Prefill {
    fn new(config: &LanguageModelConfig, case: &Case, device: &Device) -> Result<Self> {
        let model = random_model(config, case.mode, device)?.0.detach()?;
        let cache = model.new_cache(case.batch, DType::F32)?;
        Ok(Self { model, cache, ids: random_tokens(config, [case.batch, case.length])? })
    }

    fn run(&mut self) -> Result<()> {
        self.cache.reset(None)?;
        self.model.prefill(&self.ids, &self.cache, None)?;
        Ok(())
    }
}

/// Texts that go on with the likeliest token, chosen on the device.
pub struct Decoding {
    decoder: Decoder,
    slots: Vec<i32>,
}

impl Decoding {
    fn new(config: &LanguageModelConfig, case: &Case, device: &Device) -> Result<Self> {
        let model = random_model(config, case.mode, device)?.0;
        let options = DecoderOptions { slots: case.batch, ..Default::default() };
        let decoder = Decoder::new(&model, &options)?;
        for slot in 0..case.batch {
            decoder.sampling().begin(slot, &Settings::greedy(), &[])?;
        }
        Ok(Self { decoder, slots: (0..case.batch as i32).collect() })
    }

    fn run(&mut self) -> Result<()> {
        self.decoder.step_chosen(&self.slots)?;
        Ok(())
    }
}

/// Texts that come and go: each slot has several, one after the other.
pub struct Serving {
    generator: Generator,
    prompts: Vec<Vec<u32>>,
    pub length: usize,
}

impl Serving {
    /// Texts of each slot.
    const WAVES: usize = 4;

    fn new(config: &LanguageModelConfig, case: &Case, device: &Device) -> Result<Self> {
        let &Case { batch: slots, length, .. } = case;
        let model = random_model(config, case.mode, device)?.0;
        let generator = Generator::new(&model, &GeneratorOptions { slots, ..Default::default() })?;
        let prompts = random_tokens(config, [Self::WAVES * slots, length])?.to_vec2()?;
        Ok(Self { generator, prompts, length })
    }

    /// All prompts, and texts of so many tokens.
    pub fn run(&mut self, max_tokens: usize) -> Result<()> {
        for prompt in &self.prompts {
            let settings = Settings::greedy();
            self.generator.submit(Request { settings, max_tokens, ..Request::new(prompt.clone()) })?;
        }
        while !self.generator.is_idle() {
            self.generator.turn()?;
        }
        Ok(())
    }

    /// Steps that all slots together would take for the texts of a run but for their first tokens, which come of the prompts.
    pub fn steps(&self) -> f64 {
        (Self::WAVES * (self.length - 1)) as f64
    }
}

/// A model and its variables. Matrices are drawn on the device, with the deviations that the crate draws them with on the
/// processor, where 1.4 billion numbers would take longer than all that is timed.
pub fn random_model(
    config: &LanguageModelConfig,
    mode: Mode,
    device: &Device,
) -> CandleResult<(LanguageModel, VarMap)> {
    let variables = VarMap::new();
    // Names and shapes; pages of zeros that nothing touches take no memory.
    let outline = LanguageModel::new(config, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
    for (name, tensor) in outline.named_tensors() {
        let deviation = match name.rsplit_once('.') {
            Some((path, "weight")) if path.ends_with("embeddings") => 0.02,
            // Evenly between ∓1/√columns, and shrunk by depth where the residual stream is added to.
            Some((path, "weight")) if path.ends_with("_proj") => {
                let depth = if path.ends_with("out_proj") { config.backbone.n_layer } else { 1 };
                ((3 * tensor.dim(1)? * depth) as f64).sqrt().recip()
            }
            _ => continue,
        };
        let drawn = Tensor::randn(0f32, deviation as f32, tensor.shape(), device)?.to_dtype(mode.parameters())?;
        let mut all = variables.data().lock().map_err(|_| candle_core::Error::msg("the lock is poisoned"))?;
        all.insert(name, Var::from_tensor(&drawn)?);
    }
    // This draws what is left in the type of the variables, and the second model computes in another on them.
    let on = |dtype| LanguageModel::new(config, VarBuilder::from_varmap(&variables, dtype, device));
    on(mode.parameters())?;
    Ok((on(mode.arithmetic())?, variables))
}

fn random_tokens(config: &LanguageModelConfig, [rows, length]: [usize; 2]) -> CandleResult<Tensor> {
    let mut random = StdRng::seed_from_u64(0);
    let tokens: Vec<u32> = (0..rows * length).map(|_| random.random_range(0..config.vocab_size as u32)).collect();
    Tensor::from_vec(tokens, (rows, length), &Device::Cpu)
}
