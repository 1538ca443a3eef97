//! Selective updates.

use half::{bf16, f16};
use selective_scan::decode::{ColumnNorms, Columns, Linear, LinearMut, SelectiveUpdate, SelectiveUpdateMut, reference};
use selective_scan::{Element, Isa, Projection, View, norm, state_update};

use super::{
    Pool, assert_each, cpu_device, matrix, rounded, run_linear, run_state_update, run_update, sum_error, tensor, unit,
};
use crate::support::device::Device;
use crate::support::draw::{Draw, seeded};
use crate::support::strided::{Layout, Strided};
use crate::support::tolerance::bits;

/// What an update reads, and the pool.
#[derive(Debug, Clone)]
pub(super) struct Case<T, St> {
    pub(super) u: Strided<T>,
    pub(super) columns: Strided<T>,
    pub(super) dt_weight: Strided<T>,
    pub(super) norms: Option<Norms>,
    pub(super) a: Vec<f32>,
    pub(super) d: Option<Vec<f32>>,
    pub(super) delta_bias: Option<Vec<f32>>,
    pub(super) z: Option<Strided<T>>,
    pub(super) pool: Pool<St>,
}

#[derive(Debug, Clone)]
pub(super) struct Norms {
    pub(super) weights: Option<[Vec<f32>; 3]>,
    pub(super) eps: f64,
}

fn vector(data: &[f32]) -> View<'_, f32, 1> {
    View::new(data, [data.len()])
}

impl<T: Element, St: Element> Case<T, St> {
    fn draw(draw: &mut Draw, [rows, d_inner, d_state, dt_rank]: [usize; 4]) -> Self {
        let norms = |draw: &mut Draw| Norms {
            weights: draw.flag().then(|| [dt_rank, d_state, d_state].map(|size| draw.uniform(size, -1.5, 1.5))),
            eps: draw.one_of(&[1e-6f32, 1e-5, 0.1]).into(),
        };
        Self {
            u: tensor(draw, [rows, d_inner], 2.0),
            columns: tensor(draw, [rows, dt_rank + 2 * d_state], 1.0),
            dt_weight: tensor(draw, [d_inner, dt_rank], 1.0),
            norms: draw.flag().then(|| norms(draw)),
            a: draw.uniform(d_inner * d_state, -2.0, -0.01),
            d: draw.flag().then(|| draw.uniform(d_inner, -1.0, 1.0)),
            delta_bias: draw.flag().then(|| draw.uniform(d_inner, -1.0, 1.0)),
            z: draw.flag().then(|| tensor(draw, [rows, d_inner], 2.0)),
            pool: Pool::draw(draw, rows, [d_inner, d_state]),
        }
    }

    fn any(draw: &mut Draw, rows: usize) -> Self {
        let d_state = draw.one_of(&[1, 3, 8, 16, 16, 17, 32]);
        let size = [super::count_rows(draw, rows), super::size(draw, 150), d_state, super::size(draw, 64)];
        Self::draw(draw, size)
    }

    /// Rows, d_inner, d_state, dt_rank.
    fn size(&self) -> [usize; 4] {
        [self.u.shape[1], self.u.shape[2], self.pool.shape[2], self.dt_weight.shape[2]]
    }

