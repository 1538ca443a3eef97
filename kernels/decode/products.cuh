// A block's part of a product of few rows with a matrix: 16 columns of it, of 8 rows or a few times as many (of f32, of 4).
//
// A matrix is read once, straight into registers, and every row that is staged in shared memory is multiplied with it. The
// warps of a block divide the features; what each has summed up goes through shared memory at the end. Half types go through the
// tensor cores, with the matrix as the left operand, so that its 16 x 16 tiles are full however few the rows are; f32 has no
// product there that keeps its digits, and goes through the lanes.
#pragma once
#include "../common/mma.cuh"
#include "../common/tensor.cuh"
#include "params.cuh"

namespace decode::linear {

// A warp's chunks of a slice: `first` to `last`, as even as they can be divided.
struct Share {
    int first, last;
    __device__ __forceinline__ Share(int features, int chunk, int warp) {
        const int chunks = (features + chunk - 1) / chunk, each = (chunks + WARPS - 1) / WARPS;
        first = min(warp * each, chunks), last = min(first + each, chunks);
    }
};

// Up to 16 contiguous bytes of a row of the matrix from feature `k` on; zeros where there are none. `WHOLE`: rows are contiguous,
// aligned, and have a multiple of 8 features.
template <typename T, int COUNT, bool WHOLE>
__device__ __forceinline__ uint4 load_weights(const Rows &from, int64_t out, int64_t k, int64_t features, bool exists) {
    uint4 raw = {};
    const T *at = static_cast<const T *>(from.data) + out * from.row;
    if constexpr (WHOLE) {
        if (exists && k < features) raw = __ldg(reinterpret_cast<const uint4 *>(at + k));
    } else {
        T *elements = reinterpret_cast<T *>(&raw);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (exists && k + i < features) elements[i] = at[(k + i) * from.column];
        }
    }
    return raw;
}

// The products of half types. A lane holds, of every chunk of 32 features, eight neighbouring ones of two rows of the matrix and
// of one row of x: where a tile of the tensor cores has features 2t, 2t+1, 2t+8 and 2t+9 in lane t of four, these stand for
// features 8t, …, 8t+3 in the first tile and 8t+4, …, 8t+7 in the second, on both sides alike.
//
//   lane         0     1     2     3     4     5    …   31
//   output       0,8   0,8   0,8   0,8   1,9   1,9  …   7,15
//   row of x     0     0     0     0     1     1    …   7
//   features     0-7   8-15  16-23 24-31 0-7   8-15 …   24-31
template <typename T, int TILES, bool WHOLE> struct Products {
    static constexpr int ROWS = TILES * TILE_ROWS, FEATURES = CHUNK;
    // Chunks that are on their way together.
    static constexpr int AHEAD = 4;
    struct Group {
        uint4 of[AHEAD][2];
    };

    float sums[TILES][4];
    int output, part;

    __device__ __forceinline__ Products() : sums{}, output(threadIdx.x % 32 / 4), part(threadIdx.x % 4) {}

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[tile][i] = 0.0f;
        }
    }

    // The part of the matrix of the 16 columns from `first` on.
    __device__ __forceinline__ Group load(const Linear &p, int64_t first, int64_t begin, int features, int chunk,
                                          int last) const {
        Group group;
        const int64_t out = first + output;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int k = (chunk + i) * CHUNK + part * 8;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const bool exists = chunk + i < last && k < features && out + 8 * j < p.out_features;
                group.of[i][j] = load_weights<T, 8, WHOLE>(p.weight, out + 8 * j, begin + k, begin + features, exists);
            }
        }
        return group;
    }

    __device__ __forceinline__ void add(const Group &group, const T *staged, const Linear &p, int64_t, int64_t, int,
                                        int chunk, int last) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (chunk + i >= last) break;
            const uint4(&w)[2] = group.of[i];
            const uint32_t first[4] = {w[0].x, w[1].x, w[0].y, w[1].y}, second[4] = {w[0].z, w[1].z, w[0].w, w[1].w};
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const T *at = staged + (tile * TILE_ROWS + output) * p.stride + (chunk + i) * CHUNK + part * 8;
                const uint4 x = *reinterpret_cast<const uint4 *>(at);
                mma(sums[tile], first, x.x, x.y, T());
                mma(sums[tile], second, x.z, x.w, T());
            }
        }
    }

    // Leaves the warp's sums at `to`, PARTIAL_STRIDE apart for each row.
    __device__ __forceinline__ void leave(float *to) const {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                to[(tile * TILE_ROWS + 2 * part + i % 2) * PARTIAL_STRIDE + output + i / 2 * 8] = sums[tile][i];
            }
        }
    }
};

