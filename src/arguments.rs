//! What the arguments of the scan and of the state update have in common.

use bytemuck::Pod;

use crate::kinds::ProjectionOf;
use crate::{Element, Error, Host, Memory, Result, View};

/// The largest `d_state` that the operators take.
pub const MAX_D_STATE: usize = 256;

/// How the continuous system `h' = A h + B u` becomes a recurrence with step size `Δ`; `exp(ΔA)` multiplies the state
/// in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Discretization {
    /// The input is weighted by `Δ B`, Euler's rule for the input, which is what Mamba uses.
    #[default]
    Euler,
    /// The input is weighted by `(exp(ΔA) - 1)/A · B`, exact for an input that is held over the step (equation 4 of
    /// Gu and Dao 2023). Where `A` is 0 this is `Δ B`.
    ZeroOrderHold,
}

/// `B` or `C` as a view: a projection of the input at every step, or constant over time.
pub type Projection<'a, T, M = Host> = ProjectionOf<View<'a, T, 4, M>, View<'a, f32, 2, M>>;

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
    pub sequences: usize,
}

impl Dims {
    /// Checks the sizes that `u`, `a`, `b` and `c` give, every batch row a sequence. `activation` are the names of the
    /// dimensions of `u`. Whether all tensors have the shapes that follow is left to be checked.
    pub fn check<T: Element, M: Memory>(
        activation: &str,
        u: &View<T, 3, M>,
        a: &View<f32, 2, M>,
        b: &Projection<T, M>,
        c: &Projection<T, M>,
    ) -> Result<Self> {
        let [u_name, a_name, b_name, c_name] = ["u", "a", "b", "c"];
        let [batch, len, d_inner] = u.shape;
        check_count(u_name, u)?;
        let d_state = a.shape[1];
        if !(1..=MAX_D_STATE).contains(&d_state) {
            let expected = format_args!("d_state from 1 to {MAX_D_STATE} as its last dimension").to_string();
            return Err(Error::argument(a_name, expected, format_args!("shape {:?}", a.shape)));
        }
        check_channels(u_name, activation, u, a_name, a.shape[0])?;
        for (name, projection) in [(b_name, b), (c_name, c)] {
            if let Projection::Varying(view) = projection {
                check_order(name, view.shape, [batch, len, d_inner, d_state])?;
            }
        }
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
        Ok(Self { batch, len, d_inner, d_state, groups, sequences: batch })
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

/// What to do with a tensor whose last two dimensions have changed places.
const EXCHANGE: &str = "which fits with its last two dimensions exchanged (without a copy, by `permuted([0, 2, 1])` of a \
                        view or `transpose(1, 2)` of a tensor)";

/// Checks an activation's channels against the rows of a parameter, if they fit the other way round: as mamba_ssm has it,
/// `(batch, d_inner, length)`. The parameter then fits no channels, but it is not what is wrong.
pub(crate) fn check_channels<T: Element, M: Memory>(
    argument: &'static str,
    names: &str,
    view: &View<T, 3, M>,
    parameter: &str,
    rows: usize,
) -> Result<()> {
    let [_, len, d_inner] = view.shape;
    if d_inner == rows || len != rows {
        return Ok(());
    }
    let expected = format_args!("shape {names} with d_inner = {rows}, as `{parameter}` has it").to_string();
    Err(Error::argument(argument, expected, format_args!("{:?}, {EXCHANGE}", view.shape)))
}

/// [`View::check`] that says so if the last two of three dimensions have changed places.
pub(crate) fn check_exchanged<T: Element, M: Memory, const R: usize>(
    argument: &'static str,
    names: &str,
    view: &View<T, R, M>,
    shape: [usize; R],
) -> Result<()> {
    let mut exchanged = shape;
    if R == 3 {
        exchanged.swap(1, 2);
    }
    if view.shape != shape && view.shape == exchanged {
        let expected = format_args!("shape {names} = {shape:?}").to_string();
        return Err(Error::argument(argument, expected, format_args!("{:?}, {EXCHANGE}", view.shape)));
    }
    view.check(argument, names, shape)
}

/// Refuses a varying projection whose dimensions come in mamba_ssm's order, `(batch, groups, d_state, length)` or, for one
/// group, `(batch, d_state, length)`, which tensors of three dimensions are read as `(batch, length, 1, d_state)` from.
fn check_order(argument: &'static str, shape: [usize; 4], sizes: [usize; 4]) -> Result<()> {
    let [batch, len, d_inner, d_state] = sizes;
    if shape[0] != batch || (shape[1] == len && shape[3] == d_state) || shape[3] != len {
        return Ok(());
    }
    let how = if shape[2] == d_state && shape[1] != 0 && d_inner % shape[1] == 0 {
        "(batch, groups, d_state, length): give `permuted([0, 3, 1, 2])` of a view or `permute((0, 3, 1, 2))` of a tensor"
    } else if shape[1] == d_state && shape[2] == 1 {
        "(batch, d_state, length): give `permuted([0, 3, 2, 1])` of a view or `transpose(1, 2)` of a tensor"
    } else {
        return Ok(());
    };
    let expected =
        format_args!("shape (batch, length, groups, d_state) with length {len}, d_state {d_state}").to_string();
    Err(Error::argument(argument, expected, format_args!("{shape:?}, which seems to be {how} (nothing is copied)")))
}

/// A zeroed vector, or an error that names the argument whose shape asks for more than there is.
///
/// The system gives memory that is zero already, page by page as it is used, so that a call that asks for several and is
/// refused one has not spent time on the others.
pub(crate) fn zeroed<T: Pod>(argument: &'static str, shape: &[usize]) -> Result<Vec<T>> {
    let len = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
    len.and_then(|len| bytemuck::try_zeroed_vec(len).ok())
        .ok_or_else(|| Error::argument(argument, "a shape that fits in memory", format_args!("{shape:?}")))
}

/// Room for `count` things of our own that the shape of an argument makes necessary, or an error that names it.
pub(crate) fn reserved<T>(argument: &'static str, shape: &[usize], count: usize) -> Result<Vec<T>> {
    let mut room = Vec::new();
    room.try_reserve_exact(count)
        .map_err(|_| Error::argument(argument, "a shape that fits in memory", format_args!("{shape:?}")))?;
    Ok(room)
}

/// `Clone`, `Copy` and `Debug` for a struct of views over memory `M`, which derives would ask `M` and the elements for.
macro_rules! plain_struct {
    ($name:ident<$($generic:ident),*> { $($field:ident),* }) => {
        impl<$($generic: Element,)* M: Memory> Clone for $name<'_, $($generic,)* M> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<$($generic: Element,)* M: Memory> Copy for $name<'_, $($generic,)* M> {}

        impl<$($generic: Element,)* M: Memory> std::fmt::Debug for $name<'_, $($generic,)* M> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name))$(.field(stringify!($field), &self.$field))*.finish()
            }
        }
    };
}

pub(crate) use plain_struct;