    pub(super) fn inputs(&self) -> SelectiveUpdate<'_, T> {
        let [_, d_inner, d_state, _] = self.size();
        SelectiveUpdate {
            norms: self.norms.as_ref().map(|norms| ColumnNorms {
                weights: norms.weights.as_ref().map(|weights| [0, 1, 2].map(|i| vector(&weights[i]))),
                eps: norms.eps,
            }),
            d: self.d.as_deref().map(vector),
            delta_bias: self.delta_bias.as_deref().map(vector),
            z: self.z.as_ref().map(matrix),
            slots: self.pool.slots(),
            ..SelectiveUpdate::new(
                matrix(&self.u),
                matrix(&self.columns),
                matrix(&self.dt_weight),
                View::new(&self.a, [d_inner, d_state]),
            )
        }
    }

    /// The output, and the pool's storage afterwards.
    fn run(&self, device: Device) -> (Vec<T>, Vec<St>) {
        let [rows, d_inner, ..] = self.size();
        let (mut out, mut pool) = (vec![T::from_f32(7.0); rows * d_inner], self.pool.data.clone());
        let outputs = SelectiveUpdateMut::new(self.pool.view_mut(&mut pool), &mut out[..]);
        run_update(device, &self.inputs(), outputs);
        (out, pool)
    }

    /// By columns that are projected from `u`: the output, the pool's storage afterwards, and the columns.
    fn run_projected(&self, device: Device, x_proj: &Strided<T>) -> (Vec<T>, Vec<St>, Vec<T>) {
        let [rows, d_inner, d_state, dt_rank] = self.size();
        let (mut out, mut pool) = (vec![T::from_f32(7.0); rows * d_inner], self.pool.data.clone());
        let mut columns = vec![T::from_f32(7.0); rows * (dt_rank + 2 * d_state)];
        let of_columns = Columns::Projected { weight: matrix(x_proj) };
        let inputs = SelectiveUpdate { columns: of_columns, ..self.inputs() };
        let outputs = SelectiveUpdateMut::new(self.pool.view_mut(&mut pool), &mut out[..]);
        run_update(device, &inputs, SelectiveUpdateMut { columns: Some(&mut columns[..]), ..outputs });
        (out, pool, columns)
    }

    /// Asserts that an update has the same bits again, and that these rows have the same by themselves.
    fn assert_alone(&self, device: Device, rows: impl IntoIterator<Item = usize>, seed: u64) {
        let d_inner = self.size()[1];
        let (out, pool) = self.run(device);
        let (again, pool_again) = self.run(device);
        assert_eq!([bits(&out), bits(&pool)], [bits(&again), bits(&pool_again)], "again, seed {seed}");
        for row in rows {
            let alone = self.of_row(row);
            let (alone_out, alone_pool) = alone.run(device);
            let what = format!("row {row} of {:?}, {device:?}, seed {seed}", self.size());
            assert_eq!(bits(&alone_out), bits(&out[row * d_inner..(row + 1) * d_inner]), "{what}");
            for ((touched, alone), all) in alone.pool.is_touched().into_iter().zip(&alone_pool).zip(&pool) {
                assert!(!touched || alone.to_f32().to_bits() == all.to_f32().to_bits(), "{what}: the state");
            }
        }
    }

    fn of_row(&self, row: usize) -> Self {
        Self {
            u: self.u.steps(row..row + 1),
            columns: self.columns.steps(row..row + 1),
            z: self.z.as_ref().map(|z| z.steps(row..row + 1)),
            pool: self.pool.of_row(row),
            ..self.clone()
        }
    }

    /// The three parts of a row's columns, normed.
    fn parts(&self, row: usize) -> [Vec<f64>; 3] {
        let [_, _, d_state, dt_rank] = self.size();
        let mut at = 0;
        [dt_rank, d_state, d_state].map(|size| {
            let part = Strided { offset: self.columns.offset + at * self.columns.strides[2], ..self.columns.clone() };
            let part = Strided { shape: [1, part.shape[1], size], ..part }.steps(row..row + 1).dense();
            let mut part: Vec<f64> = part.data.iter().map(|x| f64::from(x.to_f32())).collect();
            if let Some(norms) = &self.norms {
                let scale = 1.0 / (part.iter().map(|x| x * x).sum::<f64>() / size as f64 + norms.eps).sqrt();
                let which = [0, dt_rank, dt_rank + d_state].iter().position(|first| *first == at).expect("a part");
                for (i, x) in part.iter_mut().enumerate() {
                    *x *= scale * norms.weights.as_ref().map_or(1.0, |weights| f64::from(weights[which][i]));
                }
            }
            at += size;
            part
        })
    }

    /// How far the output and the states after it, `(d_inner, d_state)`, of a row that has this slot may be off.
    fn allowed(&self, row: usize, slot: usize, out: &[f64], after: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let [_, d_inner, d_state, dt_rank] = self.size();
        let [dt, b, c] = self.parts(row);
        // What is normed is rounded, and sums itself up first.
        let normed = |size| if self.norms.is_some() { unit::<T>() + sum_error(size) } else { 0.0 };
        let weight = self.dt_weight.dense();
        let u = self.u.steps(row..row + 1).dense();
        let z = self.z.as_ref().map(|z| z.steps(row..row + 1).dense());
        let (mut out_allowed, mut state_allowed) = (Vec::new(), Vec::new());
        for channel in 0..d_inner {
            let terms = dt.iter().zip(&weight.data[channel * dt_rank..]).map(|(x, w)| x * f64::from(w.to_f32()));
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
            let bias = self.delta_bias.as_ref().map_or(0.0, |bias| f64::from(bias[channel]));
            let error = rounded::<T>(sum, (sum_error(dt_rank) + normed(dt_rank)) * size);
            let delta = (sum + bias).max(0.0) + (-(sum + bias).abs()).exp().ln_1p();
            // The slope of softplus is at most 1, and it is within 2^-21 itself.
            let error = error + sum_error(1) * (sum.abs() + bias.abs()) + delta * f64::exp2(-21.0);
            let u = f64::from(u.data[channel].to_f32());
            let skip = self.d.as_ref().map_or(0.0, |d| (f64::from(d[channel]) * u).abs());
            let (mut y, mut size) = (0.0, skip);
            for n in 0..d_state {
                let a = f64::from(self.a[channel * d_state + n].abs());
                let h = f64::from(self.pool.data[self.pool.index([slot, channel, n])].to_f32().abs());
                let input = (b[n] * u).abs();
                // The decay is at most 1 and within 2^-19, for its exponent is rounded twice.
                let decayed = h * (a * error + f64::exp2(-19.0));
                let entered = input * (error + (normed(d_state) + sum_error(2)) * (delta + error));
                let is = after[channel * d_state + n];
                let off = decayed + entered + sum_error(1) * (h + input * delta);
                state_allowed.push(rounded::<St>(is, off));
                y += c[n].abs() * off + normed(d_state) * (c[n] * is).abs();
                size += c[n].abs() * (is.abs() + off);
            }
            let y = y + sum_error(d_state + 2) * size;
            let gate = z.as_ref().map_or(1.0, |z| {
                let z = f64::from(z.data[channel].to_f32());
                (z / (1.0 + (-z).exp())).abs()
            });
            let want = out[channel];
            out_allowed.push(rounded::<T>(want, y * gate * 1.001 + want.abs() * f64::exp2(-20.0)));
        }
        (out_allowed, state_allowed)
    }
}

