// What the kernels of the RMS norm take, and how they are launched. (Their namespace is not `norm`, which is a function of
// CUDA's.)
#pragma once
#include "../common/params.cuh"

namespace rms_norm {

using namespace common;

// Threads of a block at least, and of a row at most.
constexpr int THREADS = 256, MOST_THREADS = 512;

// FLAG_NORM_FIRST: the gate is multiplied on after the norm, not before it.
constexpr uint64_t FLAG_NORM_FIRST = 1;

// What both passes read.
struct Inputs {
    // Of the type of x.
    Rows z;
    // (width)
    Vector weight;
    // A row has `groups` groups of `group_size` columns.
    int64_t rows, groups, group_size;
    // Threads that share a group, a power of two, as a shift.
    int64_t lane_shift;
    uint64_t flags;
    // `count` is the group's size.
    float eps, count;
};

struct Forward {
    Inputs inputs;
    Rows x;
    // Of the type of the residual.
    Rows residual;
    void *out;
    // Of the type of the residual; null where not requested.
    void *residual_out;
};

struct Backward {
    Inputs inputs;
    // Of the type of the residual, as is the gradient of `residual_out`.
    Rows s, d_residual_out;
    // Of the type of the output.
    Rows d_out;
    // Null where not requested: of the type of x, of the residual, of x.
    void *d_x, *d_residual, *d_z;
    // For each row of blocks the gradient of the weight; of the general kernel, for each of its teams. Null where not
    // requested.
    float *partials;
};

// Vectors that a thread of the fast kernels holds of each row. With eight, forward, so few threads have room on a processor that
// half of the bandwidth was reached.
namespace forward {
constexpr int QUADS = 4;
}
namespace backward {
constexpr int QUADS = 4;
}

}
