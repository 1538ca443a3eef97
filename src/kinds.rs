//! One description of an operator's tensors, for all that they can be.
//!
//! An operator lists its tensors once, with [`tensors!`]. The list becomes a struct over a [`Kind`]: views, buffers to be
//! written, vectors, candle's tensors, addresses on a device. Its `map` goes from one kind to another and its `zip` pairs
//! two kinds; checks, gradients, what is kept for a backward pass and the kernels' parameters follow from these. The list
//! also becomes the structs that a caller fills in, such as [`scan::Inputs`](crate::scan::Inputs).

pub(crate) mod declare;

pub(crate) use declare::tensors;

use std::convert::Infallible;
use std::marker::PhantomData;

use bytemuck::Pod;

use crate::arguments::{check_exchanged, zeroed};
use crate::view::check_len;
use crate::{Element, Error, Host, Memory, Result, View};

/// What the tensors of an operator are: one type for activations, and one for parameters and states.
pub trait Kind: Sized {
    /// A tensor of `R` dimensions whose elements have the type of the operator's activations.
    type Activation<const R: usize>;
    /// A tensor of `R` dimensions that is a parameter or a state.
    type Parameter<const R: usize>;
}

/// `B` or `C` as some kind of tensor: a projection of the input at every step, or constant over time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ProjectionOf<V, C> {
    /// Shape `(batch, length, groups, d_state)`: each group serves `d_inner/groups` neighbouring channels.
    Varying(V),
    /// Shape `(d_inner, d_state)`, the same at every step.
    Constant(C),
}

impl<V, C> ProjectionOf<V, C> {
    /// The tensor of a projection that varies; none of a constant one.
    pub fn varying(&self) -> Option<&V> {
        match self {
            Self::Varying(tensor) => Some(tensor),
            Self::Constant(_) => None,
        }
    }

    /// The tensor of a projection that is constant over time; none of one that varies.
    pub fn constant(&self) -> Option<&C> {
        match self {
            Self::Varying(_) => None,
            Self::Constant(tensor) => Some(tensor),
        }
    }

    pub(crate) fn by_ref(&self) -> ProjectionOf<&V, &C> {
        match self {
            Self::Varying(tensor) => ProjectionOf::Varying(tensor),
            Self::Constant(tensor) => ProjectionOf::Constant(tensor),
        }
    }

    pub(crate) fn by_mut(&mut self) -> ProjectionOf<&mut V, &mut C> {
        match self {
            Self::Varying(tensor) => ProjectionOf::Varying(tensor),
            Self::Constant(tensor) => ProjectionOf::Constant(tensor),
        }
    }
}

impl<T> ProjectionOf<T, T> {
    /// The tensor, where both kinds of it are the same.
    pub fn either(&self) -> &T {
        match self {
            Self::Varying(tensor) | Self::Constant(tensor) => tensor,
        }
    }
}

impl<T> ProjectionOf<Vec<T>, Vec<T>> {
    /// The elements, of either shape: a gradient has that of the projection.
    pub fn as_slice(&self) -> &[T] {
        self.either()
    }
}

/// A [`ProjectionOf`] the tensors of a kind.
pub(crate) type ProjectionAs<K> = ProjectionOf<<K as Kind>::Activation<4>, <K as Kind>::Parameter<2>>;

/// Views over memory `M`, with activations of type `T` and parameters of `f32`.
#[derive(Debug)]
pub struct Views<'a, T, M>(PhantomData<(&'a T, M)>);

impl<'a, T: Element, M: Memory> Kind for Views<'a, T, M> {
    type Activation<const R: usize> = View<'a, T, R, M>;
    type Parameter<const R: usize> = View<'a, f32, R, M>;
}

/// Dense buffers in memory `M` that are going to be overwritten, with activations of type `T` and parameters of `f32`.
#[derive(Debug)]
pub struct Buffers<'a, T, M>(PhantomData<(&'a mut T, M)>);

impl<'a, T: Element, M: Memory> Kind for Buffers<'a, T, M> {
    type Activation<const R: usize> = &'a mut M::Buffer<T>;
    type Parameter<const R: usize> = &'a mut M::Buffer<f32>;
}

/// Dense vectors, with activations of type `T` and parameters of type `P`.
#[derive(Debug)]
pub struct Vectors<T, P>(PhantomData<(T, P)>);

impl<T, P> Kind for Vectors<T, P> {
    type Activation<const R: usize> = Vec<T>;
    type Parameter<const R: usize> = Vec<P>;
}

/// References to tensors of another kind.
#[derive(Debug)]
pub(crate) struct Ref<'a, K>(PhantomData<&'a K>);

impl<'a, K: Kind + 'a> Kind for Ref<'a, K> {
    type Activation<const R: usize> = &'a K::Activation<R>;
    type Parameter<const R: usize> = &'a K::Parameter<R>;
}

/// Mutable references to tensors of another kind.
#[derive(Debug)]
pub(crate) struct Mut<'a, K>(PhantomData<&'a mut K>);

