//! Choosing tokens: the fast path against the reference, distributions against exact probabilities, and what changes
//! beside the token.

mod arguments;
mod distributions;
#[cfg(feature = "cuda")]
mod gpu;
mod random;
mod vectors;

use selective_scan::sampling::{INVALID, Inputs, Settings, StateMut, cpu, mark, random::uniform, reference, words};
use selective_scan::{Isa, View};

use crate::support::device::Device;
use crate::support::draw::{Draw, seeded};

/// Rows of logits as they lie in memory, with the sequences that they belong to.
#[derive(Clone)]
pub struct Case {
    pub rows: usize,
    pub vocab: usize,
    pub vocab_size: usize,
    pub data: Vec<f32>,
    pub offset: usize,
    pub stride: usize,
    pub settings: Vec<Settings>,
    pub occurred: Option<Vec<u32>>,
    pub slots: Option<Vec<i32>>,
}

/// What a call has left.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    pub tokens: Vec<u32>,
    /// As bits, which compare equal for NaN.
    pub log_probs: Option<Vec<u32>>,
    pub settings: Vec<Settings>,
    pub occurred: Option<Vec<u32>>,
}

/// What stands where nothing is to be written.
const UNTOUCHED: u32 = 0xabcd_ef01;

pub fn settings(draw: &mut Draw, vocab: usize) -> Settings {
    let seed = u64::from(draw.uniform::<f32>(1, 0.0, 1.0)[0].to_bits()) << 32 | u64::from(draw.one_of(&[0u32, 1, 77]));
    Settings {
        seed: seed ^ u64::from(draw.uniform::<f32>(1, 0.0, 1.0)[0].to_bits()),
        position: draw.one_of(&[0, 1, 1000, u64::MAX - 1, 1 << 32]),
        top_k: draw.one_of(&[0, 0, 1, 2, 5, 40, vocab as u64 / 2, vocab as u64, u64::MAX]),
        temperature: draw.one_of(&[0.0, 0.3, 0.7, 1.0, 1.0, 2.5, 30.0, 1e-3]),
        top_p: draw.one_of(&[1.0, 1.0, 0.95, 0.5, 0.1, 1e-9, 0.999_999]),
        min_p: draw.one_of(&[0.0, 0.0, 0.05, 0.5, 1.0, 1e-6]),
        repetition_penalty: draw.one_of(&[1.0, 1.0, 1.2, 0.7, 5.0]),
    }
}

impl Case {
    pub fn draw(draw: &mut Draw, vocabs: &[usize]) -> Self {
        let (rows, vocab) = (draw.one_of(&[1, 2, 5, 12]), draw.one_of(vocabs));
        let vocab_size = vocab - draw.one_of(&[0, 0, 1, 7]).min(vocab - 1);
        // Rows that start at any place beside a multiple of 16 bytes, with room between them or none.
        let (offset, stride) = (draw.one_of(&[0, 1, 3, 4]), vocab + draw.one_of(&[0, 0, 1, 4]));
        let size = draw.one_of(&[0.1, 3.0, 8.0, 20.0]);
        let mut data: Vec<f32> = draw.uniform(offset + rows * stride, -size, size);
        // Few different logits, so that many are the same; some that no token has; -0 beside 0; extreme ones.
        match draw.one_of(&[0, 0, 1, 2, 3]) {
            1 => data.iter_mut().for_each(|x| *x = (*x * 4.0 / size).round() * 0.5),
            2 => data.iter_mut().for_each(|x| *x = if *x < size / 3.0 { f32::NEG_INFINITY } else { *x }),
            3 => data.iter_mut().for_each(|x| *x *= 1e37),
            _ => {}
        }
        let sequences = rows + draw.one_of(&[0, 3]);
        let with_slots = sequences > rows || draw.flag();
        // What lies between the rows, and padding of the vocabulary, must not be read: NaN would show.
        for (i, x) in data.iter_mut().enumerate() {
            if i < offset || (i - offset) % stride >= vocab_size {
                *x = f32::NAN;
            }
        }
        // Where all are -infinity there is no token, which has a test of its own.
        for row in 0..rows {
            let x = &mut data[offset + row * stride];
            *x = x.max(-size);
        }
        let occurred = draw.flag().then(|| {
            let bits = draw.uniform::<f32>(sequences * words(vocab), 0.0, 1.0);
            bits.iter().map(|x| x.to_bits().wrapping_mul(0x9e37_79b9)).collect()
        });
        Self {
            rows,
            vocab,
            vocab_size,
            data,
            offset,
            stride,
            settings: (0..sequences).map(|_| settings(draw, vocab)).collect(),
            occurred,
            slots: with_slots.then(|| {
                let turn = draw.one_of(&(0..sequences).collect::<Vec<_>>());
                let slot = |row: usize| if row % 5 == 3 { -1 } else { ((row + turn) % sequences) as i32 };
                (0..rows).map(slot).collect()
            }),
        }
    }

