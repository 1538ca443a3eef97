//! Compiles the kernels, one fatbin for each `kernels/*/*.cu`, if the feature `cuda` is on, and writes for Rust what the files
//! `params.cuh` there say that kernels take.
//!
//! A fatbin holds machine code for each architecture asked for, and PTX of the newest of them for later devices. The
//! architectures are those of `CUDA_COMPUTE_CAP` (`90`, or a list: `80,90`), else that of the GPU that `nvidia-smi` finds,
//! else 8.0, 8.9 and 9.0. nvcc is `NVCC`, or in `CUDA_HOME` or its like, on the `PATH`, or in `/usr/local/cuda`; it takes
//! more flags from `NVCC_PREPEND_FLAGS` and `NVCC_APPEND_FLAGS`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;
use std::{env, fs, thread};

#[path = "kernels/params.rs"]
mod params;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let variables = ["NVCC", "CUDA_COMPUTE_CAP", "DOCS_RS", "PATH"];
    for name in variables.iter().chain(&FLAG_VARIABLES).chain(&TOOLKIT_VARIABLES) {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=kernels");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut sources: Vec<_> =
        files("cu").into_iter().map(|path| Source { fatbin: fatbin(&out, &path), path }).collect();
    let params = params();
    write(&out.join("params.rs"), params.rust());
    for source in &sources {
        fs::create_dir_all(source.fatbin.parent().expect("it is in a folder")).expect("OUT_DIR is writable");
    }
    if env::var_os("DOCS_RS").is_some() {
        // Documentation needs the names of the kernels only.
        for Source { fatbin, .. } in &sources {
            fs::write(fatbin, []).expect("OUT_DIR is writable");
            // What is there now is not what the command of an earlier build made.
            let _ = fs::remove_file(fatbin.with_extension("command"));
        }
        return;
    }
    sources.push(checks(&out, &params));
    let build = Build { out, nvcc: find_nvcc(), flags: flags(&architectures()) };
    let threads = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..sources.len().min(threads) {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(message) = build.compile(source) {
                        let first = message.lines().next().unwrap_or_default();
                        println!("cargo:warning={}: {first}", source.path.display());
                        eprintln!("{message}");
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert!(failed.into_inner() == 0, "the CUDA kernels did not compile; nvcc's messages are above");
}

/// A source and what is made of it.
struct Source {
    path: PathBuf,
    fatbin: PathBuf,
}

/// The files with this extension in the folders of `kernels`, the longest first, so that none is left to compile alone at the
/// end.
fn files(extension: &str) -> Vec<PathBuf> {
    let list = |folder: &Path| fs::read_dir(folder).expect("it is a folder").map(|entry| entry.expect("a file").path());
    let folders: Vec<_> = list(Path::new("kernels")).filter(|path| path.is_dir()).collect();
    let mut files: Vec<_> = folders.iter().flat_map(|folder| list(folder)).collect();
    files.retain(|path| path.extension().is_some_and(|found| found == extension));
    files.sort_by_key(|path| (std::cmp::Reverse(fs::metadata(path).map(|file| file.len()).unwrap_or(0)), path.clone()));
    files
}

/// Where the fatbin of `kernels/<folder>/<name>.cu` goes: `<folder>/<name>.fatbin`.
fn fatbin(out: &Path, source: &Path) -> PathBuf {
    out.join(source.strip_prefix("kernels").expect("it is a kernel")).with_extension("fatbin")
}

/// What the files `params.cuh` declare, `common`'s first, which the others include.
fn params() -> params::Params {
    let mut sources: Vec<_> = files("cuh").into_iter().filter(|path| path.ends_with("params.cuh")).collect();
    sources.sort_by_key(|path| (!path.ends_with("common/params.cuh"), path.clone()));
    let mut params = params::Params::default();
    for path in sources {
        let text = fs::read_to_string(&path).expect("it is a text");
        params.read(&text).unwrap_or_else(|message| panic!("{}, {message}", path.display()));
    }
    params
}

/// A source of no kernel that includes every header, so that any kernel may include any of them together, and asserts that
/// what Rust takes the parameters' layout to be is what C++ has.
fn checks(out: &Path, params: &params::Params) -> Source {
    let root = env::current_dir().expect("cargo runs this in the package's folder");
    let mut headers = files("cuh");
    headers.sort();
    let include = |header: &PathBuf| format!("#include \"{}\"\n", root.join(header).display());
    let includes: String = headers.iter().map(include).collect();
    let path = out.join("checks.cu");
    write(&path, &format!("{includes}#include <stddef.h>\n\n{}", params.checks()));
    Source { fatbin: path.with_extension("fatbin"), path }
}

/// Writes a file, unless it has this text: then it keeps its time, and what was made of it need not be made again.
fn write(path: &Path, text: &str) {
    if !fs::read_to_string(path).is_ok_and(|old| old == text) {
        fs::write(path, text).expect("OUT_DIR is writable");
    }
}

/// What nvcc takes more flags from.
const FLAG_VARIABLES: [&str; 2] = ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"];

struct Build {
    out: PathBuf,
    nvcc: PathBuf,
    flags: Vec<String>,
}

impl Build {
    /// Compiles one source unless its fatbin is newer than all that it was made of, with the same command.
    fn compile(&self, Source { path, fatbin }: &Source) -> Result<(), String> {
        let (dependencies, stamp) = (fatbin.with_extension("d"), fatbin.with_extension("command"));
        let of_variables = FLAG_VARIABLES.map(|name| env::var(name).unwrap_or_default());
        // What it is run in counts too: several checkouts can share a folder of builds.
        let folder = env::current_dir().map_err(|error| error.to_string())?;
        let (nvcc, flags) = (self.nvcc.display(), self.flags.join(" "));
        let command = format!("{} {nvcc} {flags} {}", folder.display(), of_variables.join(" "));
        let is_current = |fatbin: &Path| {
            let old = fs::read_to_string(fatbin.with_extension("command"));
            old.is_ok_and(|old| old == command) && is_newer(fatbin, &fatbin.with_extension("d"))
        };
        if is_current(fatbin) {
            return Ok(());
        }
        // Were this left by a build that is stopped in the middle, half a fatbin would count as made.
        let _ = fs::remove_file(&stamp);
        // What this build has written itself it compiles itself: another one may have written something else.
        let is_shared = !path.starts_with(&self.out);
        if is_shared && self.elsewhere(fatbin).any(|made| is_current(&made) && take(&made, fatbin)) {
            return Ok(());
        }
        let output = Command::new(&self.nvcc)
            .args(&self.flags)
            .args(["-fatbin", "-MD", "-MF"])
            .arg(&dependencies)
            .arg("-o")
            .arg(fatbin)
            .arg(path)
            .output()
            .map_err(|error| format!("{} does not start: {error}", self.nvcc.display()))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned());
        }
        // What ptxas says of registers and spills, for `kernels/budget`.
        fs::write(fatbin.with_extension("log"), output.stderr)
            .and_then(|()| fs::write(stamp, command))
            .map_err(|error| error.to_string())
    }

    /// Where builds in other profiles or with other features, which have nothing to do with kernels, put the same fatbin:
    /// cargo has a folder `<target>/<profile>/build/<package>-<hash>/out` for each.
    fn elsewhere(&self, fatbin: &Path) -> impl Iterator<Item = PathBuf> {
        let name = fatbin.strip_prefix(&self.out).expect("it is made there").to_owned();
        let folders = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
        let target = self.out.ancestors().nth(4).unwrap_or(&self.out).to_owned();
        let builds = folders(target).flat_map(move |profile| folders(profile.join("build")));
        let is_ours = |build: &PathBuf| {
            let file = build.file_name().unwrap_or_default().to_string_lossy();
            file.starts_with(concat!(env!("CARGO_PKG_NAME"), "-"))
        };
        let outs = builds.filter(is_ours).map(|build| build.join("out"));
        outs.filter(|out| *out != self.out).map(move |out| out.join(&name))
    }
}

