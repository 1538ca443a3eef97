//! Arguments of any size, valid or not, for property-based tests.

use proptest::prelude::*;

/// Sizes that fit together, nearly fit, and cannot fit anything.
pub fn size() -> impl Strategy<Value = usize> {
    prop_oneof![8 => 0usize..6, 2 => 6usize..40, 1 => Just(1 << 33), 1 => Just(usize::MAX), 1 => any::<usize>()]
}

pub fn view3() -> impl Strategy<Value = (usize, [usize; 3], [usize; 3])> {
    (size(), [size(), size(), size()], [size(), size(), size()])
}

/// Sizes small enough that what is valid can also run.
pub fn is_small(shape: [usize; 3]) -> bool {
    shape.iter().all(|&n| n < 100)
}

/// Slots that are often valid, and sometimes anything.
pub fn slots() -> impl Strategy<Value = Option<Vec<i32>>> {
    let slot = prop_oneof![6 => -1..6i32, 1 => any::<i32>()];
    prop::option::of(prop::collection::vec(slot, 0..6))
}
