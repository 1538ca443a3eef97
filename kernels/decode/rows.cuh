// The rows that a block of a product has, how they are normed, and how the warps of a block divide the features.
#pragma once
#include <type_traits>

#include "../common/async.cuh"
#include "../common/tensor.cuh"
#include "params.cuh"

namespace decode::linear {

// A warp's chunks of a slice: `first` to `last`, all of them where each warp has columns of its own, else as even a part as can be.
struct Share {
    int first, last;
    __device__ __forceinline__ Share(int features, int chunk, int warp, bool is_all) {
        const int chunks = (features + chunk - 1) / chunk, each = (chunks + WARPS - 1) / WARPS;
        first = is_all ? 0 : min(warp * each, chunks), last = is_all ? chunks : min(first + each, chunks);
    }
};

// `COUNT` elements, contiguous and aligned if `WHOLE`; zeros beyond the `exist` ones that there are.
template <typename X, int COUNT, bool WHOLE>
__device__ __forceinline__ void read_widened(float (&to)[COUNT], const X *from, int64_t distance, int exist) {
    constexpr int VECTOR = QUAD;
#pragma unroll
    for (int i = 0; i < COUNT; i += VECTOR) {
        const Pack<X, VECTOR> pack = load_vec<X, VECTOR, WHOLE>(from + i * (WHOLE ? 1 : distance), distance, exist - i);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) to[i + j] = pack[j];
    }
}

// The rows of the block, as they lie. `WHOLE`: their features, and the norm's weights, are contiguous and aligned to 16 bytes, and there is
// a multiple of 8 of them.
template <typename X, int ROWS, bool WHOLE> struct BlockRows {
    int first, count;
    const X *data;
    // Distances of rows and features.
    int64_t row, column;
    const Vector &norm_weight;
    bool norms;

    __device__ __forceinline__ explicit BlockRows(const Linear &p)
        : first(blockIdx.y * ROWS), count(min(static_cast<int>(p.rows) - first, ROWS)),
          data(static_cast<const X *>(p.x.data) + first * p.x.row), row(p.x.row), column(p.x.column),
          norm_weight(p.norm_weight), norms(p.flags & FLAG_NORM) {}

    // Features of row `i` from `k` on, of which `exist` there are; zeros beyond, and of a row that there is not.
    template <int COUNT> __device__ __forceinline__ void read(float (&to)[COUNT], int i, int k, int exist) const {
        read_widened<X, COUNT, WHOLE>(to, data + i * row + k * (WHOLE ? 1 : column), column, i < count ? exist : 0);
    }

    // Eight features of a half type as they are.
    __device__ __forceinline__ void read_words(uint32_t (&to)[4], int i, int k, int exist) const {
        static_assert(WHOLE, "as vectors of 16 bytes");
        uint4 words = {};
        if (i < count && exist > 0) words = *reinterpret_cast<const uint4 *>(data + i * row + k);
        to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
    }

    // Copies the norm's weights of a warp's share to shared memory, for the lanes of that warp: ones where there is none, and zeros after
    // the last feature.
    __device__ __forceinline__ void keep_weights(float *to, int features, const Share &share) const {
        static_assert(WHOLE, "in vectors");
        const bool exist = norms && norm_weight.data;
        for (int k = share.first * CHUNK + threadIdx.x % 32 * QUAD; k < share.last * CHUNK; k += 32 * QUAD) {
            Pack<float, QUAD> &four = *reinterpret_cast<Pack<float, QUAD> *>(to + k);
            if (exist) {
                copy_async(four, norm_weight.data + k, k < features);
            } else {
                *reinterpret_cast<float4 *>(&four) = {1.0f, 1.0f, 1.0f, 1.0f};
            }
        }
        commit_copies();
    }

    // The norm's weights of features from `k` on: ones where there is none.
    template <int COUNT> __device__ __forceinline__ void read_weights(float (&to)[COUNT], int k, int exist) const {
        if (norms && norm_weight.data) {
            const int64_t distance = norm_weight.channel;
            read_widened<float, COUNT, WHOLE>(to, norm_weight.data + k * (WHOLE ? 1 : distance), distance, exist);
            return;
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) to[i] = 1.0f;
    }
};

// The sum of what all warps have left of an element of a tile of so many rows: one order wherever it is taken.
__device__ __forceinline__ float sum_of_warps(const float *of, int rows) {
    float sum = *of;
#pragma unroll
    for (int warp = 1; warp < WARPS; warp++) sum += of[warp * rows * PARTIAL_STRIDE];
    return sum;
}

// The squares that each warp has summed up of each row, for the norm.
template <int ROWS> struct Squares {
    float *of;

    // Adds a warp's sum of a row, or begins with it. By one lane of the warp.
    __device__ __forceinline__ void leave(float sum, int row, bool begins) const {
        float &to = of[row * WARPS + threadIdx.x / 32];
        to = begins ? sum : to + sum;
    }

    // What a row is multiplied by to norm it, once all warps have left their sums.
    __device__ __forceinline__ float scale(const Linear &p, int row) const {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += of[row * WARPS + warp];
        return rsqrtf(sum / p.count + p.eps);
    }

    // Keeps that in place of the sums, by one thread for a row, and gives what has been kept.
    __device__ __forceinline__ void keep_scale(const Linear &p, int row) const { of[row * WARPS] = scale(p, row); }
    __device__ __forceinline__ float kept_scale(int row) const { return of[row * WARPS]; }
};

// Rows are multiplied by the norm's weight when they are staged, and the product by the norm's scale, so that they are read once. What
// is then staged is as large as the residual stream, for which f16 has no room: of it the scale is found first.
template <typename T> constexpr bool SCALES_FIRST = std::is_same_v<T, __half>;

// What is done with the rows: their squares are summed up, they are staged, or both, in one pass.
enum class Step { SQUARES, STAGE, BOTH };

}
