//! Models in files: a folder with tensors and a config.json beside them.

mod config_json;
mod folder;
mod hugging_face;
mod hybrid;
mod jamba;
mod llama;
mod names;
mod pytorch;
mod state_spaces;
mod stored;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use serde_json::json;

use super::{LanguageModel, LanguageModelConfig, argument};
use folder::CONFIG;
use names::EMBEDDINGS;
use stored::Stored;

/// Which library's checkpoint it is: by whose names tensors are stored, and by whose keys config.json is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CheckpointFormat {
    /// That of Hugging Face's transformers.
    HuggingFace,
    /// That of the repository state-spaces/mamba.
    StateSpaces,
}

/// The kind of file in which tensors are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum FileFormat {
    /// `model.safetensors`.
    #[default]
    Safetensors,
    /// `pytorch_model.bin`, an archive that `torch.load` opens, with `weights_only` too. state-spaces/mamba's own
    /// `from_pretrained` reads nothing else.
    PyTorch,
}

impl FileFormat {
    const ALL: [Self; 2] = [Self::Safetensors, Self::PyTorch];

    /// The parts of a file's name.
    fn stem(self) -> (&'static str, &'static str) {
        match self {
            Self::Safetensors => ("model", "safetensors"),
            Self::PyTorch => ("pytorch_model", "bin"),
        }
    }

    /// The only file.
    fn weights(self) -> String {
        let (stem, extension) = self.stem();
        format!("{stem}.{extension}")
    }

    /// The list of several.
    fn index(self) -> String {
        self.weights() + ".index.json"
    }

    /// One of several.
    fn shard(self, index: usize, count: usize) -> String {
        let (stem, extension) = self.stem();
        format!("{stem}-{:05}-of-{count:05}.{extension}", index + 1)
    }

    fn is_shard(self, name: &str) -> bool {
        let (stem, extension) = self.stem();
        let numbers = name.strip_prefix(stem).and_then(|rest| rest.strip_prefix('-')?.strip_suffix(extension));
        let numbers = numbers.and_then(|rest| rest.strip_suffix('.')?.split_once("-of-"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        numbers.is_some_and(|(index, count)| digits(index) && digits(count))
    }
}

/// How a checkpoint is written. Fields may be added: begin with [`SaveOptions::new`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveOptions {
    /// Which library's checkpoint.
    pub format: CheckpointFormat,
    /// In what kind of file tensors are stored.
    pub file: FileFormat,
    /// Above this many bytes, tensors are written to several files, with an index. A tensor is never divided.
    /// state-spaces/mamba reads one file only.
    pub max_shard_size: Option<usize>,
}

impl SaveOptions {
    /// One file of safetensors.
    pub fn new(format: CheckpointFormat) -> Self {
        Self { format, file: FileFormat::default(), max_shard_size: None }
    }
}

/// A checkpoint that has been read: the configuration, and the tensors as they were stored.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// What config.json says.
    pub config: LanguageModelConfig,
    /// Which library's checkpoint it is.
    pub format: CheckpointFormat,
    /// Where it was read.
    folder: PathBuf,
    /// By Hugging Face's names.
    tensors: HashMap<String, Tensor>,
}

/// What belongs to a checkpoint beside the model, where there is any.
const COMPANIONS: [&str; 12] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
];

impl Checkpoint {
    /// Reads a folder with `config.json` and, of these, the first that is there: `model.safetensors`, the files that
    /// `model.safetensors.index.json` names, `pytorch_model.bin`, the files that `pytorch_model.bin.index.json` names.
    ///
    /// Either library's is read, also without `backbone.` (what transformers calls a `MambaModel`), with the `module.` and
    /// `_orig_mod.` that PyTorch puts into names, and with one of the two names of a tied matrix. An embedding matrix that
    /// is not padded as `config.json` says is taken as it is.
    ///
    /// What is read belongs together, even where [`LanguageModel::save`] writes to the folder meanwhile.
    ///
    /// # Errors
    /// A file that is missing or is not what it should be, by name; a configuration of another model; tensors of integers,
    /// and quantised models; a tensor in several files with different values, or in another one than the index says.
    pub fn read(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let Opened { config, format, stored } = Opened::new(folder.as_ref())?;
        let tensors = stored.names().map(|name| Ok((name.clone(), stored.tensor(name, device)?)));
        let tensors = tensors.collect::<Result<_>>()?;
        Ok(Self { config, format, folder: folder.as_ref().into(), tensors })
    }

    /// The type of the matrices, by that of the embeddings: in half checkpoints a few vectors are `f32`.
    pub fn dtype(&self) -> DType {
        match self.tensors.get(EMBEDDINGS).map(Tensor::dtype) {
            Some(dtype @ (DType::F16 | DType::BF16)) => dtype,
            _ => DType::F32,
        }
    }

