//! The gradient of an embedding: the fast paths against the reference, and its properties.

#[cfg(feature = "cuda")]
mod gpu;

use half::{bf16, f16};
use selective_scan::embedding::{cpu, reference};
use selective_scan::{Element, Slots, View};

use crate::support::draw::{Draw, seeded};
use crate::support::strided::{Layout, Strided};
use crate::support::tolerance::bits;

/// What writes a gradient.
type Run<T> = dyn Fn(&[u32], &View<T, 2>, usize, &mut [f32]);

fn on_cpu<T: Element>(ids: &[u32], d_out: &View<T, 2>, vocab_size: usize, to: &mut [f32]) {
    cpu::backward(ids, d_out, vocab_size, to).expect("the case is valid");
}

/// A tensor of one batch row as a matrix.
fn matrix<T: Element>(tensor: &Strided<T>) -> View<'_, T, 2> {
    let view = tensor.view();
    let ([_, rows, width], [_, row, column]) = (view.shape, view.strides);
    View { data: view.data, offset: view.offset, shape: [rows, width], strides: [row, column] }
}

/// How ids are spread over a vocabulary.
#[derive(Debug, Clone, Copy)]
enum Spread {
    /// Each as likely as another.
    Even,
    /// Half of them one, and that at random places.
    Half,
    /// All one.
    One,
    /// In ascending order, so that each token's are neighbours.
    Ascending,
    /// One in ten outside of the vocabulary.
    Beyond,
}

const SPREADS: [Spread; 5] = [Spread::Even, Spread::Half, Spread::One, Spread::Ascending, Spread::Beyond];

fn ids(draw: &mut Draw, spread: Spread, count: usize, vocab_size: usize) -> Vec<u32> {
    let mut below = |n: usize| (draw.uniform::<f32>(1, 0.0, 1.0)[0] * n as f32) as u32 % n as u32;
    let one = below(vocab_size);
    let mut ids: Vec<u32> = (0..count)
        .map(|_| match spread {
            Spread::Half if below(2) == 0 => one,
            Spread::One => one,
            Spread::Beyond if below(10) == 0 => [u32::MAX, vocab_size as u32][below(2) as usize],
            _ => below(vocab_size),
        })
        .collect();
    if let Spread::Ascending = spread {
        ids.sort_unstable();
    }
    ids
}

/// The sum of each element within the roundings of its own terms: 64 of them, and sums of these, are added in a row, and up
/// to 512 sums of parts. So each is off by at most 64 + 64 + 512 roundings of 2^-24 of the sum of magnitudes.
fn against_reference<T: Element>(run: &Run<T>, count: usize, vocab_size: usize, width: usize, spread: Spread) {
    let (_, seed) = seeded();
    let draw = &mut Draw::new(seed);
    let ids = ids(draw, spread, count, vocab_size);
    let layout = Layout { time_contiguous: draw.flag(), column_slice: draw.flag() };
    let layout = if draw.flag() { Layout::default() } else { layout };
    let values: Vec<f32> = draw.uniform(count * width, -1.0, 1.0);
    let mut values = values.into_iter();
    let d_out = Strided::<T>::new([1, count, width], layout, || values.next().expect("as many"));
    let magnitudes: Vec<f32> = d_out.dense().values().iter().map(|x| x.to_f32().abs()).collect();
    let what = format!("{count} of {vocab_size} by {width}, {spread:?}, {layout:?}, seed {seed}");

    let mut ours = vec![f32::NAN; vocab_size * width];
    run(&ids, &matrix(&d_out), vocab_size, &mut ours);
    let exact = reference::backward(&ids, &matrix(&d_out), vocab_size).expect("the case is valid");
    let bounds = reference::backward(&ids, &View::new(&magnitudes[..], [count, width]), vocab_size).expect("valid");
    for (i, ((ours, exact), bound)) in ours.iter().zip(&exact).zip(&bounds).enumerate() {
        let error = (f64::from(*ours) - exact).abs();
        assert!(error <= 640.0 * 2f64.powi(-24) * bound, "{what}: element {i} is {ours}, for {exact}");
    }

    // The same bits again, and from a dense tensor.
    for d_out in [&d_out, &d_out.dense()] {
        let mut again = vec![f32::NAN; vocab_size * width];
        run(&ids, &matrix(d_out), vocab_size, &mut again);
        assert_eq!(bits(&again), bits(&ours), "{what}");
    }
}

#[test]
fn is_as_the_reference() {
    for spread in SPREADS {
        for (count, vocab_size, width) in [(0, 5, 3), (1, 1, 1), (200, 11, 8), (1000, 300, 7)] {
            against_reference::<f32>(&on_cpu, count, vocab_size, width, spread);
            against_reference::<f16>(&on_cpu, count, vocab_size, width, spread);
            against_reference::<bf16>(&on_cpu, count, vocab_size, width, spread);
        }
    }
}

