//! Saving over a checkpoint: whoever reads finds the old one or the new one, whenever the program that saves is stopped.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use rand::Rng;
use selective_scan::nn::{CheckpointFormat, FileFormat, LanguageModel, LanguageModelConfig, SaveOptions};

use super::super::{random, refusal};
use super::Folder;

/// A model all of whose numbers are its version's, in weights and configuration. The number of layers differs from one
/// version to the next but one, and so do the files.
fn version(version: usize) -> (LanguageModel, SaveOptions) {
    let mut config = LanguageModelConfig::new(64, 1 + version / 2 % 2, 16);
    config.backbone.norm_eps = version as f64 * 1e-6;
    let variables = candle_nn::VarMap::new();
    let build = || LanguageModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
    build();
    for variable in variables.all_vars() {
        variable.set(&Tensor::full(version as f32, variable.shape(), &Device::Cpu).unwrap()).unwrap();
    }
    let options = SaveOptions {
        file: if version % 5 == 4 { FileFormat::PyTorch } else { FileFormat::Safetensors },
        max_shard_size: (version % 3 == 2).then_some(6000),
        ..SaveOptions::new(CheckpointFormat::HuggingFace)
    };
    (build(), options)
}

fn save(folder: &Path, number: usize) -> Result<()> {
    let (model, options) = version(number);
    model.save_with(folder, &options)
}

/// Loads, and gives the version, which all parts must agree about.
#[track_caller]
fn load(folder: &Path) -> usize {
    let model = LanguageModel::load(folder, DType::F32, &Device::Cpu).unwrap();
    let number = (model.config().backbone.norm_eps * 1e6).round() as usize;
    assert_eq!(model.config().backbone.n_layer, 1 + number / 2 % 2);
    for (name, tensor) in model.named_tensors() {
        let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        assert!(values.iter().all(|&value| value == number as f32), "{name} of another version than {number}");
    }
    number
}

/// What a folder has after a version was saved and nothing else.
fn files(number: usize) -> Vec<String> {
    let folder = Folder::new(&format!("alone-{number}-{:?}", std::thread::current().id()));
    save(&folder.0, number).unwrap();
    folder.names()
}

const SAVES: &str = "SELECTIVE_SCAN_TEST_SAVES_TO";

/// This program again, with one of the tests that are other programs.
fn start(test: &str, folder: &Path, first: usize) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(SAVES, folder).env("FIRST", first.to_string());
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn asked() -> Option<(std::path::PathBuf, usize)> {
    Some((std::env::var_os(SAVES)?.into(), std::env::var("FIRST").ok()?.parse().ok()?))
}

/// No test but a program that saves until it is killed.
#[test]
fn program_that_saves() {
    if let Some((folder, first)) = asked() {
        for number in first.. {
            save(&folder, number).unwrap();
        }
    }
}

