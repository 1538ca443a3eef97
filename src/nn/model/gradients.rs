//! The loss of a language model and its gradients without candle's graph.

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor};

use super::LanguageModel;
use super::language_model::check_ids;
use crate::candle::{RmsNorm, embedding_gradient};
use crate::nn::layers::{Converted, Gradients, Linear, Tokens};
use crate::nn::train::{LossOptions, Targets};
use crate::norm;

impl LanguageModel {
    /// [`loss`](Self::loss) and its gradients, as `loss.backward()` gives them, of all parameters that are variables.
    ///
    /// What makes it worth while: candle adds every gradient to zeros that it has made for it, and multiplies all by the
    /// loss's own gradient, 1. Here nothing is recorded in its graph, and the gradients are what was computed, so that a step
    /// takes less time and memory. (The bits may differ from `backward`'s in the sign of a zero.)
    ///
    /// Where a layer is other than a Mamba block, or a parameter is computed from variables, as [`map_parameters`](Self::map_parameters) may have it, this is
    /// [`loss`](Self::loss) and candle's `backward`.
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use candle_nn::{VarBuilder, VarMap};
    /// # use selective_scan::nn::train::LossOptions;
    /// # use selective_scan::nn::{LanguageModel, LanguageModelConfig};
    /// # let (device, variables) = (Device::Cpu, VarMap::new());
    /// # let config = LanguageModelConfig::new(16, 1, 32);
    /// # let model = LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &device))?;
    /// let ids = Tensor::new(&[[3u32, 1, 4, 1, 5]], &device)?;
    /// let targets = Tensor::new(&[[1u32, 4, 1, 5, 9]], &device)?;
    /// let (loss, gradients) = model.loss_and_gradients(&ids, None, &targets, &LossOptions::default())?;
    /// assert!(loss.to_scalar::<f32>()? > 0.0);
    /// assert!(variables.all_vars().iter().all(|variable| gradients.get(variable).is_some()));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn loss_and_gradients(
        &self,
        ids: &Tensor,
        cu_seqlens: Option<&[usize]>,
        targets: &Tensor,
        options: &LossOptions,
    ) -> Result<(Tensor, GradStore)> {
        let tracked = self.tracked();
        let is_graph_needed = !self.backbone().is_mamba() || tracked.iter().any(|tensor| !tensor.is_variable());
        if tracked.is_empty() || is_graph_needed {
            let loss = self.loss_of(ids, cu_seqlens, targets, options)?;
            let gradients = loss.backward()?;
            return Ok((loss.detach(), gradients));
        }
        let (batch, length) = check_ids(ids)?;
        let vocab_size = self.config().padded_vocab_size();
        let targets = Targets::read(targets, &[batch, length], vocab_size, options)?;
        let tokens = Tokens::read(ids, vocab_size)?;
        let converted = Converted::of(self.parameters())?;
        let table = self.embeddings().leave_graph(&converted)?;
        let shape = (batch, length, self.config().d_model());
        let embedded = tokens.embed(&table)?.reshape(shape)?;
        let (stream, way_back) =
            self.backbone().pass(&embedded, cu_seqlens, self.embeddings().is_tracked(), &converted)?;

        let last = self.backbone().last_norm();
        let weight = last.parameter().leave_graph(&converted)?;
        let norm_weight = weight.tensor()?.to_dtype(DType::F32)?;
        let norm = RmsNorm {
            weight: Some(&norm_weight),
            options: norm::Options { eps: last.eps(), ..Default::default() },
            dtype: self.dtype(),
            ..RmsNorm::new(&stream)
        };
        let head = match self.head() {
            Some(head) => Linear::weight(head).leave_graph(&converted)?,
            None => table.clone(),
        };
        let (loss, d_hidden, d_head) = targets.loss_and_gradients(&norm.forward()?, &head.tensor()?)?;

        let mut gradients = Gradients::default();
        gradients.add(&head, |_| Ok(d_head))?;
        let d_stream = norm.backward(&d_hidden.reshape(shape)?, None)?;
        if let Some(d_weight) = d_stream.weight {
            gradients.add(&weight, |_| Ok(d_weight))?;
        }
        if let Some(d_embedded) = way_back.backward(&d_stream.sum, &mut gradients)? {
            let ids = tokens.on_device(self.device())?;
            let d_rows = d_embedded.reshape((batch * length, shape.2))?;
            gradients.add(&table, |_| embedding_gradient(&ids, &d_rows, vocab_size))?;
        }
        // candle makes an empty one for whoever asks for gradients of nothing.
        let mut store = Tensor::zeros((), DType::F32, self.device())?.backward()?;
        for tensor in &tracked {
            if let Some(gradient) = gradients.take(tensor.id()) {
                store.insert(tensor, gradient);
            }
        }
        Ok((loss, store))
    }
}
