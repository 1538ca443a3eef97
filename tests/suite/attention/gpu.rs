//! Attention on a GPU, or on a simulated one.

use half::{bf16, f16};
use selective_scan::attention::{
    Gradients, GradientsMut, Inputs, KeyRange, Output, OutputGradients, OutputMut, cuda, reference,
};
use selective_scan::cuda::Cuda;
use selective_scan::{Element, Result, View};

use super::{Case, Heads, hold_gradients};
use crate::support::draw::{Draw, seeded};
use crate::support::gpu::{Copies, stream};
use crate::support::tolerance::{assert_close, bits};
use crate::support::vectors::FORWARD;

fn on_device<'a, T: Element>(copies: &'a Copies, inputs: &Inputs<'a, T>) -> Inputs<'a, T, Cuda> {
    Inputs {
        scale: inputs.scale,
        cu_seqlens: inputs.cu_seqlens,
        keys: inputs.keys,
        causal: inputs.causal,
        ..Inputs::new(copies.view(&inputs.q), copies.view(&inputs.k), copies.view(&inputs.v))
    }
}

/// A forward pass on copies, into buffers that hold something else before.
fn forward<T: Element>(inputs: &Inputs<T>) -> Result<Output<T>> {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let [count, rows] = [4, 3].map(|dims| inputs.q.shape[..dims].iter().product());
    let (out, lse) = (copies.poisoned::<T>(count), copies.poisoned::<f32>(rows));
    cuda::forward(&stream, &on_device(&copies, inputs), OutputMut { out: &mut *out, lse: &mut *lse })?;
    let mut output = Output { out: vec![T::from_f32(0.0); count], lse: vec![0.0; rows] };
    copies.download(out, &mut output.out);
    copies.download(lse, &mut output.lse);
    Ok(output)
}

/// A backward pass on copies, into buffers that hold something else before.
fn backward<T: Element>(inputs: &Inputs<T>, output: &Output<T>, d_out: View<T, 4>) -> Result<Gradients<T>> {
    let stream = stream().expect("only called where there is a device");
    let copies = Copies::new(&stream);
    let [batch, length, heads, _] = inputs.q.shape;
    let outputs = OutputGradients {
        out: copies.view(&View::new(&output.out, inputs.q.shape)),
        lse: copies.view(&View::new(&output.lse, [batch, length, heads])),
        d_out: copies.view(&d_out),
    };
    let mut gradients = Gradients::zeroed(inputs)?;
    let [q, k, v] = [&gradients.q, &gradients.k, &gradients.v].map(|zeros| copies.poisoned::<T>(zeros.len()));
    let to = GradientsMut { q: &mut *q, k: &mut *k, v: &mut *v };
    cuda::backward(&stream, &on_device(&copies, inputs), outputs, to)?;
    copies.download(q, &mut gradients.q);
    copies.download(k, &mut gradients.k);
    copies.download(v, &mut gradients.v);
    Ok(gradients)
}

/// The sizes of a call.
#[derive(Debug, Clone, Copy)]
struct Sizes<'a> {
    d_head: usize,
    kv_heads: usize,
    group: usize,
    /// The queries of each sequence.
    lens: &'a [usize],
    /// Keys of each sequence before its queries'; none: the queries' own steps.
    before: Option<&'a [usize]>,
    causal: bool,
    packed: bool,
}

impl Sizes<'_> {
    fn case<T: Element>(self, draw: &mut Draw) -> Case<T> {
        let Sizes { d_head, kv_heads, group, lens, before, causal, packed } = self;
        let length = if packed { lens.iter().sum() } else { lens[0] };
        let batch = if packed { 1 } else { lens.len() };
        // In turn in two rows, some steps apart.
        let mut ends = [1, 0];
        let keys: Option<Vec<_>> = before.map(|before| {
            let range = |(index, (&len, &before)): (usize, (&usize, &usize))| {
                let range = KeyRange { row: index % 2, start: ends[index % 2], length: len + before };
                ends[index % 2] += range.length + index % 3;
                range
            };
            lens.iter().zip(before).enumerate().map(range).collect()
        });
        let [rows, steps] = if keys.is_some() { [2, ends[0].max(ends[1]) + 1] } else { [batch, length] };
        let (queries, keys_shape) = ([batch, length, kv_heads * group, d_head], [rows, steps, kv_heads, d_head]);
        let mut end = 0;
        let cu_seqlens = packed.then(|| {
            let ends = lens.iter().map(|len| {
                end += len;
                end
            });
            [0].into_iter().chain(ends).collect()
        });
        Case {
            q: Heads::draw(draw, queries, 1.5),
            k: Heads::draw(draw, keys_shape, 1.5),
            v: Heads::draw(draw, keys_shape, 1.0),
            d_out: Heads::draw(draw, queries, 1.0),
            scale: draw.one_of(&[None, None, Some(0.3), Some(-0.4)]),
            cu_seqlens,
            keys,
            causal,
        }
    }
}

