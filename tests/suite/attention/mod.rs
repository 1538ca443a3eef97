//! Attention: the fast path against the reference, the reference against finite differences and PyTorch, and its properties.

#[cfg(feature = "candle")]
pub mod candle;
#[cfg(feature = "cuda")]
mod gpu;

use half::{bf16, f16};
use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::attention::{
    Gradients, Inputs, KeyRange, MAX_D_HEAD, Output, OutputGradients, OutputMut, cpu, reference,
};
use selective_scan::{Element, Isa, View};

use crate::support::draw::{Draw, seeded};
use crate::support::tolerance::{assert_close, assert_close_to, bits, error};
use crate::support::vectors::{self, FORWARD, GRADIENTS, REFERENCE};

/// A tensor of four dimensions, which may have columns that are not its own between its heads.
#[derive(Debug, Clone)]
struct Heads<T> {
    data: Vec<T>,
    shape: [usize; 4],
    /// Between the steps and between the heads.
    strides: [usize; 2],
    offset: usize,
}

impl<T: Element> Heads<T> {
    fn draw(draw: &mut Draw, shape: [usize; 4], size: f32) -> Self {
        let [batch, steps, heads, d_head] = shape;
        let (strides, offset) = match draw.one_of(&[0, 1, 2]) {
            0 => ([heads * d_head, d_head], 0),
            // Columns of something wider, as of a projection to queries, keys and values at once.
            1 => ([heads * d_head + 5, d_head], 3),
            // The heads first, as PyTorch has them.
            _ => ([d_head, steps * d_head], 0),
        };
        let row = (steps * heads * d_head).max(steps * strides[0]);
        // What lies between must not be read: NaN would show.
        let mut tensor = Self { data: vec![T::from_f32(f32::NAN); offset + batch * row], shape, strides, offset };
        let values: Vec<f32> = draw.uniform(shape.iter().product(), -size, size);
        for (index, value) in indices(shape).zip(values) {
            let place = tensor.place(index);
            tensor.data[place] = T::from_f32(value);
        }
        tensor
    }

    fn view(&self) -> View<'_, T, 4> {
        let [_, steps, heads, d_head] = self.shape;
        let row = (steps * heads * d_head).max(steps * self.strides[0]);
        View::new(&self.data[..], self.shape).with_layout(self.offset, [row, self.strides[0], self.strides[1], 1])
    }

    /// All values, without what lies between them.
    fn values(&self) -> impl Iterator<Item = f64> {
        indices(self.shape).map(|index| f64::from(self.data[self.place(index)].to_f32()))
    }

    fn place(&self, [b, i, h, d]: [usize; 4]) -> usize {
        let view = self.view();
        view.offset + b * view.strides[0] + i * view.strides[1] + h * view.strides[2] + d
    }

    fn largest(&self) -> f64 {
        self.values().map(f64::abs).fold(0.0, f64::max)
    }

    fn root_mean_square(&self) -> f64 {
        (self.values().map(|x| x * x).sum::<f64>() / self.shape.iter().product::<usize>() as f64).sqrt()
    }
}

fn indices([a, b, c, d]: [usize; 4]) -> impl Iterator<Item = [usize; 4]> {
    (0..a * b * c * d).map(move |i| [i / (b * c * d), i / (c * d) % b, i / d % c, i % d])
}

/// A call.
#[derive(Debug, Clone)]
struct Case<T> {
    q: Heads<T>,
    k: Heads<T>,
    v: Heads<T>,
    d_out: Heads<T>,
    scale: Option<f32>,
    cu_seqlens: Option<Vec<usize>>,
    keys: Option<Vec<KeyRange>>,
    causal: bool,
}