/// Copies a fatbin with what was written about it; says whether all of that is there.
fn take(made: &Path, fatbin: &Path) -> bool {
    // Their stamp last, as it says that the others are whole.
    ["fatbin", "d", "log", "command"]
        .iter()
        .all(|extension| fs::copy(made.with_extension(extension), fatbin.with_extension(extension)).is_ok())
}

/// Whether `file` is newer than all that the make rule in `dependencies` names.
fn is_newer(file: &Path, dependencies: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    let Ok(rule) = fs::read_to_string(dependencies) else { return false };
    let (made, rule) = (time(file), rule.replace("\\\n", " "));
    let named = rule.split_once(": ").map_or("", |(_, named)| named);
    !named.is_empty()
        && named.split_whitespace().all(|path| fs::exists(path).unwrap_or(false) && time(Path::new(path)) < made)
}

fn flags(architectures: &[u32]) -> Vec<String> {
    // Without contraction the kernels say themselves where they round, so that variants of one give the same bits.
    let mut flags: Vec<_> = ["-O3", "-std=c++17", "-fmad=false", "-lineinfo", "-Xptxas=-v"].map(String::from).into();
    for arch in architectures {
        flags.push(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    let newest = architectures.iter().max().expect("at least one architecture");
    flags.push(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
    flags
}

fn architectures() -> Vec<u32> {
    if let Ok(list) = env::var("CUDA_COMPUTE_CAP") {
        let parsed: Option<Vec<_>> = list
            .split([',', ';', ' '])
            .filter(|part| !part.is_empty())
            .map(|part| part.replace('.', "").parse().ok())
            .collect();
        match parsed {
            Some(architectures) if !architectures.is_empty() => return architectures,
            _ => panic!("CUDA_COMPUTE_CAP: expected compute capabilities such as `90` or `80,90`, got `{list}`"),
        }
    }
    let found = Command::new("nvidia-smi").args(["--query-gpu=compute_cap", "--format=csv,noheader"]).output();
    let text = found.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let mut architectures: Vec<u32> =
        text.lines().filter_map(|line| line.trim().replace('.', "").parse().ok()).collect();
    architectures.sort_unstable();
    architectures.dedup();
    if architectures.is_empty() { vec![80, 89, 90] } else { architectures }
}

const TOOLKIT_VARIABLES: [&str; 4] = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_ROOT_DIR"];

fn find_nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let name = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };
    let toolkits = TOOLKIT_VARIABLES.iter().filter_map(env::var_os).map(|root| PathBuf::from(root).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let found = toolkits
        .chain(env::split_paths(&path))
        .chain([PathBuf::from("/usr/local/cuda/bin")])
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "the feature `cuda` of selective-scan compiles its kernels with nvcc, which was not found: install the CUDA \
             toolkit (12.4 or newer), and set CUDA_HOME to it or put nvcc on the PATH"
        )
    })
}