/// Both passes. Weights of half types are rounded before they are multiplied by values or gradients of outputs, as results are: of
/// many terms of random signs that is an error of the same size, so that both together are 1.4 times what rounding a result explains.
/// Twice that is allowed, and few results are not enough to tell; there are some hundred. (Slopes of scores are not rounded so.)
fn hold<T: Element>(case: &Case<T>, what: &str) {
    let inputs = case.inputs();
    let output = forward(&inputs).unwrap();
    let exact = reference::forward(&inputs).unwrap();
    assert_close(&output.out, &exact.out, FORWARD, &format!("{what}: out"));
    assert_close(&output.lse, &exact.lse, FORWARD, &format!("{what}: lse"));
    let gradients = backward(&inputs, &output, case.d_out.view()).unwrap();
    hold_gradients(case, &gradients, what);
}

const PLAIN: Sizes =
    Sizes { d_head: 64, kv_heads: 1, group: 2, lens: &[90, 90], before: None, causal: true, packed: false };

fn hold_sizes<T: Element>(sizes: Sizes, seed: u64) {
    let case = sizes.case::<T>(&mut Draw::new(seed));
    hold(&case, &format!("{:?}, {sizes:?}, SEED={seed}", T::DTYPE));
}

#[test]
fn all_widths_of_f32() {
    let Some(_) = stream() else { return };
    let (_, seed) = seeded();
    for (d_head, len) in [(1, 140), (7, 90), (20, 70), (64, 90), (80, 70), (128, 50), (200, 40), (256, 40)] {
        hold_sizes::<f32>(Sizes { d_head, lens: &[len, len], ..PLAIN }, seed);
    }
}

#[test]
fn all_widths_of_halves() {
    let Some(_) = stream() else { return };
    let (_, seed) = seeded();
    // Of so narrow heads more, as few large results would decide: the gradients of the first keys.
    let narrow = Sizes { d_head: 1, lens: &[50; 12], kv_heads: 3, ..PLAIN };
    hold_sizes::<bf16>(narrow, seed);
    hold_sizes::<f16>(narrow, seed);
    for (d_head, len) in [(7, 150), (32, 150), (64, 150), (80, 80), (128, 80), (256, 70)] {
        hold_sizes::<bf16>(Sizes { d_head, lens: &[len, len], ..PLAIN }, seed);
        hold_sizes::<f16>(Sizes { d_head, lens: &[len], kv_heads: 2, group: 1, ..PLAIN }, seed);
    }
}

#[test]
fn where_it_is_not_causal() {
    let Some(_) = stream() else { return };
    let (_, seed) = seeded();
    let sizes = Sizes { causal: false, d_head: 32, ..PLAIN };
    hold_sizes::<f32>(sizes, seed);
    hold_sizes::<bf16>(Sizes { lens: &[100, 7, 0, 1], packed: true, ..sizes }, seed);
    hold_sizes::<f16>(Sizes { lens: &[20, 40], before: Some(&[70, 3]), packed: true, ..sizes }, seed);
}

/// Keys that fill tiles, and one more, which all queries see.
#[test]
fn keys_at_the_edges_of_tiles() {
    let Some(_) = stream() else { return };
    let (_, seed) = seeded();
    for len in [63, 64, 65, 129] {
        let sizes = Sizes { causal: false, d_head: 32, lens: &[len], ..PLAIN };
        hold_sizes::<f32>(sizes, seed);
        hold_sizes::<bf16>(Sizes { packed: true, ..sizes }, seed);
    }
    for (d_head, len) in [(64, 33), (128, 65), (256, 17)] {
        hold_sizes::<f32>(Sizes { causal: false, d_head, lens: &[len], group: 1, ..PLAIN }, seed);
    }
}

