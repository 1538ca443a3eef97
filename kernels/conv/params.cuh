// What the kernels of the causal convolution take, and how they are launched.
#pragma once
#include "../common/params.cuh"

namespace conv {

using namespace common;

// Threads of a block, in all kernels.
constexpr int THREADS = 128;

// FLAG_VECTOR, of updates: channels can be read and written in vectors of 4.
constexpr uint64_t FLAG_SILU = 1, FLAG_REVERSE = 2, FLAG_VECTOR = 4;

// (sequences, width - 1, d_inner) f32; null where absent.
struct StateRows {
    const float *data;
    int64_t sequence, row, channel;
};

// Where a packed sequence starts: its first run, and its first step.
struct PackedRuns {
    int64_t first_run, start;
};

// How the steps are divided into `count` runs of at most `steps`: each batch row into `per_row`, or the sequences of
// which `packed` lists the starts, and after them the end of all.
struct Runs {
    const PackedRuns *packed;
    int64_t sequences, len, per_row, steps, count;
};

// What both passes read.
struct Inputs {
    Activation x;
    // (d_inner, width)
    Matrix weight;
    Vector bias;
    StateRows initial_state;
    Runs runs;
    int64_t d_inner, width;
    // Threads of a block that lie along the channels, a power of two, as a shift; the others lie along the runs.
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
    StateRows d_final_state;
    void *d_x;
    // Null where not requested.
    float *d_initial_state;
    // For each row of blocks the gradients of all weights, then of all biases.
    float *partials;
};

struct Update {
    Activation x;
    // (d_inner, width)
    Matrix weight;
    Vector bias;
    // (slots, width - 1, d_inner)
    Pool state;
    void *out;
    // (batch, tokens, width - 1, d_inner); null where not requested.
    void *token_states;
    int64_t batch, tokens, d_inner, width;
    // Threads of a block that lie along the channels, a power of two, as a shift; the others lie along the batch.
    int64_t lane_shift;
    uint64_t flags;
    Slots slots;
};

namespace backward {
// Channels of a thread. Of filters wider than 4 there is room in the registers for fewer.
constexpr int CHANNELS = 4, WIDE_CHANNELS = 2;
}

}
