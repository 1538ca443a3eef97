// The causal convolution, backward.
//
// With g the gradient of the sum that SiLU is applied to, a thread walks on from its run until the last of its inputs has
// met all its weights, computing s and g again on the way:
//
//   d_line_p = Σ_k weight_k g_{p - k}      d_weight_k = Σ_t g_t line_{t + k}      d_bias = Σ_t g_t
//
// The sums for the parameters run over the thread's runs, then over the block's threads, then (reduce_partials.cu) over the blocks.
#include "runs.cuh"

namespace conv::backward {

template <typename T, int LEAST, int MOST, int COUNT, bool VECTOR>
__device__ __forceinline__ void run(const Backward &params) {
    const Inputs &p = params.inputs;
    constexpr int BEFORE = MOST - 1, TILE = 4, AHEAD = sizeof(T) == 4 ? 1 : 2;
    const bool reverse = p.flags & FLAG_REVERSE, activate = p.flags & FLAG_SILU;
    const int lanes = 1 << p.lane_shift, lane = threadIdx.x & (lanes - 1), own = threadIdx.x >> p.lane_shift;
    const int64_t out_step = reverse ? -p.d_inner : p.d_inner;
    const int width = static_cast<int>(p.width);
    // (MOST + 1, COUNT, THREADS)
    __shared__ float sums[(MOST + 1) * COUNT * THREADS];
    __shared__ typename Incoming<T, COUNT, VECTOR, 2, TILE, AHEAD>::Tiles tiles;

    for (int64_t first_d = int64_t(blockIdx.x) * lanes * COUNT; first_d < p.d_inner;
         first_d += int64_t(gridDim.x) * lanes * COUNT) {
        const int64_t d = first_d + lane * COUNT;
        const int count = static_cast<int>(max(int64_t(0), min(p.d_inner - d, int64_t(COUNT))));
        const Filter<LEAST, MOST, COUNT> filter(p.weight, p.bias, p.width, d, count);
        float d_weight[MOST][COUNT] = {}, d_bias[COUNT] = {};

        const int64_t stride = int64_t(gridDim.y) * (THREADS >> p.lane_shift);
        for (int64_t index = int64_t(blockIdx.y) * (THREADS >> p.lane_shift) + own; index < p.runs.count && count > 0;
             index += stride) {
            const Run run = run_at(p.runs, index);
            const Line<T, COUNT, VECTOR> line(p, run, d, count);
            const int64_t step = run.step(run.first, reverse);
            // The input whose gradient is complete.
            T *d_x = static_cast<T *>(params.d_x) + (run.row * p.runs.len + step) * p.d_inner + d - BEFORE * out_step;
            // Steps that there are; of them, those after the run that its inputs reach.
            const int there = static_cast<int>(min(run.len - run.first, int64_t(run.steps + width - 1)));
            // Positions of the line from here on are of the final state.
            const int end = static_cast<int>(min(run.len - run.first, int64_t(run.steps + width)));

            Incoming<T, COUNT, VECTOR, 2, TILE, AHEAD> incoming(tiles, count, there, run.steps + BEFORE);
            const T *d_out = static_cast<const T *>(params.d_out.data) + run.row * params.d_out.batch +
                             step * params.d_out.step + d * params.d_out.channel;
            incoming.set(0, line.x + run.first * line.step, line.step, line.channel);
            incoming.set(1, d_out, reverse ? -params.d_out.step : params.d_out.step, params.d_out.channel);
            incoming.start();
            float window[BEFORE + TILE][COUNT], g[BEFORE + TILE][COUNT] = {}, before[BEFORE][COUNT];
            line.read_window(before, run.first - filter.gap, filter.gap);
#pragma unroll
            for (int j = 0; j < BEFORE; j++) {
#pragma unroll
                for (int c = 0; c < COUNT; c++) window[j][c] = before[j][c];
            }

            int i = 0;
            // `inner` where all steps are the run's own and no gradient is one of a state's.
            const auto tile = [&](auto inner) {
                Pack<T, COUNT> next[2][TILE];
                incoming.take(next);
#pragma unroll
                for (int t = 0; t < TILE; t++) {
                    const bool is_own = inner.value || i + t < run.steps;
#pragma unroll
                    for (int c = 0; c < COUNT; c++) {
                        window[BEFORE + t][c] = next[0][t][c];
                        float d_sum = next[1][t][c];
                        const float sum = filter.apply(window + t, c), s = sigmoid(sum);
                        d_sum = activate ? d_sum * silu_slope(sum, s) : d_sum;
                        // Behind the end there is no sum, and what stands there need not be a number.
                        g[BEFORE + t][c] = inner.value || i + t < there ? d_sum : 0.0f;
                        if (is_own) {
#pragma unroll
                            for (int k = 0; k < MOST; k++) {
                                if (filter.has(k)) d_weight[k][c] = fmaf(d_sum, window[t + k][c], d_weight[k][c]);
                            }
                            d_bias[c] += d_sum;
                        }
                    }
                    float d_line[COUNT];
#pragma unroll
                    for (int c = 0; c < COUNT; c++) {
                        d_line[c] = 0.0f;
#pragma unroll
                        for (int k = 0; k < MOST; k++) {
                            // Beyond the ends of the sequence no weight has been met: not even an infinite one, whose
                            // product with a zero there would be NaN.
                            const bool met = inner.value || (i + t - k >= 0 && i + t - k < there);
                            if (filter.has(k) && met) {
                                d_line[c] = fmaf(filter.weight[k][c], g[BEFORE + t - k][c], d_line[c]);
                            }
                        }
                    }
                    // Of this position from the run's start on, where weights that there are not would have come first.
                    const int position = i + t - filter.gap;
                    if (!inner.value && params.d_final_state.data && position >= end && position < run.steps + width - 1) {
                        const StateRows &state = params.d_final_state;
                        const float *at = state.data + run.sequence * state.sequence +
                                          (position - end) * state.row + d * state.channel;
#pragma unroll
                        for (int c = 0; c < COUNT; c++) {
                            if (c < count) d_line[c] += at[c * state.channel];
                        }
                    }
                    if (inner.value || i + t >= BEFORE) {
                        const int left = inner.value || i + t < run.steps + BEFORE ? count : 0;
                        store_vec<T, COUNT, VECTOR>(d_x, 1, narrow_pack<T>(d_line), left);
                    } else if (params.d_initial_state && run.first == 0 && position >= 0) {
                        float *to = params.d_initial_state + (run.sequence * (width - 1) + position) * p.d_inner + d;
#pragma unroll
                        for (int c = 0; c < COUNT; c++) {
                            if (c < count) to[c] = d_line[c];
                        }
                    }
                    d_x += out_step;
                }
#pragma unroll
                for (int j = 0; j < BEFORE; j++) {
#pragma unroll
                    for (int c = 0; c < COUNT; c++) window[j][c] = window[TILE + j][c], g[j][c] = g[TILE + j][c];
                }
                i += TILE;
            };
            while (i < BEFORE && i < run.steps + BEFORE) tile(BoolConstant<false>());
            while (i + TILE <= run.steps) tile(BoolConstant<true>());
            while (i < run.steps + BEFORE) tile(BoolConstant<false>());
        }

        __syncthreads();
#pragma unroll
        for (int c = 0; c < COUNT; c++) {
#pragma unroll
            for (int k = 0; k < MOST; k++) sums[(k * COUNT + c) * THREADS + threadIdx.x] = d_weight[k][c];
            sums[(MOST * COUNT + c) * THREADS + threadIdx.x] = d_bias[c];
        }
        __syncthreads();
        const int channels = static_cast<int>(min(p.d_inner - first_d, int64_t(lanes) * COUNT));
        float *part = params.partials + int64_t(blockIdx.y) * p.d_inner * (width + 1);
        for (int i = threadIdx.x; i < channels * (width + 1); i += THREADS) {
            // The weights of one channel after those of another, as they are in memory; then the biases.
            const bool is_bias = i >= channels * width;
            const int channel = is_bias ? i - channels * width : i / width;
            const int k = is_bias ? MOST : i - channel * width + filter.gap;
            const float *of = sums + (k * COUNT + channel % COUNT) * THREADS + channel / COUNT;
            float sum = of[0];
            for (int j = lanes; j < THREADS; j += lanes) sum += of[j];
            part[is_bias ? p.d_inner * width + first_d + channel : first_d * width + i] = sum;
        }
    }
}

#define INSTANCE(NAME, T, LEAST, MOST, COUNT, VECTOR, BLOCKS)                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        conv_backward_##NAME(const __grid_constant__ Backward params) {                                                \
        run<T, LEAST, MOST, COUNT, VECTOR>(params);                                                                    \
    }

// The usual widths exactly.
#define INSTANCES(SUFFIX, T, BLOCKS)                                                                                   \
    INSTANCE(whole_2_##SUFFIX, T, 2, 2, CHANNELS, true, 4)                                                             \
    INSTANCE(whole_3_##SUFFIX, T, 3, 3, CHANNELS, true, 4)                                                             \
    INSTANCE(whole_4_##SUFFIX, T, 4, 4, CHANNELS, true, BLOCKS)                                                        \
    INSTANCE(whole_8_##SUFFIX, T, 5, 8, WIDE_CHANNELS, true, 3)                                                        \
    INSTANCE(strided_4_##SUFFIX, T, 2, 4, CHANNELS, false, 3)                                                          \
    INSTANCE(strided_8_##SUFFIX, T, 5, 8, WIDE_CHANNELS, false, 3)

INSTANCES(f32, float, 3)
INSTANCES(f16, __half, 4)
INSTANCES(bf16, __nv_bfloat16, 4)

}