/// Sequences of any lengths, none and one among them, heads in groups of any size, keys before the queries, some in no sequence.
#[test]
fn packed_sequences_with_keys_elsewhere() {
    let Some(_) = stream() else { return };
    let (_, seed) = seeded();
    let sizes = Sizes { lens: &[0, 1, 40, 0, 3, 70, 1], packed: true, kv_heads: 2, group: 3, d_head: 24, ..PLAIN };
    let before: &[usize] = &[0, 60, 5, 9, 70, 0, 0];
    hold_sizes::<f32>(sizes, seed);
    hold_sizes::<f32>(Sizes { before: Some(before), ..sizes }, seed);
    hold_sizes::<bf16>(Sizes { before: Some(before), ..sizes }, seed);
    hold_sizes::<f16>(Sizes { before: Some(before), group: 1, ..sizes }, seed);
    // More sequences than a warp looks at at a time.
    let lens: Vec<_> = (0..75).map(|i| [1, 3, 0, 2][i % 4]).collect();
    hold_sizes::<f32>(Sizes { lens: &lens, kv_heads: 1, group: 2, d_head: 8, ..sizes }, seed);
}

/// Few queries over caches of keys about as long as one, two and more pieces, in groups that fill a tile of rows and more.
#[test]
fn few_queries_over_many_keys() {
    let Some(_) = stream() else { return };
    let (_, seed) = seeded();
    let sizes = Sizes { packed: true, causal: true, kv_heads: 2, group: 4, d_head: 32, ..PLAIN };
    let lens: &[usize] = &[1, 1, 1, 1, 3, 5, 1];
    let before: &[usize] = &[254, 255, 256, 511, 255, 700, 2000];
    let forward_alone = |sizes: Sizes| {
        fn hold<T: Element>(sizes: Sizes, seed: u64) {
            let case = sizes.case::<T>(&mut Draw::new(seed));
            let what = format!("{:?}, {sizes:?}, SEED={seed}", T::DTYPE);
            let (inputs, exact) = (case.inputs(), reference::forward(&case.inputs()).unwrap());
            let output = forward(&inputs).unwrap();
            // Values of random signs cancel in a mean.
            assert_close(&output.out, &exact.out, FORWARD, &what);
            assert_close(&output.lse, &exact.lse, FORWARD, &what);
        }
        hold::<f32>(sizes, seed);
        hold::<f16>(sizes, seed);
        hold::<bf16>(sizes, seed);
    };
    forward_alone(Sizes { lens, before: Some(before), ..sizes });
    forward_alone(Sizes { lens: &[1, 4], before: Some(&[600, 258]), causal: false, group: 3, d_head: 20, ..sizes });
    for d_head in [64, 128, 256] {
        forward_alone(Sizes { lens: &[1, 2], before: Some(&[520, 255]), kv_heads: 1, group: 9, d_head, ..sizes });
    }
    // And back.
    hold_sizes::<bf16>(Sizes { lens: &[1, 2, 1], before: Some(&[300, 511, 3]), ..sizes }, seed);
    hold_sizes::<f32>(Sizes { lens: &[1, 2, 1], before: Some(&[300, 511, 3]), ..sizes }, seed);
}

/// What is drawn for the processor, too.
#[test]
fn drawn_cases() {
    let Some(_) = stream() else { return };
    let (mut rng, seed) = seeded();
    for length in [1, 2, 15, 64, 65, 130] {
        let what = format!("{length}, SEED={seed}");
        hold(&Case::<f32>::draw(&mut rng, length), &what);
    }
}

/// A score of 20 · 20 · 16 / 4 is off by 2^-23 of that in a product of two parts: weights by as much.
#[test]
fn scores_far_apart() {
    let Some(_) = stream() else { return };
    let (_, seed) = seeded();
    let draw = &mut Draw::new(seed);
    let (queries, keys) = ([1, 90, 2, 16], [1, 90, 1, 16]);
    let case = Case::<f32> {
        q: Heads::draw(draw, queries, 20.0),
        k: Heads::draw(draw, keys, 20.0),
        v: Heads::draw(draw, keys, 1.0),
        d_out: Heads::draw(draw, queries, 1.0),
        scale: None,
        cu_seqlens: None,
        keys: None,
        causal: true,
    };
    let output = forward(&case.inputs()).unwrap();
    let exact = reference::forward(&case.inputs()).unwrap();
    assert_close(&output.out, &exact.out, 1e-4, &format!("SEED={seed}"));
    assert_close(&output.lse, &exact.lse, FORWARD, &format!("SEED={seed}"));
}