fn kill(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn killed_at_any_moment() {
    let (mut random, folder) = (random(), Folder::new("killed"));
    save(&folder.0, 1).unwrap();
    let mut last = 1;
    for _ in 0..30 {
        let mut child = start("nn::checkpoints::atomic::program_that_saves", &folder.0, last + 1).spawn().unwrap();
        // Until it has begun. It is killed at a moment of its own in every round.
        while load(&folder.0) == last {
            assert!(child.try_wait().unwrap().is_none(), "it has ended by itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(random.random_range(0..20_000)));
        kill(child);
        let found = load(&folder.0);
        assert!(found > last, "version {found} after {last}");
        last = found;
    }
    // What is left over of all this is gone after a save.
    save(&folder.0, last + 1).unwrap();
    assert_eq!((load(&folder.0), folder.names()), (last + 1, files(last + 1)));
}

/// The moments of a save one by one, made by hand: between any two of its steps, this crate finds one checkpoint, and
/// other programs find the old one, none, or the new one.
#[test]
fn killed_between_any_two_steps() {
    for (old, new) in [(1, 3), (2, 3), (3, 2), (2, 5), (1, 4), (4, 1), (1, 1)] {
        let (from, folder) = (Folder::new("step-new"), Folder::new("step-old"));
        save(&from.0, new).unwrap();
        let (from, names) = (&from.0, from.names());
        let steps = 2 * names.len() + files(old).len() + 4;
        for stop in 0..steps {
            fs::remove_dir_all(&folder.0).unwrap();
            save(&folder.0, old).unwrap();
            fs::write(folder.0.join("tokenizer.json"), "kept").unwrap();
            let mut left = stop;
            // Whether to stop before the next step.
            let mut step = || left.checked_sub(1).map(|rest| left = rest).is_some();
            let (part, whole) = (folder.0.join(".selective_scan.part"), folder.0.join(".selective_scan.new"));
            let mut expected = old;
            // All that a save does, to where it is stopped.
            let mut run = || {
                step().then_some(())?;
                fs::create_dir(&part).unwrap();
                for name in &names {
                    step().then_some(())?;
                    fs::copy(from.join(name), part.join(name)).unwrap();
                }
                step().then_some(())?;
                fs::write(part.join("files.json"), serde_json::to_string(&names).unwrap()).unwrap();
                step().then_some(())?;
                fs::rename(&part, &whole).unwrap();
                expected = new;
                step().then_some(())?;
                fs::remove_file(folder.0.join("config.json")).unwrap();
                let (config, weights) = names.split_first().unwrap();
                assert_eq!(config, "config.json");
                for name in weights {
                    step().then_some(())?;
                    fs::rename(whole.join(name), folder.0.join(name)).unwrap();
                }
                for name in files(old).iter().filter(|name| !names.contains(name)) {
                    step().then_some(())?;
                    fs::remove_file(folder.0.join(name)).unwrap();
                }
                step().then_some(())?;
                fs::rename(whole.join(config), folder.0.join(config)).unwrap();
                step().then_some(())?;
                fs::remove_file(whole.join("files.json")).unwrap();
                step().then_some(())
            };
            run();
            assert_eq!(load(&folder.0), expected, "{old} to {new}, stopped before step {stop}");
            // Others do not know of the two folders.
            let plain = Folder::new("step-plain");
            for name in folder.names().iter().filter(|name| !name.starts_with('.')) {
                fs::copy(folder.0.join(name), plain.0.join(name)).unwrap();
            }
            if plain.0.join("config.json").exists() {
                let found = load(&plain.0);
                assert!([old, new].contains(&found), "{old} to {new}, stopped before step {stop}: {found} for others");
            }
            // And the next save begins from there.
            save(&folder.0, 6).unwrap();
            assert_eq!(load(&folder.0), 6);
            let mut wanted = files(6);
            wanted.push("tokenizer.json".into());
            wanted.sort();
            assert_eq!(folder.names(), wanted, "{old} to {new}, stopped before step {stop}");
        }
    }
}

#[test]
fn a_reader_beside_a_writer() {
    let folder = Folder::new("beside");
    save(&folder.0, 1).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 2..=120 {
                save(&folder.0, number).unwrap();
            }
            done.store(true, Ordering::Release);
        });
        let (mut last, mut loads) = (1, 0);
        while !done.load(Ordering::Acquire) {
            let found = load(&folder.0);
            assert!(found >= last, "version {found} after {last}");
            (last, loads) = (found, loads + 1);
        }
        println!("{loads} loads beside 119 saves");
    });
    assert_eq!((load(&folder.0), folder.names()), (120, files(120)));
}

#[test]
fn two_writers_take_turns() {
    let folder = Folder::new("turns");
    std::thread::scope(|scope| {
        for first in [1, 100] {
            let folder = &folder.0;
            scope.spawn(move || (first..first + 20).for_each(|number| save(folder, number).unwrap()));
        }
    });
    let last = load(&folder.0);
    assert!([20, 119].contains(&last), "{last}");
    assert_eq!(folder.names(), files(last));
}

