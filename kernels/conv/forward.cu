// The causal convolution, forward.
#include "runs.cuh"

namespace conv::forward {

template <typename T, int LEAST, int MOST, bool VECTOR> __device__ __forceinline__ void run(const Forward &params) {
    const Inputs &p = params.inputs;
    constexpr int BEFORE = MOST - 1, TILE = sizeof(T) == 4 ? 4 : 8, AHEAD = 2;
    __shared__ typename Incoming<T, QUAD, VECTOR, 1, TILE, AHEAD>::Tiles tiles;
    const bool reverse = p.flags & FLAG_REVERSE, activate = p.flags & FLAG_SILU;
    const RowMap map(threadIdx.x, p.lane_shift);
    const int64_t quads = (p.d_inner + QUAD - 1) / QUAD;
    const int64_t out_step = reverse ? -p.d_inner : p.d_inner;

    for (int64_t block = blockIdx.x; block << p.lane_shift < quads; block += gridDim.x) {
        const int64_t d = ((block << p.lane_shift) + map.lane) * QUAD;
        if (d >= p.d_inner) continue;
        const int count = static_cast<int>(min(p.d_inner - d, int64_t(QUAD)));
        const Filter<LEAST, MOST, QUAD> filter(p.weight, p.bias, p.width, d, count);

        const int64_t stride = int64_t(gridDim.y) * (THREADS >> p.lane_shift);
        for (int64_t index = int64_t(blockIdx.y) * (THREADS >> p.lane_shift) + map.row; index < p.runs.count;
             index += stride) {
            const Run run = run_at(p.runs, index);
            const Line<T, QUAD, VECTOR> line(p, run, d, count);
            Incoming<T, QUAD, VECTOR, 1, TILE, AHEAD> incoming(tiles, count, run.steps, run.steps);
            incoming.set(0, line.x + run.first * line.step, line.step, line.channel);
            incoming.start();
            T *out = static_cast<T *>(params.out) +
                     (run.row * p.runs.len + run.step(run.first, reverse)) * p.d_inner + d;
            float before[BEFORE][QUAD];
            line.read_window(before, run.first - filter.gap, filter.gap);
            const auto tile = [&](auto full, int left) {
                Pack<T, QUAD> next[1][TILE];
                incoming.take(next);
                float window[BEFORE + TILE][QUAD];
#pragma unroll
                for (int j = 0; j < BEFORE; j++) {
#pragma unroll
                    for (int c = 0; c < QUAD; c++) window[j][c] = before[j][c];
                }
#pragma unroll
                for (int t = 0; t < TILE; t++) {
                    float sum[QUAD];
#pragma unroll
                    for (int c = 0; c < QUAD; c++) {
                        window[BEFORE + t][c] = next[0][t][c];
                        sum[c] = filter.apply(window + t, c);
                        const float active = silu(sum[c]);
                        sum[c] = activate ? active : sum[c];
                    }
                    store_vec<T, QUAD, VECTOR>(out, 1, narrow_pack<T>(sum), full.value || t < left ? count : 0);
                    out += out_step;
                }
#pragma unroll
                for (int j = 0; j < BEFORE; j++) {
#pragma unroll
                    for (int c = 0; c < QUAD; c++) before[j][c] = window[TILE + j][c];
                }
            };
            int left = run.steps;
            for (; left >= TILE; left -= TILE) tile(BoolConstant<true>(), TILE);
            if (left > 0) tile(BoolConstant<false>(), left);
            if (params.final_state && run.ends_sequence()) {
                for (int j = 0; j < line.rows; j++) {
                    float row[QUAD];
                    line.read(row, run.len + j);
                    float *to = params.final_state + (run.sequence * line.rows + j) * p.d_inner + d;
#pragma unroll
                    for (int c = 0; c < QUAD; c++) {
                        if (c < count) to[c] = row[c];
                    }
                }
            }
        }
    }
}

#define INSTANCE(NAME, T, LEAST, MOST, VECTOR, BLOCKS)                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        conv_forward_##NAME(const __grid_constant__ Forward params) {                                                  \
        run<T, LEAST, MOST, VECTOR>(params);                                                                           \
    }

// The usual widths exactly.
#define INSTANCES(SUFFIX, T)                                                                                           \
    INSTANCE(whole_2_##SUFFIX, T, 2, 2, true, 4)                                                                       \
    INSTANCE(whole_3_##SUFFIX, T, 3, 3, true, 4)                                                                       \
    INSTANCE(whole_4_##SUFFIX, T, 4, 4, true, 4)                                                                       \
    INSTANCE(whole_8_##SUFFIX, T, 5, 8, true, 3)                                                                       \
    INSTANCE(strided_8_##SUFFIX, T, 2, 8, false, 3)

INSTANCES(f32, float)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)

}
