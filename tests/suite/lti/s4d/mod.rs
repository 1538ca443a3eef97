//! S4D on slices.

mod accuracy;
mod arguments;
pub mod case;
mod properties;
mod update;
