// The products of products.cuh for activations of bf16, on tensor cores that take 16 columns of bf16 in the time of 8 of TF32.
//
// Activations are bf16 as they are. Of states and matrices two parts of 8 bits are taken, so that 2^-17 of each term is left out,
// where rounding a result to bf16 leaves out 2^-9; half the registers and half the products of the two parts of TF32 are needed.
//
// Lanes hold, with g = lane / 4 and t = lane % 4, by mma's definition, two neighbours to a register: of A, rows g and g + 8 in
// columns 2t, 2t + 1 and then 2t + 8, 2t + 9; of B, these rows of column g; of the result, what a TF32 product gives. So that the
// places of steps and states in shared memory are those of products.cuh:
//
//   inputs    columns 2t, 2t + 1 are steps 4t, 4t + 1, and 2t + 8, 2t + 9 the two after them
//   states    of tiles 2k and 2k + 1, the numbers of 8 pairs: columns 2t, 2t + 1 are the real and the imaginary part of pair 8k + t,
//             2t + 8, 2t + 9 of pair 8k + 4 + t
#pragma once
#include "products.cuh"

namespace s4d::halves {

// Pairs of numbers in two parts, each a bf16: what is left out is 2^-17 of a number at most, so that states, which are f32, stay
// within 1e-5. (A first part that is cut off rather than rounded would leave out 2^-16.)
struct TwoParts {
    uint32_t upper, lower;

    TwoParts() = default;
    __device__ __forceinline__ TwoParts(float x, float y) {
        upper = nearest(x, y);
        lower = nearest(x - __uint_as_float(upper << 16), y - __uint_as_float(upper & 0xffff0000u));
    }

  private:
    static __device__ __forceinline__ uint32_t nearest(float x, float y) {
        const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
        return reinterpret_cast<const uint32_t &>(both);
    }
};

// Two that are bf16: their lower halves are zero.
__device__ __forceinline__ uint32_t join(float x, float y) { return __byte_perm(__float_as_uint(x), __float_as_uint(y), 0x7632); }

// B, in two parts.
struct Operand {
    TwoParts rows[2];
};

// D += A B for activations, where there are many such sums under way at a time, the smaller part first.
__device__ __forceinline__ void add(Sum &sum, const uint32_t (&a)[4], const Operand &b) {
    mma(sum.values, a, b.rows[0].lower, b.rows[1].lower, __nv_bfloat16());
    mma(sum.values, a, b.rows[0].upper, b.rows[1].upper, __nv_bfloat16());
}
// The same in two sums, of which one does not wait for the other.
__device__ __forceinline__ void add(TwoSums &sums, const uint32_t (&a)[4], const Operand &b) {
    mma(sums.values, a, b.rows[0].upper, b.rows[1].upper, __nv_bfloat16());
    mma(sums.rests, a, b.rows[0].lower, b.rows[1].lower, __nv_bfloat16());
}
// And for states.
__device__ __forceinline__ void add(TwoSums &sums, const TwoParts (&a)[4], const Operand &b) {
    const uint32_t upper[4] = {a[0].upper, a[1].upper, a[2].upper, a[3].upper};
    const uint32_t lower[4] = {a[0].lower, a[1].lower, a[2].lower, a[3].lower};
    add(sums, upper, b);
    mma(sums.rests, lower, b.rows[0].upper, b.rows[1].upper, __nv_bfloat16());
}

// The inputs of all chunks, from a channel's row of a tile in shared memory.
struct OfSteps {
    uint32_t columns[4];

    __device__ __forceinline__ OfSteps(const float *row, Lane lane) {
        float first[4], second[4];
        read_shared(first, row + lane.g * CHUNK + 4 * lane.t);
        read_shared(second, row + (lane.g + 8) * CHUNK + 4 * lane.t);
        set(first, second);
    }
    // Zero but from step `from` to step `to` of the tile.
    __device__ __forceinline__ OfSteps(const float *row, Lane lane, int from, int to) {
        float values[2][4];
        s4d::OfSteps<true>::read_between(values, row, lane, from, to);
        set(values[0], values[1]);
    }
    // Whether there is no infinity and no NaN in any of the warp's lanes.
    __device__ __forceinline__ bool are_finite() const {
        // The exponents that are all ones.
        bool found = false;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            found |= (columns[i] & 0x7f80u) == 0x7f80u || (columns[i] & 0x7f800000u) == 0x7f800000u;
        }
        return !__any_sync(~0u, found);
    }

  private:
    __device__ __forceinline__ void set(const float (&first)[4], const float (&second)[4]) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            columns[2 * i] = join(first[2 * i], first[2 * i + 1]), columns[2 * i + 1] = join(second[2 * i], second[2 * i + 1]);
        }
    }
};

// From steps to states, as B, of a tile of a state.
struct ToState {
    Operand steps;

    ToState() = default;
    __device__ __forceinline__ ToState(const float *table, Lane lane, int tile) {
        float four[4];
        read_shared(four, table + (8 * tile + lane.g) * CHUNK + 4 * lane.t);
        steps = {TwoParts(four[0], four[1]), TwoParts(four[2], four[3])};
    }
};