    /// Dense rows of these logits.
    pub fn of(rows: &[&[f32]], settings: &[Settings]) -> Self {
        let (data, vocab) = (rows.concat(), rows[0].len());
        let (occurred, slots, settings) = (None, None, settings.to_vec());
        Self { rows: rows.len(), vocab, vocab_size: vocab, data, offset: 0, stride: vocab, settings, occurred, slots }
    }

    pub fn view(&self) -> View<'_, f32, 2> {
        View::new(&self.data, [self.rows, self.vocab]).with_layout(self.offset, [self.stride, 1])
    }

    pub fn run(&self, device: Device, with_log_probs: bool) -> Chosen {
        let (mut settings, mut occurred) = (self.settings.clone(), self.occurred.clone());
        let sequences = settings.len();
        let mut tokens = vec![UNTOUCHED; sequences];
        let mut log_probs = with_log_probs.then(|| vec![f32::from_bits(UNTOUCHED); sequences]);
        match device {
            Device::Cpu(isa) => {
                let slots = self.slots.as_deref().into();
                let inputs = Inputs { vocab_size: self.vocab_size, slots, ..Inputs::new(self.view()) };
                let state = StateMut {
                    settings: &mut settings,
                    occurred: occurred.as_deref_mut(),
                    tokens: &mut tokens,
                    log_probs: log_probs.as_deref_mut(),
                };
                cpu::sample_with(isa, &inputs, state).expect("the case is valid");
            }
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => {
                gpu::sample(self, &mut settings, occurred.as_deref_mut(), &mut tokens, log_probs.as_deref_mut());
            }
        }
        // By rows; padding has none, and what no row is of must be untouched.
        let of_row = |row| self.slot(row).filter(|slot| *slot < sequences);
        for slot in (0..sequences).filter(|slot| (0..self.rows).all(|row| of_row(row) != Some(*slot))) {
            assert_eq!(tokens[slot], UNTOUCHED, "sequence {slot}, which no row is of");
        }
        let tokens = (0..self.rows).map(|row| of_row(row).map_or(UNTOUCHED, |slot| tokens[slot])).collect();
        let log_prob = |values: &[f32], row| of_row(row).map_or(UNTOUCHED, |slot| values[slot].to_bits());
        let log_probs = log_probs.map(|values| (0..self.rows).map(|row| log_prob(&values, row)).collect());
        Chosen { tokens, log_probs, settings, occurred }
    }

    /// The sequence of a row; nothing for padding.
    fn slot(&self, row: usize) -> Option<usize> {
        self.slots.as_ref().map_or(Some(row), |slots| usize::try_from(slots[row]).ok())
    }

    fn logits(&self, row: usize) -> &[f32] {
        &self.data[self.offset + row * self.stride..][..self.vocab_size]
    }

    fn bits(&self, slot: usize) -> Option<&[u32]> {
        let words = words(self.vocab);
        self.occurred.as_ref().map(|all| &all[slot * words..(slot + 1) * words])
    }

    /// The row alone, of the first of two sequences.
    fn alone(&self, row: usize, slot: usize) -> Self {
        let mut occurred = self.bits(slot).map(<[u32]>::to_vec);
        occurred.iter_mut().for_each(|bits| bits.extend_from_within(..));
        let mut data = self.logits(row).to_vec();
        data.resize(self.vocab, f32::NAN);
        Self {
            rows: 1,
            data,
            offset: 0,
            stride: self.vocab,
            settings: vec![self.settings[slot], Settings::default()],
            occurred,
            slots: Some(vec![0]),
            ..self.clone()
        }
    }
}

