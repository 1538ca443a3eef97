// What the kernels of S4D take, and how they are launched.
#pragma once
#include "../common/params.cuh"

namespace s4d {

using namespace common;

// Steps of a chunk, and of a tile: a row of the tensor cores' products is a chunk.
constexpr int CHUNK = 16, CHUNKS = 16, TILE = CHUNK * CHUNKS;
// Pairs of a warp: those of a channel are in as many warps as they fill, at most those of a block.
constexpr int PAIRS = 32, WARPS = 8, THREADS = 32 * WARPS;

// How activations can be read and written:
// - FLAG_VECTOR: in vectors of 4 channels;
// - FLAG_ROW: in vectors of 16 bytes, and every block has 8 channels, whose warps have all pairs of one each (and FLAG_VECTOR);
// - FLAG_BOXES: backward and of bf16, by the copy engine (and FLAG_ROW).
constexpr uint64_t FLAG_REVERSE = 1, FLAG_VECTOR = 2, FLAG_ROW = 4, FLAG_BOXES = 8;
// Steps of a box: those that a warp stages.
constexpr int BOX_STEPS = 32;
constexpr int64_t RULE_HOLD = 0, RULE_BILINEAR = 1, RULE_EULER = 2;

// What both passes read. Complex numbers are two neighbours.
struct Inputs {
    Activation u;
    Vector log_delta;
    // (d_inner, 2 * d_state)
    Matrix a, b, c;
    Vector d;
    // (sequences, d_inner, 2 * d_state)
    States initial_state;
    // What is made of the parameters once for each call; `padded` is d_state up to whole warps. K, (d_inner, CHUNK); G and H,
    // (d_inner, padded, 2, CHUNK); and of each pair A̅ and its CHUNKth power, (d_inner, padded, 4).
    float *kernel, *read, *enter;
    double *powers;
    Segments segments;
    int64_t d_inner, d_state, padded, rule;
    // Warps of a channel.
    int64_t pair_blocks;
    uint64_t flags;
    // What segments reach from a zero state, (segments, d_inner, 2 * d_state); null if no sequence is split.
    float *chunk_states;
};

struct Forward {
    Inputs inputs;
    void *out;
    // Null where not requested.
    float *final_state;
};

struct Backward {
    // With FLAG_BOXES, (batch, length, d_inner) in boxes of BOX_STEPS steps of a block's channels.
    TensorMap u_boxes, d_out_boxes, d_u_boxes;
    Inputs inputs;
    Activation d_out;
    States d_final_state;
    void *d_u;
    // Null where not requested.
    float *d_initial_state;
    // As `chunk_states`, of the slopes by states, going back.
    float *d_chunk_states;
    // What each row of blocks sums up of the slopes by K, G and H, and, in the order of the powers and then of B and C, by
    // A̅^CHUNK, A̅, B̅ and C of steps that are gone through one by one: (rows, d_inner, padded, 8). After the slopes by K there is
    // that by D of such steps: (rows, d_inner, OF_KERNEL).
    float *of_kernel, *of_read, *of_enter;
    double *of_pairs;
};

// From the sums over `rows` rows of blocks to the gradients of the parameters.
struct Gradients {
    Backward sums;
    int64_t rows;
    float *d_log_delta, *d_a, *d_b, *d_c;
    // Null where not requested.
    float *d_d;
};

// From parameters to what an update reads, (d_inner, 6, d_state). Of the inputs there are those that it takes.
struct Recurrence {
    Inputs inputs;
    float *to;
};

struct Update {
    Activation u;
    // (d_inner, 6, d_state)
    States recurrence;
    // (d_inner, 2 * d_state)
    Matrix c;
    Vector d;
    // (slots, d_inner, 2 * d_state)
    Pool state;
    void *out;
    // (batch, tokens, d_inner, 2 * d_state); null where not requested.
    void *token_states;
    int64_t batch, tokens, d_inner, d_state;
    // Threads to a channel, a power of two up to 32, as a shift.
    int64_t lane_shift;
    Slots slots;
};

namespace update {
constexpr int THREADS = 128;
}

constexpr int OF_KERNEL = CHUNK + 1;
// Numbers of a row of the exchange between products and chains, with a gap that keeps rows apart in the banks.
constexpr int EXCHANGE = 2 * PAIRS + 8;
// Words of 8 bytes of where a warp of a backward kernel is, and of what it waits for.
constexpr int PLACE = 13, ARRIVAL = 2;
// Bytes of dynamic shared memory; of backward kernels those of bf16, and OF_OTHERS.
namespace forward {
constexpr int SMEM = 4 * WARPS * (4 * TILE + CHUNKS * EXCHANGE + 8 * PAIRS);
}
// Activations of bf16 are staged as they are, and operands are in part in shared memory, four words a lane; others are staged as f32.
namespace backward_states {
constexpr int SMEM = WARPS * (2 * 2 * TILE + 4 * (2 * CHUNKS * EXCHANGE + 8 * 32 * 4 + 2 * (PLACE + ARRIVAL)));
constexpr int OF_OTHERS = WARPS * (2 * 4 * TILE + 4 * (2 * CHUNKS * EXCHANGE + 32 * 4 + 2 * (PLACE + ARRIVAL)));
}
namespace backward {
constexpr int SMEM = WARPS * (2 * 2 * TILE + 4 * (CHUNKS * EXCHANGE + (2 + 8 + 2 + 5) * 32 * 4 + 2 * (PLACE + ARRIVAL)));
constexpr int OF_OTHERS = WARPS * (2 * 4 * TILE + 4 * (CHUNKS * EXCHANGE + (2 + 3) * 32 * 4 + 2 * (PLACE + ARRIVAL)));
}

}
