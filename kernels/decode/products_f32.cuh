// The same of f32, of 4 rows: tensor cores have no product of it that keeps its digits, so it goes through the lanes.
#pragma once
#include "products.cuh"

namespace decode::linear {

// One step of a sum over the lanes of 2 COUNT sums each: a lane gives half of them to another and is left with the rest.
template <int COUNT> __device__ __forceinline__ void halve(float *sums) {
    const bool upper = threadIdx.x & COUNT / 2;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float given = upper ? sums[i] : sums[i + COUNT], kept = upper ? sums[i + COUNT] : sums[i];
        sums[i] = kept + __shfl_xor_sync(0xffffffffu, given, COUNT / 2);
    }
}

// A lane holds, of every chunk of 128 features, four neighbouring ones, and a sum of its own for each row and column. Rows are read
// where they lie.
template <bool WHOLE> struct Products<float, 1, WHOLE> {
    static constexpr int ROWS = F32_ROWS, FEATURES = CHUNK_F32;
    // Columns whose part of the matrix is on its way together. Nothing is asked for before: the sums take the registers.
    static constexpr int TOGETHER = 4;
    struct Part {
        int first, begin, features;
    };

    int lane;
    // Row after row for each column.
    float sums[OUTPUTS * ROWS];

    __device__ __forceinline__ explicit Products(unsigned char *) : lane(threadIdx.x % 32) {}

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < OUTPUTS * ROWS; i++) sums[i] = 0.0f;
    }

    __device__ __forceinline__ void ask(Part &of, const Linear &, int first, int begin, int features, const Share &) const {
        of = {first, begin, features};
    }

    __device__ __forceinline__ void prefetch_rest(const Part &) const {}

    // Sums up the squares of chunks `first`, `first + step`, … of the slice from `begin` on.
    template <Step STEP>
    __device__ __forceinline__ void go_through(const BlockRows<float, ROWS, WHOLE> &rows, const Squares<ROWS> &squares,
                                               const Linear &, int begin, int features, int first, int step, int last) const {
        if (!rows.norms) return;
#pragma unroll 1
        for (int row = 0; row < rows.count; row++) {
            float sum = 0.0f;
#pragma unroll 4
            for (int chunk = first; chunk < last; chunk += step) {
                const int k = chunk * CHUNK_F32 + lane * 4;
                float x[4];
                rows.read(x, row, begin + k, features - k);
#pragma unroll
                for (int i = 0; i < 4; i++) sum = fmaf(x[i], x[i], sum);
            }
#pragma unroll
            for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
            if (lane == 0) squares.leave(sum, row, begin == 0);
        }
    }

    template <typename Rows>
    __device__ __forceinline__ void add(const Part &of, const Rows &rows, const Linear &p, const Share &share) {
#pragma unroll 1
        for (int chunk = share.first; chunk < share.last; chunk++) {
            const int k = chunk * CHUNK_F32 + lane * 4, exist = of.features - k;
            float x[ROWS][4], by[4];
            rows.read_weights(by, of.begin + k, exist);
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                rows.read(x[row], row, of.begin + k, exist);
#pragma unroll
                for (int i = 0; i < 4; i++) x[row][i] *= by[i];
            }
#pragma unroll
            for (int from = 0; from < OUTPUTS; from += TOGETHER) add_columns(of, p, x, from, k, exist);
        }
    }

    __device__ __forceinline__ void add_columns(const Part &of, const Linear &p, const float (&x)[ROWS][4], int from, int k,
                                                int exist) {
        float w[TOGETHER][4];
#pragma unroll
        for (int j = 0; j < TOGETHER; j++) {
            const int out = of.first + from + j;
            const float *at = static_cast<const float *>(p.weight.data) + out * p.weight.row;
            const bool exists = out < static_cast<int>(p.out_features);
            const int64_t distance = p.weight.column;
            read_widened<float, 4, WHOLE>(w[j], at + (of.begin + k) * (WHOLE ? 1 : distance), distance, exists ? exist : 0);
        }
#pragma unroll
        for (int i = 0; i < TOGETHER * ROWS; i++) {
            float &sum = sums[from * ROWS + i];
#pragma unroll
            for (int j = 0; j < 4; j++) sum = fmaf(w[i / ROWS][j], x[i % ROWS][j], sum);
        }
    }

    // After five steps a lane has two neighbouring sums of the 64.
    __device__ __forceinline__ void leave(float *to) {
        static_assert(OUTPUTS * ROWS == 64, "two for each lane");
        halve<32>(sums), halve<16>(sums), halve<8>(sums), halve<4>(sums), halve<2>(sums);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = lane * 2 + i;
            to[at % ROWS * PARTIAL_STRIDE + at / ROWS] = sums[i];
        }
    }
};

}
