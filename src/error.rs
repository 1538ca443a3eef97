//! What can go wrong.

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operator refused to run. Nothing has been written when an operator returns one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument does not fit the operator or the other arguments.
    #[error("`{argument}`: expected {expected}, got {got}")]
    Argument {
        /// The argument's name as the operator's documentation gives it.
        argument: &'static str,
        /// What would have been accepted.
        expected: String,
        /// What was passed.
        got: String,
    },
}

impl Error {
    /// An [`Error::Argument`]; the parts are turned into text here.
    pub(crate) fn argument(
        argument: &'static str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Self {
        Self::Argument { argument, expected: expected.to_string(), got: got.to_string() }
    }
}