impl<T: Element> Case<T> {
    /// `length` queries of a sequence, in batch rows or packed in any way, some of them with keys before theirs, or with any
    /// number of keys where all are seen.
    fn draw(rng: &mut StdRng, length: usize) -> Self {
        let mut draw = Draw::new(rng.random());
        let (kv_heads, group) = (draw.one_of(&[1, 2, 3]), draw.one_of(&[1, 2, 5]));
        let d_head = draw.one_of(&[1, 4, 8, 20, 64]);
        let is_packed = draw.flag();
        let batch = if is_packed { 1 } else { draw.one_of(&[1, 2]) };
        let causal = draw.flag();
        let cut = rng.random_range(0..=length);
        let cu_seqlens = is_packed.then(|| vec![0, cut, cut, length]);
        let lens = match &cu_seqlens {
            Some(ends) => ends.windows(2).map(|ends| ends[1] - ends[0]).collect(),
            None => vec![length; batch],
        };
        let keys = draw.flag().then(|| {
            // One after another in a few rows.
            let (mut row, mut start) = (0, 0);
            let range = |&len: &usize| {
                if rng.random() {
                    (row, start) = (row + 1, rng.random_range(0..3));
                }
                let length = match causal || len == 0 {
                    true => len + rng.random_range(0..80),
                    false => rng.random_range(1..len + 80),
                };
                let range = KeyRange { row, start, length };
                start += length;
                range
            };
            lens.iter().map(range).collect::<Vec<_>>()
        });
        let [rows, steps] = match &keys {
            Some(keys) => {
                let most = |of: &dyn Fn(&KeyRange) -> usize| keys.iter().map(of).max().unwrap_or(1);
                [most(&|range| range.row + 1), most(&|range| range.start + range.length) + 2]
            }
            None => [batch, length],
        };
        let (queries, keys_shape) = ([batch, length, kv_heads * group, d_head], [rows, steps, kv_heads, d_head]);
        // Scores that differ by little, and some that leave one key only.
        let size = draw.one_of(&[1.0, 4.0]);
        Self {
            q: Heads::draw(&mut draw, queries, size),
            k: Heads::draw(&mut draw, keys_shape, size),
            v: Heads::draw(&mut draw, keys_shape, 1.0),
            d_out: Heads::draw(&mut draw, queries, 1.0),
            scale: draw.flag().then_some(0.3),
            cu_seqlens,
            keys,
            causal,
        }
    }

    fn inputs(&self) -> Inputs<'_, T> {
        Inputs {
            scale: self.scale,
            cu_seqlens: self.cu_seqlens.as_deref(),
            keys: self.keys.as_deref(),
            causal: self.causal,
            ..Inputs::new(self.q.view(), self.k.view(), self.v.view())
        }
    }
}

/// Both passes, into buffers that hold something else before.
fn run<T: Element>(isa: Isa, inputs: &Inputs<T>, d_out: View<T, 4>) -> (Output<T>, Gradients<T>) {
    let shape = inputs.q.shape;
    let seven = |shape: &[usize]| vec![T::from_f32(7.0); shape.iter().product()];
    let mut output = Output { out: seven(&shape), lse: vec![7.0; shape[..3].iter().product()] };
    cpu::forward_with(isa, inputs, OutputMut { out: &mut output.out, lse: &mut output.lse }).unwrap();
    let outputs = OutputGradients {
        out: View::new(&output.out, shape),
        lse: View::new(&output.lse, [shape[0], shape[1], shape[2]]),
        d_out,
    };
    let mut gradients = Gradients::new(seven(&shape), seven(&inputs.k.shape), seven(&inputs.v.shape));
    cpu::backward_with(isa, inputs, outputs, gradients.as_mut()).unwrap();
    (output, gradients)
}

/// Scores of up to 64·16·0.3 are off by 2^-24 of that, and weights by as much: up to 1e-5 of each, of random signs. The
/// gradients of queries and keys are differences of terms, and of one key that has all the weight nothing is left: they are off
/// by some roundings of [`terms`].
fn hold<T: Element>(isa: Isa, case: &Case<T>, what: &str) {
    let inputs = case.inputs();
    let (output, gradients) = run(isa, &inputs, case.d_out.view());
    let exact = reference::forward(&inputs).unwrap();
    assert_close(&output.out, &exact.out, FORWARD, &format!("{what}: out"));
    assert_close(&output.lse, &exact.lse, FORWARD, &format!("{what}: lse"));
    hold_gradients(case, &gradients, what);
}

