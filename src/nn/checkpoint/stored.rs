//! Tensors as they are stored in files: which there are, and the reading of one.
//!
//! Files are opened and their directories read; a tensor's elements are read only when they are wanted, straight to where
//! they stay.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use bytemuck::Pod;
use candle_core::{DType, Device, Error, Result, Shape, Tensor, WithDType};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use half::{bf16, f16};
use safetensors::tensor::Metadata;
use serde::Deserialize;
use zip::ZipArchive;

use super::folder::{Snapshot, is_plain};
use super::names::{self, EMBEDDINGS, HEAD};
use super::{FileFormat, at, pytorch};

/// The tensors of a checkpoint, by the names that the model knows them by.
pub(super) struct Stored {
    files: Vec<Container>,
    tensors: BTreeMap<String, Entry>,
}

/// An open file with tensors.
pub(super) struct Container {
    pub path: PathBuf,
    pub reader: Mutex<Reader>,
}

pub(super) enum Reader {
    Safetensors(File),
    PyTorch(ZipArchive<File>),
}

/// Where a tensor is.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    /// Index into the open files.
    pub file: usize,
    /// What the tensor is called there.
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<usize>,
    /// Of the first byte: in the file, or in the member of the archive.
    pub offset: u64,
    /// The member of an archive.
    pub member: usize,
}

impl Entry {
    /// A tensor without gaps.
    pub fn dense(file: usize, name: String, dtype: DType, shape: Vec<usize>, offset: u64) -> Self {
        let strides = dense_strides(&shape);
        Self { file, name, dtype, shape, strides, offset, member: 0 }
    }

    /// The elements from the first to the last, with those that may lie between. `None` if there are more than can be.
    pub fn span(&self) -> Option<usize> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let mut last = 0usize;
        for (&size, &stride) in self.shape.iter().zip(&self.strides) {
            last = last.checked_add((size - 1).checked_mul(stride)?)?;
        }
        last.checked_add(1)
    }

    /// Whether its elements lie one after another.
    fn is_dense(&self) -> bool {
        let steps = self.strides.iter().zip(dense_strides(&self.shape));
        self.shape.contains(&0)
            || self.shape.iter().zip(steps).all(|(&size, (&stride, dense))| size == 1 || stride == dense)
    }
}

/// The strides of a tensor without gaps. Sizes may be those of a file that lies.
pub(super) fn dense_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for index in (1..shape.len()).rev() {
        strides[index - 1] = strides[index].saturating_mul(shape[index]);
    }
    strides
}

