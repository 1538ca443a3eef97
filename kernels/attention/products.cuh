// The two products that attention is made of, on the tensor cores: of rows of a tile with rows of another (queries and keys, say),
// and of weights with the rows of a tile (and values).
//
// Lanes hold, with g = lane / 4 and t = lane % 4, by mma's definition, of a result of 16 x 8 the columns 2t, 2t + 1 of row g and
// then of row g + 8. Half types are multiplied 16 elements deep:
//
//   A   columns 2t, 2t + 1 of rows g and g + 8, then columns 2t + 8, 2t + 9 of them
//   B   rows 2t, 2t + 1 of column g, then rows 2t + 8, 2t + 9
//
// so that two neighbouring results, rounded in pairs, are an A of the next product as they stand. f32 is multiplied 8 deep:
//
//   A   column t of rows g and g + 8, then column t + 4 of them
//   B   row t of column g, then row t + 4
//
// where a result is an A if the elements that are summed over are taken in another order: t is 2t, and t + 4 is 2t + 1.
//
// An f32 is taken in two parts of 11 bits, of whose four products the smallest is left out: 2^-23 of each. Tensor cores cut off
// what they add up rather than rounding it, which over many terms of one sign would show: each 8 are summed up by themselves, and
// added to the rest by an addition that rounds.
#pragma once
#include "../common/mma.cuh"
#include "tile.cuh"

namespace attention {

// Rows of A.
template <typename T> struct RowFragment {
    uint32_t pairs[4];

    RowFragment() = default;
    __device__ __forceinline__ explicit RowFragment(const uint32_t (&raw)[4]) : pairs{raw[0], raw[1], raw[2], raw[3]} {}
};
template <> struct RowFragment<float> {
    float upper[4], lower[4];

    RowFragment() = default;
    __device__ __forceinline__ explicit RowFragment(const uint32_t (&raw)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float x = __uint_as_float(raw[i]);
            upper[i] = nearest_tf32(x);
            lower[i] = nearest_tf32(x - upper[i]);
        }
    }
};
// sums += A B for a tile of 16 x 8.
template <typename T>
__device__ __forceinline__ void add_product(float (&sums)[4], const RowFragment<T> &a, uint32_t b0, uint32_t b1) {
    mma(sums, a.pairs, b0, b1, T());
}
__device__ __forceinline__ void add_product(float (&sums)[4], const RowFragment<float> &a, uint32_t b0, uint32_t b1) {
    const float x0 = __uint_as_float(b0), x1 = __uint_as_float(b1);
    const float upper0 = nearest_tf32(x0), upper1 = nearest_tf32(x1);
    const float lower0 = nearest_tf32(x0 - upper0), lower1 = nearest_tf32(x1 - upper1);
    float part[4] = {};
    mma_tf32(part, a.lower, upper0, upper1);
    mma_tf32(part, a.upper, lower0, lower1);
    mma_tf32(part, a.upper, upper0, upper1);
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] += part[i];
}

// The A of 16 rows from `first` on, number `step` along them.
template <typename T, int D> __device__ __forceinline__ RowFragment<T> load_fragment(const Tile<T, D> &tile, int first, int step) {
    const int lane = threadIdx.x % 32;
    uint32_t raw[4];
    load_matrices<false>(raw, tile.at(first + lane % 16, 2 * step + lane / 16));
    return RowFragment<T>(raw);
}

// How deep a product along a row is, in products of the tensor cores.
template <typename T, int D> constexpr int DEPTH = D / (2 * PER_CHUNK<T>);

// sums += rows · columns over `D`: 16 times as many rows as there are sums of them, whose fragments `rows(tile, step)` gives, and
// the rows of a tile from `first` on as columns.
template <typename T, int D, int TILES, int COLUMNS, typename Rows>
__device__ __forceinline__ void add_scores(float (&sums)[TILES][COLUMNS][4], Rows rows, const Tile<T, D> &columns, int first) {
    static_assert(COLUMNS % 2 == 0, "two are loaded together");
    const int lane = threadIdx.x % 32;
    const int row = first + lane % 8 + lane / 16 * 8, chunk = lane / 8 % 2;
    // Longer ones are not unrolled whole, which would take registers for addresses.
    constexpr int TOGETHER = DEPTH<T, D> <= 4 ? DEPTH<T, D> : sizeof(T) == 4 || D > 128 ? 2 : 4;
#pragma unroll TOGETHER
    for (int step = 0; step < DEPTH<T, D>; step++) {
        RowFragment<T> a[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) a[tile] = rows(tile, step);
#pragma unroll
        for (int column = 0; column < COLUMNS; column += 2) {
            uint32_t b[4];
            load_matrices<false>(b, columns.at(row + 8 * column, 2 * step + chunk));
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                add_product(sums[tile][column], a[tile], b[0], b[1]);
                add_product(sums[tile][column + 1], a[tile], b[2], b[3]);
            }
        }
    }
}

