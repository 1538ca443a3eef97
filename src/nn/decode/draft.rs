//! Tokens that have been read and may be taken back.

use candle_core::Result;

use super::Cache;
use crate::candle::Slots;
use crate::nn::argument;
use crate::nn::model::LayerDraft;

/// The states after each token of a draft, see [`LanguageModel::draft`](crate::nn::LanguageModel::draft).
///
/// ```
/// # use candle_core::{DType, Device, Tensor};
/// # use candle_nn::{VarBuilder, VarMap};
/// # use selective_scan::nn::{LanguageModel, LanguageModelConfig};
/// # let config = LanguageModelConfig::new(16, 2, 32);
/// # let model = LanguageModel::new(&config, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu))?.detach()?;
/// let cache = model.new_cache(1, DType::F32)?;
/// // The last token of the text, and three more that somebody takes for likely.
/// let (logits, draft) = model.draft(&Tensor::new(&[[3u32, 1, 4, 1]], &Device::Cpu)?, &cache, None)?;
/// let likeliest = logits.argmax(2)?.to_vec2::<u32>()?;
/// // Those stay that the model would have chosen itself, and the first, which nobody doubts.
/// let right = [1, 4, 1].iter().zip(&likeliest[0]).take_while(|(drafted, chosen)| drafted == chosen).count();
/// draft.accept(&[1 + right])?;
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Draft {
    cache: Cache,
    slots: Option<Vec<i32>>,
    layers: Vec<LayerDraft>,
}

impl Draft {
    pub(crate) fn new(cache: Cache, slots: Option<Vec<i32>>, layers: Vec<LayerDraft>) -> Self {
        Self { cache, slots, layers }
    }

    /// Puts the states of each row back to what they were after the first `accepted[i]` of its tokens, at least one; the count of a row
    /// of padding is not looked at. Nothing else must have written these slots since.
    ///
    /// # Errors
    /// Another number of counts than rows, or one that is 0 or more than there were tokens. Nothing is written then.
    pub fn accept(self, accepted: &[usize]) -> Result<()> {
        if self.layers.len() != self.cache.layers.len() {
            return Err(argument("cache", "states of the layers of the draft", "those of another model"));
        }
        let slots: Slots = self.slots.as_deref().into();
        let mut layers = self.layers.iter().zip(&self.cache.layers);
        layers.try_for_each(|(layer, state)| layer.accept(state, slots, accepted))
    }
}
