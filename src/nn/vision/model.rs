//! The model of images.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Module, VarBuilder};

use super::VisionConfig;
use crate::nn::layers::{Change, Initial, Linear, Parameter, ParameterList, Parameters};
use crate::nn::train::Drops;
use crate::nn::{Backbone, argument, check_model_dtype, check_room};

/// Vision Mamba (Zhu et al. 2024, arXiv 2401.09417):
///
/// ```text
/// stream = patch_embed.proj(patches)                      row by row, with cls_token in the middle
/// stream = norm_f(layers(stream + pos_embed))             see Backbone; mixers run in both directions
/// logits = head(the token's step of the stream)           or of the mean over the patches, without a token
/// ```
///
/// The token stands before patch number `patches / 2`, counted from 0. Parameters have the names and shapes of the published
/// models: `patch_embed.proj.weight` `(d_model, channels, patch, patch)` and `.bias`, `cls_token` `(1, 1, d_model)`,
/// `pos_embed` `(1, steps, d_model)`, `layers.N.norm.weight`, `layers.N.mixer.…`, `norm_f.weight`, `head.weight` and `.bias`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use selective_scan::nn::{VisionConfig, VisionModel};
///
/// // Coloured images of 32 x 24 pixels, in patches of 8 x 8, in 10 classes.
/// let config = VisionConfig::new([32, 24], 8, 10, 2, 16);
/// assert_eq!(config.grid(), [4, 3]);
/// let variables = VarMap::new();
/// let model = VisionModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
/// let images = Tensor::randn(0f32, 1.0, (2, 3, 32, 24), &Device::Cpu)?;
/// assert_eq!(model.forward(&images)?.dims(), [2, 10]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct VisionModel {
    config: VisionConfig,
    embed: Linear,
    /// `(1, 1, d_model)`.
    class_token: Option<Parameter>,
    /// `(1, steps, d_model)`.
    positions: Parameter,
    backbone: Backbone,
    head: Linear,
    /// Of each number of a channel of each patch, the pixel that it is.
    pixels: Tensor,
    parameters: ParameterList,
}

impl VisionModel {
    /// A model with the parameters of `vb`, which computes in its type (`f32`, `f16` or `bf16`) and on its device. Those
    /// that a [`VarMap`](candle_nn::VarMap) does not have yet are drawn, from the seed of the configuration's mixer and their
    /// names; variables of another type that it has are trained as they are, see [types](crate::nn#types).
    ///
    /// # Errors
    /// A size that makes no model, or one that does not fit in memory; a parameter that is missing or of another shape, by
    /// name.
    pub fn new(config: &VisionConfig, vb: VarBuilder) -> Result<Self> {
        config.check()?;
        let (dtype, device) = (check_model_dtype(vb.dtype())?, vb.device().clone());
        let parameters = Parameters::new(vb, config.backbone.mixer.seed());
        let positions = "pos_embed";
        parameters.check_room(positions, "image, patch, n_layer, d_model", config.parameter_count()?)?;
        Self::build(config, dtype, &device, &parameters)
    }

    fn build(config: &VisionConfig, dtype: DType, device: &Device, parameters: &Parameters) -> Result<Self> {
        let (count, d_model) = (parameters.count(), config.backbone.d_model());
        let kernel = [d_model, config.channels, config.patch, config.patch];
        let embed = Linear::of_patches(&parameters.pp("patch_embed").pp("proj"), kernel)?;
        // The deviations that Vision Mamba begins with.
        let token = |parameters: &Parameters| parameters.get(&[1, 1, d_model], "cls_token", Initial::Normal(0.02));
        let class_token = config.class_token.then(|| token(parameters)).transpose()?;
        let positions = parameters.get(&[1, config.steps(), d_model], "pos_embed", Initial::Normal(0.02))?;
        let backbone = Backbone::build(&config.backbone, dtype, device, parameters)?;
        let head = Linear::new(&parameters.pp("head"), [d_model, config.classes], true, 1.0)?;
        let (pixels, parameters) = (pixels(config, device)?, parameters.taken_since(count));
        Ok(Self { config: config.clone(), embed, class_token, positions, backbone, head, pixels, parameters })
    }

    /// The same model, each parameter as `change` gives it.
    fn changed(&self, change: &mut Change) -> Result<Self> {
        let parameters = Parameters::changed(&self.parameters, change);
        let changed = Self::build(&self.config, self.dtype(), self.device(), &parameters)?;
        changed.with_drops(self.backbone.drops())
    }

    /// The same model, sharing its parameters with their gradients, which leaves that out of what layers add: for a step of training.
    /// Vision Mamba is trained with a stochastic depth of 0.05 to 0.1. With [`Drops::default`] nothing is left out.
    ///
    /// # Errors
    /// A probability below 0, or of 1 or more.
    pub fn with_drops(&self, drops: Drops) -> Result<Self> {
        Ok(Self { backbone: self.backbone.with_drops(drops)?, ..self.clone() })
    }

    /// The model's sizes and variants.
    pub fn config(&self) -> &VisionConfig {
        &self.config
    }

    /// The type in which it computes.
    pub fn dtype(&self) -> DType {
        self.backbone.dtype()
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        self.backbone.device()
    }

    /// The layers.
    pub fn backbone(&self) -> &Backbone {
        &self.backbone
    }

