//! Arguments that do not fit are refused by name, and nothing is written.

use selective_scan::sampling::{Inputs, MAX_VOCAB_SIZE, Settings, StateMut, mark};
use selective_scan::{Slots, View};

/// What is refused of 2 rows of 40 logits, with the buffers that `change` makes of those that fit.
#[track_caller]
fn refused(inputs: impl Fn(&mut Inputs), change: impl Fn(&mut Buffers), message: &str) {
    let logits = vec![0.0; 80];
    let mut buffers = Buffers {
        settings: vec![Settings::default(); 2],
        occurred: vec![0; 4],
        tokens: vec![9; 2],
        log_probs: vec![9.0; 2],
    };
    change(&mut buffers);
    let before = buffers.clone();
    let Buffers { settings, occurred, tokens, log_probs } = &mut buffers;
    let state = StateMut { settings, occurred: Some(occurred), tokens, log_probs: Some(log_probs) };
    let mut given = Inputs::new(View::new(&logits, [2, 40]));
    inputs(&mut given);
    let error = given.sample(state).expect_err("it does not fit").to_string();
    assert_eq!(error, message);
    assert_eq!(buffers, before);
}

#[derive(Clone, PartialEq, Debug)]
struct Buffers {
    settings: Vec<Settings>,
    occurred: Vec<u32>,
    tokens: Vec<u32>,
    log_probs: Vec<f32>,
}

#[test]
fn what_does_not_fit_is_named() {
    let same = |_: &mut Buffers| {};
    refused(|i| i.vocab_size = 0, same, "`vocab_size`: expected from 1 to 40, for logits of 40 columns, got 0");
    refused(|i| i.vocab_size = 41, same, "`vocab_size`: expected from 1 to 40, for logits of 40 columns, got 41");
    refused(
        |i| i.logits.strides = [40, 2],
        same,
        "`logits`: expected a storage that holds offset 0, shape [2, 40], strides [40, 2], got one of 80 elements",
    );
    refused(
        |i| (i.logits.shape, i.logits.strides, i.vocab_size) = ([2, 33], [1, 2], 33),
        |buffers| buffers.occurred = vec![0; 4],
        "`logits`: expected logits of a row that are neighbours in memory, got strides [1, 2]",
    );
    refused(
        |_| {},
        |buffers| buffers.settings.push(Settings::default()),
        "`settings`: expected one slot for each of 2 batch rows, since no `slots` are given, got 3 slots",
    );
    refused(|i| i.slots = Slots::Host(&[0]), same, "`slots`: expected one for each of 2 batch rows, got 1");
    refused(
        |i| i.slots = Slots::Host(&[0, 2]),
        same,
        "`slots`: expected slots below 2, or negative ones for padding, got 2 for row 1",
    );
    refused(|i| i.slots = Slots::Host(&[1, 1]), same, "`slots`: expected a different slot for every row, got 1 twice");
    refused(
        |_| {},
        |buffers| buffers.occurred.truncate(2),
        "`occurred`: expected (sequences, ⌈vocab / 32⌉) = [2, 2] elements, got 2 elements",
    );
    refused(
        |_| {},
        |buffers| buffers.tokens.truncate(1),
        "`tokens`: expected (sequences) = [2] elements, got 1 elements",
    );
    refused(
        |_| {},
        |buffers| buffers.log_probs.push(0.0),
        "`log_probs`: expected (sequences) = [2] elements, got 3 elements",
    );
}

/// More tokens than weights can be summed up of.
#[test]
fn a_vocabulary_has_a_limit() {
    let logits = [0.0];
    let mut inputs = Inputs::new(View::new(&logits, [1, MAX_VOCAB_SIZE + 1]).with_layout(0, [0, 0]));
    inputs.logits.strides = [0, 0];
    let (mut settings, mut tokens) = ([Settings::default()], [0]);
    let error = inputs.sample(StateMut::new(&mut settings, &mut tokens)).expect_err("they are too many");
    assert!(error.to_string().contains("logits"), "{error}");
    let logits = vec![0.0; MAX_VOCAB_SIZE + 1];
    let inputs = Inputs::new(View::new(&logits, [1, MAX_VOCAB_SIZE + 1]));
    let error = inputs.sample(StateMut::new(&mut settings, &mut tokens)).expect_err("they are too many");
    assert!(error.to_string().contains("`vocab_size`: expected from 1 to 4194304"), "{error}");
    Inputs { vocab_size: MAX_VOCAB_SIZE, ..inputs }
        .sample(StateMut::new(&mut settings, &mut tokens))
        .expect("as many fit");
    assert!((tokens[0] as usize) < MAX_VOCAB_SIZE);
}

#[test]
fn settings_are_checked_by_name() {
    let default = Settings::default();
    default.check().expect("it is sound");
    Settings::greedy().check().expect("it is sound");
    let cases = [
        (Settings { temperature: -0.5, ..default }, "`temperature`: expected a finite number, 0 or more, got -0.5"),
        (Settings { top_p: 0.0, ..default }, "`top_p`: expected above 0 and at most 1, got 0"),
        (Settings { min_p: 2.0, ..default }, "`min_p`: expected from 0 to 1, got 2"),
        (
            Settings { repetition_penalty: f32::NAN, ..default },
            "`repetition_penalty`: expected a finite number above 0, got NaN",
        ),
    ];
    for (settings, message) in cases {
        assert_eq!(settings.check().expect_err("it is not").to_string(), message);
    }
}

#[test]
fn no_rows_and_marks() {
    let (mut settings, mut tokens) = ([], []);
    Inputs::new(View::new(&[], [0, 7])).sample(StateMut::new(&mut settings, &mut tokens)).expect("nothing to do");
    let mut bits = [0; 2];
    mark(&mut bits, &[0, 33, 63, 33]).expect("they have bits");
    assert_eq!(bits, [1, 0x8000_0002]);
    let error = mark(&mut bits, &[5, 64]).expect_err("there is no such bit").to_string();
    assert_eq!(error, "`tokens`: expected tokens below 64, of which there are bits, got 64");
    assert_eq!(bits, [1, 0x8000_0002]);
}