/// Weights of one key, of equal ones and of a scale that is zero.
#[test]
fn a_scale_of_zero_takes_the_mean() {
    let Some(_) = stream() else { return };
    let draw = &mut Draw::new(3);
    let mut case = Sizes { d_head: 8, lens: &[70], ..PLAIN }.case::<f32>(draw);
    case.scale = Some(0.0);
    hold(&case, "a scale of zero");
}

/// All of a call that is compared bit by bit.
fn results<T: Element>(inputs: &Inputs<T>, d_out: View<T, 4>) -> [Vec<u32>; 5] {
    let output = forward(inputs).unwrap();
    let gradients = backward(inputs, &output, d_out).unwrap();
    let Gradients { q, k, v } = gradients;
    [bits(&output.out), bits(&output.lse), bits(&q), bits(&k), bits(&v)]
}

/// Sequences, each alone and all packed, and the same as batch rows; the lengths are those of all kernels.
fn alone_is_packed<T: Element>(seed: u64) {
    let lens = [1usize, 70, 0, 3, 140];
    let sizes = Sizes { lens: &lens, before: Some(&[300, 10, 0, 600, 0]), packed: true, group: 4, d_head: 16, ..PLAIN };
    let case = sizes.case::<T>(&mut Draw::new(seed));
    let inputs = case.inputs();
    let whole = results(&inputs, case.d_out.view());
    assert_eq!(whole, results(&inputs, case.d_out.view()), "a second run, SEED={seed}");
    let (ranges, ends) = (case.keys.as_deref().unwrap(), case.cu_seqlens.as_deref().unwrap());
    let [heads, d_head] = [4, 16];
    for (index, &len) in lens.iter().enumerate() {
        let part = |view: View<'_, T, 4>, of: [usize; 3]| -> Vec<T> {
            let [batch, start, len] = of;
            let at = |i: usize, h: usize, d: usize| {
                view.offset + batch * view.strides[0] + (start + i) * view.strides[1] + h * view.strides[2] + d
            };
            let place = |n: usize| [n / d_head / view.shape[2], n / d_head % view.shape[2], n % d_head];
            (0..len * view.shape[2] * d_head)
                .map(|n| {
                    view.data[{
                        let [i, h, d] = place(n);
                        at(i, h, d)
                    }]
                })
                .collect()
        };
        let of_queries = [0, ends[index], len];
        let KeyRange { row, start, length } = ranges[index];
        let (q, d_out) = (part(case.q.view(), of_queries), part(case.d_out.view(), of_queries));
        let [k, v] = [&case.k, &case.v].map(|tensor| part(tensor.view(), [row, start, length]));
        let (queries, keys) = ([1, len, heads, d_head], [1, length, 1, d_head]);
        let range = [KeyRange { row: 0, start: 0, length }];
        let alone = Inputs {
            scale: case.scale,
            keys: Some(&range),
            ..Inputs::new(View::new(&q, queries), View::new(&k, keys), View::new(&v, keys))
        };
        let alone = results(&alone, View::new(&d_out, queries));
        let per_step = heads * d_head;
        let key_at = (row * case.k.shape[1] + start) * d_head;
        let places = [
            ends[index] * per_step..ends[index + 1] * per_step,
            ends[index] * heads..ends[index + 1] * heads,
            ends[index] * per_step..ends[index + 1] * per_step,
            key_at..key_at + length * d_head,
            key_at..key_at + length * d_head,
        ];
        for ((of, place), alone) in whole.iter().zip(places).zip(&alone) {
            assert_eq!(&of[place], &alone[..], "sequence {index} of {len}, SEED={seed}");
        }
    }
}

