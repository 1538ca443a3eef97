// What both kernels of the backward pass have in common: weights and slopes of scores.
//
// With s the scores, p their weights and dp = d_out · v the slopes by these, the slopes by the scores are p (dp - mean), where the
// mean of a query is that of dp by its weights.
#pragma once
#include "../common/math.cuh"
#include "products.cuh"
#include "stages.cuh"

namespace attention {

// How many steps rows meet at a time.
template <typename T, int D, int STEPS> constexpr int STEPS_OF = IS_NARROW<T> && D >= 128 ? STEPS / 2 : STEPS;

// What a lane has of 16 rows with so many columns of eight.
template <int COLUMNS> using Scores = float[1][COLUMNS][4];

// The products of 16 rows from `of_warp` on with all columns: scores of queries and keys, or of gradients of outputs and values the
// slopes by weights.
template <typename T, int D, int COLUMNS>
__device__ __forceinline__ void add_scores_of(Scores<COLUMNS> &sums, const Tile<T, D> &rows, int of_warp, const Tile<T, D> &columns) {
    add_scores(sums, [&](int, int step) { return load_fragment(rows, of_warp, step); }, columns, 0);
}

}
