//! S4D on slices.

mod accuracy;
mod arguments;
mod case;
mod properties;
mod update;
