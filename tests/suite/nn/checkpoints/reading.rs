//! The ways in which people store a model, and what is no model.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use selective_scan::nn::{Checkpoint, CheckpointFormat, FileFormat, LanguageModel, LanguageModelConfig, SaveOptions};

use super::super::{checkpoint, model, random, refusal};
use super::{Folder, named_bits};
use crate::support::memory::peak_of;

type Tensors = HashMap<String, Tensor>;

fn load(folder: &Folder) -> LanguageModel {
    LanguageModel::load(&folder.0, DType::F32, &Device::Cpu).unwrap()
}

/// The names that training leaves, and what `MambaModel` of transformers saves.
#[test]
fn names_with_wrappers_or_without_a_backbone() {
    let rename = |name: &str, to: fn(&str) -> String| {
        let folder = Folder::copy_of(&checkpoint(name), "renamed");
        folder.edit_tensors(|all| *all = all.drain().map(|(name, tensor)| (to(&name), tensor)).collect());
        folder
    };
    for source in ["mamba", "state_spaces"] {
        let expected = LanguageModel::load(checkpoint(source), DType::F32, &Device::Cpu).unwrap();
        for to in [
            |name: &str| format!("module.{name}"),
            |name: &str| format!("_orig_mod.{name}"),
            |name: &str| format!("module._orig_mod.{name}"),
            |name: &str| name.replace("backbone.", "backbone._orig_mod."),
            |name: &str| name.replace("backbone.", ""),
            |name: &str| format!("_orig_mod.{}", name.replace("backbone.", "")),
        ] {
            let folder = rename(source, to);
            assert_eq!(named_bits(&load(&folder)), named_bits(&expected), "{}", to("backbone.norm_f.weight"));
            let read = Checkpoint::read(&folder.0, &Device::Cpu).unwrap();
            assert_eq!(named_bits(&read.model(DType::F32).unwrap()), named_bits(&expected));
        }
        // Only one of the two names of a tied matrix.
        for one in ["backbone.embedding.weight", "backbone.embeddings.weight", "lm_head.weight"] {
            let folder = Folder::copy_of(&checkpoint(source), "one-name");
            folder.edit_tensors(|all| {
                let matrix =
                    all.remove("backbone.embeddings.weight").or_else(|| all.remove("backbone.embedding.weight"));
                all.remove("lm_head.weight");
                all.insert(one.into(), matrix.unwrap());
            });
            assert_eq!(named_bits(&load(&folder)), named_bits(&expected), "{one}");
        }
    }
    // What the model does not know is told by the name that it has.
    let folder = Folder::copy_of(&checkpoint("mamba"), "stray");
    folder.edit_tensors(|all| drop(all.insert("norm_f.weight".into(), all["backbone.norm_f.weight"].clone())));
    assert!(folder.refusal().contains("`norm_f.weight`"));
}

/// A tied pair of NaN is a pair; so is one of zeros with different signs.
#[test]
fn a_tied_pair_that_is_not_a_number() {
    let folder = Folder::copy_of(&checkpoint("state_spaces"), "nan");
    folder.edit_tensors(|all| {
        let shape = all["lm_head.weight"].dims().to_vec();
        let full = |value: f32| Tensor::full(value, &shape[..], &Device::Cpu).unwrap();
        all.insert("lm_head.weight".into(), full(f32::NAN));
        all.insert("backbone.embedding.weight".into(), full(f32::NAN));
    });
    load(&folder);
    folder.edit_tensors(|all| {
        let shape = all["lm_head.weight"].dims().to_vec();
        let full = |value: f32| Tensor::full(value, &shape[..], &Device::Cpu).unwrap();
        all.insert("lm_head.weight".into(), full(0.0));
        all.insert("backbone.embedding.weight".into(), full(-0.0));
    });
    load(&folder);
}