pub(super) fn against_reference<T: Element, St: Element>(
    device: &dyn Fn(&mut Draw) -> Device,
    rounds: usize,
    rows: usize,
) {
    for _ in 0..rounds {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let device = device(draw);
        let case = Case::<T, St>::any(draw, rows);
        let [rows, d_inner, d_state, _] = case.size();
        let (out, pool) = case.run(device);
        let (want, after) = reference::selective_update(&case.inputs(), case.pool.view()).expect("the case is valid");
        for row in 0..rows {
            let what = format!("row {row} of {:?}, {:?}, {device:?}, seed {seed}", case.size(), (T::DTYPE, St::DTYPE));
            let (out, want) = (&out[row * d_inner..][..d_inner], &want[row * d_inner..][..d_inner]);
            let Some(slot) = case.pool.slot(row) else {
                assert!(out.iter().all(|x| x.to_f32().to_bits() == 0), "{what}: padding");
                continue;
            };
            let after = &after[row * d_inner * d_state..][..d_inner * d_state];
            let (out_allowed, state_allowed) = case.allowed(row, slot, want, after);
            assert_each(out, want, &out_allowed, &what);
            let places = (0..d_inner * d_state).map(|i| case.pool.index([slot, i / d_state, i % d_state]));
            let states: Vec<St> = places.map(|place| pool[place]).collect();
            assert_each(&states, after, &state_allowed, &format!("{what}: the state"));
        }
        for ((touched, is), was) in case.pool.is_touched().into_iter().zip(&pool).zip(&case.pool.data) {
            assert!(touched || is.to_f32().to_bits() == was.to_f32().to_bits(), "seed {seed}: another state");
        }
    }
}

#[test]
fn as_the_reference() {
    against_reference::<f32, f32>(&cpu_device, 30, 20);
    against_reference::<f16, f32>(&cpu_device, 10, 20);
    against_reference::<bf16, f32>(&cpu_device, 10, 20);
    against_reference::<f32, bf16>(&cpu_device, 10, 20);
    against_reference::<f16, f16>(&cpu_device, 10, 20);
    against_reference::<bf16, bf16>(&cpu_device, 10, 20);
    against_reference::<bf16, f16>(&cpu_device, 10, 20);
}