// From states to steps, as B, of two tiles of a state: for both tiles of steps.
struct FromState {
    Operand tiles[STEP_TILES];

    FromState() = default;
    __device__ __forceinline__ FromState(const float *table, Lane lane, int two) {
        float numbers[2][2][2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int part = 0; part < 2; part++) {
                read_shared(numbers[i][part], table + (8 * (2 * two + i) + 2 * lane.t + part) * CHUNK + 2 * lane.g);
            }
        }
#pragma unroll
        for (int j = 0; j < STEP_TILES; j++) {
            tiles[j] = {TwoParts(numbers[0][0][j], numbers[0][1][j]), TwoParts(numbers[1][0][j], numbers[1][1][j])};
        }
    }
};

// K from a chunk's steps to its steps, as s4d::WithinChunk.
struct WithinChunk {
    Operand tiles[STEP_TILES];

    template <bool BACK> static __device__ __forceinline__ WithinChunk of(const float *kernel, Lane lane, bool is_first) {
        WithinChunk within;
#pragma unroll
        for (int j = 0; j < STEP_TILES; j++) {
            float values[4];
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const int from = 4 * lane.t + b, to = 2 * lane.g + j, lag = BACK ? from - to : to - from;
                values[b] = is_first && lag >= 0 ? kernel[lag] : 0.0f;
            }
            within.tiles[j] = {TwoParts(values[0], values[1]), TwoParts(values[2], values[3])};
        }
        return within;
    }
};

// As s4d::to_states.
template <typename Table>
__device__ __forceinline__ void to_states(float *exchange, Lane lane, const OfSteps &steps, const Table &table) {
#pragma unroll
    for (int i = 0; i < STATE_TILES; i++) {
        const ToState &matrix = table(i);
        Sum sums;
        add(sums, steps.columns, matrix.steps);
        write_shared(exchange + lane.g * EXCHANGE + 2 * (4 * i + lane.t), {sums[0], sums[1]});
        write_shared(exchange + (lane.g + 8) * EXCHANGE + 2 * (4 * i + lane.t), {sums[2], sums[3]});
    }
}

// As s4d::from_states; `table(k)` gives the matrix of two tiles.
template <typename Table>
__device__ __forceinline__ void from_states(TwoSums (&sums)[STEP_TILES], Lane lane, const float *exchange, const Table &table) {
#pragma unroll
    for (int k = 0; k < STATE_TILES / 2; k++) {
        TwoParts states[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float number[2];
            const int row = lane.g + 8 * (i % 2), pair = 8 * k + 4 * (i / 2) + lane.t;
            read_shared(number, exchange + row * EXCHANGE + 2 * pair);
            states[i] = TwoParts(number[0], number[1]);
        }
        const FromState &matrix = table(k);
#pragma unroll
        for (int j = 0; j < STEP_TILES; j++) add(sums[j], states, matrix.tiles[j]);
    }
}

// As s4d::backward::OverChunks: columns 2t, 2t + 1 are chunks t and t + 4, and 2t + 8, 2t + 9 are chunks t + 8 and t + 12.
struct OverChunks {
    uint32_t columns[4];

    __device__ __forceinline__ OverChunks(const float *row, Lane lane, int from, int to) {
        float values[4][2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int chunk = 4 * i + lane.t;
            read_shared(values[i], row + chunk * CHUNK + 2 * lane.g);
            if (chunk < from || chunk >= to) values[i][0] = values[i][1] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) columns[i] = join(values[i / 2 * 2][i % 2], values[i / 2 * 2 + 1][i % 2]);
    }
    // Adds the product with what `value` gives of a chunk in the lane's column.
    template <typename Value> __device__ __forceinline__ void add_states(Sum &sum, Lane lane, const Value &value) const {
        add(sum, columns, {TwoParts(value(lane.t), value(lane.t + 4)), TwoParts(value(lane.t + 8), value(lane.t + 12))});
    }
    // The same of activations, which have one part.
    template <typename Value> __device__ __forceinline__ void add_steps(Sum &sum, Lane lane, const Value &value) const {
        const uint32_t first = join(value(lane.t), value(lane.t + 4)), second = join(value(lane.t + 8), value(lane.t + 12));
        mma(sum.values, columns, first, second, __nv_bfloat16());
    }
};

__device__ __forceinline__ void within_chunks(TwoSums (&sums)[STEP_TILES], const OfSteps &steps, const WithinChunk &matrix) {
#pragma unroll
    for (int j = 0; j < STEP_TILES; j++) add(sums[j], steps.columns, matrix.tiles[j]);
}

}

namespace s4d {

template <> struct Products<__nv_bfloat16> {
    using OfSteps = halves::OfSteps;
    using ToState = halves::ToState;
    using FromState = halves::FromState;
    using WithinChunk = halves::WithinChunk;
    static constexpr int FROM_TILES = 2;
    static constexpr bool WITHIN_IN_SHARED = true;

    template <typename Table>
    static __device__ __forceinline__ void from_states(TwoSums (&sums)[STEP_TILES], Lane lane, const float *exchange,
                                                       const Table &table) {
        halves::from_states(sums, lane, exchange, table);
    }
};

}
