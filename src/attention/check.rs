//! The only checks of attention's arguments, on any memory.

use super::tensors::Sizes;
use super::{GradientsMut, Inputs, KeyRange, MAX_D_HEAD, OutputGradients, OutputMut};
use crate::kinds::{CheckGradients, CheckViews};
use crate::sequences::{Sequence, Sequences};
use crate::view::check_len;
use crate::{Element, Error, Host, Memory, Result, View};

pub(super) const QUERY_NAMES: &str = "(batch, length, heads, d_head)";
pub(super) const LSE_NAMES: &str = "(batch, length, heads)";

/// A sequence of queries, and where its keys lie.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pub queries: Sequence,
    pub keys: KeyRange,
    pub causal: bool,
}

impl Part {
    /// The number of keys that the query of step `i` sees.
    pub fn seen(&self, i: usize) -> usize {
        match self.causal {
            true => self.keys.length - self.queries.len + i + 1,
            false => self.keys.length,
        }
    }
}

/// Checks shapes and where keys lie.
fn check_shapes<'a>(
    q: [usize; 4],
    k: [usize; 4],
    scale: Option<f32>,
    cu_seqlens: Option<&'a [usize]>,
    keys: Option<&'a [KeyRange]>,
    causal: bool,
) -> Result<(Sizes, Sequences<'a>)> {
    let ([batch, length, heads, d_head], [rows, steps, kv_heads, _]) = (q, k);
    if !(1..=MAX_D_HEAD).contains(&d_head) {
        let expected = format_args!("d_head from 1 to {MAX_D_HEAD} as its last dimension").to_string();
        return Err(Error::argument("q", expected, format_args!("shape {q:?}")));
    }
    for (name, shape) in [("q", q), ("k", k)] {
        let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
        if count.is_none_or(|count| count > isize::MAX as usize) {
            return Err(Error::argument(name, "fewer than 2^63 elements", format_args!("shape {shape:?}")));
        }
    }
    if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
        let expected = format_args!("kv_heads that divide the {heads} heads of `q`").to_string();
        return Err(Error::argument("k", expected, kv_heads));
    }
    if let Some(scale) = scale.filter(|scale| !scale.is_finite()) {
        return Err(Error::argument("scale", "a finite number", scale));
    }
    let sequences = Sequences::check(batch, length, cu_seqlens)?;
    match keys {
        None if [rows, steps] != [batch, length] => {
            let expected = format_args!("{batch} rows and {length} steps, as `q`, where `keys` is absent").to_string();
            return Err(Error::argument("k", expected, format_args!("shape {k:?}")));
        }
        None => {}
        Some(ranges) => {
            if ranges.len() != sequences.count() {
                let expected = format_args!("{}, one for each sequence", sequences.count()).to_string();
                return Err(Error::argument("keys", expected, ranges.len()));
            }
            for (queries, range) in sequences.iter().zip(ranges) {
                let end = range.start.checked_add(range.length);
                // A query has one key at least.
                let least = if causal { queries.len } else { queries.len.min(1) };
                if range.row >= rows || end.is_none_or(|end| end > steps) || range.length < least {
                    let expected = format_args!("at least {least} of {steps} steps in a row below {rows}").to_string();
                    return Err(Error::argument("keys", expected, format_args!("{range:?}")));
                }
            }
        }
    }
    Ok((Sizes { batch, length, heads, d_head, rows, steps, kv_heads }, sequences))
}

/// Checks that no key belongs to two sequences, whose gradients would meet there.
pub(crate) fn check_apart(keys: &[KeyRange]) -> Result<()> {
    let mut sorted: Vec<_> = keys.iter().filter(|range| range.length > 0).collect();
    sorted.sort_unstable_by_key(|range| (range.row, range.start));
    let meets = |pair: &&[&KeyRange]| pair[0].row == pair[1].row && pair[0].start + pair[0].length > pair[1].start;
    match sorted.windows(2).find(meets) {
        None => Ok(()),
        Some(pair) => {
            let got = format_args!("{:?} and {:?}", pair[0], pair[1]).to_string();
            Err(Error::argument("keys", "keys of one sequence each, where there are gradients", got))
        }
    }
}

impl<'a, T: Element, M: Memory> Inputs<'a, T, M> {
    /// Checks every argument. This is the only place that does; all implementations read what it returns.
    pub(crate) fn check(&self) -> Result<Problem<'a, T, M>> {
        let (sizes, sequences) =
            check_shapes(self.q.shape, self.k.shape, self.scale, self.cu_seqlens, self.keys, self.causal)?;
        self.tensors().shaped(sizes).map(&mut CheckViews)?;
        let scale = self.scale.unwrap_or_else(|| default_scale(sizes.d_head));
        Ok(Problem { inputs: *self, sizes, sequences, scale })
    }
}

fn default_scale(d_head: usize) -> f32 {
    (1.0 / (d_head as f64).sqrt()) as f32
}

/// Inputs that have passed [`Inputs::check`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Problem<'a, T: Element, M: Memory = Host> {
    pub inputs: Inputs<'a, T, M>,
    pub sizes: Sizes,
    pub sequences: Sequences<'a>,
    pub scale: f32,
}

impl<T: Element, M: Memory> Problem<'_, T, M> {
    /// The sequences that have queries, with their keys.
    pub fn parts(&self) -> Vec<Part> {
        // Batch rows without a step could be more than can be counted through.
        if self.sizes.length == 0 {
            return Vec::new();
        }
        (0..self.sequences.count()).map(|index| self.part(index)).filter(|part| part.queries.len > 0).collect()
    }

    /// A sequence, with its keys.
    pub fn part(&self, index: usize) -> Part {
        let queries = self.sequences.get(index);
        let own = KeyRange { row: queries.batch, start: queries.start, length: queries.len };
        Part { queries, keys: self.inputs.keys.map_or(own, |keys| keys[index]), causal: self.inputs.causal }
    }

    /// Checks what a forward pass writes.
    pub fn check_output(&self, outputs: &OutputMut<T, M>) -> Result<()> {
        let shape = self.inputs.q.shape;
        check_len("out", QUERY_NAMES, &shape, M::len(outputs.out))?;
        check_len("lse", LSE_NAMES, &shape[..3], M::len(outputs.lse))
    }

    /// Checks what a backward pass reads beside the inputs, and what it writes.
    pub fn check_backward(&self, outputs: &OutputGradients<T, M>, gradients: &GradientsMut<T, M>) -> Result<()> {
        let shape = self.inputs.q.shape;
        let check = |name, view: &View<T, 4, M>| view.check(name, QUERY_NAMES, shape);
        check("out", &outputs.out)?;
        check("d_out", &outputs.d_out)?;
        outputs.lse.check("lse", LSE_NAMES, [shape[0], shape[1], shape[2]])?;
        check_apart(self.inputs.keys.unwrap_or_default())?;
        self.inputs.tensors().zip(gradients.by_ref())?.shaped(self.sizes).map(&mut CheckGradients)?;
        Ok(())
    }
}