/// A row by itself, in whatever company, and again.
pub(super) fn rows_do_not_depend_on_each_other<T: Element, St: Element>(
    device: &dyn Fn(&mut Draw) -> Device,
    rounds: usize,
    rows: usize,
) {
    for _ in 0..rounds {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let device = device(draw);
        let case = Case::<T, St>::any(draw, rows);
        case.assert_alone(device, 0..case.size()[0], seed);
    }
}

/// The same of as many rows and channels as have a lane of a GPU take several parts of a channel's states, where one row has it take
/// one.
#[cfg(feature = "cuda")]
pub(super) fn rows_do_not_depend_on_lanes<T: Element, St: Element>(device: &dyn Fn(&mut Draw) -> Device) {
    // So many rows of so many channels that lanes have several parts; of 187 a warp has more than it takes at once. The last has more ranks
    // than there is room for.
    for (rows, d_state, dt_rank) in [(34, 16, 48), (34, 64, 4), (187, 16, 48), (34, 16, 2000)] {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let device = device(draw);
        // Of vectors, and of states that lie together, as lanes with several parts want them.
        let case = loop {
            let case = Case::<T, St>::draw(draw, [rows, 1030, d_state, dt_rank]);
            let is_aligned = case.pool.offset.is_multiple_of(16 / size_of::<St>());
            if case.pool.strides == [1030 * d_state, d_state, 1] && is_aligned {
                break Case { dt_weight: case.dt_weight.dense(), ..case };
            }
        };
        case.assert_alone(device, [0, 17, rows - 1], seed);
    }
}

#[test]
fn a_row_alone_and_among_others() {
    rows_do_not_depend_on_each_other::<f32, f32>(&cpu_device, 10, 14);
    rows_do_not_depend_on_each_other::<bf16, f32>(&cpu_device, 10, 14);
    rows_do_not_depend_on_each_other::<f16, bf16>(&cpu_device, 10, 14);
}

/// Tensors with any strides have the bits of dense ones.
pub(super) fn strides_change_no_bits<T: Element>(device: Device, rounds: usize, rows: usize) {
    for _ in 0..rounds {
        let (_, seed) = seeded();
        let case = Case::<T, f32>::any(&mut Draw::new(seed), rows);
        let dense = Case {
            u: case.u.dense(),
            columns: case.columns.dense(),
            dt_weight: case.dt_weight.dense(),
            z: case.z.as_ref().map(Strided::dense),
            ..case.clone()
        };
        assert_eq!(bits(&case.run(device).0), bits(&dense.run(device).0), "{:?}, {device:?}, seed {seed}", case.size());
    }
}

#[test]
fn any_strides() {
    for isa in Isa::available() {
        strides_change_no_bits::<f32>(Device::Cpu(isa), 10, 9);
        strides_change_no_bits::<bf16>(Device::Cpu(isa), 10, 9);
    }
}

/// An update with x_proj has the bits of a product and then the update.
pub(super) fn projected_columns_are_a_product_before<T: Element, St: Element>(
    device: &dyn Fn(&mut Draw) -> Device,
    rounds: usize,
    rows: usize,
) {
    for round in 0..rounds {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let device = device(draw);
        let mut case = Case::<T, St>::any(draw, rows);
        if round % 2 == 0 {
            // What the blocks of a cluster can share, of fewer and of more columns than they take at a time.
            let size = [super::count_rows(draw, rows), 8 * super::size(draw, 20), draw.one_of(&[4, 16, 32, 64]), 0];
            let size = [size[0], size[1], size[2], 4 * super::size(draw, 20)];
            case = Case::draw(draw, size);
            case = Case { u: case.u.dense(), dt_weight: case.dt_weight.dense(), ..case };
        }
        let [rows, d_inner, d_state, dt_rank] = case.size();
        let mut x_proj = tensor::<T>(draw, [dt_rank + 2 * d_state, d_inner], 0.3);
        if round % 2 == 0 {
            x_proj = x_proj.dense();
        }
        let (out, pool, columns) = case.run_projected(device, &x_proj);

        let mut want = vec![T::from_f32(7.0); columns.len()];
        let product = Linear::new(matrix(&case.u), matrix(&x_proj));
        run_linear::<_, _, _, f32>(device, &product, LinearMut::new(&mut want[..]));
        let mut values = want.iter().map(|x| x.to_f32());
        let shape = [1, rows, dt_rank + 2 * d_state];
        let given = Strided::new(shape, Layout::default(), || values.next().expect("as many"));
        let (want_out, want_pool) = Case { columns: given, ..case.clone() }.run(device);
        let what = format!("{:?}, {:?}, {device:?}, seed {seed}", case.size(), (T::DTYPE, St::DTYPE));
        assert_eq!(bits(&columns), bits(&want), "{what}: columns");
        assert_eq!(bits(&out), bits(&want_out), "{what}: out");
        assert_eq!(bits(&pool), bits(&want_pool), "{what}: states");
    }
}