fn save_shards(folder: &Path, shards: [(&str, &Tensors); 2], index: &Tensors, shard_of: impl Fn(&str) -> String) {
    for (name, tensors) in shards {
        candle_core::safetensors::save(tensors, folder.join(name)).unwrap();
    }
    let map: HashMap<_, _> = index.keys().map(|name| (name, shard_of(name))).collect();
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn the_index_says_where_a_tensor_is() {
    const D: &str = "backbone.layers.1.mixer.D";
    let folder = Folder::copy_of(&checkpoint("mamba"), "shards");
    let all = candle_core::safetensors::load(folder.0.join("model.safetensors"), &Device::Cpu).unwrap();
    fs::remove_file(folder.0.join("model.safetensors")).unwrap();
    let (mut first, second): (Tensors, Tensors) = all.clone().into_iter().partition(|(name, _)| name < &D.to_string());
    assert!(second.contains_key(D) && !first.is_empty());
    let shard = |name: &str| if name < D { "a.safetensors" } else { "b.safetensors" }.to_string();
    let expected = LanguageModel::load(checkpoint("mamba"), DType::F32, &Device::Cpu).unwrap();

    save_shards(&folder.0, [("a.safetensors", &first), ("b.safetensors", &second)], &all, shard);
    assert_eq!(named_bits(&load(&folder)), named_bits(&expected));
    // The same in both is the same.
    first.insert(D.into(), all[D].clone());
    save_shards(&folder.0, [("a.safetensors", &first), ("b.safetensors", &second)], &all, shard);
    assert_eq!(named_bits(&load(&folder)), named_bits(&expected));
    // Different values are not, wherever the index sends.
    first.insert(D.into(), (&all[D] * 2.0).unwrap());
    for at in ["a.safetensors", "b.safetensors"] {
        let to = |name: &str| if name == D { at.to_string() } else { shard(name) };
        save_shards(&folder.0, [("a.safetensors", &first), ("b.safetensors", &second)], &all, to);
        let message = folder.refusal();
        for word in [D, "a.safetensors", "b.safetensors"] {
            assert!(message.contains(word), "{word} is not in: {message}");
        }
    }
    // A shard that does not have what the index says.
    first.remove(D);
    let to = |name: &str| if name == D { "a.safetensors".to_string() } else { shard(name) };
    save_shards(&folder.0, [("a.safetensors", &first), ("b.safetensors", &second)], &all, to);
    let message = folder.refusal();
    assert!(message.contains(D) && message.contains("a.safetensors"), "{message}");
}

#[test]
fn integers_are_no_weights() {
    const EMBEDDINGS: &str = "backbone.embeddings.weight";
    for dtype in [DType::U8, DType::U32, DType::I64] {
        let folder = Folder::copy_of(&checkpoint("mamba"), "integers");
        folder.edit_tensors(|all| {
            let integers = all[EMBEDDINGS].to_dtype(dtype).unwrap();
            all.insert(EMBEDDINGS.into(), integers);
        });
        let message = folder.refusal();
        assert!(message.contains(EMBEDDINGS) && message.contains(dtype.as_str()), "{message}");
        let message = refusal(Checkpoint::read(&folder.0, &Device::Cpu));
        assert!(message.contains(EMBEDDINGS) && message.contains(dtype.as_str()), "{message}");
    }
    // Doubles are numbers.
    let folder = Folder::copy_of(&checkpoint("mamba"), "doubles");
    folder.edit_tensors(|all| all.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::F64).unwrap()));
    let expected = LanguageModel::load(checkpoint("mamba"), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(named_bits(&load(&folder)), named_bits(&expected));
}

/// Every kind of file, in one and in several, has the same model. What others make of them is in exchange.py.
#[test]
fn every_format_is_read_as_it_was_written() {
    let mut random = random();
    let folder = Folder::new("formats");
    let (mut model, variables) = model(&super::super::causal_blocks()[0].1, &mut random);
    for (naming, tie) in [
        (CheckpointFormat::HuggingFace, true),
        (CheckpointFormat::StateSpaces, true),
        (CheckpointFormat::StateSpaces, false),
    ] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            model = untie(&model, &variables, tie, dtype);
            for format in [FileFormat::Safetensors, FileFormat::PyTorch] {
                for max_shard_size in [None, Some(1), Some(2000), Some(usize::MAX)] {
                    let what = format!("{naming:?}, {format:?}, {dtype:?}, {max_shard_size:?}");
                    let options = SaveOptions { file: format, max_shard_size, ..SaveOptions::new(naming) };
                    // Each over the one before: of that nothing may be left.
                    model.save_with(&folder.0, &options).unwrap();
                    let loaded = LanguageModel::load(&folder.0, dtype, &Device::Cpu).unwrap();
                    assert_eq!(named_bits(&loaded), named_bits(&model), "{what}");
                    let read = Checkpoint::read(&folder.0, &Device::Cpu).unwrap();
                    assert_eq!(read.format, naming);
                    assert_eq!(named_bits(&read.model(dtype).unwrap()), named_bits(&model), "{what}");
                    let extension = if format == FileFormat::PyTorch { ".bin" } else { ".safetensors" };
                    for name in folder.names() {
                        let known = name == "config.json" || name.contains(extension);
                        assert!(known, "{what} has left {name}");
                    }
                    let several = max_shard_size.is_some_and(|size| size < usize::MAX);
                    assert_eq!(folder.names().iter().any(|name| name.ends_with("index.json")), several, "{what}");
                }
            }
        }
    }
    let options = SaveOptions { max_shard_size: Some(0), ..SaveOptions::new(CheckpointFormat::HuggingFace) };
    assert!(refusal(model.save_with(&folder.0, &options)).contains("max_shard_size"));
}

