// Products of a warp on the tensor cores, of tiles of 16 chunks of one channel.
//
// A row of such a product is a chunk. What is multiplied are 10-bit mantissas (TF32): halves are that, of all else the upper and
// the lower part are taken, so that 21 bits count and what is left out is 2^-21 of each term.
//
// Lanes hold, with g = lane / 4 and t = lane % 4, by mma's definition: of A, rows g and g + 8 in columns t and t + 4; of B, rows t
// and t + 4 of column g; of the result, rows g and g + 8 in columns 2t and 2t + 1. Which step or number of a state stands in
// which column is free, as long as both operands agree, and is chosen so that lanes have neighbours:
//
//   inputs    column t of A's tile i is step 4t + 2i, t + 4 the one after it: a lane reads 4 steps
//   outputs   column n of the result's tile j is step 2n + j: a lane writes steps 4t to 4t + 3
//   states    of tile i, the numbers of pairs 4i to 4i + 3: a lane has pair 4i + t, the real part in column t, the imaginary
//             one in t + 4, and as a result in 2t and 2t + 1
#pragma once
#include "../common/mma.cuh"
#include "../common/tensor.cuh"
#include "number.cuh"

namespace s4d {

// Tiles of a state's numbers, and those of a chunk's steps.
constexpr int STATE_TILES = PAIRS / 4, STEP_TILES = 2;

// bf16 in memory that is multiplied as f16 is, in TF32, where it is exact: for devices whose blocks have no room for what halves.cuh keeps in
// shared memory.
struct Bf16InTf32 {
    __nv_bfloat16 value;
};
__device__ __forceinline__ float low(uint32_t both, Bf16InTf32) { return common::low(both, __nv_bfloat16()); }
__device__ __forceinline__ float high(uint32_t both, Bf16InTf32) { return common::high(both, __nv_bfloat16()); }
using common::narrow_pair;
__device__ __forceinline__ uint32_t narrow_pair(float x, float y, Bf16InTf32) { return common::narrow_pair(x, y, __nv_bfloat16()); }

// A state is carried in f64 where activations have 24 bits.
template <typename T> struct Precision { using Real = float; static constexpr bool EXACT = true; };
template <> struct Precision<float> { using Real = double; static constexpr bool EXACT = false; };

// Numbers in two parts, or in one if they are `EXACT`.
template <int N, bool EXACT = false> struct Parts {
    float upper[N], lower[EXACT ? 1 : N];

    Parts() = default;
    __device__ __forceinline__ explicit Parts(const float (&x)[N]) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            upper[i] = EXACT ? x[i] : __uint_as_float(__float_as_uint(x[i]) & 0xffffe000u);
            if (!EXACT) lower[i] = x[i] - upper[i];
        }
    }
};

// D += A B, where there are many such sums under way at a time.
struct Sum {
    float values[4] = {};

    template <bool EXACT> __device__ __forceinline__ void add(const Parts<4, EXACT> &a, const Parts<2> &b) {
        mma_tf32(values, a.upper, b.lower[0], b.lower[1]);
        if constexpr (!EXACT) mma_tf32(values, a.lower, b.upper[0], b.upper[1]);
        mma_tf32(values, a.upper, b.upper[0], b.upper[1]);
    }
    __device__ __forceinline__ float operator[](int i) const { return values[i]; }
};

// The same where there are few: in two sums, of which one does not wait for the other.
struct TwoSums {
    float values[4] = {}, rests[4] = {};

    template <bool EXACT> __device__ __forceinline__ void add(const Parts<4, EXACT> &a, const Parts<2> &b) {
        mma_tf32(values, a.upper, b.upper[0], b.upper[1]);
        mma_tf32(rests, a.upper, b.lower[0], b.lower[1]);
        if constexpr (!EXACT) mma_tf32(rests, a.lower, b.upper[0], b.upper[1]);
    }
    __device__ __forceinline__ float operator[](int i) const { return values[i] + rests[i]; }
};

struct Lane {
    int g, t;
    __device__ __forceinline__ explicit Lane(int thread = threadIdx.x) : g(thread % 32 / 4), t(thread % 4) {}
    __device__ __forceinline__ int index() const { return 4 * g + t; }
};