#[test]
fn columns_are_a_product_before() {
    projected_columns_are_a_product_before::<f32, f32>(&cpu_device, 10, 9);
    projected_columns_are_a_product_before::<bf16, f32>(&cpu_device, 10, 9);
}

/// With step sizes that are columns, times powers of two, the update is that of these step sizes.
pub(super) fn known_step_sizes<T: Element, St: Element>(
    device: &dyn Fn(&mut Draw) -> Device,
    rounds: usize,
    rows: usize,
) {
    for _ in 0..rounds {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let device = device(draw);
        let d_inner = super::size(draw, 70);
        let size = [super::count_rows(draw, rows), d_inner, draw.one_of(&[1, 8, 16, 17]), d_inner];
        let mut case = Case { norms: None, ..Case::<T, St>::draw(draw, size) };
        for i in 0..d_inner * d_inner {
            case.dt_weight.set([0, i / d_inner, i % d_inner], 0.0);
        }
        for channel in 0..d_inner {
            // The channels the other way round.
            case.dt_weight.set([0, channel, d_inner - 1 - channel], [0.5, 1.0, 2.0][channel % 3]);
        }
        let (out, pool) = case.run(device);

        let [rows, _, d_state, _] = size;
        let columns = case.columns.dense();
        let delta: Vec<T> = (0..rows * d_inner)
            .map(|i| {
                let (row, channel) = (i / d_inner, i % d_inner);
                let dt = columns.data[row * columns.shape[2] + d_inner - 1 - channel].to_f32();
                T::from_f32(dt * [0.5, 1.0, 2.0][channel % 3])
            })
            .collect();
        let inputs = case.inputs();
        let of_one_token = |view: View<'_, T, 2>| {
            let [rows, columns] = view.shape;
            let [row, column] = view.strides;
            (view.offset, [rows, 1, columns], [row, 0, column])
        };
        let of_columns = matrix(&case.columns);
        let part = |first: usize| {
            let (offset, [rows, ..], [row, _, column]) = of_one_token(of_columns);
            let view = View::new(of_columns.data, [rows, 1, 1, d_state]);
            Projection::Varying(view.with_layout(offset + (d_inner + first) * column, [row, 0, 0, column]))
        };
        let activation = |view: View<'_, T, 2>| -> (usize, [usize; 3], [usize; 3]) { of_one_token(view) };
        let (offset, shape, strides) = activation(inputs.u);
        let u = View::new(inputs.u.data, shape).with_layout(offset, strides);
        let update = state_update::Inputs {
            z: inputs.z.map(|z| {
                let (offset, shape, strides) = activation(z);
                View::new(z.data, shape).with_layout(offset, strides)
            }),
            d: inputs.d,
            delta_bias: inputs.delta_bias,
            slots: inputs.slots,
            options: state_update::Options { delta_softplus: true, ..Default::default() },
            ..state_update::Inputs::new(u, View::new(&delta, [rows, 1, d_inner]), inputs.a, part(0), part(d_state))
        };
        let (mut want, mut states) = (vec![T::from_f32(7.0); rows * d_inner], case.pool.data.clone());
        let outputs = state_update::UpdateMut::new(case.pool.view_mut(&mut states), &mut want[..]);
        run_state_update(device, &update, outputs);
        let what = format!("{size:?}, {:?}, {device:?}, seed {seed}", (T::DTYPE, St::DTYPE));
        assert_eq!(bits(&out), bits(&want), "{what}");
        assert_eq!(bits(&pool), bits(&states), "{what}: the pool");
    }
}

