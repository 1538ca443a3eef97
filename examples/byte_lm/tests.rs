//! That a run goes on exactly where it stopped, that nothing held out is learnt from, and that the baseline is a model.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use clap::Parser;
use selective_scan::nn::LanguageModel;
use selective_scan::nn::train::RunFolder;

use crate::data::{Corpus, MARK, Position, Windows};
use crate::ngram::Ngram;
use crate::train::Training;
use crate::{Arguments, RunOptions, TrainArguments, checkpoint};

/// A folder that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("byte_lm-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What cannot be removed is of no use to a test.
        _ = fs::remove_dir_all(&self.0);
    }
}

fn arguments(line: &str, out: &Path) -> TrainArguments {
    let line = ["byte_lm", "--out", out.to_str().unwrap()].into_iter().chain(line.split_whitespace());
    Arguments::parse_from(line).train
}

/// Pieces of words, each its own and in no other, in which there is something to learn.
fn pieces() -> Vec<Vec<u8>> {
    let word = |i: usize| format!("word{} ", (i * i) % 17);
    let piece = |piece: usize| (0..40).map(|i| word(piece + i)).collect::<String>() + &format!("{piece}.");
    (0..20).map(|i| piece(i).into_bytes()).collect()
}

/// Trains until the arguments say, and gives what the newest checkpoint then has: all files but for the time that the
/// steps took.
fn train(arguments: &TrainArguments, corpus: &Corpus) -> (checkpoint::Run, Vec<Vec<u8>>) {
    let mut training = Training::open(arguments, &Device::Cpu).unwrap();
    training.check(corpus).unwrap();
    training.train(arguments, corpus, &Device::Cpu, 2.0).unwrap();
    let newest = RunFolder::newest(&arguments.out).unwrap().unwrap();
    let run = checkpoint::Run { seconds: 0.0, ..checkpoint::read_run(&newest).unwrap() };
    (run, ["model.safetensors", "moments.safetensors"].map(|file| fs::read(newest.join(file)).unwrap()).into())
}

const SMALL: &str = "--layers 2 --d-model 16 --batch 3 --length 24 --steps 120 --warmup 10 --evaluate-every 25";

#[test]
fn a_resumed_run_has_the_bits_of_one_that_did_not_stop() {
    let (at_once, in_parts) = (Folder::new("at-once"), Folder::new("in-parts"));
    let corpus = Corpus::divide(pieces(), 0.2, 0).unwrap();
    let (whole, whole_files) = train(&arguments(SMALL, &at_once.0), &corpus);
    // The text is gone through more than once, so that an epoch's order must be found again too.
    assert!(whole.position.epoch > 0 && whole.step == 120);

    // Stops that fit neither the points of the curves nor the looks at the held-out text.
    train(&arguments(&format!("{SMALL} --until 37"), &in_parts.0), &corpus);
    // What a process has left that was killed at its next checkpoint, or while it removed one.
    for left in ["step-50.part", "step-2.part"] {
        fs::create_dir(in_parts.0.join(left)).unwrap();
        fs::write(in_parts.0.join(left).join("model.safetensors"), "half").unwrap();
    }
    let (half, half_files) = train(&arguments("--resume --until 90", &in_parts.0), &corpus);
    assert_eq!(half.step, 90);
    assert_ne!(half_files, whole_files);
    let (resumed, resumed_files) = train(&arguments("--resume", &in_parts.0), &corpus);
    assert_eq!(resumed, whole);
    assert!(resumed_files == whole_files, "weights or moments differ");
    let names: Vec<_> = fs::read_dir(&in_parts.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_str().unwrap().ends_with(".part")), "{names:?}");
    // And something was learnt on the way.
    let held_out = &whole.curves.held_out;
    assert!(held_out.last().unwrap().1 < held_out[0].1, "{held_out:?}");
}