impl<'a, K: Kind + 'a> Kind for Mut<'a, K> {
    type Activation<const R: usize> = &'a mut K::Activation<R>;
    type Parameter<const R: usize> = &'a mut K::Parameter<R>;
}

/// Tensors of two kinds, in pairs.
#[derive(Debug)]
pub(crate) struct Pair<K, L>(PhantomData<(K, L)>);

impl<K: Kind, L: Kind> Kind for Pair<K, L> {
    type Activation<const R: usize> = (K::Activation<R>, L::Activation<R>);
    type Parameter<const R: usize> = (K::Parameter<R>, L::Parameter<R>);
}

/// Tensors of another kind, each with the shape that the operator's sizes give it.
#[derive(Debug)]
pub(crate) struct Shaped<K>(PhantomData<K>);

impl<K: Kind> Kind for Shaped<K> {
    type Activation<const R: usize> = (K::Activation<R>, [usize; R]);
    type Parameter<const R: usize> = (K::Parameter<R>, [usize; R]);
}

/// Nothing: what a `map` gives that is made for what it does on its way.
#[derive(Debug)]
pub(crate) struct Nothing;

impl Kind for Nothing {
    type Activation<const R: usize> = ();
    type Parameter<const R: usize> = ();
}

/// A tensor of an operator by name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field {
    pub name: &'static str,
    /// The name of its gradient.
    pub gradient: &'static str,
    /// The names of its dimensions; of a projection, if it varies.
    pub dims: &'static str,
    /// The names of a projection's dimensions if it is constant.
    pub constant_dims: &'static str,
}

/// What a `map` does to each tensor that is there, in the order in which they are listed.
pub(crate) trait Map<K: Kind, L: Kind> {
    type Error;

    fn activation<const R: usize>(
        &mut self,
        field: Field,
        tensor: K::Activation<R>,
    ) -> Result<L::Activation<R>, Self::Error>;

    fn parameter<const R: usize>(
        &mut self,
        field: Field,
        tensor: K::Parameter<R>,
    ) -> Result<L::Parameter<R>, Self::Error>;

    fn projection(&mut self, field: Field, tensor: ProjectionAs<K>) -> Result<ProjectionAs<L>, Self::Error> {
        Ok(match tensor {
            ProjectionOf::Varying(tensor) => ProjectionOf::Varying(self.activation::<4>(field, tensor)?),
            ProjectionOf::Constant(tensor) => {
                let field = Field { dims: field.constant_dims, ..field };
                ProjectionOf::Constant(self.parameter::<2>(field, tensor)?)
            }
        })
    }
}