// The A of results that are weights: of 16 of half types, and of 8 of f32.
template <typename T> __device__ __forceinline__ RowFragment<T> weight_fragment(const float (&x)[4], const float (&y)[4]) {
    const uint32_t pairs[4] = {narrow_pair(x[0], x[1], T()), narrow_pair(x[2], x[3], T()), narrow_pair(y[0], y[1], T()),
                               narrow_pair(y[2], y[3], T())};
    return RowFragment<T>(pairs);
}
__device__ __forceinline__ RowFragment<float> weight_fragment(const float (&x)[4]) {
    const uint32_t raw[4] = {__float_as_uint(x[0]), __float_as_uint(x[2]), __float_as_uint(x[1]), __float_as_uint(x[3])};
    return RowFragment<float>(raw);
}

// What weights are, which says how they are rounded before they are multiplied by rows of a half type.
enum class Weights {
    // At most 1, and what is much less does not count: to the type.
    SHARES,
    // Of any size: f16 would lose digits of what is less than 2^-14, and sums of many such count. They are multiplied as numbers of
    // 11 bits, as f16 has, at half the speed.
    ANY,
    // Slopes, which add up to zero, so that little may be left where rows are alike: in two parts.
    DIFFERENCES,
};

// The A of 16 weights of a row times rows of a half type, in as many parts.
template <typename T, Weights KIND> struct HalfWeights {
    static constexpr int PARTS = KIND == Weights::DIFFERENCES ? 2 : 1;
    RowFragment<T> parts[PARTS];

    __device__ __forceinline__ void set(const float (&x)[4], const float (&y)[4]) {
        parts[0] = weight_fragment<T>(x, y);
        if constexpr (PARTS == 2) {
            float rests[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t pair_x = parts[0].pairs[i / 2], pair_y = parts[0].pairs[2 + i / 2];
                rests[0][i] = x[i] - (i % 2 ? high(pair_x, T()) : low(pair_x, T()));
                rests[1][i] = y[i] - (i % 2 ? high(pair_y, T()) : low(pair_y, T()));
            }
            parts[1] = weight_fragment<T>(rests[0], rests[1]);
        }
    }
    // The smaller part first. `b` are the rows of eight columns.
    __device__ __forceinline__ void add(float (&sums)[4], uint32_t b0, uint32_t b1) const {
#pragma unroll
        for (int part = PARTS - 1; part >= 0; part--) add_product(sums, parts[part], b0, b1);
    }
};
// The same of 8 weights, as numbers of 11 bits with the range of an f32.
template <Weights KIND> struct WideWeights {
    static constexpr int PARTS = KIND == Weights::DIFFERENCES ? 2 : 1;
    float parts[PARTS][4];

    __device__ __forceinline__ explicit WideWeights(const float (&x)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // As an f32 is an A.
            float rest = x[i % 2 * 2 + i / 2];
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                parts[part][i] = nearest_tf32(rest);
                rest -= parts[part][i];
            }
        }
    }
    // `b` is two rows of eight columns.
    __device__ __forceinline__ void add(float (&sums)[4], uint32_t b) const {
#pragma unroll
        for (int part = PARTS - 1; part >= 0; part--) mma_tf32(sums, parts[part], low(b, __half()), high(b, __half()));
    }
};
template <typename T> constexpr bool IS_NARROW = false;
template <> inline constexpr bool IS_NARROW<__half> = true;

// sums += weights · rows: the rows of a tile from `first` on, of which there are sums of so many parts of 8 elements from `of_part`
// on.
template <Weights KIND, typename T, int D, int TILES, int COLUMNS, int PARTS>
__device__ __forceinline__ void add_weighted(float (&sums)[TILES][PARTS][4], const float (&weights)[TILES][COLUMNS][4],
                                             const Tile<T, D> &rows, int first, int of_part) {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 4) {
        const int row = first + lane % 4 * 2, d = 8 * of_part + lane / 4;
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
            RowFragment<T> a[TILES];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) a[tile] = weight_fragment(weights[tile][column]);
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const uint32_t b0 = rows.word(row + 8 * column, 8 * part + d), b1 = rows.word(row + 8 * column + 1, 8 * part + d);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) add_product(sums[tile][part], a[tile], b0, b1);
            }
        }
    } else if constexpr (IS_NARROW<T> && KIND != Weights::SHARES) {
        static_assert(TILES == 1 && PARTS % 4 == 0, "four parts are loaded together");
        const int row = first + lane % 8, chunk = of_part + lane / 8;
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
            const WideWeights<KIND> a(weights[0][column]);
#pragma unroll
            for (int part = 0; part < PARTS; part += 4) {
                uint32_t b[4];
                load_matrices<true>(b, rows.at(row + 8 * column, part + chunk));
#pragma unroll
                for (int i = 0; i < 4; i++) a.add(sums[0][part + i], b[i]);
            }
        }
    } else {
        const int row = first + lane % 16, chunk = of_part + lane / 16;
#pragma unroll
        for (int column = 0; column < COLUMNS; column += 2) {
            HalfWeights<T, KIND> a[TILES];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) a[tile].set(weights[tile][column], weights[tile][column + 1]);
#pragma unroll
            for (int part = 0; part < PARTS; part += 2) {
                uint32_t b[4];
                load_matrices<true>(b, rows.at(row + 8 * column, part + chunk));
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) a[tile].add(sums[tile][part + i], b[2 * i], b[2 * i + 1]);
                }
            }
        }
    }
}

}