#[test]
fn a_packed_sequence_gives_the_bits_of_the_same_alone() {
    let Some(_) = stream() else { return };
    let (_, seed) = seeded();
    alone_is_packed::<f32>(seed);
    alone_is_packed::<bf16>(seed);
    alone_is_packed::<f16>(seed);
}

/// Batch rows that all kernels find by themselves, and the same listed as packed sequences.
#[test]
fn batch_rows_give_the_bits_of_packed_ones() {
    let Some(_) = stream() else { return };
    for len in [3, 75] {
        let shape = [3, len, 2, 16];
        let draw = &mut Draw::new(5);
        let [q, k, v, d_out] = [(); 4].map(|()| draw.uniform::<f32>(shape.iter().product(), -1.0, 1.0));
        let rows = Inputs::new(View::new(&q, shape), View::new(&k, shape), View::new(&v, shape));
        let all = [1, 3 * len, 2, 16];
        let ends = [0, len, 2 * len, 3 * len];
        let packed = Inputs {
            cu_seqlens: Some(&ends),
            ..Inputs::new(View::new(&q, all), View::new(&k, all), View::new(&v, all))
        };
        assert_eq!(results(&rows, View::new(&d_out, shape)), results(&packed, View::new(&d_out, all)));
    }
}

/// Bits do not depend on how tensors lie: rows that are read whole, element by element, and with elements apart.
#[test]
fn any_layout_gives_the_same_bits() {
    let Some(_) = stream() else { return };
    fn check<T: Element>() {
        let shape @ [batch, steps, heads, d_head] = [2, 70, 2, 16];
        let draw = &mut Draw::new(6);
        let dense = [(); 4].map(|()| draw.uniform::<T>(shape.iter().product(), -1.0, 1.0));
        // Offset, and the distances of batch rows, steps, heads and elements.
        let layouts = [
            (0, [steps * heads * d_head, heads * d_head, d_head, 1]),
            (3, [steps * (heads * d_head + 5), heads * d_head + 5, d_head, 1]),
            (0, [steps * heads * d_head, d_head, steps * d_head, 1]),
            (1, [1, batch, batch * steps, batch * steps * heads]),
        ];
        let mut all = layouts.map(|(offset, strides)| {
            let lay_out = |values: &Vec<T>| {
                let len = offset + (0..4).map(|dim| (shape[dim] - 1) * strides[dim]).sum::<usize>() + 1;
                let mut data = vec![T::from_f32(f32::NAN); len];
                for (n, &value) in values.iter().enumerate() {
                    let index =
                        [n / (steps * heads * d_head), n / (heads * d_head) % steps, n / d_head % heads, n % d_head];
                    data[offset + (0..4).map(|dim| index[dim] * strides[dim]).sum::<usize>()] = value;
                }
                data
            };
            let data = dense.each_ref().map(lay_out);
            let [q, k, v, d_out] = data.each_ref().map(|data| View::new(&data[..], shape).with_layout(offset, strides));
            results(&Inputs::new(q, k, v), d_out)
        });
        let first = std::mem::take(&mut all[0]);
        assert!(all[1..].iter().all(|other| *other == first));
    }
    check::<f32>();
    check::<bf16>();
}

/// What is not finite stays in its sequence and in the heads that read it.
#[test]
fn what_is_not_finite_stays_where_it_is() {
    let Some(_) = stream() else { return };
    let ends = [0, 20, 50, 51];
    let shape = [1, 51, 2, 8];
    for of in 0..4 {
        let draw = &mut Draw::new(8);
        let mut data = [(); 4].map(|()| draw.uniform::<f32>(shape.iter().product(), -1.0, 1.0));
        let run = |[q, k, v, d_out]: &[Vec<f32>; 4]| {
            let inputs = Inputs {
                cu_seqlens: Some(&ends),
                ..Inputs::new(View::new(q, shape), View::new(k, shape), View::new(v, shape))
            };
            results(&inputs, View::new(d_out, shape))
        };
        let before = run(&data);
        // Head 1 of a step of the second sequence.
        data[of][30 * 16 + 8 + 3] = f32::NAN;
        let after = run(&data);
        for (result, (before, after)) in before.iter().zip(&after).enumerate() {
            let per_step = before.len() / 51;
            for n in 0..before.len() {
                let (step, head) = (n / per_step, n % per_step / (per_step / 2));
                let may_change = (20..50).contains(&step) && head == 1;
                assert!(may_change || before[n] == after[n], "input {of}, result {result}, step {step}, head {head}");
            }
        }
        assert_ne!(before, after);
    }
}

