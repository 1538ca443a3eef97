//! A folder whose files change all at once.
//!
//! A checkpoint is several files under names that other programs expect, and a file system renames one at a time. So new
//! files are written into a folder of their own inside, [`UNFINISHED`], with a list of them. Renaming that to [`COMMITTED`]
//! is the moment at which the new checkpoint replaces the old one: from then on, [`read`] takes what the list names from
//! there. After that the files are moved to their names one by one, and the list goes last. Where a program is killed
//! between, the next one that writes goes on with moving; nothing has to be repaired for reading.
//!
//! Programs that know nothing of the list see the old files, or the new ones. While files are moved, which is a few renames
//! without any waiting, there is no `config.json` for them, so that what they find is refused rather than mixed; that
//! there always is one if only one file of weights changes and the configuration is the same.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use candle_core::Result;

use super::at;

/// Always there, and moved last: who has opened it knows which checkpoint it is.
pub(super) const CONFIG: &str = "config.json";
const UNFINISHED: &str = ".selective_scan.part";
const COMMITTED: &str = ".selective_scan.new";
const LIST: &str = "files.json";

/// How often a folder is read again because it was written meanwhile. A save takes much longer than opening files.
const ATTEMPTS: u64 = 200;

/// A folder as it was at one moment, unless [`Snapshot::is_current`] says that it has changed.
pub(super) struct Snapshot {
    folder: PathBuf,
    /// Held open, so that no other file gets its number.
    list: Option<(File, BTreeSet<String>)>,
    config: Option<File>,
}

/// Calls `read` with a folder's files, again where they were replaced meanwhile: what it opens belongs together.
pub(super) fn read<T>(folder: &Path, read: impl Fn(&Snapshot) -> Result<T>) -> Result<T> {
    // A link to the folder may be changed while this reads.
    let folder = fs::canonicalize(folder).map_err(|error| at(folder, error))?;
    for attempt in 0..ATTEMPTS {
        thread::sleep(Duration::from_micros(50 * attempt));
        let snapshot = Snapshot::take(&folder)?;
        let result = read(&snapshot);
        if snapshot.is_current()? {
            return result;
        }
    }
    Err(at(&folder, "other programs write to it all the time"))
}

impl Snapshot {
    fn take(folder: &Path) -> Result<Self> {
        let mut snapshot = Self { folder: folder.into(), list: None, config: None };
        snapshot.list = read_list(&folder.join(COMMITTED))?;
        snapshot.config = snapshot.open(CONFIG)?.map(|(file, _)| file);
        Ok(snapshot)
    }

    /// Opens a file of the checkpoint, if it has one of this name; with its path, for messages.
    pub fn open(&self, name: &str) -> Result<Option<(File, PathBuf)>> {
        if let Some((_, names)) = &self.list {
            if !names.contains(name) {
                return Ok(None);
            }
            let path = self.folder.join(COMMITTED).join(name);
            if let Some(file) = open(&path)? {
                return Ok(Some((file, path)));
            }
        }
        let path = self.folder.join(name);
        Ok(open(&path)?.map(|file| (file, path)))
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The text of a file.
    pub fn read(&self, name: &str) -> Result<Option<String>> {
        let Some((mut file, path)) = self.open(name)? else { return Ok(None) };
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(|error| at(&path, error))?;
        Ok(Some(text))
    }

    /// Whether what has been opened since the beginning belongs together. It does if the list and the configuration are
    /// still the same files: every save replaces the configuration, after all else, and there is a list until then.
    fn is_current(&self) -> Result<bool> {
        let now = Self::take(&self.folder)?;
        let list = |snapshot: &Self| snapshot.list.as_ref().map(|(file, _)| identity(file)).transpose();
        let config = |snapshot: &Self| snapshot.config.as_ref().map(identity).transpose();
        let same = || Ok::<_, std::io::Error>(list(self)? == list(&now)? && config(self)? == config(&now)?);
        same().map_err(|error| at(&self.folder, error))
    }
}

fn open(path: &Path) -> Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(at(path, error)),
    }
}

/// The list in a folder of files that are to be moved, if it has one.
fn read_list(folder: &Path) -> Result<Option<(File, BTreeSet<String>)>> {
    let path = folder.join(LIST);
    let Some(mut file) = open(&path)? else { return Ok(None) };
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|error| at(&path, error))?;
    let names: BTreeSet<String> = serde_json::from_str(&text).map_err(|error| at(&path, error))?;
    match names.iter().find(|name| !is_plain(name)) {
        None => Ok(Some((file, names))),
        Some(name) => Err(at(&path, format_args!("`{name}` is no file beside it"))),
    }
}

/// Whether a name has no folder in it, which would lead elsewhere.
pub(super) fn is_plain(name: &str) -> bool {
    Path::new(name).file_name() == Some(name.as_ref())
}

/// What tells an open file from others. It is never given to another file as long as this one is open.
fn identity(file: &File) -> std::io::Result<impl PartialEq + use<>> {
    Ok(identify(&file.metadata()?))
}

#[cfg(unix)]
fn identify(metadata: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.dev(), metadata.ino())
}

#[cfg(not(unix))]
fn identify(metadata: &Metadata) -> (u64, Option<std::time::SystemTime>) {
    (metadata.len(), metadata.modified().ok())
}