/// An f32 exponential within 2^-20; the rounding of its argument, four times 2^-24 of it; and 2^-40 of the likeliest.
fn relative_error(t: f64) -> f64 {
    2f64.powi(-20) + t.abs() * 4.0 * 2f64.powi(-24)
}

/// Asserts that a token is the reference's or one that rounding can put in its place: the random number falls within
/// the error of the cumulative sum of a boundary, where the filters are taken at their strictest and at their most
/// generous, each within the error of what it compares.
#[track_caller]
fn assert_within_rounding(logits: &[f32], settings: &Settings, bits: Option<&[u32]>, token: usize, what: &str) {
    let y = reference::penalised(logits, settings, bits);
    let most = f64::from(y.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    // Of all tokens, in powers of two.
    let powers = |y: &f32| (f64::from(*y) - most) / f64::from(settings.temperature) * std::f64::consts::LOG2_E;
    let total: f64 = y.iter().map(|y| powers(y).exp2()).sum();
    let of_weights: f64 = y.iter().map(powers).filter(|t| *t > -1e3).map(|t| t.exp2() * relative_error(t)).sum();
    // Of a sum of some of the weights beside that of all that are kept, which is 1 at least and the sum of those above.
    let lost = y.len() as f64 * 2f64.powi(-40);
    let kept = |p: f64, min_p: f64| {
        let settings = Settings { top_p: p.clamp(1e-30, 1.0) as f32, min_p: min_p.clamp(0.0, 1.0) as f32, ..*settings };
        reference::probabilities(logits, &settings, bits).expect("the row has a token")
    };
    let (p, min_p) = (f64::from(settings.top_p), f64::from(settings.min_p));
    // The sum that top-p is a part of is at least 1.
    let p_error = 2.0 * (of_weights / total.min(top_k_total(&y, settings, most)) + lost) + 2f64.powi(-24);
    let min_p_error = min_p * (relative_error(min_p.max(1e-12).log2()) + 2f64.powi(-23)) + 2f64.powi(-39);
    let many = kept(if p < 1.0 { p + p_error } else { 1.0 }, min_p - min_p_error);
    let few = kept(if p < 1.0 { p - p_error } else { 1.0 }, min_p + min_p_error);
    let apart: f64 = many.iter().zip(&few).filter(|(_, few)| **few == 0.0).map(|(many, _)| many).sum();
    // Of the kept weights: their number is not that of all.
    let of_kept: f64 =
        many.iter().zip(&y).map(|(p, y)| if *p > 0.0 { p * relative_error(powers(y)) } else { 0.0 }).sum();
    let error = 2.0 * (of_kept + lost) + 2.0 * apart;
    let (before, own) = (many[..token].iter().sum::<f64>(), many[token]);
    let u = uniform(settings.seed, settings.position) as f64 / 2f64.powi(64);
    assert!(
        own > 0.0 && u >= before - error - 1e-12 && u <= before + own + error + 1e-12,
        "{token} has {before} to {} for {u}, error {error:e}, {what}",
        before + own
    );
}

/// The sum of weights that top-k leaves.
fn top_k_total(y: &[f32], settings: &Settings, most: f64) -> f64 {
    let mut weights: Vec<f64> =
        y.iter().map(|y| ((f64::from(*y) - most) / f64::from(settings.temperature)).exp()).collect();
    weights.sort_by(|a, b| b.total_cmp(a));
    let count = if settings.top_k == 0 { usize::MAX } else { settings.top_k.try_into().unwrap_or(usize::MAX) };
    weights.iter().take(count).sum()
}

/// Holds a call to the reference; gives its rows, and those whose token is exactly the reference's.
#[track_caller]
fn hold_to_reference(case: &Case, got: &Chosen, what: &str) -> [usize; 2] {
    let mut counts = [0; 2];
    let (mut expected_settings, mut expected_bits) = (case.settings.clone(), case.occurred.clone());
    for row in 0..case.rows {
        let what = &format!("row {row}, {what}");
        let Some(slot) = case.slot(row) else {
            assert_eq!(got.tokens[row], UNTOUCHED, "{what}");
            assert!(got.log_probs.as_ref().is_none_or(|all| all[row] == UNTOUCHED), "{what}");
            continue;
        };
        let (logits, settings, bits) = (case.logits(row), &case.settings[slot], case.bits(slot));
        let (token, _) = reference::sample(logits, settings, bits).expect("the row has a token");
        let ours = got.tokens[row];
        assert!((ours as usize) < case.vocab_size, "{ours}, {what}");
        counts[0] += 1;
        counts[1] += usize::from(ours == token);
        if settings.temperature == 0.0 {
            assert_eq!(ours, token, "{what}");
        } else {
            assert_within_rounding(logits, settings, bits, ours as usize, &format!("{settings:?}, {what}"));
        }
        if let Some(all) = &got.log_probs {
            let log_prob = reference::log_probability(logits, ours as usize);
            let ours = f64::from(f32::from_bits(all[row]));
            assert!((ours - log_prob).abs() <= 1e-5 + log_prob.abs() * 2f64.powi(-22), "{ours} for {log_prob}, {what}");
        }
        expected_settings[slot].position = settings.position.wrapping_add(1);
        if let Some(all) = &mut expected_bits {
            let words = words(case.vocab);
            mark(&mut all[slot * words..(slot + 1) * words], &[ours]).expect("it is a token");
        }
    }
    assert_eq!(got.settings, expected_settings, "{what}");
    assert_eq!(got.occurred, expected_bits, "{what}");
    counts
}

/// Less and more than a vector, a tile and the tiles of a block have.
const VOCABS: [usize; 9] = [1, 2, 7, 32, 100, 511, 513, 2049, 9001];

fn against_reference(device: &dyn Fn(&mut Draw) -> Device, seeds: std::ops::Range<u64>, vocabs: &[usize]) {
    let (_, seed) = seeded();
    let (mut rows, mut equal) = (0, 0);
    for i in seeds {
        let draw = &mut Draw::new(seed.wrapping_add(i));
        let case = Case::draw(draw, vocabs);
        let (device, with_log_probs) = (device(draw), draw.flag());
        let what = format!("{device:?}, {} x {}, SEED={seed}, {i}", case.rows, case.vocab);
        let counts = hold_to_reference(&case, &case.run(device, with_log_probs), &what);
        (rows, equal) = (rows + counts[0], equal + counts[1]);
    }
    // A boundary of some thousand tokens lies within 1e-6 of the random number once in some hundred rows.
    assert!(rows < 200 || equal * 10 >= rows * 9, "only {equal} of {rows} tokens are the reference's, SEED={seed}");
}

fn any_isa(draw: &mut Draw) -> Device {
    Device::Cpu(draw.isa())
}

#[test]
fn tokens_are_those_of_the_reference() {
    against_reference(&any_isa, 0..600, &VOCABS);
    against_reference(&any_isa, 600..606, &[50_280]);
}

/// All that a call leaves is the same bits on any instruction set.
#[test]
fn all_instruction_sets_choose_the_same() {
    let (_, seed) = seeded();
    for i in 0..60 {
        let case = Case::draw(&mut Draw::new(seed.wrapping_add(i)), &VOCABS);
        let all: Vec<_> = Device::all().into_iter().map(|device| case.run(device, true)).collect();
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "SEED={seed}, {i}");
    }
}

