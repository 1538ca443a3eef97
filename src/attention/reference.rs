//! Attention in `f64`, one query and key after another: the equations and nothing else.

use super::check::{Part, Problem, QUERY_NAMES, check_apart};
use super::{Gradients, Inputs, Output};
use crate::{Element, Result, View};

/// Runs attention. The results are what exact arithmetic on the inputs would give, to about 15 digits.
pub fn forward<T: Element>(inputs: &Inputs<T>) -> Result<Output<f64, f64>> {
    let problem = inputs.check()?;
    let mut output: Output<f64, f64> = problem.zero_output()?;
    for_each_query(&problem, |query| {
        let (p, lse) = query.probabilities();
        output.lse[query.index()] = lse;
        for (j, p) in p.into_iter().enumerate() {
            for d in 0..problem.sizes.d_head {
                output.out[query.index() * problem.sizes.d_head + d] += p * f64::from(inputs.v.at(query.key(j, d)));
            }
        }
    });
    Ok(output)
}

/// The gradients of all inputs, from that of the output, `(batch, length, heads, d_head)`.
pub fn backward<T: Element>(inputs: &Inputs<T>, d_out: View<T, 4>) -> Result<Gradients<f64, f64>> {
    let problem = inputs.check()?;
    d_out.check("d_out", QUERY_NAMES, inputs.q.shape)?;
    check_apart(inputs.keys.unwrap_or_default())?;
    let sizes = problem.sizes;
    let mut grad: Gradients<f64, f64> = problem.zero_gradients()?;
    let key_index =
        |[row, step, head, d]: [usize; 4]| ((row * sizes.steps + step) * sizes.kv_heads + head) * sizes.d_head + d;
    let scale = f64::from(problem.scale);
    for_each_query(&problem, |query| {
        let (p, _) = query.probabilities();
        let d_out = |d| f64::from(d_out.at(query.at(d)));
        let d_p = |j| (0..sizes.d_head).map(|d| d_out(d) * f64::from(inputs.v.at(query.key(j, d)))).sum::<f64>();
        let d_ps: Vec<f64> = (0..p.len()).map(d_p).collect();
        let mean: f64 = p.iter().zip(&d_ps).map(|(p, d_p)| p * d_p).sum();
        for (j, (p, d_p)) in p.iter().zip(&d_ps).enumerate() {
            let d_s = p * (d_p - mean) * scale;
            for d in 0..sizes.d_head {
                let key = query.key(j, d);
                grad.v[key_index(key)] += p * d_out(d);
                grad.k[key_index(key)] += d_s * f64::from(inputs.q.at(query.at(d)));
                grad.q[query.index() * sizes.d_head + d] += d_s * f64::from(inputs.k.at(key));
            }
        }
    });
    Ok(grad)
}

/// A query of a head.
struct Query<'p, 'a, T: Element> {
    problem: &'p Problem<'a, T>,
    part: Part,
    /// Its step within the sequence.
    i: usize,
    head: usize,
}

fn for_each_query<'a, T: Element>(problem: &Problem<'a, T>, mut f: impl FnMut(Query<'_, 'a, T>)) {
    for part in problem.parts() {
        for i in 0..part.queries.len {
            (0..problem.sizes.heads).for_each(|head| f(Query { problem, part, i, head }));
        }
    }
}

impl<T: Element> Query<'_, '_, T> {
    /// Where its number `d` lies.
    fn at(&self, d: usize) -> [usize; 4] {
        [self.part.queries.batch, self.part.queries.start + self.i, self.head, d]
    }

    /// Its place among all queries.
    fn index(&self) -> usize {
        let [batch, step, head, _] = self.at(0);
        (batch * self.problem.sizes.length + step) * self.problem.sizes.heads + head
    }

    /// Where number `d` of key `j` lies.
    fn key(&self, j: usize, d: usize) -> [usize; 4] {
        let keys = self.part.keys;
        [keys.row, keys.start + j, self.head / self.problem.sizes.group(), d]
    }

    /// The weight of each key that it sees, and the logarithm of the sum that they were divided by.
    fn probabilities(&self) -> (Vec<f64>, f64) {
        let Problem { inputs, scale, sizes, .. } = self.problem;
        let product = |j, d| f64::from(inputs.q.at(self.at(d))) * f64::from(inputs.k.at(self.key(j, d)));
        let score = |j| f64::from(*scale) * (0..sizes.d_head).map(|d| product(j, d)).sum::<f64>();
        let scores: Vec<f64> = (0..self.part.seen(self.i)).map(score).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = most + scores.iter().map(|s| (s - most).exp()).sum::<f64>().ln();
        (scores.iter().map(|s| (s - lse).exp()).collect(), lse)
    }
}