#[test]
fn an_error_changes_nothing() {
    let folder = Folder::new("error");
    save(&folder.0, 1).unwrap();
    // A folder where a file should go.
    fs::create_dir_all(folder.0.join("pytorch_model.bin/inside")).unwrap();
    let before = folder.names();
    let message = refusal(save(&folder.0, 4));
    assert!(message.contains("pytorch_model.bin"), "{message}");
    assert_eq!((load(&folder.0), folder.names()), (1, before));
    // A file where a folder should be; folders that were made for nothing are gone.
    fs::write(folder.0.join("file"), "").unwrap();
    assert!(refusal(save(&folder.0.join("file/deep"), 1)).contains("file"));
    let (model, _) = version(1);
    let bad = SaveOptions { max_shard_size: Some(0), ..SaveOptions::new(CheckpointFormat::HuggingFace) };
    refusal(model.save_with(folder.0.join("a/b/c"), &bad));
    refusal(model.save(folder.0.join("a/b/c"), CheckpointFormat::StateSpaces));
    assert!(!folder.0.join("a").exists());
}

#[cfg(unix)]
mod unix {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    /// No test but a program that must not be able to save.
    #[test]
    fn program_on_a_full_disk() {
        if let Some((folder, number)) = asked() {
            let message = refusal(save(&folder, number));
            assert!(message.contains(folder.file_name().unwrap().to_str().unwrap()), "{message}");
        }
    }

    /// A limit on the size of files ends a write as a full disk does, at every file of the checkpoint.
    #[test]
    fn a_full_disk_changes_nothing() {
        let folder = Folder::new("full");
        save(&folder.0, 1).unwrap();
        let before = folder.names();
        for (blocks, number) in [(0, 3), (1, 3), (1, 2), (4, 3), (4, 4), (9, 3), (9, 4)] {
            for target in [folder.0.clone(), folder.0.join("fresh/deep")] {
                let program = start("nn::checkpoints::atomic::unix::program_on_a_full_disk", &target, number);
                let mut shell = Command::new("sh");
                shell.args(["-c", r#"trap "" XFSZ; ulimit -f "$0"; exec "$@""#, &blocks.to_string()]);
                shell.arg(program.get_program()).args(program.get_args());
                shell.envs(program.get_envs().map(|(name, value)| (name, value.unwrap())));
                let output = shell.output().unwrap();
                assert!(
                    output.status.success(),
                    "{blocks} blocks, {number}: {}",
                    String::from_utf8_lossy(&output.stdout)
                );
                assert_eq!((load(&folder.0), folder.names()), (1, before.clone()), "{blocks} blocks, {number}");
            }
        }
    }

    #[test]
    fn files_are_for_whom_a_new_file_is() {
        let folder = Folder::new("mode");
        fs::write(folder.0.join("new"), "").unwrap();
        let mode = |name: &str| fs::metadata(folder.0.join(name)).unwrap().mode();
        for number in [1, 2, 4] {
            save(&folder.0, number).unwrap();
            for name in folder.names() {
                assert_eq!(mode(&name), mode("new"), "{name}");
            }
        }
    }

    /// A link to the folder leads to it. A link in the folder is a place in it: what it leads to is somebody else's, as
    /// in Hugging Face's cache.
    #[test]
    fn links() {
        let folder = Folder::new("links");
        let (run, latest) = (folder.0.join("run"), folder.0.join("latest"));
        save(&run, 1).unwrap();
        symlink("run", &latest).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::rename(run.join(name), folder.0.join(name)).unwrap();
            symlink(Path::new("..").join(name), run.join(name)).unwrap();
        }
        let before = ["config.json", "model.safetensors"].map(|name| fs::read(folder.0.join(name)).unwrap());
        assert_eq!(load(&latest), 1);
        save(&latest, 3).unwrap();
        assert_eq!((load(&latest), load(&run)), (3, 3));
        assert!(fs::symlink_metadata(&latest).unwrap().is_symlink());
        for (name, before) in ["config.json", "model.safetensors"].iter().zip(before) {
            assert!(fs::symlink_metadata(run.join(name)).unwrap().is_file(), "{name}");
            assert_eq!(fs::read(folder.0.join(name)).unwrap(), before, "{name}");
        }
    }
}