/// Replaces a folder's checkpoint by the files that `fill` writes into the folder that it gets, `config.json` among them.
/// Other files stay, but for the names that `is_replaced` says are of the old checkpoint.
///
/// On an error before the new files are complete the old ones stay, and nothing is left of the new.
pub(super) fn write(
    folder: &Path,
    fill: impl FnOnce(&Path) -> Result<()>,
    is_replaced: impl Fn(&str) -> bool,
) -> Result<()> {
    let made = Made::folders(folder)?;
    let result = replace(folder, fill, &is_replaced);
    if result.is_err() {
        made.remove();
    }
    result
}

fn replace(folder: &Path, fill: impl FnOnce(&Path) -> Result<()>, is_replaced: &impl Fn(&str) -> bool) -> Result<()> {
    let folder = &fs::canonicalize(folder).map_err(|error| at(folder, error))?;
    let _lock = lock(folder)?;
    // What a program that was killed has left: complete files are moved, others removed.
    publish(folder, is_replaced)?;
    let unfinished = folder.join(UNFINISHED);
    remove(&unfinished)?;
    if let Err(error) = prepare(folder, &unfinished, fill) {
        // The first error is the one to be told of.
        let _ = remove(&unfinished);
        return Err(error);
    }
    publish(folder, is_replaced)
}

/// Folders that were not there.
struct Made(Vec<PathBuf>);

impl Made {
    fn folders(folder: &Path) -> Result<Self> {
        let mut missing = Vec::new();
        let mut next = Some(folder);
        while let Some(path) = next.filter(|path| !path.as_os_str().is_empty() && !path.exists()) {
            missing.push(path.to_path_buf());
            next = path.parent();
        }
        let made = Self(missing);
        if let Err(error) = fs::create_dir_all(folder) {
            made.remove();
            return Err(at(folder, error));
        }
        for path in &made.0 {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            sync(parent)?;
        }
        Ok(made)
    }

    /// Removes them again, if nobody has put anything there.
    fn remove(&self) {
        for path in &self.0 {
            if fs::remove_dir(path).is_err() {
                break;
            }
        }
    }
}

/// Lets one program at a time write to a folder: the next one waits. Where there is no such lock, it goes on without.
fn lock(folder: &Path) -> Result<Option<File>> {
    if !cfg!(unix) {
        return Ok(None);
    }
    let handle = File::open(folder).map_err(|error| at(folder, error))?;
    match handle.lock() {
        Ok(()) => Ok(Some(handle)),
        // Some file systems have no locks, each with an error of its own.
        Err(_) => Ok(None),
    }
}

/// Writes all new files, and commits to them.
fn prepare(folder: &Path, unfinished: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    fs::create_dir(unfinished).map_err(|error| at(unfinished, error))?;
    fill(unfinished)?;
    let names = names(unfinished)?;
    if let Some(name) = names.iter().find(|name| folder.join(name).is_dir()) {
        return Err(at(&folder.join(name), "a file is to be written there, but it is a folder"));
    }
    let list = unfinished.join(LIST);
    let text = serde_json::to_string(&names).map_err(|error| at(&list, error))?;
    fs::write(&list, text).map_err(|error| at(&list, error))?;
    // Some writers make files that are for their owner alone. These are for whom a new file is.
    let permissions = fs::metadata(&list).map_err(|error| at(&list, error))?.permissions();
    for name in names.iter().map(String::as_str).chain([LIST]) {
        let path = unfinished.join(name);
        let finish = || {
            fs::set_permissions(&path, permissions.clone())?;
            File::open(&path)?.sync_all()
        };
        finish().map_err(|error| at(&path, error))?;
    }
    sync(unfinished)?;
    let committed = folder.join(COMMITTED);
    // Only an empty one can be there, see `publish`.
    remove(&committed)?;
    fs::rename(unfinished, &committed).map_err(|error| at(&committed, error))?;
    sync(folder)
}

/// Moves committed files to their names, and removes the list of them.
fn publish(folder: &Path, is_replaced: &impl Fn(&str) -> bool) -> Result<()> {
    let committed = folder.join(COMMITTED);
    let Some((_, mut list)) = read_list(&committed)? else {
        return remove(&committed);
    };
    list.remove(CONFIG);
    let mut old = names(folder)?;
    old.retain(|name| is_replaced(name) && !list.contains(name));
    let (new_config, config) = (committed.join(CONFIG), folder.join(CONFIG));
    // Where a program was killed in this function, the new configuration may be in its place already.
    if let Some(new) = bytes(&new_config)? {
        let weights = list.iter().filter(|name| is_replaced(name)).count();
        if !(weights == 1 && old.is_empty() && bytes(&config)?.as_ref() == Some(&new)) {
            remove(&config)?;
        }
    }
    for name in &list {
        take(&committed.join(name), &folder.join(name))?;
    }
    for name in &old {
        remove(&folder.join(name))?;
    }
    take(&new_config, &config)?;
    sync(folder)?;
    remove(&committed.join(LIST))?;
    remove(&committed)
}

fn bytes(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(path, error)),
    }
}

/// Moves a file in the place of another, unless that has been done.
fn take(from: &Path, to: &Path) -> Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(at(to, error)),
        _ => Ok(()),
    }
}

/// The names of a folder's files.
fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    let entries = entries.map_err(|error| at(folder, error))?;
    // No name of a checkpoint's file is other than text.
    let names = entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter(|name| !folder.join(name).is_dir()).collect())
}

/// Removes a file or a folder, if there is one.
fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(at(path, error)),
        _ => Ok(()),
    }
}

/// Has the names in a folder survive a loss of power.
fn sync(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder).and_then(|file| file.sync_all()).map_err(|error: std::io::Error| at(folder, error))?;
    }
    Ok(())
}