    /// The tensors as they were stored, by the names that a model has for them ([`LanguageModel::named_tensors`]).
    pub fn tensors(&self) -> &HashMap<String, Tensor> {
        &self.tensors
    }

    /// The model, of type `dtype`, whatever that of the file.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or of which the model knows nothing, by name.
    pub fn model(&self, dtype: DType) -> Result<LanguageModel> {
        let device = self.tensors.values().next().map_or(Device::Cpu, |tensor| tensor.device().clone());
        let model = LanguageModel::new(&self.config, VarBuilder::from_tensors(self.tensors.clone(), dtype, &device))?;
        check_known(self.tensors.keys(), &model)?;
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

    /// Writes a model that was made of this checkpoint, as [`LanguageModel::save_with`] does, with the files that belong to
    /// it: the tokenizer's and `generation_config.json`, as they are now in the folder that was read.
    ///
    /// # Errors
    /// As [`LanguageModel::save_with`].
    pub fn save(&self, model: &LanguageModel, folder: impl AsRef<Path>, options: &SaveOptions) -> Result<()> {
        let companions = COMPANIONS.iter().map(|name| self.folder.join(name)).filter(|path| path.is_file());
        save(model, folder.as_ref(), options, &companions.collect::<Vec<_>>())
    }
}

/// A checkpoint of which the tensors are still in their files.
struct Opened {
    config: LanguageModelConfig,
    format: CheckpointFormat,
    stored: Stored,
}

impl Opened {
    fn new(folder: &Path) -> Result<Self> {
        let mut opened = folder::read(folder, |snapshot| {
            let path = snapshot.folder().join(CONFIG);
            let text = snapshot.read(CONFIG)?.ok_or_else(|| at(&path, "there is no such file"))?;
            let (config, format) = config_json::read(&text).map_err(|error| at(&path, error))?;
            Ok(Self { config, format, stored: Stored::open(snapshot)? })
        })?;
        let Self { config, stored, .. } = &mut opened;
        if config.tie_embeddings {
            stored.tie()?;
        }
        let rows = stored.shape(EMBEDDINGS).and_then(|shape| shape.first());
        if rows == Some(&config.vocab_size) && config.padded_vocab_size() != config.vocab_size {
            config.pad_vocab_size_multiple = 1;
        }
        Ok(opened)
    }
}

impl LanguageModel {
    /// Reads a model from a folder, see [`Checkpoint::read`] and [`Checkpoint::model`]. Beside the model itself this takes
    /// memory for no more than a tensor.
    ///
    /// # Errors
    /// As theirs.
    pub fn load(folder: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        let Opened { config, stored, .. } = Opened::new(folder.as_ref())?;
        let names: Vec<_> = stored.names().cloned().collect();
        let build = || {
            let model = Self::new(&config, VarBuilder::from_backend(Box::new(stored), dtype, device.clone()))?;
            check_known(&names, &model)?;
            Ok(model)
        };
        build().map_err(|error: Error| at(folder.as_ref(), error))
    }

    /// Writes the model to a folder, which is made if it is not there: `config.json` and `model.safetensors`, whatever the
    /// model's size. Loading it gives the same bits. See [`LanguageModel::save_with`].
    ///
    /// # Errors
    /// As there.
    pub fn save(&self, folder: impl AsRef<Path>, format: CheckpointFormat) -> Result<()> {
        self.save_with(folder, &SaveOptions::new(format))
    }

