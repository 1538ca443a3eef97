//! What a recurrent layer is made of.

use candle_core::Result;

use crate::nn::{COUNTABLE, argument, sum};

/// The cell of a recurrent layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RecurrentCell {
    /// Long short-term memory (Hochreiter and Schmidhuber 1997, with a forget gate).
    Lstm,
    /// A gated recurrent unit (Cho et al. 2014, arXiv 1406.1078), whose reset gate is applied after the product, as in PyTorch.
    Gru,
}

impl RecurrentCell {
    /// The gates, each of which has a row of weights for every number of the state.
    pub(super) fn gates(self) -> usize {
        match self {
            Self::Lstm => 4,
            Self::Gru => 3,
        }
    }

    /// The vectors of a state.
    pub(super) fn vectors(self) -> usize {
        match self {
            Self::Lstm => 2,
            Self::Gru => 1,
        }
    }
}

/// A recurrent layer: a cell of candle-nn's, and a projection back to the layer's width.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecurrentConfig {
    /// The width of its input and output.
    pub d_model: usize,
    /// The width of the state.
    pub d_hidden: usize,
    /// The cell.
    pub cell: RecurrentCell,
    /// What initial weights are drawn from, together with each parameter's name.
    pub seed: u64,
}

impl RecurrentConfig {
    /// A cell whose state is as wide as the layer.
    pub fn new(d_model: usize, cell: RecurrentCell) -> Self {
        Self { d_model, d_hidden: d_model, cell, seed: 0 }
    }

    pub(crate) fn check(&self) -> Result<()> {
        for (name, size) in [("d_model", self.d_model), ("d_hidden", self.d_hidden)] {
            if size == 0 {
                return Err(argument(name, "at least 1", size));
            }
        }
        self.parameter_count().map(|_| ())
    }

    /// The number of parameters of a layer.
    ///
    /// # Errors
    /// More than can be counted.
    pub(crate) fn parameter_count(&self) -> Result<usize> {
        let &Self { d_model, d_hidden, cell, .. } = self;
        let gates = cell.gates();
        let count = sum(&[
            [gates, d_hidden, d_model],
            [gates, d_hidden, d_hidden],
            [gates, d_hidden, 2],
            [d_hidden, d_model, 1],
        ]);
        count
            .filter(|count| *count <= COUNTABLE)
            .ok_or_else(|| argument("d_hidden", "sizes whose parameters can be counted", format_args!("{self:?}")))
    }
}