// The inputs of all chunks, or of the outputs' slopes, from a channel's row of a tile in shared memory.
template <bool EXACT> struct OfSteps {
    Parts<4, EXACT> tiles[STEP_TILES];

    __device__ __forceinline__ OfSteps(const float *row, Lane lane) {
        float first[4], second[4];
        read_shared(first, row + lane.g * CHUNK + 4 * lane.t);
        read_shared(second, row + (lane.g + 8) * CHUNK + 4 * lane.t);
        set(first, second);
    }
    // Zero but from step `from` to step `to` of the tile.
    __device__ __forceinline__ OfSteps(const float *row, Lane lane, int from, int to) {
        float values[2][4];
        read_between(values, row, lane, from, to);
        set(values[0], values[1]);
    }
    // A lane's steps of both of its rows, zero but from step `from` to step `to` of the tile.
    template <typename S>
    static __device__ __forceinline__ void read_between(float (&values)[2][4], const S *row, Lane lane, int from, int to) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int step = (lane.g + 8 * half) * CHUNK + 4 * lane.t + i;
                values[half][i] = step >= from && step < to ? static_cast<float>(row[step]) : 0.0f;
            }
        }
    }
    // Whether there is no infinity and no NaN in any of the warp's lanes.
    __device__ __forceinline__ bool are_finite() const {
        float zero = 0.0f;
#pragma unroll
        for (int i = 0; i < STEP_TILES; i++) {
#pragma unroll
            for (int k = 0; k < 4; k++) zero = fmaf(tiles[i].upper[k], 0.0f, zero);
        }
        return __all_sync(~0u, zero == 0.0f);
    }

  private:
    __device__ __forceinline__ void set(const float (&first)[4], const float (&second)[4]) {
#pragma unroll
        for (int i = 0; i < STEP_TILES; i++) {
            tiles[i] = Parts<4, EXACT>({first[2 * i], second[2 * i], first[2 * i + 1], second[2 * i + 1]});
        }
    }
};

// The first step of a tile that is not finite, or the last (`LAST`), of which there is one.
template <bool LAST, typename S> __device__ __forceinline__ int not_finite(const S *row) {
    int found = LAST ? 0 : TILE;
    // (Not unrolled: it is rarely needed, and so a loop of its own in the counts of instructions.)
#pragma unroll 1
    for (int step = threadIdx.x % 32; step < TILE; step += 32) {
        if (static_cast<float>(row[step]) * 0.0f != 0.0f) found = LAST ? step : min(found, step);
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        const int other = __shfl_xor_sync(~0u, found, distance);
        found = LAST ? max(found, other) : min(found, other);
    }
    return found;
}

// Writes a result's steps from `from` to `to` to a row of a tile.
__device__ __forceinline__ void write_steps(float *row, Lane lane, const TwoSums (&sums)[STEP_TILES], int from, int to) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int step = (lane.g + 8 * half) * CHUNK + 4 * lane.t;
        const float values[4] = {sums[0][2 * half], sums[1][2 * half], sums[0][2 * half + 1], sums[1][2 * half + 1]};
        if (step >= from && step + 4 <= to) {
            write_shared(row + step, values);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (step + i >= from && step + i < to) row[step + i] = values[i];
            }
        }
    }
}

// H or G from steps to states, as B: of a tile of a state, for both tiles of steps.
struct ToState {
    Parts<2> tiles[STEP_TILES];

    // `table` is the warp's part of `enter` or `read`.
    __device__ __forceinline__ ToState(const float *table, Lane lane, int tile) {
        float four[4];
        read_shared(four, table + (8 * tile + lane.g) * CHUNK + 4 * lane.t);
        tiles[0] = Parts<2>({four[0], four[1]}), tiles[1] = Parts<2>({four[2], four[3]});
    }
    ToState() = default;
};

// G or H from states to steps, as B: of a tile of a state, for both tiles of steps.
struct FromState {
    Parts<2> tiles[STEP_TILES];

    __device__ __forceinline__ FromState(const float *table, Lane lane, int tile) {
        float re[2], im[2];
        read_shared(re, table + (8 * tile + 2 * lane.t) * CHUNK + 2 * lane.g);
        read_shared(im, table + (8 * tile + 2 * lane.t + 1) * CHUNK + 2 * lane.g);
#pragma unroll
        for (int j = 0; j < STEP_TILES; j++) tiles[j] = Parts<2>({re[j], im[j]});
    }
    FromState() = default;
};

