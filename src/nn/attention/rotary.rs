//! Rotary positions.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::rotary_emb::rope_thd;

use crate::candle::node;

/// The angles of all positions up to some: made once, for all layers whose pairs are turned alike.
#[derive(Debug)]
pub(super) struct RotaryTables {
    /// By how much pairs are turned from one position to the next.
    rates: Vec<f64>,
    /// On each device that has been asked for.
    tables: Mutex<Vec<Rotary>>,
}

/// The angles of steps: their cosines and sines, `(steps, d_head / 2)` for all sequences alike or `(batch, steps, d_head / 2)`, `f32`.
#[derive(Debug, Clone)]
pub(super) struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

/// The positions of a table at least.
const LEAST: usize = 1024;

impl RotaryTables {
    /// Those of these rates, which live as long as a layer has them.
    pub fn of(rates: Vec<f64>) -> Arc<Self> {
        static ALL: Mutex<Vec<Weak<RotaryTables>>> = Mutex::new(Vec::new());
        // (For both locks: a panic while one was held cannot have left what it guards half changed.)
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|tables| tables.strong_count() > 0);
        if let Some(known) = all.iter().filter_map(Weak::upgrade).find(|known| known.rates == rates) {
            return known;
        }
        let new = Arc::new(Self { rates, tables: Mutex::default() });
        all.push(Arc::downgrade(&new));
        new
    }

    /// Of these positions, `batch · length` of them.
    pub fn at(&self, positions: &[usize], batch: usize, device: &Device) -> Result<Rotary> {
        let length = positions.len() / batch.max(1);
        let Rotary { cos, sin } = self.table(positions.iter().max().map_or(0, |most| most + 1), device)?;
        let start = positions.first().copied().unwrap_or(0);
        let is_run = |row: &[usize]| row.iter().enumerate().all(|(i, &position)| position == start + i);
        if positions.chunks(length.max(1)).all(is_run) {
            return Ok(Rotary { cos: cos.narrow(0, start, length)?, sin: sin.narrow(0, start, length)? });
        }
        // A table has fewer than 2^32 rows, or it would not have fit.
        let rows = Tensor::from_iter(positions.iter().map(|&position| position as u32), device)?;
        let of = |table: &Tensor| table.index_select(&rows, 0)?.reshape((batch, length, self.rates.len()));
        Ok(Rotary { cos: of(&cos)?, sin: of(&sin)? })
    }

    /// The table of at least `count` positions.
    fn table(&self, count: usize, device: &Device) -> Result<Rotary> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let known = tables.iter().position(|table| table.cos.device().same_device(device));
        if let Some(at) = known
            && tables[at].cos.dim(0)? >= count
        {
            return Ok(tables[at].clone());
        }
        let count = count.next_power_of_two().max(LEAST);
        // In f64, as in f32 a position of some ten thousand turns is off by more than the rounding of the result.
        let angles = || (0..count).flat_map(|position| self.rates.iter().map(move |rate| position as f64 * rate));
        let made = |f: fn(f64) -> f64| {
            let numbers: Vec<f32> = angles().map(|angle| f(angle) as f32).collect();
            Tensor::from_vec(numbers, (count, self.rates.len()), device)
        };
        let new = Rotary { cos: made(f64::cos)?, sin: made(f64::sin)? };
        match known {
            Some(at) => tables[at] = new.clone(),
            None => tables.push(new.clone()),
        }
        Ok(new)
    }
}

impl Rotary {
    /// Turns the heads of `x`, `(batch, length, heads, d_head)`, in its type. Differentiable.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let turned = turn(&x.detach(), &self.cos, &self.sin)?;
        let Self { cos, sin } = self.clone();
        // The way back turns the other way.
        let backward = move |d_out: &Tensor| Ok(vec![Some(turn(d_out, &cos, &sin.neg()?)?)]);
        // SAFETY: the result is a tensor of its own, of which no other handle is left.
        unsafe { node("rotary", &[x], turned, backward) }
    }
}

fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?.contiguous()?;
    rope_thd(&wide, cos, sin)?.to_dtype(x.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether positions run or not, and whatever the table was made for, a position has its angles.
    #[test]
    fn a_position_has_its_angles() {
        let tables = RotaryTables::of(vec![1.0, 0.01]);
        assert!(Arc::ptr_eq(&tables, &RotaryTables::of(vec![1.0, 0.01])));
        assert!(!Arc::ptr_eq(&tables, &RotaryTables::of(vec![1.0, 0.02])));
        for (positions, batch) in [
            (vec![0, 1, 2, 0, 1, 2], 2),
            (vec![5, 6, 7], 1),
            (vec![0, 1, 0, 1, 2, 3], 1),
            (vec![3000, 3001, 17, 18], 2),
            (vec![4], 1),
            (vec![0, 0], 2),
            (vec![7, 9], 2),
            (vec![], 1),
        ] {
            let rotary = tables.at(&positions, batch, &Device::Cpu).unwrap();
            let length = positions.len() / batch;
            let shape = (batch, length, 2);
            for (table, f) in [(&rotary.cos, f64::cos as fn(f64) -> f64), (&rotary.sin, f64::sin)] {
                let got = table.broadcast_as(shape).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let want =
                    positions.iter().flat_map(|&position| [1.0, 0.01].map(|rate| f(position as f64 * rate) as f32));
                assert_eq!(got, want.collect::<Vec<_>>(), "{positions:?}");
            }
        }
    }
}
