// What the kernels of the scan with complex states take, and how they are launched. Complex numbers are two neighbours.
#pragma once
#include "../common/params.cuh"

namespace complex_scan {

using namespace common;

// A block's threads, as a shift too.
constexpr int THREADS = 256, THREADS_SHIFT = 8;
// Steps of a tile, and from one checkpoint to the next.
constexpr int TILE = 8, CHECKPOINT_STEPS = 64;
// Threads of a channel at least, as a shift too, so that a tile has no more steps of channels than the block has threads.
constexpr int LEAST_LANES = 8, LEAST_LANE_SHIFT = 3;
// Channels of a block at a time at most, and those in backward, of which it takes as many at a time as it has threads for.
constexpr int CHANNELS = THREADS / LEAST_LANES;
// The sums over the lanes of warps that a step leaves at most.
constexpr int WARP_SUMS = 32;

constexpr uint64_t FLAG_REVERSE = 1, FLAG_SOFTPLUS = 2;

// What both passes read.
struct Inputs {
    Activation u, delta;
    // (d_inner, 2 * d_state)
    Matrix a;
    Projection b, c;
    Activation z;
    Vector d, delta_bias;
    // (sequences, d_inner, 2 * d_state)
    States initial_state;
    // Each is a whole sequence.
    Segments segments;
    int64_t d_inner, d_state, group_channels;
    // The channels of a group are divided into `group_blocks` parts, each of `rounds` times the channels that a block takes at
    // a time; there are `columns` parts.
    int64_t group_blocks, rounds, columns;
    // Threads of a channel, a power of two, as a shift.
    int64_t lane_shift;
    uint64_t flags;
};

struct Forward {
    Inputs inputs;
    void *out;
    // Null where not requested.
    float *final_state;
};

struct Backward {
    Inputs inputs;
    Activation d_out;
    States d_final_state;
    void *d_u, *d_delta;
    // Null where not requested.
    void *d_z;
    float *d_initial_state;
    // The states before each chunk of the sequence that a block is at, but for the first: (blocks, chunks, THREADS, 2).
    double *checkpoints;
    int64_t chunks;
    // What each row of blocks sums up: (rows, d_inner, 2 * d_state) and (rows, d_inner). Null where B or C varies, and where not
    // requested.
    float *d_a, *d_b, *d_c, *d_d, *d_bias;
    // What each part of a group's channels sums up where B or C varies: (group_blocks, steps, groups, 2 * d_state).
    float *of_b, *of_c;
    int64_t steps, groups;
};
namespace backward {
// Bytes of dynamic shared memory: a tile's steps and ∂/∂y, sums, states before tiles, terms of ∂B and ∂C.
constexpr int SMEM = 8 * 3 * TILE * CHANNELS + 8 * 3 * TILE * WARP_SUMS + 16 * (CHECKPOINT_STEPS / TILE - 1) * THREADS +
                     4 * 4 * TILE * (THREADS + 1);
}

struct Update {
    Activation u, delta;
    Matrix a;
    Projection b, c;
    Activation z;
    Vector d, delta_bias;
    // (slots, d_inner, 2 * d_state)
    Pool state;
    void *out;
    // (batch, tokens, d_inner, 2 * d_state); null where not requested.
    void *token_states;
    int64_t batch, tokens, d_inner, d_state, group_channels;
    // Threads of a channel, a power of two up to 32, as a shift.
    int64_t lane_shift;
    uint64_t flags;
    Slots slots;
};
namespace update {
constexpr int THREADS = 128;
}

}
