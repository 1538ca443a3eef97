//! PyTorch's files: an archive without compression, in which each tensor's elements are a member, and a program for Python's
//! `pickle` says which tensors there are.
//!
//! The program is run by candle's reader, which knows only the few objects that a table of tensors is made of. What it
//! leaves is taken apart here, where every part is checked and a message can name the tensor.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::pickle::{Object, Stack};
use candle_core::{DType, Error, Result, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use super::stored::{Entry, dense_strides};

/// The storage classes of PyTorch.
const STORAGES: [(&str, DType); 8] = [
    ("FloatStorage", DType::F32),
    ("HalfStorage", DType::F16),
    ("BFloat16Storage", DType::BF16),
    ("DoubleStorage", DType::F64),
    ("ByteStorage", DType::U8),
    ("ShortStorage", DType::I16),
    ("IntStorage", DType::I32),
    ("LongStorage", DType::I64),
];

/// What a file has.
pub(super) fn entries(archive: &mut ZipArchive<File>, file: usize) -> Result<Vec<Entry>> {
    let names: Vec<String> = archive.file_names().filter_map(|name| Some(name.ok()?.into_owned())).collect();
    let program = names.iter().find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"));
    let program = program.ok_or_else(|| Error::msg("no file of PyTorch's: it has no `data.pkl`"))?;
    let root = program.strip_suffix("data.pkl").unwrap_or_default();
    if let Ok(mut order) = archive.by_name(&format!("{root}byteorder")) {
        let order = std::io::read_to_string(&mut order)?;
        if order.trim() != "little" {
            return Err(Error::msg(format_args!("expected little-endian numbers, got {order}")));
        }
    }
    let mut stack = Stack::empty();
    {
        let mut reader = BufReader::new(archive.by_name(program).map_err(Error::wrap)?);
        // candle's reader trusts a few lengths; a file that lies about them is an error too.
        catch_unwind(AssertUnwindSafe(|| stack.read_loop(&mut reader)))
            .map_err(|_| Error::msg("`data.pkl` is no table of tensors"))??;
    }
    let Object::Dict(items) = stack.finalize()? else {
        return Err(Error::msg("expected a table of tensors by name, as a `state_dict` is, got something else"));
    };
    let mut entries = Vec::new();
    for (name, value) in items {
        let Object::Unicode(name) = name else { continue };
        let Some(rebuilt) = tensor(value) else { continue };
        let entry = rebuilt.entry(archive, root, file, &name);
        entries.push(entry.map_err(|error| Error::msg(format_args!("`{name}`: {error}")))?);
    }
    if entries.is_empty() {
        return Err(Error::msg("there is no tensor in it, at the top of the table"));
    }
    Ok(entries)
}

/// The arguments by which PyTorch rebuilds a tensor.
struct Rebuilt(Vec<Object>);

/// A tensor or a parameter; `None` is something else, of which a table may have a few.
fn tensor(value: Object) -> Option<Rebuilt> {
    let Object::Reduce { callable, args } = value else { return None };
    let (Object::Class { class_name, .. }, Object::Tuple(mut args)) = (*callable, *args) else { return None };
    match class_name.as_str() {
        "_rebuild_tensor_v2" => Some(Rebuilt(args)),
        "_rebuild_parameter" if !args.is_empty() => tensor(args.swap_remove(0)),
        // (function, class, arguments, state)
        "_rebuild_from_type_v2" if args.len() > 2 => {
            let (args, callable) = (Box::new(args.swap_remove(2)), Box::new(args.swap_remove(0)));
            tensor(Object::Reduce { callable, args })
        }
        _ => None,
    }
}

impl Rebuilt {
    fn entry(self, archive: &mut ZipArchive<File>, root: &str, file: usize, name: &str) -> Result<Entry> {
        let unknown = || Error::msg("expected a tensor as PyTorch writes it, got something else");
        let [storage, offset, shape, strides] = self.0.get(..4).ok_or_else(unknown)? else { return Err(unknown()) };
        let Object::PersistentLoad(storage) = storage else { return Err(unknown()) };
        let Object::Tuple(storage) = &**storage else { return Err(unknown()) };
        let [_, Object::Class { class_name, .. }, Object::Unicode(key), ..] = &storage[..] else {
            return Err(unknown());
        };
        let dtype = STORAGES.iter().find(|(class, _)| class == class_name).map(|&(_, dtype)| dtype);
        let dtype = dtype
            .ok_or_else(|| Error::msg(format_args!("expected f32, f16, bf16 or f64, got numbers of a {class_name}")))?;
        let number = |object: &Object| match *object {
            Object::Int(number) => usize::try_from(number).ok(),
            Object::Long(number) => usize::try_from(number).ok(),
            _ => None,
        };
        let numbers = |object: &Object| match object {
            Object::Tuple(objects) => objects.iter().map(number).collect::<Option<Vec<_>>>(),
            _ => None,
        };
        let (Some(offset), Some(shape), Some(strides)) = (number(offset), numbers(shape), numbers(strides)) else {
            return Err(unknown());
        };
        let path = format!("{root}data/{key}");
        let missing = || Error::msg(format_args!("its numbers should be in `{path}`, which is not there"));
        let member = archive.index_for_name(&path).ok_or_else(missing)?;
        let size = archive.by_index_raw(member).map_err(Error::wrap)?.size();
        let width = dtype.size_in_bytes();
        let mut entry = Entry::dense(file, name.into(), dtype, shape, 0);
        if strides.len() != entry.shape.len() {
            return Err(unknown());
        }
        entry.strides = strides;
        entry.member = member;
        let end = entry.span().and_then(|span| span.checked_add(offset)?.checked_mul(width));
        // A stride of zero repeats an element; that many are not worth reading.
        let count = entry.shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
        match (end, count) {
            (Some(end), Some(count))
                if end as u64 <= size && count <= (size as usize / width).saturating_mul(1 << 10) =>
            {
                entry.offset = (offset * width) as u64;
                Ok(entry)
            }
            _ => Err(Error::msg(format_args!("shape {:?} does not fit {size} bytes of `{path}`", entry.shape))),
        }
    }
}

/// Writes a file that `torch.load` reads as a table of tensors, `weights_only` too.
pub(super) fn write(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut archive = ZipWriter::new(BufWriter::new(File::create(path)?));
    // PyTorch reads tensors where they lie, and wants them at multiples of 64 bytes.
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored).with_alignment(64);
    let mut member = |name: &str, size: usize, write: &mut dyn FnMut(&mut dyn Write) -> std::io::Result<()>| {
        // Above this, sizes need the form of the archive that old programs do not know.
        let options = options.large_file(size >= u32::MAX as usize);
        archive.start_file(format!("archive/{name}"), options).map_err(Error::wrap)?;
        Ok::<_, Error>(write(&mut archive)?)
    };
    let program = program(tensors)?;
    member("data.pkl", program.len(), &mut |to| to.write_all(&program))?;
    member("byteorder", 6, &mut |to| to.write_all(b"little"))?;
    for (key, (_, tensor)) in tensors.iter().enumerate() {
        let size = tensor.elem_count() * tensor.dtype().size_in_bytes();
        let view: &dyn safetensors::View = &tensor;
        member(&format!("data/{key}"), size, &mut |to| to.write_all(&view.data()))?;
    }
    member("version", 2, &mut |to| to.write_all(b"3\n"))?;
    archive.finish().map_err(Error::wrap)?.flush()?;
    Ok(())
}

