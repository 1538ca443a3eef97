//! Models in files: safetensors with a config.json beside them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use serde::Deserialize;

use super::{LanguageModel, LanguageModelConfig, argument, json};

/// By whose names and keys a checkpoint is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// Those of Hugging Face's transformers.
    HuggingFace,
    /// Those of the repository state-spaces/mamba.
    StateSpaces,
}

/// A checkpoint that has been read: the configuration, and the tensors as they were stored.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What config.json says.
    pub config: LanguageModelConfig,
    /// By whose keys it says it.
    pub naming: Naming,
    /// By Hugging Face's names.
    tensors: HashMap<String, Tensor>,
}

/// The embedding matrix, the only tensor that the two name differently.
const EMBEDDINGS: [(Naming, &str); 2] =
    [(Naming::HuggingFace, "backbone.embeddings.weight"), (Naming::StateSpaces, "backbone.embedding.weight")];
const HEAD: &str = "lm_head.weight";
const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Which file has which tensor, where there are several.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Reads a folder with `config.json` and `model.safetensors`, or the several files that
    /// `model.safetensors.index.json` names, by either naming.
    ///
    /// # Errors
    /// A file that is missing or is not what it should be, by name; a configuration of another model.
    pub fn read(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let folder = folder.as_ref();
        let text = fs::read_to_string(folder.join(CONFIG)).map_err(|error| at(&folder.join(CONFIG), error))?;
        let (config, naming) = json::read(&text).map_err(|error| at(&folder.join(CONFIG), error))?;
        let mut tensors = read_tensors(folder, device)?;
        let [(_, ours), (_, theirs)] = EMBEDDINGS;
        if let Some(embeddings) = tensors.remove(theirs)
            && tensors.insert(ours.into(), embeddings).is_some()
        {
            return Err(at(folder, format_args!("there are both `{ours}` and `{theirs}`")));
        }
        if config.tie_embeddings
            && let Some(head) = tensors.remove(HEAD)
            && let Some(embeddings) = tensors.get(ours)
            && !same(&head, embeddings)?
        {
            let message = format_args!("`{HEAD}` should be the embeddings, as config.json ties them, but differs");
            return Err(at(folder, message));
        }
        Ok(Self { config, naming, tensors })
    }

    /// The model, of type `dtype`, whatever that of the file.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or of which the model knows nothing, by name.
    pub fn model(&self, dtype: DType) -> Result<LanguageModel> {
        let device = self.tensors.values().next().map_or(Device::Cpu, |tensor| tensor.device().clone());
        let model = LanguageModel::new(&self.config, VarBuilder::from_tensors(self.tensors.clone(), dtype, &device))?;
        self.check_known(&model)?;
        Ok(model)
    }

    /// The model to be trained further, which computes in `dtype`, with the variables that it is made of. These are `f32`
    /// whatever `dtype`: small steps of training are lost in a half type.
    ///
    /// # Errors
    /// As [`Checkpoint::model`].
    pub fn trainable(&self, dtype: DType) -> Result<(LanguageModel, VarMap)> {
        let (fixed, variables) = (self.model(DType::F32)?, VarMap::new());
        {
            let mut map = variables.data().lock().map_err(|_| Error::msg("the lock of the variables is poisoned"))?;
            for (name, tensor) in fixed.named_tensors() {
                // A variable is a copy: training does not change what was read.
                map.insert(name, Var::from_tensor(&tensor)?);
            }
        }
        let model = LanguageModel::new(&self.config, VarBuilder::from_varmap(&variables, dtype, fixed.device()))?;
        Ok((model, variables))
    }

    /// Checks that the model has taken all that there was.
    fn check_known(&self, model: &LanguageModel) -> Result<()> {
        let known: HashSet<_> = model.named_tensors().into_iter().map(|(name, _)| name).collect();
        let mut unknown: Vec<_> = self.tensors.keys().filter(|name| !known.contains(*name)).collect();
        unknown.sort_unstable();
        match unknown.first() {
            None => Ok(()),
            Some(first) => {
                let got = format_args!("{} more, the first of which is `{first}`", unknown.len());
                Err(argument("tensors", "those of the model that config.json describes", got))
            }
        }
    }
}

impl LanguageModel {
    /// Reads a model from a folder, see [`Checkpoint::read`] and [`Checkpoint::model`].
    ///
    /// # Errors
    /// As theirs.
    pub fn load(folder: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        Checkpoint::read(&folder, device)?.model(dtype).map_err(|error| at(folder.as_ref(), error))
    }

    /// Writes the model to a folder, which is made if it is not there: `config.json` and `model.safetensors`, whatever the
    /// model's size. Loading it gives the same bits.
    ///
    /// # Errors
    /// A model that the naming has no words for, see [`LanguageModelConfig::to_json`]; nothing is written then.
    pub fn save(&self, folder: impl AsRef<Path>, naming: Naming) -> Result<()> {
        let folder = folder.as_ref();
        let config = self.config().to_json(naming)?;
        let mut tensors: HashMap<_, _> = self.named_tensors().into_iter().collect();
        if naming == Naming::StateSpaces {
            let [(_, ours), (_, theirs)] = EMBEDDINGS;
            if let Some(embeddings) = tensors.remove(ours) {
                if self.config().tie_embeddings {
                    tensors.insert(HEAD.into(), embeddings.clone());
                }
                tensors.insert(theirs.into(), embeddings);
            }
        }
        fs::create_dir_all(folder).map_err(|error| at(folder, error))?;
        // Under another name first, so that there is never half a file under this one.
        let unfinished = folder.join(format!("{WEIGHTS}.part"));
        candle_core::safetensors::save(&tensors, &unfinished).map_err(|error| at(&unfinished, error))?;
        fs::rename(&unfinished, folder.join(WEIGHTS)).map_err(|error| at(&unfinished, error))?;
        fs::write(folder.join(CONFIG), config).map_err(|error| at(&folder.join(CONFIG), error))
    }
}

fn read_tensors(folder: &Path, device: &Device) -> Result<HashMap<String, Tensor>> {
    let index = folder.join(INDEX);
    let files = if folder.join(WEIGHTS).exists() {
        vec![WEIGHTS.to_string()]
    } else if index.exists() {
        let text = fs::read_to_string(&index).map_err(|error| at(&index, error))?;
        let map: Index = serde_json::from_str(&text).map_err(|error| at(&index, error))?;
        let files: HashSet<_> = map.weight_map.into_values().collect();
        // A name with a folder in it would lead out of this one.
        if let Some(file) = files.iter().find(|file| Path::new(file).file_name() != Some(file.as_ref())) {
            return Err(at(&index, format_args!("`{file}` is no file beside it")));
        }
        files.into_iter().collect()
    } else {
        return Err(at(folder, format_args!("there is neither `{WEIGHTS}` nor `{INDEX}`")));
    };
    let mut tensors = HashMap::new();
    for file in files {
        let path = folder.join(file);
        let bytes = fs::read(&path).map_err(|error| at(&path, error))?;
        tensors.extend(candle_core::safetensors::load_buffer(&bytes, device).map_err(|error| at(&path, error))?);
    }
    Ok(tensors)
}

/// Whether two tensors are equal, element by element.
fn same(a: &Tensor, b: &Tensor) -> Result<bool> {
    if a.shape() != b.shape() {
        return Ok(false);
    }
    let different = a.ne(&b.to_dtype(a.dtype())?)?.to_dtype(DType::U32)?.max_all()?.to_scalar::<u32>()?;
    Ok(different == 0)
}

/// An error that says at which file it happened.
fn at(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::msg(format_args!("{}: {error}", path.display()))
}