#[test]
fn a_run_is_neither_lost_nor_resumed_with_another_text() {
    let folder = Folder::new("neither-lost");
    let corpus = Corpus::divide(pieces(), 0.2, 0).unwrap();
    train(&arguments(&format!("{SMALL} --until 1"), &folder.0), &corpus);
    let begin = Training::open(&arguments(SMALL, &folder.0), &Device::Cpu).err().unwrap().to_string();
    assert!(begin.contains("--fresh"), "{begin}");
    let other = Corpus::divide(pieces(), 0.2, 1).unwrap();
    let mut training = Training::open(&arguments("--resume", &folder.0), &Device::Cpu).unwrap();
    assert!(training.check(&other).is_err());
    assert!(Arguments::try_parse_from(["byte_lm", "--resume", "--d-model", "16"]).is_err());
}

#[test]
fn the_checkpoint_is_a_model_that_loads() {
    let folder = Folder::new("loads");
    let corpus = Corpus::divide(pieces(), 0.2, 0).unwrap();
    train(&arguments(&format!("{SMALL} --until 2"), &folder.0), &corpus);
    let newest = RunFolder::newest(&folder.0).unwrap().unwrap();
    assert_eq!(LanguageModel::load(newest, DType::F32, &Device::Cpu).unwrap().config().vocab_size, 256);
}

#[test]
fn no_held_out_piece_is_learnt_from() {
    let mut all = pieces();
    all.extend(pieces());
    let contains = |text: &[u8], piece: &[u8]| text.windows(piece.len()).any(|window| window == piece);
    for seed in 0..10 {
        let corpus = Corpus::divide(all.clone(), 0.3, seed).unwrap();
        let count: usize = pieces().iter().map(|piece| piece.len() + 1).sum();
        assert_eq!(corpus.train.len() + corpus.held_out.iter().map(Vec::len).sum::<usize>(), count);
        assert!(corpus.held_out.iter().all(|piece| piece[0] == MARK && !contains(&corpus.train, &piece[1..])));
        assert_eq!(corpus.fingerprint, Corpus::divide(all.clone(), 0.3, seed).unwrap().fingerprint);
        assert_ne!(corpus.fingerprint, Corpus::divide(all.clone(), 0.3, seed + 1).unwrap().fingerprint);
    }
}

#[test]
fn an_epoch_predicts_each_byte_at_most_once_and_most_of_them() {
    // Bytes by which a window's place is known.
    let text: Vec<u8> = (1..=250).collect();
    let mut windows = Windows::new(&text, 8, 3, Position::default()).unwrap();
    let mut orders = Vec::new();
    for epoch in 0..3 {
        let mut predicted = Vec::new();
        loop {
            let (ids, targets) = windows.next(1);
            if windows.position().epoch != epoch {
                windows = Windows::new(&text, 8, 3, Position { epoch: epoch + 1, windows: 0 }).unwrap();
                break;
            }
            assert!(ids.iter().zip(&targets).all(|(id, target)| id + 1 == *target));
            predicted.extend(targets);
        }
        orders.push(predicted.clone());
        predicted.sort_unstable();
        let count = predicted.len();
        predicted.dedup();
        assert!(predicted.len() == count && count > 250 - 2 * 8, "{count}");
    }
    assert!(orders[0] != orders[1] && orders[1] != orders[2]);
}

#[test]
fn the_probabilities_of_the_baseline_sum_to_one() {
    let corpus = Corpus::divide(pieces(), 0.2, 0).unwrap();
    for order in 0..=4 {
        let model = Ngram::new(&corpus.train, order);
        // Histories seen often, at the beginning of a piece, in part, and never.
        for history in ["word1", "word", "", "w", "zzord", "???"] {
            let history = history.bytes().fold(0, |history, byte| history << 8 | u64::from(byte));
            let sum: f64 = (0..=255).map(|byte| model.probability(history, byte)).sum();
            // 256 terms, each rounded a few times.
            assert!((sum - 1.0).abs() < 1e-12, "order {order}: {sum}");
        }
    }
}

