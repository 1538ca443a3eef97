// What the kernels of the state update take, and how they are launched.
#pragma once
#include "../common/params.cuh"

namespace state_update {

using namespace common;

constexpr int THREADS = 128;
// The vectors of 4 states that a thread of the fast kernel holds.
constexpr int QUADS = 2;

// FLAG_VECTOR: all that has states as its last dimension can be read and written in vectors of 4.
constexpr uint64_t FLAG_SOFTPLUS = 1, FLAG_ZOH = 2, FLAG_VECTOR = 4;

struct Update {
    Activation u, delta, z;
    Matrix a;
    Projection b, c;
    Vector d, delta_bias;
    Pool state;
    void *out;
    // (batch, tokens, d_inner, d_state); null where not requested.
    void *token_states;
    int64_t batch, tokens, d_inner, d_state, group_channels;
    // Threads to a channel, a power of two up to 32, as a shift.
    int64_t lane_shift;
    uint64_t flags;
    Slots slots;
};

}
