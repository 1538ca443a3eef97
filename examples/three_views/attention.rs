//! Causal softmax attention of one head, plainly: its cost is what is looked at here.

/// The width of the head.
pub const HEAD: usize = 64;

/// `q`, `k` and `v` are `(length, 64)`, and so is the result.
pub fn attention(q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    let rows = |x| <[f32]>::as_chunks::<HEAD>(x).0;
    let (q, k, v) = (rows(q), rows(k), rows(v));
    let mut out = Vec::with_capacity(q.len() * HEAD);
    let mut weights = Vec::new();
    for (t, q) in q.iter().enumerate() {
        weights.clear();
        weights.extend(k[..=t].iter().map(|k| {
            // Sums of every eighth product, which become one vector.
            let mut sums = [0.0f32; 8];
            for (q, k) in q.as_chunks::<8>().0.iter().zip(k.as_chunks::<8>().0) {
                for i in 0..8 {
                    sums[i] += q[i] * k[i];
                }
            }
            sums.iter().sum::<f32>() / 8.0
        }));
        let largest = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (mut sum, mut row) = (0.0, [0.0f32; HEAD]);
        for (weight, v) in weights.iter().zip(v) {
            let weight = (weight - largest).exp();
            sum += weight;
            for (row, v) in row.iter_mut().zip(v) {
                *row += weight * v;
            }
        }
        out.extend(row.map(|x| x / sum));
    }
    out
}