fn hold_gradients<T: Element>(case: &Case<T>, gradients: &Gradients<T>, what: &str) {
    let exact = reference::backward(&case.inputs(), case.d_out.view()).unwrap();
    assert_close(&gradients.v, &exact.v, GRADIENTS, &format!("{what}: v"));
    let roundings = 2e-6 / GRADIENTS;
    assert_close_to(&gradients.q, &exact.q, GRADIENTS, roundings * terms(case, &case.k), &format!("{what}: q"));
    assert_close_to(&gradients.k, &exact.k, GRADIENTS, roundings * terms(case, &case.q), &format!("{what}: k"));
}

/// The norm of what the gradient of queries sums, with the keys as `factor`, or that of keys, with the queries. A term is a
/// weight times the slope by that weight, a product `d_out · v` of random signs, times `scale` times an entry of the factor. The
/// weights of a query sum to one, so that in both the squares come to those of one term for each entry of the queries at most.
fn terms<T: Element>(case: &Case<T>, factor: &Heads<T>) -> f64 {
    let d_head = case.q.shape[3] as f64;
    let scale = case.scale.map_or(1.0 / d_head.sqrt(), f64::from).abs();
    let slope = d_head.sqrt() * case.d_out.root_mean_square() * case.v.root_mean_square();
    let entries = case.q.shape.iter().product::<usize>() as f64;
    scale * slope * factor.largest() * entries.sqrt()
}

#[test]
fn the_fast_path_is_the_reference() {
    let (mut rng, seed) = seeded();
    for isa in Isa::available() {
        for length in [1, 2, 15, 64, 65, 130, 300] {
            let what = format!("{isa:?}, {length}, SEED={seed}");
            hold(isa, &Case::<f32>::draw(&mut rng, length), &what);
            hold(isa, &Case::<f16>::draw(&mut rng, length), &what);
            hold(isa, &Case::<bf16>::draw(&mut rng, length), &what);
        }
    }
}

/// A score is off by 2^-24 of its size, some 1e-6 here, and a sum of 65,536 terms in 1,024 blocks by the roundings of these.
#[test]
fn long_contexts_and_scores_far_apart() {
    let (mut rng, seed) = seeded();
    for (steps, size) in [(65_536, 1.0), (65_536, 0.0), (500, 20.0)] {
        let mut draw = Draw::new(rng.random());
        let (queries, shape) = ([1, 3, 2, 16], [1, steps, 1, 16]);
        let case = Case::<f32> {
            q: Heads::draw(&mut draw, queries, f32::max(size, 1e-6)),
            k: Heads::draw(&mut draw, shape, f32::max(size, 1e-6)),
            v: Heads::draw(&mut draw, shape, 1.0),
            d_out: Heads::draw(&mut draw, queries, 1.0),
            scale: None,
            cu_seqlens: None,
            keys: Some(vec![KeyRange { row: 0, start: 0, length: steps }]),
            causal: true,
        };
        let inputs = case.inputs();
        let (output, gradients) = run(Isa::best(), &inputs, case.d_out.view());
        let what = format!("{steps} keys, size {size}, SEED={seed}");
        // Values of random signs cancel in a mean: of 65,536 that is a 256th of them.
        let terms = if size < 2.0 { 6f64.sqrt() } else { 0.0 };
        assert_close_to(&output.out, &reference::forward(&inputs).unwrap().out, FORWARD, terms, &what);
        let exact = reference::backward(&inputs, case.d_out.view()).unwrap();
        assert_close(&gradients.v, &exact.v, GRADIENTS, &what);
    }
}

