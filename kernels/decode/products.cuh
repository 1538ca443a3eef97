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
    // Chunks that are on their way, as registers allow: each is asked for as many turns before it is used.
    static constexpr int AHEAD = !WHOLE ? 2 : TILES == 1 ? 6 : TILES == 8 ? 4 : 8;

    // A lane's part of 16 columns of the matrix, and what of it is on its way.
    struct Part {
        // Where the lane's first feature of the slice lies; null where there is no column.
        const T *at[2];
        // Features from there on: of the warp's share, and that there are.
        int last, end;
        uint4 ahead[AHEAD][2];
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

    // Eight features of a column from `k` on; zeros where there are none. `WHOLE`: rows are contiguous, aligned, and have a multiple
    // of 8 features.
    __device__ __forceinline__ static uint4 load(const Linear &p, const Part &from, int column, int k) {
        uint4 raw = {};
        if (!from.at[column] || k >= from.last) return raw;
        if constexpr (WHOLE) {
            raw = __ldg(reinterpret_cast<const uint4 *>(from.at[column] + k));
        } else {
            T *elements = reinterpret_cast<T *>(&raw);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (k + i < from.end) elements[i] = from.at[column][(k + i) * p.weight.column];
            }
        }
        return raw;
    }

    // Asks for the beginning of the warp's share of the slice from `begin` on, of the 16 columns from `first` on.
    __device__ __forceinline__ void ask(Part &of, const Linear &p, int64_t first, int64_t begin, int features,
                                        const Share &share) const {
        of.end = features - part * 8, of.last = min(of.end, share.last * CHUNK - part * 8);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int64_t out = first + output + 8 * j;
            const T *data = static_cast<const T *>(p.weight.data) + (begin + part * 8) * p.weight.column;
            of.at[j] = out < p.out_features ? data + out * p.weight.row : nullptr;
#pragma unroll
            for (int i = 0; i < AHEAD; i++) of.ahead[i][j] = load(p, of, j, (share.first + i) * CHUNK);
        }
    }

    // Multiplies the warp's share of the slice.
    __device__ __forceinline__ void add(Part &of, const T *staged, const Linear &p, const Share &share) {
        const int stride = static_cast<int>(p.stride);
        const T *x = staged + output * stride + part * 8;
#pragma unroll 1
        for (int chunk = share.first; chunk < share.last; chunk += AHEAD) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (chunk + i >= share.last) break;
                uint4(&w)[2] = of.ahead[i];
                const uint32_t first[4] = {w[0].x, w[1].x, w[0].y, w[1].y}, second[4] = {w[0].z, w[1].z, w[0].w, w[1].w};
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const T *at = x + tile * TILE_ROWS * stride + (chunk + i) * CHUNK;
                    const uint4 rows = *reinterpret_cast<const uint4 *>(at);
                    mma(sums[tile], first, rows.x, rows.y, T());
                    mma(sums[tile], second, rows.z, rows.w, T());
                }
#pragma unroll
                for (int j = 0; j < 2; j++) w[j] = load(p, of, j, (chunk + i + AHEAD) * CHUNK);
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
    // Columns whose part of the matrix is on its way together. Nothing is asked for before the rows are there: the sums take the
    // registers.
    static constexpr int TOGETHER = 4;
    struct Part {
        int64_t first, begin;
        int features;
    };

    // Row after row for each column.
    float sums[OUTPUTS * ROWS];

    __device__ __forceinline__ Products() : sums{} {}

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < OUTPUTS * ROWS; i++) sums[i] = 0.0f;
    }

    // Four features of a column of the product from `k` on; zeros where there are none.
    __device__ __forceinline__ static float4 load(const Linear &p, const Part &of, int column, int k) {
        float elements[4] = {};
        const int64_t out = of.first + column;
        const float *at = static_cast<const float *>(p.weight.data) + out * p.weight.row + (of.begin + k) * p.weight.column;
        if (WHOLE && k < of.features && out < p.out_features) return __ldg(reinterpret_cast<const float4 *>(at));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (!WHOLE && k + i < of.features && out < p.out_features) elements[i] = at[i * p.weight.column];
        }
        return {elements[0], elements[1], elements[2], elements[3]};
    }

    __device__ __forceinline__ void ask(Part &of, const Linear &, int64_t first, int64_t begin, int features,
                                        const Share &) const {
        of = {first, begin, features};
    }

    __device__ __forceinline__ void add(const Part &of, const float *staged, const Linear &p, const Share &share) {
#pragma unroll 1
        for (int chunk = share.first; chunk < share.last; chunk++) add_chunk(of, staged, p, chunk);
    }

    __device__ __forceinline__ void add_chunk(const Part &of, const float *staged, const Linear &p, int chunk) {
        const int k = chunk * CHUNK_F32 + threadIdx.x % 32 * 4;
        float4 x[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; row++) x[row] = *reinterpret_cast<const float4 *>(staged + row * p.stride + k);
#pragma unroll
        for (int from = 0; from < OUTPUTS; from += TOGETHER) {
            float4 w[TOGETHER];
#pragma unroll
            for (int j = 0; j < TOGETHER; j++) w[j] = load(p, of, from + j, k);
#pragma unroll
            for (int i = 0; i < TOGETHER * ROWS; i++) {
                const float4 &column = w[i / ROWS];
                float &sum = sums[from * ROWS + i];
                sum = fmaf(column.x, x[i % ROWS].x, sum);
                sum = fmaf(column.y, x[i % ROWS].y, sum);
                sum = fmaf(column.z, x[i % ROWS].z, sum);
                sum = fmaf(column.w, x[i % ROWS].w, sum);
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