/// Pairs an input that may be absent with its gradient, which must then be absent too.
pub(crate) fn pair<A, B>(field: Field, input: Option<A>, gradient: Option<B>) -> Result<Option<(A, B)>> {
    match (input, gradient) {
        (Some(input), Some(gradient)) => Ok(Some((input, gradient))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(Error::argument(field.gradient, "a buffer, since the input is given", "none")),
        (None, Some(_)) => Err(Error::argument(field.gradient, "none, since the input is absent", "a buffer")),
    }
}

/// Pairs a projection with its gradient, which must vary if the projection does.
pub(crate) fn pair_projections<V, C, W, D>(
    field: Field,
    input: ProjectionOf<V, C>,
    gradient: ProjectionOf<W, D>,
) -> Result<ProjectionOf<(V, W), (C, D)>> {
    use ProjectionOf::{Constant, Varying};
    match (input, gradient) {
        (Varying(input), Varying(gradient)) => Ok(Varying((input, gradient))),
        (Constant(input), Constant(gradient)) => Ok(Constant((input, gradient))),
        (Varying(_), Constant(_)) => Err(Error::argument(field.gradient, "Varying, as its input is", "Constant")),
        (Constant(_), Varying(_)) => Err(Error::argument(field.gradient, "Constant, as its input is", "Varying")),
    }
}

/// Checks the shape and the extent of every view.
pub(crate) struct CheckViews;

impl<'a, T: Element, M: Memory> Map<Shaped<Views<'a, T, M>>, Nothing> for CheckViews {
    type Error = Error;

    fn activation<const R: usize>(
        &mut self,
        field: Field,
        (view, shape): (View<'a, T, R, M>, [usize; R]),
    ) -> Result<()> {
        check_exchanged(field.name, field.dims, &view, shape)
    }

    fn parameter<const R: usize>(
        &mut self,
        field: Field,
        (view, shape): (View<'a, f32, R, M>, [usize; R]),
    ) -> Result<()> {
        check_exchanged(field.name, field.dims, &view, shape)
    }
}

/// Checks the length of the buffer for every gradient.
pub(crate) struct CheckGradients;

impl<'r, 'a: 'r, K: Kind, T: Element, M: Memory> Map<Shaped<Pair<K, Ref<'r, Buffers<'a, T, M>>>>, Nothing>
    for CheckGradients
{
    type Error = Error;

    fn activation<const R: usize>(
        &mut self,
        field: Field,
        ((_, buffer), shape): ((K::Activation<R>, &'r &'a mut M::Buffer<T>), [usize; R]),
    ) -> Result<()> {
        check_len(field.gradient, field.dims, &shape, M::len(buffer))
    }

    fn parameter<const R: usize>(
        &mut self,
        field: Field,
        ((_, buffer), shape): ((K::Parameter<R>, &'r &'a mut M::Buffer<f32>), [usize; R]),
    ) -> Result<()> {
        check_len(field.gradient, field.dims, &shape, M::len(buffer))
    }
}

/// Makes a vector of zeros for every tensor.
pub(crate) struct Zeros;

impl<K: Kind, T: Pod, P: Pod> Map<Shaped<K>, Vectors<T, P>> for Zeros {
    type Error = Error;

    fn activation<const R: usize>(
        &mut self,
        field: Field,
        (_, shape): (K::Activation<R>, [usize; R]),
    ) -> Result<Vec<T>> {
        zeroed(field.name, &shape)
    }

    fn parameter<const R: usize>(&mut self, field: Field, (_, shape): (K::Parameter<R>, [usize; R])) -> Result<Vec<P>> {
        zeroed(field.name, &shape)
    }
}

/// Lends vectors as buffers.
pub(crate) struct Slices;

impl<'a, T: Element> Map<Mut<'a, Vectors<T, f32>>, Buffers<'a, T, Host>> for Slices {
    type Error = Infallible;

    fn activation<const R: usize>(&mut self, _: Field, tensor: &'a mut Vec<T>) -> Result<&'a mut [T], Infallible> {
        Ok(tensor)
    }

    fn parameter<const R: usize>(&mut self, _: Field, tensor: &'a mut Vec<f32>) -> Result<&'a mut [f32], Infallible> {
        Ok(tensor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::{Gradients, Inputs};

    /// Lists what a `map` comes to.
    #[derive(Default)]
    struct List(Vec<(&'static str, &'static str, Vec<usize>)>);

    impl<'a> Map<Shaped<Views<'a, f32, Host>>, Nothing> for List {
        type Error = Infallible;

        fn activation<const R: usize>(
            &mut self,
            field: Field,
            (_, shape): (View<'a, f32, R>, [usize; R]),
        ) -> Result<(), Infallible> {
            self.0.push((field.name, field.dims, shape.into()));
            Ok(())
        }

        fn parameter<const R: usize>(
            &mut self,
            field: Field,
            (_, shape): (View<'a, f32, R>, [usize; R]),
        ) -> Result<(), Infallible> {
            self.0.push((field.name, field.dims, shape.into()));
            Ok(())
        }
    }

    /// Two batch rows of 3 steps, 4 channels in 2 groups, 5 states.
    fn inputs(data: &[f32]) -> Inputs<'_, f32> {
        let (activation, varying) = (View::new(data, [2, 3, 4]), View::new(data, [2, 3, 2, 5]));
        let constant = View::new(data, [4, 5]);
        Inputs { d: Some(View::new(data, [4])), ..Inputs::new(activation, activation, constant, varying, constant) }
    }

    #[test]
    fn a_map_comes_to_what_is_there_in_order_with_its_shape() {
        let data = [0.0; 60];
        let inputs = Inputs { initial_state: Some(View::new(&data, [2, 4, 5])), ..inputs(&data) };
        let mut list = List::default();
        let Ok(_) = inputs.tensors().shaped(inputs.check().expect("valid").dims).map(&mut list);
        let activation = ("(batch, length, d_inner)", vec![2, 3, 4]);
        let parameter = ("(d_inner, d_state)", vec![4, 5]);
        let expected = [
            ("u", activation.clone()),
            ("delta", activation),
            ("a", parameter.clone()),
            ("b", ("(batch, length, groups, d_state)", vec![2, 3, 2, 5])),
            ("c", parameter),
            ("d", ("(d_inner)", vec![4])),
            ("initial_state", ("(sequences, d_inner, d_state)", vec![2, 4, 5])),
        ];
        assert_eq!(list.0, expected.map(|(name, (dims, shape))| (name, dims, shape)));
    }

    #[test]
    fn a_gradient_without_its_input_is_named() {
        let data = [0.0; 60];
        let inputs = inputs(&data);
        let gradients = || Gradients::<f32>::zeroed(&inputs).expect("valid");
        inputs.tensors().zip(gradients()).expect("one for each");
        let refused = |change: &dyn Fn(&mut Gradients<f32>)| {
            let mut gradients = gradients();
            change(&mut gradients);
            inputs.tensors().zip(gradients).expect_err("it does not fit").to_string()
        };
        let error = refused(&|g| g.d = None);
        assert_eq!(error, "`gradients.d`: expected a buffer, since the input is given, got none");
        let error = refused(&|g| g.z = Some(Vec::new()));
        assert_eq!(error, "`gradients.z`: expected none, since the input is absent, got a buffer");
        let error = refused(&|g| g.b = ProjectionOf::Constant(Vec::new()));
        assert_eq!(error, "`gradients.b`: expected Varying, as its input is, got Constant");
        let error = refused(&|g| g.c = ProjectionOf::Varying(Vec::new()));
        assert_eq!(error, "`gradients.c`: expected Constant, as its input is, got Varying");
    }
}