// K from a chunk's steps to its steps, as B: later ones read earlier ones or, going back, the other way round. Zero in warps that
// do not have a channel's first pairs.
struct WithinChunk {
    Parts<2> tiles[STEP_TILES][STEP_TILES];

    template <bool BACK> static __device__ __forceinline__ WithinChunk of(const float *kernel, Lane lane, bool is_first) {
        WithinChunk within;
#pragma unroll
        for (int i = 0; i < STEP_TILES; i++) {
#pragma unroll
            for (int j = 0; j < STEP_TILES; j++) {
                float values[2];
#pragma unroll
                for (int b = 0; b < 2; b++) {
                    const int from = 4 * lane.t + 2 * i + b, to = 2 * lane.g + j, lag = BACK ? from - to : to - from;
                    values[b] = is_first && lag >= 0 ? kernel[lag] : 0.0f;
                }
                within.tiles[i][j] = Parts<2>(values);
            }
        }
        return within;
    }
};

// Multiplies the steps of all chunks by H or G, which `table(i)` gives of tile i, and leaves what each chunk adds to the state in the
// exchange.
template <bool EXACT, typename Table>
__device__ __forceinline__ void to_states(float *exchange, Lane lane, const OfSteps<EXACT> &steps, const Table &table) {
#pragma unroll
    for (int i = 0; i < STATE_TILES; i++) {
        const ToState &matrix = table(i);
        Sum sums;
#pragma unroll
        for (int k = 0; k < STEP_TILES; k++) sums.add(steps.tiles[k], matrix.tiles[k]);
        write_shared(exchange + lane.g * EXCHANGE + 2 * (4 * i + lane.t), {sums[0], sums[1]});
        write_shared(exchange + (lane.g + 8) * EXCHANGE + 2 * (4 * i + lane.t), {sums[2], sums[3]});
    }
}

// Adds to results what the states in the exchange come to, by G or H, which `table(i)` gives of tile i.
template <typename Table>
__device__ __forceinline__ void from_states(TwoSums (&sums)[STEP_TILES], Lane lane, const float *exchange, const Table &table) {
#pragma unroll
    for (int i = 0; i < STATE_TILES; i++) {
        float first[2], second[2];
        read_shared(first, exchange + lane.g * EXCHANGE + 2 * (4 * i + lane.t));
        read_shared(second, exchange + (lane.g + 8) * EXCHANGE + 2 * (4 * i + lane.t));
        const Parts<4> states({first[0], second[0], first[1], second[1]});
        const FromState &matrix = table(i);
#pragma unroll
        for (int j = 0; j < STEP_TILES; j++) sums[j].add(states, matrix.tiles[j]);
    }
}

// The same of a chunk's own steps, by K.
template <bool EXACT>
__device__ __forceinline__ void within_chunks(TwoSums (&sums)[STEP_TILES], const OfSteps<EXACT> &steps, const WithinChunk &matrix) {
#pragma unroll
    for (int k = 0; k < STEP_TILES; k++) {
#pragma unroll
        for (int j = 0; j < STEP_TILES; j++) sums[j].add(steps.tiles[k], matrix.tiles[k][j]);
    }
}

// What products are made of, by the type of activations.
template <typename T> struct Products {
    using OfSteps = s4d::OfSteps<Precision<T>::EXACT>;
    using ToState = s4d::ToState;
    using FromState = s4d::FromState;
    using WithinChunk = s4d::WithinChunk;
    // What backward has of a tile's activations in shared memory, and of a slope by a state.
    using InTile = float;
    using Slope = Number<float>;
    // Tiles of a state that a `FromState` is of.
    static constexpr int FROM_TILES = 1;
    // Whether operands for which there are no registers are in shared memory. (Else forward has all in registers, and backward makes
    // them of the tables for each tile.)
    static constexpr bool IN_SHARED = false;

    template <typename Table>
    static __device__ __forceinline__ void from_states(TwoSums (&sums)[STEP_TILES], Lane lane, const float *exchange,
                                                       const Table &table) {
        s4d::from_states(sums, lane, exchange, table);
    }
    template <typename Table>
    static __device__ __forceinline__ void from_slopes(TwoSums (&sums)[STEP_TILES], Lane lane, const float *exchange,
                                                       const Table &table) {
        s4d::from_states(sums, lane, exchange, table);
    }
};

}