fn untie(model: &LanguageModel, variables: &VarMap, tie: bool, dtype: DType) -> LanguageModel {
    let config = LanguageModelConfig { tie_embeddings: tie, ..model.config().clone() };
    let vb = candle_nn::VarBuilder::from_varmap(variables, DType::F32, &Device::Cpu);
    let wide = LanguageModel::new(&config, vb).unwrap();
    // No variables, which would keep their own type.
    let tensors = wide.named_tensors().into_iter().map(|(name, tensor)| (name, tensor.detach())).collect();
    LanguageModel::new(&config, candle_nn::VarBuilder::from_tensors(tensors, dtype, &Device::Cpu)).unwrap()
}

/// Files that lie or are cut short give an error, wherever they are cut.
#[test]
fn broken_files_are_refused() {
    let folder = Folder::new("broken");
    let model = LanguageModel::load(checkpoint("mamba"), DType::F32, &Device::Cpu).unwrap();
    for format in [FileFormat::Safetensors, FileFormat::PyTorch] {
        model
            .save_with(&folder.0, &SaveOptions { file: format, ..SaveOptions::new(CheckpointFormat::HuggingFace) })
            .unwrap();
        let name = if format == FileFormat::PyTorch { "pytorch_model.bin" } else { "model.safetensors" };
        let (path, bytes) = (folder.0.join(name), fs::read(folder.0.join(name)).unwrap());
        for length in [0, 1, 7, 8, 9, 100, 1000, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&path, &bytes[..length]).unwrap();
            assert!(folder.refusal().contains(name), "{length} bytes");
        }
        if format == FileFormat::Safetensors {
            fs::write(&path, [&u64::MAX.to_le_bytes(), &bytes[8..]].concat()).unwrap();
            assert!(folder.refusal().contains(name));
        }
    }
    fs::write(folder.0.join("pytorch_model.bin"), "no archive").unwrap();
    assert!(folder.refusal().contains("pytorch_model.bin"));
}

/// Loading takes memory for the model and little more: not for the file, nor for the model in another type.
#[test]
fn loading_takes_the_memory_of_the_model() {
    let (vocab, d_model) = (4096, 256);
    let config = LanguageModelConfig::new(vocab, 4, d_model);
    let folder = Folder::new("memory");
    let variables = VarMap::new();
    let vb = candle_nn::VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    let model = LanguageModel::new(&config, vb).unwrap();
    let elements = |model: &LanguageModel| model.named_tensors().iter().map(|(_, x)| x.elem_count()).sum::<usize>();
    let size = elements(&model) * 4;
    for format in [FileFormat::Safetensors, FileFormat::PyTorch] {
        for naming in [CheckpointFormat::HuggingFace, CheckpointFormat::StateSpaces] {
            model.save_with(&folder.0, &SaveOptions { file: format, ..SaveOptions::new(naming) }).unwrap();
            // The same type: each tensor is read to where it stays. Another: one at a time stands beside. The largest is
            // the matrix of embeddings, some half of this model; of the rest, tables and headers, a tenth is plenty.
            let (same, _) = peak_of(|| LanguageModel::load(&folder.0, DType::F32, &Device::Cpu).unwrap());
            assert!(same < size + size / 10, "{format:?}, {naming:?}: {same} bytes for a model of {size}");
            let (half, _) = peak_of(|| LanguageModel::load(&folder.0, DType::BF16, &Device::Cpu).unwrap());
            let largest = vocab * d_model * 4;
            assert!(half < size / 2 + largest + size / 10, "{format:?}, {naming:?}: {half} bytes, half of {size}");
            let (read, _) = peak_of(|| Checkpoint::read(&folder.0, &Device::Cpu).unwrap());
            assert!(read < size + size / 10, "{format:?}, {naming:?}: {read} bytes for a model of {size}");
        }
    }
}