/// NaN and infinity stay in the row of their token.
fn what_is_not_finite_stays(run: &Run<f32>) {
    let (ids, width) = ([3, 1, 3, 0, 1], 6);
    let mut d_out = vec![1.0f32; ids.len() * width];
    d_out[2 * width + 1] = f32::NAN;
    d_out[width] = f32::INFINITY;
    let mut ours = vec![7.0; 4 * width];
    run(&ids, &View::new(&d_out[..], [ids.len(), width]), 4, &mut ours);
    for (i, x) in ours.iter().enumerate() {
        let expected = match i {
            _ if i == 3 * width + 1 => f32::NAN,
            _ if i == width => f32::INFINITY,
            _ => [1.0, 2.0, 0.0, 2.0][i / width],
        };
        assert!(*x == expected || x.is_nan() && expected.is_nan(), "element {i} is {x}, for {expected}");
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    what_is_not_finite_stays(&on_cpu);
}

#[test]
fn what_does_not_fit_is_named() {
    let data = [0.0f32; 12];
    let view = View::new(&data[..], [3, 4]);
    let refused = |ids: &[u32], view: &View<f32, 2>, vocab_size, len, message: &str| {
        let mut table = vec![7.0; len];
        let error = cpu::backward(ids, view, vocab_size, &mut table).expect_err("it does not fit");
        assert_eq!(error.to_string(), message);
        assert!(table.iter().all(|x| *x == 7.0));
    };
    refused(&[0; 4], &view, 2, 8, "`d_out`: expected shape (ids, width) = [4, 4], got [3, 4]");
    refused(&[0; 3], &view, 2, 9, "`d_table`: expected (vocab_size, width) = [2, 4] elements, got 9 elements");
    refused(&[0; 3], &view, 1 << 32, 8, "`vocab_size`: expected at most 2^32 - 1, got 4294967296");
    let beyond = View::new(&data[..], [3, 5]);
    let message =
        "`d_out`: expected a storage that holds offset 0, shape [3, 5], strides [5, 1], got one of 12 elements";
    refused(&[0; 3], &beyond, 2, 10, message);
}

/// A million times one token: the sum loses nothing but its own rounding.
#[test]
fn a_million_rows_of_one_token() {
    let (ids, tenth) = (vec![1u32; 1 << 20], [0.1f32]);
    let mut table = [7.0; 6];
    let view = View::new(&tenth[..], [ids.len(), 2]).with_layout(0, [0, 0]);
    cpu::backward(&ids, &view, 3, &mut table).expect("valid");
    let sum = (f64::from(0.1f32) * f64::from(1 << 20)) as f32;
    assert_eq!(table, [0.0, 0.0, sum, sum, 0.0, 0.0]);
}

/// A lookup on some device: ids, slots, table, vocabulary, width, result.
type LookUp<'f, T, O> = &'f dyn Fn(&[u32], Slots, &View<T, 2>, &mut [O]);

/// Rows are those of the table, by ids or by the ids in slots; zeros for padding, and no numbers for what the table does not have.
fn rows_are_those_of_the_table<T: Element, O: Element>(look_up: LookUp<T, O>) {
    let (_, seed) = seeded();
    let draw = &mut Draw::new(seed);
    for (vocab, width, room) in [(1, 1, 0), (7, 5, 0), (300, 600, 3)] {
        let data: Vec<T> = draw.uniform(vocab * (width + room), -2.0, 2.0);
        let table = View::new(&data[..], [vocab, width]).with_layout(0, [width + room, 1]);
        let ids: Vec<u32> = (0..6).map(|i| if i == 4 { vocab as u32 } else { (i * 37 % vocab) as u32 }).collect();
        let lists: [(Slots, Vec<Option<usize>>); 2] = [
            (Slots::Rows, (0..6).map(Some).collect()),
            (Slots::Host(&[5, -1, 0, 4]), vec![Some(5), None, Some(0), Some(4)]),
        ];
        for (slots, expected) in lists {
            let mut out = vec![O::from_f32(7.0); expected.len() * width];
            look_up(&ids, slots, &table, &mut out);
            for (row, slot) in expected.into_iter().enumerate() {
                for (j, got) in out[row * width..(row + 1) * width].iter().enumerate() {
                    let want = match slot.map(|slot| ids[slot] as usize) {
                        None => 0.0,
                        Some(id) if id >= vocab => f32::NAN,
                        Some(id) => data[id * (width + room) + j].to_f32(),
                    };
                    let got = got.to_f32();
                    assert!(got == want || got.is_nan() && want.is_nan(), "row {row}, column {j}: {got}, {want}");
                }
            }
        }
    }
}

#[test]
fn lookups() {
    fn on_cpu<T: Element, O: Element>(ids: &[u32], slots: Slots, table: &View<T, 2>, out: &mut [O]) {
        cpu::lookup(ids, slots, table, out).expect("the case is valid");
    }
    rows_are_those_of_the_table::<f32, f32>(&on_cpu);
    rows_are_those_of_the_table::<f16, f32>(&on_cpu);
    rows_are_those_of_the_table::<bf16, bf16>(&on_cpu);
}

#[test]
fn lookups_that_do_not_fit_are_refused() {
    let table = [bf16::ONE; 6];
    let table = View::new(&table, [3, 2]);
    let mut out = [7.0f32; 4];
    let error = cpu::lookup(&[0, 1, 2], Slots::Rows, &table, &mut out).unwrap_err();
    assert_eq!(error.to_string(), "`out`: expected (rows, width) = [3, 2] elements, got 4 elements");
    let error = cpu::lookup(&[0, 1], Slots::Host(&[0, 2]), &table, &mut out).unwrap_err();
    assert_eq!(error.to_string(), "`slots`: expected slots below 2, or negative ones for padding, got 2 for row 1");
    assert_eq!(out, [7.0; 4]);
    let error = cpu::lookup(&[0, 1], Slots::Rows, &table, &mut [f16::ZERO; 4]).unwrap_err();
    assert_eq!(error.to_string(), "`out`: expected f32 or Bf16, the type of `table`, got F16");
}
