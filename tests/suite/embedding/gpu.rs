//! The gradient of an embedding on a GPU, or on a simulated one.

use half::{bf16, f16};
use selective_scan::embedding::cuda;
use selective_scan::{Element, Slots, View};

use super::{SPREADS, Spread, against_reference, rows_are_those_of_the_table, what_is_not_finite_stays};
use crate::support::gpu::{Copies, stream, with_slots_on_device};

fn on_gpu<T: Element>(ids: &[u32], d_out: &View<T, 2>, vocab_size: usize, to: &mut [f32]) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let ids = match ids.len() {
        0 => stream.null(),
        _ => stream.clone_htod(ids),
    };
    let table = copies.slice(to);
    let d_out = copies.view(d_out);
    cuda::backward(&stream, &ids.expect("there is room"), &d_out, vocab_size, table).expect("the case is valid");
    copies.download(table, to);
}

/// Tokens of fewer positions than a part has and of more, that begin and end with a part and within; several tiles of the
/// vocabulary.
#[test]
fn is_as_the_reference() {
    if stream().is_none() {
        return;
    }
    for spread in SPREADS {
        for (count, vocab_size, width) in
            [(0, 5, 3), (1, 1, 1), (64, 1, 4), (128, 1, 8), (1000, 7, 8), (700, 12, 7), (600, 600, 5)]
        {
            against_reference::<f32>(&on_gpu, count, vocab_size, width, spread);
        }
        against_reference::<f16>(&on_gpu, 300, 300, 12, spread);
        against_reference::<bf16>(&on_gpu, 300, 3, 12, spread);
    }
    // Columns of several blocks and of several turns.
    against_reference::<f32>(&on_gpu, 300, 4, 300, Spread::Half);
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    if stream().is_some() {
        what_is_not_finite_stays(&on_gpu);
    }
}

fn look_up<T: Element, O: Element>(ids: &[u32], slots: Slots, table: &View<T, 2>, to: &mut [O]) {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let (ids, out, table) = (copies.slice(ids), copies.slice(to), copies.view(table));
    cuda::lookup(&stream, ids, copies.slots(slots), &table, out).expect("the case is valid");
    copies.download(out, to);
}

#[test]
fn lookups() {
    if stream().is_none() {
        return;
    }
    for run in [|test: &dyn Fn()| test(), |test: &dyn Fn()| with_slots_on_device(test)] {
        run(&|| {
            rows_are_those_of_the_table::<f32, f32>(&look_up);
            rows_are_those_of_the_table::<f16, f16>(&look_up);
            rows_are_those_of_the_table::<f16, f32>(&look_up);
            rows_are_those_of_the_table::<bf16, bf16>(&look_up);
            rows_are_those_of_the_table::<bf16, f32>(&look_up);
        });
    }
}