/// Against central differences, whose error is that of the third derivative, a few times h² of a loss of some hundred terms.
#[test]
fn the_reference_is_differentiated_rightly() {
    let (mut rng, seed) = seeded();
    for _ in 0..6 {
        let mut case = Case::<f32>::draw(&mut rng, 9);
        case.scale = Some(0.25);
        let want = reference::backward(&case.inputs(), case.d_out.view()).unwrap();
        let loss = |case: &Case<f32>| {
            let out = reference::forward(&case.inputs()).unwrap().out;
            out.iter().zip(case.d_out.values()).map(|(out, slope)| out * slope).sum::<f64>()
        };
        for of in 0..3 {
            let h = 2f32.powi(-7);
            let shape = [case.q.shape, case.k.shape, case.v.shape][of];
            let nth = rng.random_range(0..shape.iter().product());
            let index = indices(shape).nth(nth).unwrap();
            let moved = |by: f32| {
                let mut other = case.clone();
                let tensor = match of {
                    0 => &mut other.q,
                    1 => &mut other.k,
                    _ => &mut other.v,
                };
                let at = tensor.place(index);
                let before = tensor.data[at];
                tensor.data[at] += by;
                let step = f64::from(tensor.data[at]) - f64::from(before);
                (loss(&other), step)
            };
            let ((above, up), (below, down)) = (moved(h), moved(-h));
            let got = (above - below) / (up - down);
            let want = [&want.q, &want.k, &want.v][of][nth];
            assert!((got - want).abs() < 2e-3 * (1.0 + got.abs()), "{of}, {nth}: {got} {want}, SEED={seed}");
        }
    }
}

/// Both are held to what PyTorch computes: tests/vectors/generate_attention.py.
#[test]
fn pytorch_computes_the_same() {
    for case in vectors::Case::all("attention") {
        let (q, k) = (case.view::<4>("q"), case.view::<4>("k"));
        let cu_seqlens: Option<Vec<usize>> = case.list("cu_seqlens");
        let keys: Vec<_> = (0..k.shape[0]).map(|row| KeyRange { row, start: 0, length: k.shape[1] }).collect();
        let scale = case.options["scale"].as_f64();
        let inputs = Inputs {
            scale: scale.map(|scale| scale as f32),
            cu_seqlens: cu_seqlens.as_deref(),
            keys: (q.shape[1] != k.shape[1]).then_some(&keys[..]),
            causal: case.options["causal"].as_bool().unwrap(),
            ..Inputs::new(q, k, case.view("v"))
        };
        let d_out = case.view("d_out");
        let (exact, grad) = (reference::forward(&inputs).unwrap(), reference::backward(&inputs, d_out).unwrap());
        let (fast, fast_grad) = run(Isa::best(), &inputs, d_out);
        // A scale is an `f32`, by default and otherwise: the root of most sizes, and 0.3, are not.
        let tolerance = if q.shape[3].is_power_of_two() && q.shape[3].ilog2() % 2 == 0 && scale.is_none() {
            REFERENCE
        } else {
            1e-6
        };
        let results = [
            ("out", &exact.out, &fast.out, FORWARD),
            ("lse", &exact.lse, &fast.lse, FORWARD),
            ("grad_q", &grad.q, &fast_grad.q, GRADIENTS),
            ("grad_k", &grad.k, &fast_grad.k, GRADIENTS),
            ("grad_v", &grad.v, &fast_grad.v, GRADIENTS),
        ];
        for (name, exact, fast, promised) in results {
            let (what, want) = (format!("{}, {name}", case.name), &case.results[name]);
            // Of one key there is no gradient but zero, of differences of equal numbers.
            let nothing = want.iter().all(|x| x.abs() < 1e-15);
            assert!(nothing || error(exact, want) < tolerance, "{what}: {:e}", error(exact, want));
            assert_close_to(fast, want, promised, if nothing { 1.0 } else { 0.0 }, &what);
        }
    }
}

