// What the kernels of the scan share: their arguments, and how the work of a block is laid out.
//
// A block carries `CHANNELS` neighbouring channels of one group through one segment after another, tile by tile:
//
//   stage    all threads read the tile's activations four channels at a time and leave Δ and what the recurrence takes
//            in in shared memory, so that the functions of a step are computed once per channel however many lanes
//            share its states;
//   advance  each lane carries `STATES` neighbouring states of one channel in registers, `LANES` lanes a channel;
//   finish   the threads that staged four channels sum up the lanes' parts of y and write them.
//
// Loads of the next tile are in flight while a tile is advanced. Steps beyond the end are staged as zero step sizes,
// which leave every state as it is, so that no loop depends on the length.
#pragma once
#include "math.cuh"
#include "tensor.cuh"

// The steps between two kept states of one sequence; see src/sequences.rs.
constexpr int CHECKPOINT_STEPS = 64;

constexpr uint64_t FLAG_SOFTPLUS = 1, FLAG_HOLD = 2, FLAG_REVERSE = 4;
// f32 states are summed with compensation.
constexpr uint64_t FLAG_COMPENSATE = 8;

// What forward and backward both read.
struct ScanInputs {
    Activation u, delta, z;
    Matrix a;
    Projection b, c;
    Vector d, delta_bias;
    States initial_state;
    Segments segments;
    int64_t d_inner, d_state;
    // Channels of a group, and the blocks that they are cut into.
    int64_t group_channels, group_blocks;
    // What each segment makes of a zero state, (segments, d_inner, d_state), and its ΣΔ, (segments, d_inner): null where
    // no sequence is split.
    float *reached, *sums;
    uint64_t flags;
};

// The channels of a block.
struct Block {
    int64_t group, first;
    int width;

    __device__ __forceinline__ Block(const ScanInputs &p, int64_t index, int channels) {
        group = index / p.group_blocks;
        const int64_t within = (index - group * p.group_blocks) * channels;
        first = group * p.group_channels + within;
        width = static_cast<int>(min(static_cast<int64_t>(channels), p.group_channels - within));
    }
};

// Keeps the compiler from computing `x` anew in every turn of a loop.
__device__ __forceinline__ void keep(int64_t &x) { asm("" : "+l"(x)); }

// The neighbouring channels that a thread stages and finishes together.
constexpr int QUAD = 4;

// Walks the steps of one batch row of an activation for the quad of channels from `d` on.
template <typename T, bool WHOLE> struct Walk {
    const T *at;
    int64_t step, channel;

    __device__ __forceinline__ Walk(const Activation &tensor, const Segment &segment, int64_t i, int64_t d, bool reverse)
        : at(static_cast<const T *>(tensor.data)), step(reverse ? -tensor.step : tensor.step), channel(tensor.channel) {
        // An absent tensor stays null and is not read.
        if (at) at += segment.row * tensor.batch + segment.step(i, reverse) * tensor.step + d * tensor.channel;
        keep(step);
    }
    __device__ __forceinline__ Pack<T, QUAD> load(int steps, int count) const {
        return ::load<T, QUAD, WHOLE>(at + steps * step, channel, count);
    }
    __device__ __forceinline__ void advance(int steps) { at += steps * step; }
};

// Walks B and C for a tile in shared memory, `(STEPS, 2, STATES)` with the states from `state` on: zero beyond the
// segment's end and beyond d_state, and where a projection is constant. Each thread brings in pairs of states.
template <typename T, int STEPS, int STATES, int THREADS, bool WHOLE> struct ProjectionWalk {
    static constexpr int ROW = STATES; // pairs in a step
    static constexpr int COUNT = (STEPS * ROW + THREADS - 1) / THREADS, ROWS = THREADS / ROW;
    static_assert(THREADS % ROW == 0, "a thread stays with its states");

    const T *at;
    int64_t step, state;
    int count, row;
    Pack<T, 2> pairs[COUNT];

    __device__ __forceinline__ ProjectionWalk(const ScanInputs &p, const Segment &segment, int64_t group, int64_t i,
                                              int64_t first_state) {
        const bool reverse = p.flags & FLAG_REVERSE;
        const int n = threadIdx.x % (STATES / 2) * 2;
        const Projection &from = threadIdx.x / (STATES / 2) % 2 ? p.c : p.b;
        row = threadIdx.x / ROW;
        count = from.constant ? 0 : static_cast<int>(max(int64_t(0), min(p.d_state - first_state - n, int64_t(2))));
        step = reverse ? -from.step : from.step;
        state = from.state;
        at = static_cast<const T *>(from.data) + segment.row * from.batch + segment.step(i + row, reverse) * from.step +
             group * from.group + (first_state + n) * from.state;
        keep(step);
    }

    // Puts the loads in flight for a tile of which `left` steps exist.
    __device__ __forceinline__ void load(int left) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const int t = row + k * ROWS;
            pairs[k] = ::load<T, 2, WHOLE>(at + k * ROWS * step, state, t < STEPS && t < left ? count : 0);
        }
    }
    __device__ __forceinline__ void advance(int steps) { at += steps * step; }

    __device__ __forceinline__ void store(float *tile) const {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const int i = threadIdx.x + k * THREADS;
            if (STEPS * ROW % THREADS == 0 || i < STEPS * ROW) {
                *reinterpret_cast<float2 *>(tile + 2 * i) = {pairs[k][0], pairs[k][1]};
            }
        }
    }
};

// `COUNT` values that lie side by side in shared memory, aligned.
template <int COUNT> __device__ __forceinline__ void read_shared(float (&to)[COUNT], const float *from) {
    static_assert(COUNT % 4 == 0, "whole 16-byte words");
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        const float4 four = *reinterpret_cast<const float4 *>(from + i);
        to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
}
template <int COUNT> __device__ __forceinline__ void write_shared(float *to, const float (&from)[COUNT]) {
    static_assert(COUNT % 4 == 0, "whole 16-byte words");
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        *reinterpret_cast<float4 *>(to + i) = {from[i], from[i + 1], from[i + 2], from[i + 3]};
    }
}
