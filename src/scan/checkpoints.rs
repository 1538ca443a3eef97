//! What a forward pass keeps for a backward pass, and of which inputs.

use std::convert::Infallible;
use std::fmt;
use std::hash::{DefaultHasher, Hasher};

use rayon::prelude::*;

use super::{Options, Problem};
use crate::kinds::{Field, Map, Nothing, Views};
use crate::{Element, Error, Host, Result, View};

/// What [`forward_with_checkpoints`](super::Inputs::forward_with_checkpoints) keeps for
/// [`backward`](super::Inputs::backward): one state of every channel for every 64 steps, and what they were computed from.
///
/// A backward pass over other inputs is refused, with an error that names `checkpoints` and says what differs: the shape,
/// the options, `cu_seqlens`, or the values of an input that the states depend on (`u`, `delta`, `a`, `b`, `delta_bias`,
/// `initial_state`; the states do not depend on `c`, `d` and `z`, which may have changed). Values are compared by a sample
/// of at least four elements of each row, of every step and of every channel's parameters: other tensors are found, and so
/// is another token; a single element that was changed may not be.
#[derive(Clone, PartialEq)]
pub struct Checkpoints {
    pub(super) states: Vec<f32>,
    origin: Origin,
}

impl Checkpoints {
    pub(super) fn new<T: Element>(states: Vec<f32>, problem: &Problem<T>) -> Self {
        Self { states, origin: Origin::of(problem) }
    }

    /// The states, as [`cpu::backward`](super::cpu::backward) takes them.
    pub fn as_slice(&self) -> &[f32] {
        &self.states
    }

    /// Checks that these are the checkpoints of these inputs.
    pub(super) fn check<T: Element>(&self, problem: &Problem<T>) -> Result<()> {
        match self.origin.difference(problem) {
            None => Ok(()),
            Some(got) => {
                let expected = "those of a forward pass over the same inputs with the same options";
                Err(Error::argument("checkpoints", expected, got))
            }
        }
    }
}

impl fmt::Debug for Checkpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoints").field("states", &self.states.len()).field("origin", &self.origin).finish()
    }
}

/// What the states of a scan depend on.
#[derive(Debug, Clone, PartialEq)]
struct Origin {
    shape: [usize; 4],
    options: Options,
    cu_seqlens: Option<Vec<usize>>,
    values: Values,
}

/// A fingerprint of the values of each input that is there, by name.
type Values = Vec<(&'static str, u64)>;

impl Origin {
    fn of<T: Element>(problem: &Problem<T>) -> Self {
        Self {
            shape: shape(problem),
            options: problem.inputs.options,
            cu_seqlens: problem.inputs.cu_seqlens.map(<[usize]>::to_vec),
            values: values(problem),
        }
    }

    /// What these inputs have that the others have not. Values are looked at last, and only at those of a problem of the
    /// same size: it has been run, so that it can be counted through.
    fn difference<T: Element>(&self, others: &Problem<T>) -> Option<String> {
        if self.shape != shape(others) {
            let names = "(batch, length, d_inner, d_state)";
            return Some(format!("those of {names} = {:?}, where the inputs have {:?}", self.shape, shape(others)));
        }
        if self.options != others.inputs.options {
            return Some(format!("those of {:?}, where the inputs have {:?}", self.options, others.inputs.options));
        }
        if self.cu_seqlens.as_deref() != others.inputs.cu_seqlens {
            return Some("those of other `cu_seqlens`".into());
        }
        let theirs = values(others);
        let of = |values: &Values, name: &str| values.iter().find(|(other, _)| *other == name).map(|(_, value)| *value);
        let mut names = self.values.iter().chain(&theirs).map(|(name, _)| *name);
        let name = names.find(|&name| of(&self.values, name) != of(&theirs, name))?;
        Some(match (of(&self.values, name), of(&theirs, name)) {
            (Some(_), None) => format!("those of inputs with `{name}`"),
            (None, _) => format!("those of inputs without `{name}`"),
            _ => format!("those of other values of `{name}`"),
        })
    }
}

/// `(batch, length, d_inner, d_state)`.
fn shape<T: Element>(problem: &Problem<T>) -> [usize; 4] {
    [problem.dims.batch, problem.dims.len, problem.dims.d_inner, problem.dims.d_state]
}

fn values<T: Element>(problem: &Problem<T>) -> Values {
    let mut fingerprints = Fingerprints(Values::new());
    // Without steps no states are kept, and there may be more channels than can be counted through.
    if problem.dims.batch * problem.dims.len > 0 {
        let Ok(_) = problem.inputs.tensors().map(&mut fingerprints);
    }
    fingerprints.0
}

/// Takes the fingerprints of all inputs that the states depend on.
struct Fingerprints(Values);

impl Fingerprints {
    fn add<T: Element, const R: usize>(&mut self, field: Field, view: &View<T, R>) {
        if !matches!(field.name, "c" | "d" | "z") {
            self.0.push((field.name, fingerprint(view)));
        }
    }
}

impl<'a, T: Element> Map<Views<'a, T, Host>, Nothing> for Fingerprints {
    type Error = Infallible;

    fn activation<const R: usize>(&mut self, field: Field, view: View<'a, T, R>) -> Result<(), Infallible> {
        self.add(field, &view);
        Ok(())
    }

    fn parameter<const R: usize>(&mut self, field: Field, view: View<'a, f32, R>) -> Result<(), Infallible> {
        self.add(field, &view);
        Ok(())
    }
}

/// The elements of a row that are looked at.
const SAMPLE: usize = 4;

/// Rows that are worth a task.
const ROWS_PER_TASK: usize = 256;

/// A number that nearly surely differs for tensors of one shape that differ in a row, wherever they lie and however they
/// are laid out.
///
/// It has to cost little beside a backward pass, which does `d_state` states of work for every element of a row. So of each
/// row (the last dimension) [`SAMPLE`] elements are looked at, evenly spread, and others in the next row. With 1,536
/// channels of 16 states that is a dozen reads for a step of u, delta and B, some tenths of a microsecond, beside 14 µs for a
/// step backward on one core and 4 forward; for A, or an initial state, about as much as a few steps. All elements would be
/// read from memory once more, a good part of what a forward pass takes.
fn fingerprint<T: Element, const R: usize>(view: &View<T, R>) -> u64 {
    let width = view.shape[R - 1];
    // Checked, with all other shapes, to be countable.
    let rows: usize = view.shape[..R - 1].iter().product();
    let hash = |row: usize| {
        let mut index = [0; R];
        let mut rest = row;
        for k in (0..R - 1).rev() {
            index[k] = rest % view.shape[k];
            rest /= view.shape[k];
        }
        let mut hasher = DefaultHasher::new();
        hasher.write_usize(row);
        for i in 0..SAMPLE.min(width) {
            index[R - 1] = (i * width / SAMPLE.min(width) + row) % width;
            hasher.write_u32(view.at(index).to_bits());
        }
        hasher.finish()
    };
    // Each row's number is part of its hash, so that the order in which these are added does not matter.
    (0..rows).into_par_iter().with_min_len(ROWS_PER_TASK).map(hash).reduce(|| 0, u64::wrapping_add)
}