/// A sequence has the bits that it has alone, packed or in parts that go on from the keys of the parts before.
#[test]
fn packed_and_in_parts_is_whole() {
    let (mut rng, seed) = seeded();
    for length in [40, 300] {
        let mut draw = Draw::new(rng.random());
        let shape = |heads| [1, length, heads, 8];
        let (q, k, v) = (
            Heads::<f32>::draw(&mut draw, shape(4), 1.0),
            Heads::<f32>::draw(&mut draw, shape(2), 1.0),
            Heads::<f32>::draw(&mut draw, shape(2), 1.0),
        );
        let whole = Inputs::new(q.view(), k.view(), v.view()).forward().unwrap();
        let per_step = 4 * 8;
        let cut = rng.random_range(0..=length);
        let steps = |tensor: &Heads<f32>, from: usize, to: usize| {
            let mut part = tensor.clone();
            part.offset += from * part.strides[0];
            part.shape[1] = to - from;
            let row = tensor.view().strides[0];
            (part, row)
        };
        for (from, to) in [(0, cut), (cut, length)] {
            let (part, row) = steps(&q, from, to);
            let view = View::new(&part.data[..], part.shape)
                .with_layout(part.offset, [row, part.strides[0], part.strides[1], 1]);
            let keys = [KeyRange { row: 0, start: 0, length: to }];
            let inputs = Inputs { keys: Some(&keys), ..Inputs::new(view, k.view(), v.view()) };
            let got = inputs.forward().unwrap();
            assert_eq!(
                bits(&got.out),
                bits(&whole.out[from * per_step..to * per_step]),
                "from {from} to {to} of {length}, SEED={seed}"
            );
        }
        let ends = [0, cut, length];
        let packed = Inputs { cu_seqlens: Some(&ends), ..Inputs::new(q.view(), k.view(), v.view()) }.forward().unwrap();
        // The first of them begins where the whole does.
        assert_eq!(bits(&packed.out[..cut * per_step]), bits(&whole.out[..cut * per_step]), "SEED={seed}");
    }
}

/// What comes later does not reach a query.
#[test]
fn it_is_causal() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let shape = [1, 150, 2, 8];
    let (q, mut k, mut v) = (
        Heads::<f32>::draw(&mut draw, shape, 1.0),
        Heads::<f32>::draw(&mut draw, shape, 1.0),
        Heads::<f32>::draw(&mut draw, shape, 1.0),
    );
    let before = Inputs::new(q.view(), k.view(), v.view()).forward().unwrap();
    let at = rng.random_range(1..150);
    for tensor in [&mut k, &mut v] {
        let place = tensor.offset + at * tensor.strides[0];
        tensor.data[place] += 1.0;
    }
    let after = Inputs::new(q.view(), k.view(), v.view()).forward().unwrap();
    assert_eq!(bits(&before.out[..at * 16]), bits(&after.out[..at * 16]), "step {at}, SEED={seed}");
    assert_ne!(bits(&before.out[at * 16..]), bits(&after.out[at * 16..]), "step {at}, SEED={seed}");
}

/// Where it is not, all keys reach all queries of their sequence and no others; and the order of the keys means nothing but
/// that of a sum: of 150 terms, in tiles of 64, it moves a mean by a few times 1e-7.
#[test]
fn it_is_not_causal_where_it_is_told_so() {
    let (mut rng, seed) = seeded();
    let mut draw = Draw::new(rng.random());
    let (heads, d_head) = (2, 8);
    let shape = [1, 150, heads, d_head];
    let [q, k, v] = [(); 3].map(|()| dense(&mut draw, shape));
    let ends = [0, 90, 150];
    let run = |k: &Heads<f32>, v: &Heads<f32>| {
        let inputs = Inputs { cu_seqlens: Some(&ends), causal: false, ..Inputs::new(q.view(), k.view(), v.view()) };
        inputs.forward().unwrap().out
    };
    let (before, per_step) = (run(&k, &v), heads * d_head);
    // The last step of the first sequence.
    let mut changed = v.clone();
    changed.data[89 * per_step..90 * per_step].iter_mut().for_each(|x| *x += 1.0);
    let after = run(&k, &changed);
    for step in 0..150 {
        let [before, after] = [&before, &after].map(|out| bits(&out[step * per_step..(step + 1) * per_step]));
        assert_eq!(before != after, step < 90, "step {step}, SEED={seed}");
    }
    let reversed = |tensor: &Heads<f32>| {
        let mut other = tensor.clone();
        let (first, second) = tensor.data.split_at(90 * per_step);
        let backwards = |steps: &[f32]| steps.chunks(per_step).rev().flatten().copied().collect::<Vec<_>>();
        other.data = [backwards(first), backwards(second)].concat();
        other
    };
    let [other, whole] = [run(&reversed(&k), &reversed(&v)), before.clone()]
        .map(|out| out.into_iter().map(f64::from).collect::<Vec<_>>());
    assert!(error(&other, &whole) < 1e-6, "SEED={seed}");
    let alone = |tensor: &Heads<f32>| Heads {
        data: tensor.data[90 * per_step..].to_vec(),
        shape: [1, 60, heads, d_head],
        ..tensor.clone()
    };
    let [q, k, v] = [&q, &k, &v].map(alone);
    let alone = Inputs { causal: false, ..Inputs::new(q.view(), k.view(), v.view()) }.forward().unwrap().out;
    assert_eq!(bits(&alone), bits(&before[90 * per_step..]), "SEED={seed}");
}

