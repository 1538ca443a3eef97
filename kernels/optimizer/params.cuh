// What the kernels of the optimizer take. Tensors are contiguous; many of them travel in one launch.
#pragma once
#include "../common/params.cuh"

namespace optimizer {
using namespace common;

// Threads of a block.
constexpr int THREADS = 256;
// Elements of one gradient whose squares a block sums.
constexpr int SUM_CHUNK = 16 * QUAD * THREADS;
// Elements of one parameter that a block brings up to date: a thread has two quads of each tensor in flight.
constexpr int AHEAD = 2;
constexpr int UPDATE_CHUNK = AHEAD * QUAD * THREADS;
// Threads of the one block that sums what the blocks leave.
constexpr int TOTAL_THREADS = 512;

// A gradient, and the first block of the launch that works on it.
struct Gradient {
    const void *data;
    int64_t count;
    int32_t first_block, dtype;
};

// As many as a launch of 4 KiB has room for.
constexpr int MOST_GRADIENTS = 168;
struct Squares {
    // One for each block.
    double *partials;
    int64_t count;
    Gradient gradients[MOST_GRADIENTS];
};

// The counts that are kept from step to step: steps taken, steps skipped, and steps taken since the scale of losses changed.
constexpr int COUNT_TAKEN = 0, COUNT_SKIPPED = 1, COUNT_STREAK = 2, COUNTS = 3;
// The scale of losses stays between 1 and this.
constexpr int64_t MOST_SCALE = 1073741824;

// What a step multiplies by, and whether it is taken.
struct Factors {
    // Of the gradients: clipping, over the scale of the loss.
    float gradient;
    // One over the root of the correction of mean squares.
    float root;
    // The correction of means.
    double correction;
    int64_t is_taken;
};

struct Begin {
    const double *partials;
    int64_t count;
    int64_t *counts;
    float *scale;
    Factors *factors;
    float *norm;
    // `clip` is zero if gradients are not clipped.
    double beta1, beta2, clip, divisor;
    // Steps after which the scale doubles, or zero if it is fixed.
    int64_t interval;
};

// A parameter, its gradient, and where its moments and its master are among those of all parameters. A parameter of f32 has no
// master.
struct Parameter {
    void *data;
    const void *gradient;
    int64_t count, moments, master;
    double learning_rate;
    // What decay leaves of the parameter.
    float kept;
    int32_t first_block, dtype, gradient_dtype;
};

// As many as a launch of 4 KiB has room for.
constexpr int MOST_PARAMETERS = 60;
struct Update {
    float *mean, *mean_square, *master;
    const Factors *factors;
    // What a step keeps of the means, and what it takes of the new.
    float beta1, rest1, beta2, rest2, eps;
    int32_t count;
    Parameter parameters[MOST_PARAMETERS];
};

}
