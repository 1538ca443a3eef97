// What the kernels of the scan take, and how they are launched.
#pragma once
#include "../common/params.cuh"

namespace scan {

using namespace common;

// A lane carries 4 neighbouring states of a channel; 4 lanes hold a block of 16 states, and more than 16 states take turns,
// a block at a time. (The kernels for few channels divide states among lanes in their own way.)
constexpr int STATE_VEC = 4, STATE_LANES = 4, STATE_BLOCK = STATE_VEC * STATE_LANES;

// The steps of a chunk, which backward goes through at a time. Forward keeps a state before each, or more of them: one for each
// `checkpoint_steps`, of which there are LEAST_CHECKPOINT_STEPS at least; see src/scan/mod.rs.
constexpr int CHUNK_STEPS = 64, LEAST_CHECKPOINT_STEPS = 16;

// Sequences with more steps than this are long: a sum of n terms loses about sqrt(n/2)·2^-25, which passes 2e-6 here.
constexpr int64_t LONG_SEQUENCE = 16384;

// Softplus of Δ; zero-order hold instead of Euler's rule; from the last step to the first; f32 states of long sequences are
// summed with compensation.
constexpr uint64_t FLAG_SOFTPLUS = 1, FLAG_ZOH = 2, FLAG_REVERSE = 4, FLAG_COMPENSATE = 8;

// What forward and backward both read.
struct Inputs {
    Activation u, delta, z;
    Matrix a;
    Projection b, c;
    Vector d, delta_bias;
    States initial_state;
    Segments segments;
    int64_t d_inner, d_state;
    // Channels of a group, and the blocks that they are cut into.
    int64_t group_channels, group_blocks;
    // The state that each segment reaches from a zero state, (segments, d_inner, d_state), and its ΣΔ, (segments, d_inner):
    // null where no sequence is split.
    float *chunk_states, *delta_sums;
    // The steps between two states of a sequence that forward keeps for backward, a power of two, as its logarithm.
    int64_t checkpoint_log2;
    uint64_t flags;
};

struct Forward {
    Inputs inputs;
    void *out;
    // Null where not requested.
    float *final_state, *checkpoints;
};

struct Backward {
    Inputs inputs;
    Activation d_out;
    States d_final_state;
    // The states that forward kept, (slots, d_inner, d_state).
    const float *checkpoints;
    // Dense gradients of the activations, and of the initial state; null where the input is absent.
    void *d_u, *d_delta, *d_z;
    float *d_initial_state;
    // Gradients of parameters, summed by each of gridDim.y rows of blocks: (rows, d_inner, d_state) and (rows, d_inner).
    float *d_a, *d_b, *d_c, *d_d, *d_bias;
    // Gradients of B and of C that vary, summed by each block over its channels: (2, blocks of a group, batch·length,
    // groups, d_state).
    float *projections;
    // With more than 16 states, the sums of the state blocks so far for ∂/∂Δ, ∂/∂(Δu) and y: of each quad of channels in a
    // dense activation the first of these, then the second and the third.
    float *partial_sums;
    int64_t groups, steps;
    // The first state of the block of 16 that this launch takes.
    int64_t first_state;
};

// How each kernel is launched: threads and channels of a block, the steps of a tile, bytes of dynamic shared memory.
namespace forward {
// Each lane has one channel, or the four of a quad.
constexpr int THREADS = 128;
constexpr int ONE_CHANNELS = THREADS / STATE_LANES, FOUR_CHANNELS = ONE_CHANNELS * QUAD;
constexpr int ONE_TILE = 32, FOUR_TILE = 8;
// Of each thread, for its states in each block of 16 where these take turns.
constexpr int STATE_BLOCK_SMEM = 4 * STATE_VEC;
}
namespace forward_general {
constexpr int THREADS = 256, CHANNELS = THREADS / STATE_LANES, TILE = 16;
}
namespace forward_few_channels {
// Threads that advance tiles; as many stage them, and as many finish them.
constexpr int ROLE_THREADS = 128, THREADS = 3 * ROLE_THREADS, TILE = 64;
// Each lane has one state, or two.
constexpr int ONE_CHANNELS = ROLE_THREADS / STATE_BLOCK, TWO_CHANNELS = 2 * ONE_CHANNELS;
// And so much for each byte of an activation's element.
constexpr int ONE_SMEM = 79616, ONE_SMEM_PER_BYTE = 5632, TWO_SMEM = 88064, TWO_SMEM_PER_BYTE = 7168;
}
namespace backward {
// A lane carries 4 states of two neighbouring channels.
constexpr int CHANNELS_PER_LANE = 2, WARPS = 4, THREADS = 32 * WARPS;
constexpr int WARP_CHANNELS = 32 / STATE_LANES * CHANNELS_PER_LANE, CHANNELS = WARPS * WARP_CHANNELS;
// Steps whose decays and states are in registers at a time.
constexpr int TILE = 8;
// And so much for each byte of an activation's element.
constexpr int SMEM = 107696, SMEM_PER_BYTE = 512;
}
// The same with one channel to a lane.
namespace backward_narrow {
constexpr int CHANNELS_PER_LANE = 1, WARPS = 4, THREADS = 32 * WARPS;
constexpr int WARP_CHANNELS = 32 / STATE_LANES * CHANNELS_PER_LANE, CHANNELS = WARPS * WARP_CHANNELS, TILE = 8;
constexpr int SMEM = 59824, SMEM_PER_BYTE = 256;
}
namespace backward_general {
constexpr int WARPS = 4, THREADS = 32 * WARPS, CHANNELS = THREADS / STATE_LANES, TILE = 8;
constexpr int SMEM = 60912;
}
namespace backward_chunk_state {
constexpr int THREADS = 256, CHANNELS = THREADS / STATE_LANES;
}

}