/// The program, in version 2 of pickle's language.
fn program(tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    const ORDERED_DICT: &[u8] = b"ccollections\nOrderedDict\n)R";
    let mut to = vec![0x80, 2];
    to.extend(ORDERED_DICT);
    to.push(b'(');
    for (key, (name, tensor)) in tensors.iter().enumerate() {
        let class = STORAGES.iter().find(|(_, dtype)| *dtype == tensor.dtype()).map(|(class, _)| class);
        let class = class.ok_or_else(|| {
            Error::msg(format_args!("`{name}`: PyTorch has no numbers of type {}", tensor.dtype().as_str()))
        })?;
        text(&mut to, name);
        to.extend(b"ctorch._utils\n_rebuild_tensor_v2\n(");
        // The storage: ("storage", class, key, device, elements).
        to.push(b'(');
        text(&mut to, "storage");
        to.extend(format!("ctorch\n{class}\n").as_bytes());
        text(&mut to, &key.to_string());
        text(&mut to, "cpu");
        number(&mut to, tensor.elem_count());
        to.extend(b"tQ");
        // The offset, shape and strides, no gradient, no hooks.
        number(&mut to, 0);
        for numbers in [tensor.dims(), &dense_strides(tensor.dims())] {
            to.push(b'(');
            numbers.iter().for_each(|&size| number(&mut to, size));
            to.push(b't');
        }
        to.push(0x89);
        to.extend(ORDERED_DICT);
        to.extend(b"tR");
    }
    to.extend(b"u.");
    Ok(to)
}

fn text(to: &mut Vec<u8>, text: &str) {
    to.push(b'X');
    to.extend((text.len() as u32).to_le_bytes());
    to.extend(text.as_bytes());
}

fn number(to: &mut Vec<u8>, number: usize) {
    match i32::try_from(number) {
        Ok(number) => {
            to.push(b'J');
            to.extend(number.to_le_bytes());
        }
        Err(_) => {
            // Two's complement: no size has the sign bit.
            to.extend([0x8a, 8]);
            to.extend((number as u64).to_le_bytes());
        }
    }
}