#[test]
fn the_baseline_knows_what_it_has_counted() {
    // One byte after another, always: longer histories make it surer.
    let text = [&[MARK][..], &b"abc".repeat(200)].concat();
    let bits = [0, 1, 2].map(|order| Ngram::new(&text, order).bits_per_byte(std::slice::from_ref(&text)));
    // Three bytes that are equally likely take log2(3) bits; some of the probability goes to others.
    assert!(bits[0] > 1.58 && bits[0] < 1.8 && bits[1] < 0.2 && bits[2] < 0.2, "{bits:?}");
    // Two to one, by hand: of 3 bytes after the mark's history, 2 are a.
    let text = [MARK, b'a', MARK, b'a', MARK, b'b'];
    let model = Ngram::new(&text, 1);
    // Order 0 counts the different bytes before: 1 each, so that D is 1 / (1 + 2·0) = 1, and 1/256 is left of it.
    // Order 1 has one pair seen once and one seen twice, so that D is 1 / (1 + 2).
    let expected = (2.0 - 1.0 / 3.0) / 3.0 + (2.0 / 3.0) / 3.0 / 256.0;
    assert!((model.probability(0, b'a') - expected).abs() < 1e-12);
}

#[test]
fn one_process_trains_in_a_folder() {
    let folder = Folder::new("locked");
    let first = Training::open(&arguments(SMALL, &folder.0), &Device::Cpu).unwrap();
    for line in [SMALL.to_string(), format!("{SMALL} --fresh"), "--resume".into()] {
        let message = Training::open(&arguments(&line, &folder.0), &Device::Cpu).err().unwrap().to_string();
        assert!(message.contains("another process"), "{message}");
    }
    drop(first);
    Training::open(&arguments(SMALL, &folder.0), &Device::Cpu).unwrap();
}

/// A file that was edited is no way around the checks of the command line.
#[test]
fn a_resumed_run_is_checked_as_the_command_line() {
    let folder = Folder::new("edited");
    let corpus = Corpus::divide(pieces(), 0.2, 0).unwrap();
    train(&arguments(&format!("{SMALL} --until 1"), &folder.0), &corpus);
    let path = RunFolder::newest(&folder.0).unwrap().unwrap().join("run.json");
    let text = fs::read_to_string(&path).unwrap();
    for (from, to, word) in [
        (r#""clip": 1.0"#, r#""clip": -1"#, "clip"),
        (r#""weight_decay": 0.1"#, r#""weight_decay": -0.1"#, "weight_decay"),
        (r#""learning_rate": 0.003"#, r#""learning_rate": 0"#, "learning_rate"),
        (r#""held_out": 0.1"#, r#""held_out": 1"#, "held_out"),
        (r#""batch": 3"#, r#""batch": 0"#, "nonzero"),
        (r#""layers": 2"#, r#""layers": 3"#, "another model"),
    ] {
        let edited = text.replace(from, to);
        assert_ne!(text, edited, "{from}");
        fs::write(&path, edited).unwrap();
        let message = Training::open(&arguments("--resume", &folder.0), &Device::Cpu).err().unwrap().to_string();
        assert!(message.contains(word), "{message}");
    }
    fs::write(&path, text).unwrap();
    Training::open(&arguments("--resume", &folder.0), &Device::Cpu).unwrap();
}

/// Sizes that no text has are an error, not an end of the program.
#[test]
fn absurd_sizes_are_refused() {
    let corpus = Corpus::divide(pieces(), 0.2, 0).unwrap();
    for size in
        ["--length 9223372036854775808", "--batch 1000000000000", "--batch 18446744073709551615", "--length 9999"]
    {
        let folder = Folder::new("absurd");
        let line = format!("--layers 1 --d-model 8 {size}");
        let mut training = Training::open(&arguments(&line, &folder.0), &Device::Cpu).unwrap();
        let message = training.check(&corpus).unwrap_err().to_string();
        assert!(message.contains("--batch, --length"), "{message}");
    }
    assert!(Windows::new(&corpus.train, usize::MAX, 0, Position::default()).is_err());
}

#[test]
fn options_are_checked() {
    for bad in ["--held-out 1", "--learning-rate 0", "--batch 0", "--clip nan", "--weight-decay -1"] {
        assert!(Arguments::try_parse_from(["byte_lm"].into_iter().chain(bad.split(' '))).is_err(), "{bad}");
    }
    let text: RunOptions = arguments("--text a b --seed 4", Path::new("x")).options;
    assert_eq!((text.text, text.seed), (vec!["a".into(), "b".into()], 4));
}
