//! Slots as tensors: as lists on the host, and on a GPU read when an update runs.

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor};
use selective_scan::candle::{ConvUpdate, Slots, StateUpdate, rollback};

use super::values;
use crate::support::draw::{Draw, seeded};

const BATCH: usize = 3;
const D: usize = 6;
const N: usize = 8;
const WIDTH: usize = 4;
const POOL: usize = 5;

/// The tensors of both updates.
struct Updates {
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    rows: Tensor,
    states: Tensor,
}

impl Updates {
    fn new(seed: u64, device: &Device) -> Self {
        let mut draw = Draw::new(seed);
        let mut random = |shape: &[usize], low, high| {
            let data = draw.uniform::<f32>(shape.iter().product(), low, high);
            Tensor::from_vec(data, shape, device).expect("as many as the shape says")
        };
        Self {
            x: random(&[BATCH, 2, D], -1.0, 1.0),
            weight: random(&[D, WIDTH], -1.0, 1.0),
            a: random(&[D, N], -2.0, -0.1),
            b: random(&[BATCH, 2, N], -1.0, 1.0),
            rows: random(&[POOL, WIDTH - 1, D], -1.0, 1.0),
            states: random(&[POOL, D, N], -1.0, 1.0),
        }
    }

    /// Two tokens, of which the second is rejected.
    fn run(&self, slots: Slots) -> candle_core::Result<Vec<Tensor>> {
        let (u, kept) =
            ConvUpdate { slots, ..ConvUpdate::new(&self.x, &self.weight) }.update_with_token_states(&self.rows)?;
        rollback(&self.rows, &kept, slots, &[1; BATCH])?;
        let update = StateUpdate { slots, ..StateUpdate::new(&u, &self.x, &self.a, &self.b, &self.b) };
        let (out, kept) = update.update_with_token_states(&self.states)?;
        rollback(&self.states, &kept, slots, &[1; BATCH])?;
        Ok(vec![u, out])
    }

    /// What has been written, after `results`.
    fn all(&self, results: &[Tensor]) -> Vec<Vec<f64>> {
        results.iter().chain([&self.rows, &self.states]).map(values).collect()
    }
}

fn list(slots: &[i32], device: &Device) -> Tensor {
    Tensor::new(slots, device).expect("a tensor")
}

/// Writes slots into a tensor from element 1 on, since candle copies no `i32` on GPUs.
struct Write<'a>(&'a [i32]);

impl InplaceOp1 for Write<'_> {
    fn name(&self) -> &'static str {
        "write-slots"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        let CpuStorage::I32(data) = storage else { candle_core::bail!("i32 is expected") };
        data[1..][..self.0.len()].copy_from_slice(self.0);
        Ok(())
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, _: &Layout) -> candle_core::Result<()> {
        let stream = storage.device.cuda_stream();
        let to = storage.as_cuda_slice_mut::<i32>()?;
        stream.memcpy_htod(self.0, &mut to.slice_mut(1..=self.0.len())).map_err(candle_core::Error::wrap)
    }
}

/// A tensor of slots, also one that is a part of another, gives the bits of a list on the host; and other slots once others
/// stand in it.
pub fn as_a_list(device: &Device) {
    let (_, seed) = seeded();
    let (ours, expected) = (Updates::new(seed, device), Updates::new(seed, device));
    let wide = list(&[7, 4, -1, 1, 7], device);
    let slots = wide.narrow(0, 1, BATCH).expect("a range");
    for host in [[4, -1, 1], [0, 3, 4]] {
        wide.inplace_op1(&Write(&host)).expect("they fit");
        let got = ours.run((&slots).into()).expect("valid");
        let want = expected.run((&host).into()).expect("valid");
        assert!(ours.all(&got) == expected.all(&want), "{host:?}, seed {seed}");
    }
}

#[test]
fn a_tensor_is_as_a_list() {
    as_a_list(&Device::Cpu);
}

/// On a GPU, what a pool does not have is padding.
#[cfg_attr(not(feature = "candle-cuda"), allow(dead_code, reason = "for devices that the host does not read from"))]
pub fn beyond_a_pool(device: &Device) {
    let (_, seed) = seeded();
    let (ours, expected) = (Updates::new(seed, device), Updates::new(seed, device));
    let got = ours.run((&list(&[POOL as i32, 2, i32::MAX], device)).into()).expect("what it says is not known");
    let want = expected.run((&[-1, 2, -1]).into()).expect("valid");
    assert!(ours.all(&got) == expected.all(&want), "seed {seed}");
}

/// What cannot be a list of slots is named, and nothing is written.
pub fn refused(device: &Device) {
    let updates = Updates::new(1, device);
    let before = updates.all(&[]);
    let column = list(&[0, 3, 1, 4, 2, 0], device).reshape((3, 2)).and_then(|x| x.narrow(1, 0, 1)?.squeeze(1));
    let tensor = list(&[0, -1, 2], device);
    let cases = [
        (Tensor::zeros(BATCH, DType::U32, device).expect("a tensor"), "`slots`: expected dtype I32, got U32"),
        (list(&[0, 1], device), "`slots`: expected one for each of 3 batch rows, got 2"),
        (tensor.unsqueeze(0).expect("a view"), "`slots`: expected shape (batch), got [1, 3]"),
        (column.expect("a column"), "`slots`: expected a contiguous tensor, got stride [2]"),
    ];
    for (slots, expected) in cases {
        let slots = Slots::from(&slots);
        let conv = ConvUpdate { slots, ..ConvUpdate::new(&updates.x, &updates.weight) };
        let update =
            StateUpdate { slots, ..StateUpdate::new(&updates.x, &updates.x, &updates.a, &updates.b, &updates.b) };
        let kept = Tensor::zeros((BATCH, 2, D, N), DType::F32, device).expect("a tensor");
        for result in [
            conv.update(&updates.rows).map(drop),
            update.update(&updates.states).map(drop),
            rollback(&updates.states, &kept, slots, &[1; BATCH]),
            slots.check(BATCH, "pool", &updates.states),
            slots.of_rows(BATCH, "pool", &updates.states).map(drop),
        ] {
            let error = result.expect_err("it is none").to_string();
            assert!(error.starts_with(expected), "{error}");
        }
    }
    // The host does not know which rows are padding on a GPU, so that every count is checked.
    if !device.is_cpu() {
        let kept = Tensor::zeros((BATCH, 2, D, N), DType::F32, device).expect("a tensor");
        let error = rollback(&updates.states, &kept, &tensor, &[1, 3, 1]).expect_err("two tokens").to_string();
        assert!(error.starts_with("`accepted`: expected from 1 to 2 tokens of each row, got 3 for row 1"), "{error}");
    }
    assert!(updates.all(&[]) == before, "nothing is written");
}

#[test]
fn what_is_no_list_is_refused() {
    refused(&Device::Cpu);
    // A list on the processor is read.
    let updates = Updates::new(1, &Device::Cpu);
    let before = updates.all(&[]);
    for (slots, expected) in [
        ([0, POOL as i32, 1], "`slots`: expected slots below 5, or negative ones for padding, got 5 for row 1"),
        ([3, 0, 3], "`slots`: expected a different slot for every row, got 3 twice"),
    ] {
        let error = updates.run((&list(&slots, &Device::Cpu)).into()).expect_err("they are wrong").to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    assert!(updates.all(&[]) == before, "nothing is written");
}
