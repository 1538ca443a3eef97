//! What can go wrong.

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operator did not run. When an argument does not fit, nothing has been written.
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
    /// The CUDA driver could not do what was needed. Only operators on GPUs give this.
    #[error("{action}: {message}")]
    Cuda {
        /// What was being done.
        action: String,
        /// What the driver said.
        message: String,
    },
}

/// So that `?` takes cudarc's own calls beside those of this crate.
#[cfg(feature = "cuda")]
impl From<cudarc::driver::DriverError> for Error {
    fn from(error: cudarc::driver::DriverError) -> Self {
        Self::cuda("calling the CUDA driver", error)
    }
}

impl Error {
    /// An [`Error::Cuda`].
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(action: impl std::fmt::Display, error: cudarc::driver::DriverError) -> Self {
        let message = match (error.error_name(), error.error_string()) {
            (Ok(name), Ok(text)) => format!("{} ({})", text.to_string_lossy(), name.to_string_lossy()),
            _ => format!("{error:?}"),
        };
        Self::Cuda { action: action.to_string(), message }
    }

    /// An [`Error::Argument`], also for operators and models that stand on this crate.
    pub fn argument(argument: &'static str, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Self {
        Self::Argument { argument, expected: expected.to_string(), got: got.to_string() }
    }
}