/// A row has the same token whoever shares the batch, wherever it lies and whatever its slot.
fn rows_alone(device: Device, count: u64, vocabs: &[usize]) {
    let (_, seed) = seeded();
    for i in 0..count {
        let case = Case::draw(&mut Draw::new(seed.wrapping_add(i)), vocabs);
        let all = case.run(device, true);
        for row in 0..case.rows {
            let Some(slot) = case.slot(row) else { continue };
            let one = case.alone(row, slot).run(device, true);
            let log_probs = [&all, &one].map(|chosen| chosen.log_probs.as_ref().expect("they were wanted"));
            assert_eq!((all.tokens[row], log_probs[0][row]), (one.tokens[0], log_probs[1][0]), "SEED={seed}, {i}");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_batch() {
    rows_alone(Device::best(), 100, &VOCABS);
}

/// Rows of which nothing can be said, beside one that is as it should be.
fn odd_rows(device: Device) {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let sound = Settings { seed: 3, position: 5, ..Settings::default() };
    let bad = |change: fn(&mut Settings)| {
        let mut settings = sound;
        change(&mut settings);
        assert!(settings.check().is_err());
        ([1.0, 2.0, 3.0], settings)
    };
    let rows = [
        ([1.0, nan, 2.0], sound),
        ([nan, 1.0, 1.0], Settings { temperature: 0.0, ..sound }),
        ([1.0, 2.0, inf], Settings { top_k: 2, ..sound }),
        ([-inf; 3], Settings { top_p: 0.5, ..sound }),
        ([-inf; 3], Settings { temperature: 0.0, ..sound }),
        bad(|settings| settings.temperature = -1.0),
        bad(|settings| settings.temperature = f32::NAN),
        bad(|settings| settings.temperature = f32::INFINITY),
        bad(|settings| settings.top_p = 0.0),
        bad(|settings| settings.top_p = 1.5),
        bad(|settings| settings.min_p = -0.1),
        bad(|settings| settings.min_p = f32::NAN),
        bad(|settings| settings.repetition_penalty = 0.0),
        bad(|settings| settings.repetition_penalty = f32::INFINITY),
        ([-inf, 2.0, -inf], sound),
    ];
    let settings = rows.map(|(_, settings)| settings);
    let mut case = Case::of(&rows.each_ref().map(|(logits, _)| &logits[..]), &settings);
    case.occurred = Some(vec![0; rows.len()]);
    let chosen = case.run(device, true);
    let last = rows.len() - 1;
    assert!(chosen.tokens[..last].iter().all(|token| *token == INVALID), "{:?}", chosen.tokens);
    let log_probs: Vec<_> = chosen.log_probs.iter().flatten().map(|bits| f32::from_bits(*bits)).collect();
    assert!(log_probs[..last].iter().all(|x| x.is_nan()), "{log_probs:?}");
    assert!(chosen.occurred.iter().flatten().take(last).all(|bits| *bits == 0));
    let bits = |all: &[Settings]| bytemuck::cast_slice::<_, u8>(all).to_vec();
    assert_eq!(bits(&chosen.settings[..last]), bits(&settings[..last]));
    assert_eq!((chosen.tokens[last], log_probs[last], chosen.settings[last].position), (1, 0.0, 6));
    assert_eq!(chosen.occurred.expect("it was given")[last], 2);
}

#[test]
fn rows_without_a_token() {
    Isa::available().for_each(|isa| odd_rows(Device::Cpu(isa)));
}

/// Logits of which some are the same are greedily chosen by the lowest index, whatever settings come to a greedy
/// choice.
fn greedy_choices(device: Device, vocabs: &[usize]) {
    let (_, seed) = seeded();
    for i in 0..40 {
        let draw = &mut Draw::new(seed.wrapping_add(i));
        let vocab = draw.one_of(vocabs);
        let logits: Vec<f32> = draw.uniform::<f32>(vocab, -3.0, 3.0).iter().map(|x| x.round()).collect();
        let first =
            |is_best: &dyn Fn(f32) -> bool| logits.iter().position(|x| is_best(*x)).expect("there is one") as u32;
        let most = logits.iter().copied().fold(f32::MIN, f32::max);
        let any = Settings { repetition_penalty: 1.0, temperature: 1.5, ..settings(draw, vocab) };
        let all = [
            Settings { temperature: 0.0, ..any },
            Settings { top_k: 1, ..any },
            Settings { top_p: 1e-30, ..any },
            Settings { min_p: 1.0, top_k: 0, top_p: 1.0, ..any },
        ];
        let chosen = Case::of(&[&logits[..]; 4], &all).run(device, false).tokens;
        let what = format!("{vocab}, SEED={seed}, {i}");
        assert_eq!(chosen[..3], [first(&|x| x == most); 3], "{what}");
        assert_eq!(logits[chosen[3] as usize], most, "{what}");
    }
    // -0 and 0 are the same logit.
    let zeros = Case::of(&[&[-1.0, -0.0, 0.0], &[-1.0, 0.0, -0.0]], &[Settings::greedy(); 2]);
    assert_eq!(zeros.run(device, false).tokens, [1, 1]);
}

#[test]
fn greedy_choices_take_the_first() {
    greedy_choices(Device::best(), &VOCABS);
}

/// Penalties go to tokens that have occurred, those that the operator has chosen among them.
fn a_penalty_passes_on(device: Device) {
    let settings = Settings { repetition_penalty: 2.0, ..Settings::greedy() };
    let mut case = Case::of(&[&[3.0, 2.0, 1.8, -1.0]], &[settings]);
    case.occurred = Some(vec![0]);
    let mut tokens = Vec::new();
    for _ in 0..4 {
        let chosen = case.run(device, false);
        (case.settings, case.occurred) = (chosen.settings, chosen.occurred);
        tokens.extend(chosen.tokens);
    }
    // 3, then 2 beside 1.5, then 1.8, then 1.5 beside 1 and 0.9 and -1.
    assert_eq!(tokens, [0, 1, 2, 0]);
    assert_eq!(case.occurred, Some(vec![0b111]));
    assert_eq!(case.settings[0].position, 4);
    // Negative logits are multiplied.
    let mut case = Case::of(&[&[-1.0, -1.5]], &[settings]);
    case.occurred = Some(vec![1]);
    assert_eq!(case.run(device, false).tokens, [1]);
}

#[test]
fn chosen_tokens_are_penalised() {
    a_penalty_passes_on(Device::best());
}

/// Worked by hand: probabilities of 4/8, 2/8, 1/8 and 1/8.
#[test]
fn the_reference_filters_in_order() {
    let logits = [0.0, 1.0, 2.0, 0.0].map(|x: f32| x * std::f32::consts::LN_2);
    let default = Settings::default();
    let cases = [
        (default, [1.0, 2.0, 4.0, 1.0]),
        (Settings { temperature: 0.5, ..default }, [1.0, 4.0, 16.0, 1.0]),
        (Settings { top_k: 3, ..default }, [1.0, 2.0, 4.0, 0.0]),
        // 4/8 are not enough; 6/8 are.
        (Settings { top_p: 0.6, ..default }, [0.0, 2.0, 4.0, 0.0]),
        (Settings { top_p: 0.8, ..default }, [1.0, 2.0, 4.0, 0.0]),
        // Of the two that top-k leaves, 4/6 are enough.
        (Settings { top_k: 2, top_p: 0.6, ..default }, [0.0, 0.0, 1.0, 0.0]),
        (Settings { min_p: 0.3, ..default }, [0.0, 2.0, 4.0, 0.0]),
        (Settings { top_k: 3, top_p: 0.95, min_p: 0.2, ..default }, [1.0, 2.0, 4.0, 0.0]),
        // Of what is colder 1/16 is left.
        (Settings { temperature: 0.5, min_p: 0.2, ..default }, [0.0, 4.0, 16.0, 0.0]),
    ];
    for (settings, weights) in cases {
        let got = reference::probabilities(&logits, &settings, None).expect("there is a token");
        let total: f64 = weights.iter().sum();
        let near = got.iter().zip(weights).all(|(got, weight)| (got - weight / total).abs() < 1e-6);
        assert!(near, "{got:?} for {weights:?}, {settings:?}");
    }
}
