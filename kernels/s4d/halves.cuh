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
    __device__ __forceinline__ explicit TwoParts(Number<float> x) : TwoParts(x.re, x.im) {}
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

// Two neighbours' lower halves, and their upper ones.
__device__ __forceinline__ uint32_t lower_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
__device__ __forceinline__ uint32_t upper_halves(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

// B, in two parts, each in neighbouring registers also where a lane's is read from shared memory at once.
struct alignas(16) Operand {
    uint32_t upper[2], lower[2];

    Operand() = default;
    __device__ __forceinline__ Operand(TwoParts first, TwoParts second)
        : upper{first.upper, second.upper}, lower{first.lower, second.lower} {}
};

// D += A B for activations, where there are many such sums under way at a time, the smaller part first.
__device__ __forceinline__ void add(Sum &sum, const uint32_t (&a)[4], const Operand &b) {
    mma(sum.values, a, b.lower[0], b.lower[1], __nv_bfloat16());
    mma(sum.values, a, b.upper[0], b.upper[1], __nv_bfloat16());
}
// The same in two sums, of which one does not wait for the other.
__device__ __forceinline__ void add(TwoSums &sums, const uint32_t (&a)[4], const Operand &b) {
    mma(sums.values, a, b.upper[0], b.upper[1], __nv_bfloat16());
    mma(sums.rests, a, b.lower[0], b.lower[1], __nv_bfloat16());
}
// And for states.
__device__ __forceinline__ void add(TwoSums &sums, const TwoParts (&a)[4], const Operand &b) {
    const uint32_t upper[4] = {a[0].upper, a[1].upper, a[2].upper, a[3].upper};
    const uint32_t lower[4] = {a[0].lower, a[1].lower, a[2].lower, a[3].lower};
    add(sums, upper, b);
    mma(sums.rests, lower, b.upper[0], b.upper[1], __nv_bfloat16());
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
    __device__ __forceinline__ OfSteps(const __nv_bfloat16 *row, Lane lane) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint2 four = *reinterpret_cast<const uint2 *>(row + (lane.g + 8 * half) * CHUNK + 4 * lane.t);
            columns[half] = four.x, columns[2 + half] = four.y;
        }
    }
    // Zero but from step `from` to step `to` of the tile.
    template <typename S> __device__ __forceinline__ OfSteps(const S *row, Lane lane, int from, int to) {
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

// A slope by a state in the exchange: in two parts.
__device__ __forceinline__ void read_number(TwoParts &x, const float *from) {
    const uint2 two = *reinterpret_cast<const uint2 *>(from);
    x.upper = two.x, x.lower = two.y;
}
__device__ __forceinline__ void write_number(float *to, TwoParts x) { *reinterpret_cast<uint2 *>(to) = {x.upper, x.lower}; }

// As s4d::from_states; `table(k)` gives the matrix of two tiles. The states may be in two parts already.
template <bool IN_PARTS, typename Table>
__device__ __forceinline__ void from_states(TwoSums (&sums)[STEP_TILES], Lane lane, const float *exchange, const Table &table) {
#pragma unroll(IN_PARTS ? 1 : STATE_TILES / 2)
    for (int k = 0; k < STATE_TILES / 2; k++) {
        TwoParts states[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = lane.g + 8 * (i % 2), pair = 8 * k + 4 * (i / 2) + lane.t;
            const float *const from = exchange + row * EXCHANGE + 2 * pair;
            if constexpr (IN_PARTS) {
                read_number(states[i], from);
            } else {
                float number[2];
                read_shared(number, from);
                states[i] = TwoParts(number[0], number[1]);
            }
        }
        const FromState &matrix = table(k);
#pragma unroll
        for (int j = 0; j < STEP_TILES; j++) add(sums[j], states, matrix.tiles[j]);
    }
}

// As s4d::backward::OverChunks: columns 2t, 2t + 1 are chunks t and t + 4, and 2t + 8, 2t + 9 are chunks t + 8 and t + 12.
struct OverChunks {
    uint32_t columns[4];

    __device__ __forceinline__ OverChunks(const __nv_bfloat16 *row, Lane lane, int from, int to) {
        uint32_t two[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int chunk = 4 * i + lane.t;
            two[i] = *reinterpret_cast<const uint32_t *>(row + chunk * CHUNK + 2 * lane.g);
            if (chunk < from || chunk >= to) two[i] = 0;
        }
#pragma unroll
        for (int k = 0; k < 2; k++) {
            columns[2 * k] = lower_halves(two[2 * k], two[2 * k + 1]), columns[2 * k + 1] = upper_halves(two[2 * k], two[2 * k + 1]);
        }
    }
    __device__ __forceinline__ void add_states(Sum &re, Sum &im, const Number<float> (&x)[4]) const {
        add(re, columns, {TwoParts(x[0].re, x[1].re), TwoParts(x[2].re, x[3].re)});
        add(im, columns, {TwoParts(x[0].im, x[1].im), TwoParts(x[2].im, x[3].im)});
    }
    __device__ __forceinline__ void add_states(Sum &re, Sum &im, const TwoParts (&x)[4]) const {
        Operand of_re, of_im;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const TwoParts &first = x[2 * k], &second = x[2 * k + 1];
            of_re.upper[k] = lower_halves(first.upper, second.upper), of_re.lower[k] = lower_halves(first.lower, second.lower);
            of_im.upper[k] = upper_halves(first.upper, second.upper), of_im.lower[k] = upper_halves(first.lower, second.lower);
        }
        add(re, columns, of_re);
        add(im, columns, of_im);
    }
    // Activations have one part.
    __device__ __forceinline__ void add_steps(Sum (&sums)[STEP_TILES], const OverChunks &steps) const {
#pragma unroll
        for (int n = 0; n < STEP_TILES; n++) mma(sums[n].values, columns, steps.columns[n], steps.columns[2 + n], __nv_bfloat16());
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
    using InTile = __nv_bfloat16;
    using Slope = halves::TwoParts;
    static constexpr int FROM_TILES = 2;
    static constexpr bool IN_SHARED = true;

    template <typename Table>
    static __device__ __forceinline__ void from_states(TwoSums (&sums)[STEP_TILES], Lane lane, const float *exchange,
                                                       const Table &table) {
        halves::from_states<false>(sums, lane, exchange, table);
    }
    template <typename Table>
    static __device__ __forceinline__ void from_slopes(TwoSums (&sums)[STEP_TILES], Lane lane, const float *exchange,
                                                       const Table &table) {
        halves::from_states<true>(sums, lane, exchange, table);
    }
};

}
