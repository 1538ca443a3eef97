//! Tasks that are shared out to threads where that pays.

use rayon::prelude::*;

/// Calls `run` for the tasks from 0 to `count`, each thread with one scratch that it uses again and again, on the threads of
/// the current rayon pool. A thread gets at least `least` tasks. Where there are too few for two, or the pool has one thread,
/// they are run where they are: threads that sleep take 5 to 10 µs to wake, in which a thread does all of a small operator.
pub(crate) fn for_each_init<S>(
    count: usize,
    least: usize,
    init: impl Fn() -> S + Sync + Send,
    run: impl Fn(&mut S, usize) + Sync + Send,
) {
    if count / 2 < least || rayon::current_num_threads() == 1 {
        let mut scratch = init();
        return (0..count).for_each(|task| run(&mut scratch, task));
    }
    (0..count).into_par_iter().with_min_len(least).for_each_init(init, |scratch, task| run(scratch, task));
}