/// A dense tensor.
fn dense(draw: &mut Draw, shape: [usize; 4]) -> Heads<f32> {
    let data = draw.uniform(shape.iter().product(), -1.0, 1.0);
    Heads { data, shape, strides: [shape[2] * shape[3], shape[3]], offset: 0 }
}

#[test]
fn bad_arguments_are_named() {
    let data = vec![0.0f32; 4 * MAX_D_HEAD * 4];
    let q = View::new(&data, [1, 3, 4, 2]);
    let refused = |inputs: Inputs<f32>, text: &str| {
        assert_eq!(inputs.forward().unwrap_err().to_string(), text);
    };
    let kv = View::new(&data, [1, 3, 2, 2]);
    let plain = Inputs::new(q, kv, kv);
    refused(
        Inputs { k: View::new(&data, [1, 3, 3, 2]), ..plain },
        "`k`: expected kv_heads that divide the 4 heads of `q`, got 3",
    );
    refused(
        Inputs { v: View::new(&data, [1, 3, 2, 1]), ..plain },
        "`v`: expected shape (rows, steps, kv_heads, d_head) = [1, 3, 2, 2], got [1, 3, 2, 1]",
    );
    refused(
        Inputs { k: View::new(&data, [1, 4, 2, 2]), ..plain },
        "`k`: expected 1 rows and 3 steps, as `q`, where `keys` is absent, got shape [1, 4, 2, 2]",
    );
    let wide = View::new(&data, [1, 1, 1, MAX_D_HEAD + 1]);
    refused(
        Inputs::new(wide, wide, wide),
        "`q`: expected d_head from 1 to 256 as its last dimension, got shape [1, 1, 1, 257]",
    );
    refused(Inputs { scale: Some(f32::NAN), ..plain }, "`scale`: expected a finite number, got NaN");
    refused(
        Inputs { keys: Some(&[KeyRange { row: 0, start: 2, length: 2 }]), ..plain },
        "`keys`: expected at least 3 of 3 steps in a row below 1, got KeyRange { row: 0, start: 2, length: 2 }",
    );
    // Where all keys are seen, one is enough.
    let few = Inputs { keys: Some(&[KeyRange { row: 0, start: 2, length: 1 }]), causal: false, ..plain };
    assert!(few.forward().is_ok());
    refused(
        Inputs { keys: Some(&[KeyRange { row: 0, start: 2, length: 0 }]), ..few },
        "`keys`: expected at least 1 of 3 steps in a row below 1, got KeyRange { row: 0, start: 2, length: 0 }",
    );
    refused(Inputs { keys: Some(&[]), ..plain }, "`keys`: expected 1, one for each sequence, got 0");
    let error = cpu::forward(&plain, OutputMut { out: &mut [0.0; 23], lse: &mut [0.0; 12] }).unwrap_err().to_string();
    assert_eq!(error, "`out`: expected (batch, length, heads, d_head) = [1, 3, 4, 2] elements, got 23 elements");
    // The gradients of two sequences would meet in one key.
    let keys = [KeyRange { row: 0, start: 0, length: 3 }, KeyRange { row: 0, start: 2, length: 1 }];
    let inputs = Inputs { keys: Some(&keys), cu_seqlens: Some(&[0, 2, 3]), ..plain };
    let output = inputs.forward().unwrap();
    let error = inputs.backward(&output, q).unwrap_err().to_string();
    assert!(error.starts_with("`keys`: expected keys of one sequence each, where there are gradients"), "{error}");
    let empty = View::new(&data, [2, 0, 2, 2]);
    assert!(Inputs::new(empty, empty, empty).forward().unwrap().out.is_empty());
}
