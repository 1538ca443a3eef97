//! What the arguments of the scan and of the state update have in common.

use bytemuck::Pod;

use crate::{Element, Error, Host, Memory, Result, View};

/// The largest `d_state` that the operators take.
pub const MAX_D_STATE: usize = 256;

/// How the continuous system `h' = A h + B u` becomes a recurrence with step size `Δ`; `exp(ΔA)` multiplies the state
/// in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Discretization {
    /// The input is weighted by `Δ B`, Euler's rule for the input, which is what Mamba uses.
    #[default]
    Euler,
    /// The input is weighted by `(exp(ΔA) - 1)/A · B`, exact for an input that is held over the step (equation 4 of
    /// Gu and Dao 2023). Where `A` is 0 this is `Δ B`.
    ZeroOrderHold,
}

/// `B` or `C`: a projection of the input at every step, or constant over time.
#[derive(Debug)]
pub enum Projection<'a, T: Element, M: Memory = Host> {
    /// Shape `(batch, length, groups, d_state)`: each group serves `d_inner/groups` neighbouring channels.
    Varying(View<'a, T, 4, M>),
    /// Shape `(d_inner, d_state)`, the same at every step.
    Constant(View<'a, f32, 2, M>),
}

impl<T: Element, M: Memory> Clone for Projection<'_, T, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, M: Memory> Copy for Projection<'_, T, M> {}

impl<'a, T: Element, M: Memory> From<View<'a, T, 4, M>> for Projection<'a, T, M> {
    fn from(view: View<'a, T, 4, M>) -> Self {
        Self::Varying(view)
    }
}

impl<'a, T: Element, M: Memory> From<View<'a, f32, 2, M>> for Projection<'a, T, M> {
    fn from(view: View<'a, f32, 2, M>) -> Self {
        Self::Constant(view)
    }
}

/// The sizes of a checked problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dims {
    pub batch: usize,
    pub len: usize,
    pub d_inner: usize,
    pub d_state: usize,
    pub groups: usize,
}

impl Dims {
    /// Checks the sizes that `u`, `a`, `b` and `c` give, and the shapes and extents of the last three.
    pub fn check<T: Element, M: Memory>(
        names: [&'static str; 4],
        u: &View<T, 3, M>,
        a: &View<f32, 2, M>,
        b: &Projection<T, M>,
        c: &Projection<T, M>,
    ) -> Result<Self> {
        let [u_name, a_name, b_name, c_name] = names;
        let [batch, len, d_inner] = u.shape;
        check_count(u_name, u)?;
        let d_state = a.shape[1];
        if !(1..=MAX_D_STATE).contains(&d_state) {
            let expected = format_args!("d_state from 1 to {MAX_D_STATE} as its last dimension").to_string();
            return Err(Error::argument(a_name, expected, format_args!("shape {:?}", a.shape)));
        }
        a.check(a_name, "(d_inner, d_state)", [d_inner, d_state])?;
        let groups = match (b, c) {
            (Projection::Varying(b), _) => Some((b_name, b.shape[2])),
            (_, Projection::Varying(c)) => Some((c_name, c.shape[2])),
            _ => None,
        };
        let groups = match groups {
            Some((name, groups)) if groups == 0 || d_inner % groups != 0 => {
                return Err(Error::argument(name, format_args!("groups that divide d_inner = {d_inner}"), groups));
            }
            Some((_, groups)) => groups,
            None => 1,
        };
        for (name, projection) in [(b_name, b), (c_name, c)] {
            match projection {
                Projection::Varying(view) => {
                    view.check(name, "(batch, length, groups, d_state)", [batch, len, groups, d_state])?;
                }
                Projection::Constant(view) => view.check(name, "(d_inner, d_state)", [d_inner, d_state])?,
            }
        }
        Ok(Self { batch, len, d_inner, d_state, groups })
    }

    /// The channels that share one group's `B` and `C`.
    pub fn group_channels(&self) -> usize {
        self.d_inner / self.groups
    }
}

/// Checks that an activation `(batch, length, d_inner)` has channels, and that its elements can be counted.
pub(crate) fn check_count<T: Element, M: Memory>(argument: &'static str, view: &View<T, 3, M>) -> Result<()> {
    let [batch, len, d_inner] = view.shape;
    if d_inner == 0 {
        return Err(Error::argument(argument, "at least one channel", format_args!("shape {:?}", view.shape)));
    }
    if batch.checked_mul(len).and_then(|n| n.checked_mul(d_inner)).is_none_or(|n| n > isize::MAX as usize) {
        return Err(Error::argument(argument, "fewer than 2^63 elements", format_args!("shape {:?}", view.shape)));
    }
    Ok(())
}

/// A zeroed vector, or an error that names the argument whose shape asks for more than there is.
pub(crate) fn zeroed<T: Pod>(argument: &'static str, shape: &[usize]) -> Result<Vec<T>> {
    let len = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    let mut data = Vec::new();
    match len {
        Some(len) if data.try_reserve_exact(len).is_ok() => {
            data.resize(len, T::zeroed());
            Ok(data)
        }
        _ => Err(Error::argument(argument, "a shape that fits in memory", format_args!("{shape:?}"))),
    }
}
