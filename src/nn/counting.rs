//! How many parameters a configuration asks for.

/// So many parameters have an address each, in any type.
pub(crate) const COUNTABLE: usize = isize::MAX as usize / 8;

/// The elements of all shapes together, if they can be counted.
pub(crate) fn sum(shapes: &[[usize; 3]]) -> Option<usize> {
    let product = |shape: &[usize; 3]| shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
    shapes.iter().try_fold(0usize, |total, shape| total.checked_add(product(shape)?))
}