#[test]
fn nothing_in_gives_nothing_out() {
    let Some(_) = stream() else { return };
    let none: View<f32, 4> = View::new(&[], [2, 0, 4, 8]);
    assert!(results(&Inputs::new(none, none, none), none).iter().all(Vec::is_empty));
    // Keys that no query has.
    let data = vec![1.0f32; 5 * 2 * 8];
    let (queries, keys) = (View::new(&[][..], [1, 0, 4, 8]), View::new(&data, [1, 5, 2, 8]));
    let range = [KeyRange { row: 0, start: 1, length: 3 }];
    let inputs = Inputs { keys: Some(&range), ..Inputs::new(queries, keys, keys) };
    let [.., k, v] = results(&inputs, queries);
    assert!(k.iter().chain(&v).all(|&bits| bits == 0) && k.len() == data.len());
}

#[test]
fn what_lies_elsewhere_or_does_not_fit_is_named() {
    let Some(stream) = stream() else { return };
    let copies = Copies::new(&stream);
    let data = copies.slice(&[1.0f32; 64]);
    let (out, lse, short) = (copies.slice(&[7.0f32; 24]), copies.slice(&[7.0f32; 12]), copies.slice(&[7.0f32; 23]));
    let q = View::on_device(data, [1, 3, 4, 2]);
    let kv = View::on_device(data, [1, 3, 2, 2]);
    let plain = Inputs::new(q, kv, kv);
    let refused = |inputs: Inputs<f32, Cuda>, outputs: OutputMut<f32, Cuda>, text: &str| {
        let error = cuda::forward(&stream, &inputs, outputs).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error}");
    };
    refused(plain, OutputMut { out: &mut *short, lse: &mut *lse }, "`out`: expected (batch, length, heads, d_head)");
    refused(plain, OutputMut { out: &mut *out, lse: &mut *short }, "`lse`: expected (batch, length, heads)");
    let far = View::on_device(data, [1, 30, 2, 2]);
    refused(Inputs { v: far, ..plain }, OutputMut { out: &mut *out, lse: &mut *lse }, "`v`: expected shape");
    // One element that is repeated, more often than kernels count.
    let many = kv.with_layout(0, [0; 4]);
    let many = View { shape: [1, (1 << 30) + 1, 2, 2], ..many };
    let keys = [KeyRange { row: 0, start: 0, length: (1 << 30) + 1 }];
    let inputs = Inputs { k: many, v: many, keys: Some(&keys), ..plain };
    refused(inputs, OutputMut { out: &mut *out, lse: &mut *lse }, "`k`: expected at most 2^30 keys");
    let other = cudarc::driver::CudaContext::new_non_primary(0, 0).ok().map(|context| context.default_stream());
    if let Some(other) = other {
        let to = OutputMut { out: &mut *out, lse: &mut *lse };
        let error = cuda::forward(&other, &plain, to).unwrap_err().to_string();
        assert!(error.contains("expected memory of"), "{error}");
    }
    // Keys of two sequences at one place.
    let keys = [KeyRange { row: 0, start: 0, length: 3 }, KeyRange { row: 0, start: 2, length: 1 }];
    let inputs = Inputs { keys: Some(&keys), cu_seqlens: Some(&[0, 2, 3]), ..plain };
    let [d_q, d_k, d_v] = [24, 12, 12].map(|len| copies.slice(&vec![7.0f32; len]));
    let outputs = OutputGradients { out: q, lse: View::on_device(data, [1, 3, 4]), d_out: q };
    let to = GradientsMut { q: &mut *d_q, k: &mut *d_k, v: &mut *d_v };
    let error = cuda::backward(&stream, &inputs, outputs, to).unwrap_err().to_string();
    assert!(error.starts_with("`keys`: expected keys of one sequence each"), "{error}");
    for buffer in [out, lse, short, d_q, d_k, d_v] {
        let mut host = vec![0.0f32; buffer.len()];
        copies.download(buffer, &mut host);
        assert!(host.iter().all(|&x| x == 7.0), "written on an error");
    }
}