// One step of a sum over the lanes of 2 COUNT sums each: a lane gives half of them to another and is left with the rest.
template <int COUNT> __device__ __forceinline__ void halve(float *sums) {
    const bool upper = threadIdx.x & COUNT / 2;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float given = upper ? sums[i] : sums[i + COUNT], kept = upper ? sums[i + COUNT] : sums[i];
        sums[i] = kept + __shfl_xor_sync(0xffffffffu, given, COUNT / 2);
    }
}

// The products of f32, of 4 rows: a lane holds, of every chunk of 128 features, four neighbouring ones, and a sum of its own for
// each row and column.
template <bool WHOLE> struct Products<float, 1, WHOLE> {
    static constexpr int ROWS = F32_ROWS, FEATURES = CHUNK_F32;
    static constexpr int AHEAD = 1;
    // Columns whose part of the matrix is on its way together. Nothing is asked for before the rows are there: the sums take the
    // registers.
    static constexpr int TOGETHER = 4;
    struct Group {};

    // Row after row for each column.
    float sums[OUTPUTS * ROWS];

    __device__ __forceinline__ Products() : sums{} {}

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < OUTPUTS * ROWS; i++) sums[i] = 0.0f;
    }

    __device__ __forceinline__ Group load(const Linear &, int64_t, int64_t, int, int, int) const { return {}; }

    __device__ __forceinline__ void add(Group, const float *staged, const Linear &p, int64_t first, int64_t begin,
                                        int features, int chunk, int) {
        const int k = chunk * CHUNK_F32 + threadIdx.x % 32 * 4;
        float4 x[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; row++) x[row] = *reinterpret_cast<const float4 *>(staged + row * p.stride + k);
#pragma unroll
        for (int from = 0; from < OUTPUTS; from += TOGETHER) {
            uint4 w[TOGETHER];
#pragma unroll
            for (int j = 0; j < TOGETHER; j++) {
                const int64_t out = first + from + j;
                const bool exists = k < features && out < p.out_features;
                w[j] = load_weights<float, 4, WHOLE>(p.weight, out, begin + k, begin + features, exists);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER * ROWS; i++) {
                const uint4 &of = w[i / ROWS];
                float &sum = sums[from * ROWS + i];
                sum = fmaf(__uint_as_float(of.x), x[i % ROWS].x, sum);
                sum = fmaf(__uint_as_float(of.y), x[i % ROWS].y, sum);
                sum = fmaf(__uint_as_float(of.z), x[i % ROWS].z, sum);
                sum = fmaf(__uint_as_float(of.w), x[i % ROWS].w, sum);
            }
        }
    }

    // After five steps a lane has two neighbouring sums of the 64.
    __device__ __forceinline__ void leave(float *to) {
        static_assert(OUTPUTS * ROWS == 64, "two for each lane");
        halve<32>(sums), halve<16>(sums), halve<8>(sums), halve<4>(sums), halve<2>(sums);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = threadIdx.x % 32 * 2 + i;
            to[at % ROWS * PARTIAL_STRIDE + at / ROWS] = sums[i];
        }
    }
};

}