/// Which file has which tensor, where there are several.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Stored {
    /// Opens the files of a checkpoint, of the first format and number that are there.
    pub fn open(snapshot: &Snapshot) -> Result<Self> {
        for format in FileFormat::ALL {
            if let Some((file, path)) = snapshot.open(&format.weights())? {
                let mut stored = Self { files: Vec::new(), tensors: BTreeMap::new() };
                let tensors = stored.add(format, file, &path)?;
                stored.tensors = tensors.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
                return stored.renamed(&path);
            }
            if let Some(text) = snapshot.read(&format.index())? {
                return Self::open_shards(snapshot, format, &text);
            }
        }
        let names: Vec<_> = FileFormat::ALL
            .iter()
            .flat_map(|format| [format.weights(), format.index()])
            .map(|name| format!("`{name}`"))
            .collect();
        Err(at(snapshot.folder(), format_args!("there is neither of {}", names.join(", "))))
    }

    /// Opens the files that an index names. It decides which of them a tensor is taken from.
    fn open_shards(snapshot: &Snapshot, format: FileFormat, index: &str) -> Result<Self> {
        let index_path = snapshot.folder().join(format.index());
        let Index { weight_map } = serde_json::from_str(index).map_err(|error| at(&index_path, error))?;
        let mut stored = Self { files: Vec::new(), tensors: BTreeMap::new() };
        let mut places: BTreeMap<String, Vec<(&str, Entry)>> = BTreeMap::new();
        for shard in weight_map.values().map(String::as_str).collect::<BTreeSet<_>>() {
            if !is_plain(shard) {
                return Err(at(&index_path, format_args!("`{shard}` is no file beside it")));
            }
            let Some((file, path)) = snapshot.open(shard)? else {
                let message = format_args!("there is no such file, though `{}` names it", format.index());
                return Err(at(&snapshot.folder().join(shard), message));
            };
            for entry in stored.add(format, file, &path)? {
                places.entry(entry.name.clone()).or_default().push((shard, entry));
            }
        }
        for (name, shard) in &weight_map {
            if !places.get(name).is_some_and(|places| places.iter().any(|(place, _)| place == shard)) {
                return Err(at(&index_path, format_args!("`{name}` should be in `{shard}`, and is not")));
            }
        }
        for (name, mut places) in places {
            // One that the index does not list is where it is.
            let listed =
                places.iter().position(|(shard, _)| weight_map.get(&name).is_some_and(|listed| listed == shard));
            let (shard, entry) = places.swap_remove(listed.unwrap_or(0));
            for (other, duplicate) in places {
                if !stored.same(&entry, &duplicate)? {
                    let message = format_args!("`{name}` is in `{shard}` and in `{other}`, with different values");
                    return Err(at(&index_path, message));
                }
            }
            stored.tensors.insert(name, entry);
        }
        stored.renamed(&index_path)
    }

    /// Takes in a file, and gives what it has.
    fn add(&mut self, format: FileFormat, file: File, path: &Path) -> Result<Vec<Entry>> {
        let index = self.files.len();
        let (reader, entries) = match format {
            FileFormat::Safetensors => {
                let mut file = file;
                let entries = safetensors_entries(&mut file, index).map_err(|error| at(path, error))?;
                (Reader::Safetensors(file), entries)
            }
            FileFormat::PyTorch => {
                let mut archive = ZipArchive::new(file).map_err(|error| at(path, error))?;
                let entries = pytorch::entries(&mut archive, index).map_err(|error| at(path, error))?;
                (Reader::PyTorch(archive), entries)
            }
        };
        self.files.push(Container { path: path.into(), reader: Mutex::new(reader) });
        match entries.iter().find(|entry| !is_number(entry.dtype)) {
            None => Ok(entries),
            Some(Entry { name, dtype, .. }) => {
                let message = format!("`{name}`: expected f32, f16, bf16 or f64, got {}", dtype.as_str());
                Err(at(path, message))
            }
        }
    }

    /// The tensors by the names that the model has for them.
    fn renamed(mut self, path: &Path) -> Result<Self> {
        let names = names::in_model(self.tensors.keys());
        let mut renamed: BTreeMap<String, Entry> = BTreeMap::new();
        for (name, entry) in names.into_iter().zip(std::mem::take(&mut self.tensors).into_values()) {
            if let Some(other) = renamed.get(&name) {
                return Err(at(path, format_args!("there are both `{}` and `{}`", other.name, entry.name)));
            }
            renamed.insert(name, entry);
        }
        self.tensors = renamed;
        Ok(self)
    }

    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| &entry.shape[..])
    }

    /// Leaves out the head of a tied pair, or takes it as the embeddings if it is alone.
    ///
    /// # Errors
    /// Two that differ.
    pub fn tie(&mut self) -> Result<()> {
        let Some(head) = self.tensors.remove(HEAD) else { return Ok(()) };
        match self.tensors.get(EMBEDDINGS) {
            None => drop(self.tensors.insert(EMBEDDINGS.into(), head)),
            Some(embeddings) if self.same(&head, embeddings)? => {}
            Some(embeddings) => {
                let message =
                    format!("`{}` should be `{}`, as config.json ties them, but differs", head.name, embeddings.name);
                return Err(at(&self.files[head.file].path, message));
            }
        }
        Ok(())
    }

    /// Reads a tensor, of its own type.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let entry = self.tensors.get(name).ok_or_else(|| Error::CannotFindTensor { path: name.into() }.bt())?;
        self.load(entry)?.to_device(device)
    }

    fn load(&self, entry: &Entry) -> Result<Tensor> {
        match entry.dtype {
            DType::F32 => self.elements::<f32>(entry),
            DType::F16 => self.elements::<f16>(entry),
            DType::BF16 => self.elements::<bf16>(entry),
            DType::F64 => self.elements::<f64>(entry),
            other => Err(Error::msg(format_args!("`{}`: no number: {}", entry.name, other.as_str()))),
        }
    }

    fn elements<T: WithDType + Pod>(&self, entry: &Entry) -> Result<Tensor> {
        let file = &self.files[entry.file];
        let span = entry.span().unwrap_or(usize::MAX);
        let mut values: Vec<T> = Vec::new();
        let room = values.try_reserve_exact(span);
        room.map_err(|error| at(&file.path, format_args!("`{}`: {error}", entry.name)))?;
        values.resize(span, T::zeroed());
        file.read(entry, 0, bytemuck::cast_slice_mut(&mut values))
            .map_err(|error| at(&file.path, format_args!("`{}`: {error}", entry.name)))?;
        // Files are little-endian.
        if cfg!(target_endian = "big") {
            for value in &mut values {
                bytemuck::bytes_of_mut(value).reverse();
            }
        }
        if !entry.is_dense() {
            values = gathered(&values, &entry.shape, &entry.strides);
        }
        Tensor::from_vec(values, &entry.shape[..], &Device::Cpu)
    }

    /// Whether two tensors are equal, element by element; NaN equals NaN.
    fn same(&self, a: &Entry, b: &Entry) -> Result<bool> {
        if a.shape != b.shape {
            return Ok(false);
        }
        if a == &(Entry { name: a.name.clone(), ..b.clone() }) || self.same_bytes(a, b)? {
            return Ok(true);
        }
        let values = |entry| self.load(entry)?.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
        let same = |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan();
        Ok(values(a)?.iter().zip(&values(b)?).all(same))
    }

    /// Whether two tensors of one type have the same bytes, a piece at a time: this is done for matrices as large as the
    /// vocabulary.
    fn same_bytes(&self, a: &Entry, b: &Entry) -> Result<bool> {
        if a.dtype != b.dtype || !(a.is_dense() && b.is_dense()) {
            return Ok(false);
        }
        let total = a.span().unwrap_or(0) * a.dtype.size_in_bytes();
        let mut buffers = [vec![0; PIECE], vec![0; PIECE]];
        for start in (0..total).step_by(PIECE) {
            for (entry, buffer) in [a, b].into_iter().zip(&mut buffers) {
                buffer.truncate(total - start);
                self.files[entry.file].read(entry, start as u64, buffer)?;
            }
            if buffers[0] != buffers[1] {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Bytes that are compared at a time.
const PIECE: usize = 1 << 20;

/// Whether a type is one that weights have.
fn is_number(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16 | DType::F64)
}

impl Container {
    /// Reads bytes of a tensor, from the one at `start` on.
    fn read(&self, entry: &Entry, start: u64, to: &mut [u8]) -> Result<()> {
        let mut reader = self.reader.lock().map_err(|_| Error::msg("the lock of the file is poisoned"))?;
        match &mut *reader {
            Reader::Safetensors(file) => {
                file.seek(SeekFrom::Start(entry.offset + start))?;
                file.read_exact(to)?;
            }
            Reader::PyTorch(archive) => {
                let mut member = archive.by_index_seek(entry.member).map_err(Error::wrap)?;
                member.seek(SeekFrom::Start(entry.offset + start))?;
                member.read_exact(to)?;
            }
        }
        Ok(())
    }
}

/// The elements of a tensor with gaps, or in another order, one after another.
fn gathered<T: Copy>(values: &[T], shape: &[usize], strides: &[usize]) -> Vec<T> {
    let count = shape.iter().product();
    let mut index = vec![0; shape.len()];
    let mut to = Vec::with_capacity(count);
    for _ in 0..count {
        to.push(values[index.iter().zip(strides).map(|(index, stride)| index * stride).sum::<usize>()]);
        for (index, size) in index.iter_mut().zip(shape).rev() {
            *index += 1;
            if *index < *size {
                break;
            }
            *index = 0;
        }
    }
    to
}

/// What a file of safetensors has, by its header.
fn safetensors_entries(file: &mut File, index: usize) -> Result<Vec<Entry>> {
    let length = file.metadata()?.len();
    let mut size = [0; 8];
    file.read_exact(&mut size)?;
    let start = u64::from_le_bytes(size).checked_add(8).filter(|&start| start <= length);
    let start = start.ok_or_else(|| Error::msg("no file of safetensors: the header is longer than the file"))?;
    let mut header = vec![0; (start - 8) as usize];
    file.read_exact(&mut header)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(Error::wrap)?;
    if start.checked_add(metadata.data_len() as u64) != Some(length) {
        let wanted = metadata.data_len() as u64 + start;
        return Err(Error::msg(format_args!("expected {wanted} bytes by its header, got {length}")));
    }
    let mut entries = Vec::new();
    for (name, info) in metadata.tensors() {
        let dtype = DType::try_from(info.dtype)
            .map_err(|_| Error::msg(format_args!("`{name}`: expected f32, f16, bf16 or f64, got {:?}", info.dtype)))?;
        entries.push(Entry::dense(index, name, dtype, info.shape.clone(), start + info.data_offsets.0 as u64));
    }
    Ok(entries)
}

/// For candle-nn: reads what a model asks for, and makes it of the type that it wants.
impl SimpleBackend for Stored {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        if let Some(got) = self.shape(name)
            && got != shape.dims()
        {
            let got = Shape::from(got);
            return Err(Error::UnexpectedShape { msg: format!("shape mismatch for {name}"), expected: shape, got }.bt());
        }
        self.get_unchecked(name, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.tensor(name, &Device::Cpu)?.to_dtype(dtype)?.to_device(device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}