#[test]
fn the_update_of_known_step_sizes() {
    known_step_sizes::<f32, f32>(&cpu_device, 20, 14);
    known_step_sizes::<bf16, f32>(&cpu_device, 20, 14);
    known_step_sizes::<f16, f16>(&cpu_device, 20, 14);
    known_step_sizes::<bf16, bf16>(&cpu_device, 20, 14);
}

/// On processors the norms are the operator's, rounded.
#[test]
fn norms_are_those_of_the_columns() {
    fn check<T: Element>() {
        for _ in 0..15 {
            let (_, seed) = seeded();
            let draw = &mut Draw::new(seed);
            let device = cpu_device(draw);
            let mut case = Case::<T, f32>::any(draw, 9);
            case.norms.get_or_insert(Norms { weights: None, eps: 1e-5 });
            let (inputs, [rows, _, d_state, dt_rank]) = (case.inputs(), case.size());
            let norms = inputs.norms.expect("there are some");
            let width = dt_rank + 2 * d_state;
            let mut columns = vec![0.0f32; rows * width];
            let mut first = 0;
            for (i, size) in [dt_rank, d_state, d_state].into_iter().enumerate() {
                let view = matrix(&case.columns);
                let x = View::new(view.data, [rows, size]);
                let x = x.with_layout(view.offset + first * view.strides[1], view.strides);
                let options = norm::Options { eps: norms.eps, ..Default::default() };
                let weight = norms.weights.map(|weights| weights[i]);
                let normed: norm::Output<T, T> =
                    norm::Inputs { weight, options, ..norm::Inputs::new(x) }.forward().expect("valid");
                for (at, value) in normed.out.iter().enumerate() {
                    columns[at / size * width + first + at % size] = value.to_f32();
                }
                first += size;
            }
            let mut values = columns.into_iter();
            let columns = Strided::new([1, rows, width], Default::default(), || values.next().expect("as many"));
            let after = Case { columns, norms: None, ..case.clone() };
            let ((out, pool), (want, states)) = (case.run(device), after.run(device));
            assert_eq!([bits(&out), bits(&pool)], [bits(&want), bits(&states)], "{device:?}, seed {seed}");
        }
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

/// What is not finite in a row stays there.
pub(super) fn what_is_not_finite_stays(device: &dyn Fn(&mut Draw) -> Device, rounds: usize) {
    for _ in 0..rounds {
        let (_, seed) = seeded();
        let draw = &mut Draw::new(seed);
        let device = device(draw);
        let case = Case::<bf16, f32>::any(draw, 7);
        let [rows, d_inner, ..] = case.size();
        let row = draw.one_of(&(0..rows).collect::<Vec<_>>());
        let value = draw.one_of(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]);
        let mut other = case.clone();
        let column = draw.one_of(&(0..case.columns.shape[2]).collect::<Vec<_>>());
        other.columns.set([0, row, column], value);
        let ((out, pool), (other_out, other_pool)) = (case.run(device), other.run(device));
        let what = format!("{value} in row {row} of {:?}, {device:?}, seed {seed}", case.size());
        for i in (0..rows).filter(|&i| i != row) {
            let range = i * d_inner..(i + 1) * d_inner;
            assert_eq!(bits(&other_out[range.clone()]), bits(&out[range]), "{what}: row {i}");
        }
        let of_row = case.pool.of_row(row).is_touched();
        for ((own, other), before) in of_row.into_iter().zip(&other_pool).zip(&pool) {
            assert!(own || other.to_bits() == before.to_bits(), "{what}: the state of another");
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    what_is_not_finite_stays(&cpu_device, 40);
}

/// Updates that several threads share.
#[test]
fn threads_change_no_bits() {
    let (_, seed) = seeded();
    let case = Case::<f32, f32>::draw(&mut Draw::new(seed), [5, 1030, 16, 70]);
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        let (out, states) = pool.install(|| case.run(Device::best()));
        [bits(&out), bits(&states)]
    };
    let one = run(1);
    assert!([2, 3].into_iter().all(|threads| run(threads) == one), "seed {seed}");
}