    /// Writes the model to a folder, which is made if it is not there.
    ///
    /// # What happens to what is there
    /// `config.json` and all files of weights are replaced (`model.safetensors`, `pytorch_model.bin`, their shards and
    /// indices, those of another format too); other files stay. A link to the folder is followed; one in it, to a file, is
    /// replaced by a file, and what it leads to stays. The new files have the mode of any new file.
    ///
    /// The new checkpoint replaces the old one in one moment, after everything has been written and has reached the disk.
    /// Whatever happens before, the program's end or a full disk, the old checkpoint stays; an error leaves nothing of the
    /// new one, and what a program left that was killed is removed by the next save to that folder. Whatever happens after,
    /// the new checkpoint is there.
    ///
    /// - [`LanguageModel::load`] and [`Checkpoint::read`] always find one or the other, and never parts of both, also in
    ///   the middle of a save and after a kill or a loss of power. That holds on Linux and macOS, on file systems with
    ///   atomic renames. On others, files are not told apart by their number but by length and time, and names are not
    ///   waited for until they reach the disk.
    /// - For other programs, the new files get their names one by one in that moment, without a wait between, and
    ///   `config.json` is last. It is missing until then, so that nobody who is stopped in between, and nobody who begins to
    ///   read in between, takes parts of both for a checkpoint. Where only one file of weights changes and the
    ///   configuration is the same, it is never missing. A save that was killed in that moment is finished by the next one;
    ///   the files are complete, in `.selective_scan.new`. Another program that has read the old `config.json` before that
    ///   moment, and opens the weights after it, gets the new weights.
    /// - Saves to one folder wait for each other, where the system has locks on folders (Unix).
    ///
    /// # Errors
    /// A model that the format has no words for, see [`LanguageModelConfig::to_json`]; an error of the file system. Nothing
    /// is changed then, unless the message says that a file could not take its place.
    pub fn save_with(&self, folder: impl AsRef<Path>, options: &SaveOptions) -> Result<()> {
        save(self, folder.as_ref(), options, &[])
    }
}

fn save(model: &LanguageModel, folder: &Path, options: &SaveOptions, companions: &[PathBuf]) -> Result<()> {
    if options.max_shard_size == Some(0) {
        return Err(argument("max_shard_size", "at least 1", 0));
    }
    let tensors = names::in_file(model, options.format)?;
    // The type of what is stored, which need not be the one that the model computes in.
    let mut dtype = None;
    model.visit(&mut |name, tensor| dtype = if name == EMBEDDINGS { Some(tensor.dtype()) } else { dtype });
    let config = config_json::write(model.config(), options.format, dtype)?;
    let write = |to: &Path| {
        for from in companions {
            let path = to.join(from.file_name().unwrap_or_default());
            fs::copy(from, &path).map_err(|error| at(from, error))?;
        }
        write_tensors(to, tensors, options)?;
        fs::write(to.join(CONFIG), config).map_err(|error| at(&to.join(CONFIG), error))
    };
    folder::write(folder, write, |name| {
        FileFormat::ALL.iter().any(|file| name == file.weights() || name == file.index() || file.is_shard(name))
    })
}

/// Writes one file, or several and their index.
fn write_tensors(folder: &Path, tensors: Vec<(String, Tensor)>, options: &SaveOptions) -> Result<()> {
    let size = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
    let total: usize = tensors.iter().map(|(_, tensor)| size(tensor)).sum();
    let mut shards: Vec<(Vec<(String, Tensor)>, usize)> = Vec::new();
    for (name, tensor) in tensors {
        let bytes = size(&tensor);
        match shards.last_mut() {
            Some((shard, sum)) if *sum + bytes <= options.max_shard_size.unwrap_or(usize::MAX) => {
                *sum += bytes;
                shard.push((name, tensor));
            }
            _ => shards.push((vec![(name, tensor)], bytes)),
        }
    }
    let (format, count) = (options.file, shards.len());
    let mut weight_map = BTreeMap::new();
    for (index, (shard, _)) in shards.iter().enumerate() {
        let name = if count == 1 { format.weights() } else { format.shard(index, count) };
        weight_map.extend(shard.iter().map(|(tensor, _)| (tensor, name.clone())));
        write_file(&folder.join(name), format, shard)?;
    }
    if count > 1 {
        let path = folder.join(format.index());
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        fs::write(&path, format!("{index:#}\n")).map_err(|error| at(&path, error))?;
    }
    Ok(())
}

fn write_file(path: &Path, format: FileFormat, tensors: &[(String, Tensor)]) -> Result<()> {
    match format {
        FileFormat::Safetensors => {
            // transformers wants to know from which library they come, and knows not this one.
            let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
            let tensors = tensors.iter().map(|(name, tensor)| (name, tensor));
            safetensors::serialize_to_file(tensors, Some(metadata), path).map_err(|error| at(path, error))
        }
        FileFormat::PyTorch => pytorch::write(path, tensors).map_err(|error| at(path, error)),
    }
}

/// Checks that the model has taken all that there was.
fn check_known<'a>(names: impl IntoIterator<Item = &'a String>, model: &LanguageModel) -> Result<()> {
    let mut known = HashSet::new();
    model.visit(&mut |name, _| {
        known.insert(name.to_string());
    });
    let mut unknown: Vec<_> = names.into_iter().filter(|name| !known.contains(*name)).collect();
    unknown.sort_unstable();
    match unknown.first() {
        None => Ok(()),
        Some(first) => {
            let got = format_args!("{} more, the first of which is `{first}`", unknown.len());
            Err(argument("tensors", "those of the model that config.json describes", got))
        }
    }
}

/// An error that says at which file it happened.
fn at(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::msg(format_args!("{}: {error}", path.display()))
}