    /// What the layers read of images: `(batch, channels, rows, columns)` of `f32`, `f16` or `bf16` to
    /// `(batch, steps, d_model)` of the model's type, the patches row by row with the token in their middle. Differentiable.
    ///
    /// # Errors
    /// Another shape or type; what does not fit in memory.
    pub fn embed(&self, images: &Tensor) -> Result<Tensor> {
        let VisionConfig { channels, image: [rows, columns], .. } = self.config;
        let expected = [channels, rows, columns];
        let batch = match images.dims().split_first() {
            Some((&batch, shape)) if shape == expected => batch,
            _ => {
                let expected = format_args!("(batch, {channels}, {rows}, {columns})").to_string();
                return Err(argument("images", expected, format_args!("{:?}", images.dims())));
            }
        };
        if !matches!(images.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(argument("images", "f32, f16 or bf16", images.dtype().as_str()));
        }
        let (steps, d_model) = (self.config.steps(), self.config.backbone.d_model());
        let patches = steps - usize::from(self.config.class_token);
        check_room("images", &[batch, patches, self.config.patch_size()], self.dtype(), self.device())?;
        check_room("images", &[batch, steps, d_model], DType::F32, self.device())?;
        if batch == 0 {
            return Tensor::zeros((0, steps, d_model), self.dtype(), self.device());
        }
        // (batch, channels, patches, patch · patch) to the numbers of each patch, the channels one after the other.
        let flat = images.to_dtype(self.dtype())?.reshape((batch, channels, rows * columns))?;
        let picked = flat.index_select(&self.pixels, 2)?.reshape((batch, channels, patches, ()))?;
        let picked = picked.transpose(1, 2)?.reshape((batch, patches, self.config.patch_size()))?;
        let mut stream = self.embed.forward(&picked)?;
        if let Some(token) = &self.class_token {
            let token = token.tensor()?.broadcast_as((batch, 1, d_model))?.contiguous()?;
            let middle = patches / 2;
            let [before, after] = [stream.narrow(1, 0, middle)?, stream.narrow(1, middle, patches - middle)?];
            stream = match middle {
                // candle's operators do not all take tensors of no elements.
                0 => Tensor::cat(&[&token, &after], 1)?,
                _ => Tensor::cat(&[&before, &token, &after], 1)?,
            };
        }
        stream.broadcast_add(&self.positions.tensor()?)
    }

    /// What the head reads of images: `(batch, channels, rows, columns)` to `(batch, d_model)` of the model's type.
    /// Differentiable.
    ///
    /// # Errors
    /// As [`embed`](Self::embed).
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        let stream = self.embed(images)?;
        if stream.dim(0)? == 0 {
            return Tensor::zeros((0, self.config.backbone.d_model()), self.dtype(), self.device());
        }
        let stream = self.backbone.forward(&stream)?;
        match self.config.class_token {
            true => stream.narrow(1, (self.config.steps() - 1) / 2, 1)?.squeeze(1)?.contiguous(),
            // A sum over all patches, which in a half type would lose the last of them.
            false => stream.to_dtype(DType::F32)?.mean(1)?.to_dtype(self.dtype()),
        }
    }

    /// The logits of images: `(batch, channels, rows, columns)` to `(batch, classes)` of `f32`. Differentiable.
    ///
    /// # Errors
    /// As [`embed`](Self::embed).
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let features = self.features(images)?;
        if features.dim(0)? == 0 {
            return Tensor::zeros((0, self.config.classes), DType::F32, self.device());
        }
        self.head.forward(&features)?.to_dtype(DType::F32)
    }

    /// The same model, sharing its parameters, without gradients. Where training goes on, take a new one after a step.
    pub fn detach(&self) -> Result<Self> {
        self.changed(&mut |_, parameter| parameter.detach())
    }

    /// The same model with other parameters, see
    /// [`LanguageModel::map_parameters`](crate::nn::LanguageModel::map_parameters).
    ///
    /// # Errors
    /// Those of `f`; a tensor of another shape, on another device, or of a type that is none of `f32`, `f16`, `bf16` and
    /// `f64`, by the parameter's name.
    pub fn map_parameters(&self, mut f: impl FnMut(&str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        self.changed(&mut |name, parameter| parameter.replace(name, f(name, parameter.stored())?))
    }

    /// Calls `f` with each parameter and its name, in the order in which the model uses them.
    pub fn visit(&self, f: &mut dyn FnMut(&str, &Tensor)) {
        self.parameters.visit(f);
    }

    /// All parameters by name, in the order in which the model uses them.
    pub fn named_tensors(&self) -> Vec<(String, Tensor)> {
        self.parameters.named_tensors()
    }
}

impl Module for VisionModel {
    fn forward(&self, images: &Tensor) -> Result<Tensor> {
        Self::forward(self, images)
    }
}

/// The pixels of the patches, row by row, within each its rows from the top.
fn pixels(config: &VisionConfig, device: &Device) -> Result<Tensor> {
    let ([_, columns], [down, across], patch) = (config.image, config.grid(), config.patch);
    let count = down.saturating_mul(across).saturating_mul(patch * patch);
    check_room("image, patch, stride", &[count], DType::U32, &Device::Cpu)?;
    let mut pixels = Vec::with_capacity(count);
    for (top, left) in (0..down).flat_map(|row| (0..across).map(move |column| (row, column))) {
        let first = (top * columns + left) * config.stride;
        for row in 0..patch {
            pixels.extend((0..patch).map(|column| (first + row * columns + column) as u32));
        }
    }
    Tensor::from_vec(pixels, count, device)
}
