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

// What a thread adds up over its runs.
template <int MOST, int COUNT> struct ParameterSums {
    float weight[MOST][COUNT] = {}, bias[COUNT] = {};
};

// The line and g of a tile of steps, after the `BEFORE` positions that its first step's filter reaches back to.
template <int MOST, int COUNT> struct Windows {
    static constexpr int TILE = 4, BEFORE = MOST - 1;
    float line[BEFORE + TILE][COUNT], g[BEFORE + TILE][COUNT] = {};

    __device__ __forceinline__ void move_on() {
#pragma unroll
        for (int j = 0; j < BEFORE; j++) {
#pragma unroll
            for (int c = 0; c < COUNT; c++) line[j][c] = line[TILE + j][c], g[j][c] = g[TILE + j][c];
        }
    }
};

// What a thread works on: a run, of which with the steps after it that its inputs reach `there` steps exist, and from position
// `end` of which on the line is the final state's.
template <typename Filter> struct Work {
    const Backward &params;
    const Run &run;
    const Filter &filter;
    const int64_t &d;
    const int &count, &width, &there, &end;
};

// Computes g in step `i` of the run, the `t`th of a tile, and adds to the gradients of the parameters what the run's own steps do.
// `INNER` where all steps are the run's own and no gradient is one of a state's.
template <bool INNER, typename T, int LEAST, int MOST, int COUNT>
__device__ __forceinline__ void add_step(const Work<Filter<LEAST, MOST, COUNT>> &work, int t, int i, bool activate,
                                         const Pack<T, COUNT> &x, const Pack<T, COUNT> &d_out, Windows<MOST, COUNT> &windows,
                                         ParameterSums<MOST, COUNT> &sums) {
    const auto &filter = work.filter;
    const bool is_own = INNER || i < work.run.steps;
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
        windows.line[MOST - 1 + t][c] = x[c];
        float d_sum = d_out[c];
        const float sum = filter.apply(windows.line + t, c), s = sigmoid(sum);
        d_sum = activate ? d_sum * silu_slope(sum, s) : d_sum;
        // After the end there is no sum, and what stands there need not be a number.
        windows.g[MOST - 1 + t][c] = INNER || i < work.there ? d_sum : 0.0f;
        if (is_own) {
#pragma unroll
            for (int k = 0; k < MOST; k++) {
                if (filter.has(k)) sums.weight[k][c] = fmaf(d_sum, windows.line[t + k][c], sums.weight[k][c]);
            }
            sums.bias[c] += d_sum;
        }
    }
}

// The gradient of the line at the position that step `i` is the last to meet.
template <bool INNER, int LEAST, int MOST, int COUNT>
__device__ __forceinline__ void line_gradient(const Work<Filter<LEAST, MOST, COUNT>> &work, int t, int i,
                                              const Windows<MOST, COUNT> &windows, float (&d_line)[COUNT]) {
    const auto &filter = work.filter;
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
        d_line[c] = 0.0f;
#pragma unroll
        for (int k = 0; k < MOST; k++) {
            // Beyond the ends of the sequence no weight has been met: not even an infinite one, whose product with a zero there
            // would be NaN.
            const bool met = INNER || (i - k >= 0 && i - k < work.there);
            if (filter.has(k) && met) d_line[c] = fmaf(filter.weight[k][c], windows.g[MOST - 1 + t - k][c], d_line[c]);
        }
    }
    // Of this position from the run's start on, where weights that there are not would have come first.
    const int position = i - filter.gap;
    const StateRows &state = work.params.d_final_state;
    if (!INNER && state.data && position >= work.end && position < work.run.steps + work.width - 1) {
        const float *at = state.data + work.run.sequence * state.sequence + (position - work.end) * state.row +
                          work.d * state.channel;
#pragma unroll
        for (int c = 0; c < COUNT; c++) {
            if (c < work.count) d_line[c] += at[c * state.channel];
        }
    }
}

// Writes it: to `d_x`, if the position is an input of the run's, or to the initial state.
template <typename T, bool VECTOR, bool INNER, int LEAST, int MOST, int COUNT>
__device__ __forceinline__ void write_line_gradient(const Work<Filter<LEAST, MOST, COUNT>> &work, int i, T *const &d_x,
                                                    const float (&d_line)[COUNT]) {
    constexpr int BEFORE = MOST - 1;
    const Run &run = work.run;
    const int position = i - work.filter.gap;
    if (INNER || i >= BEFORE) {
        const int left = INNER || i < run.steps + BEFORE ? work.count : 0;
        store_vec<T, COUNT, VECTOR>(d_x, 1, narrow_pack<T>(d_line), left);
    } else if (work.params.d_initial_state && run.first == 0 && position >= 0) {
        const int64_t row = run.sequence * (work.width - 1) + position;
        float *to = work.params.d_initial_state + row * work.params.inputs.d_inner + work.d;
#pragma unroll
        for (int c = 0; c < COUNT; c++) {
            if (c < work.count) to[c] = d_line[c];
        }
    }
}

// Writes the gradients of the parameters of a block's channels, from `first_d` on: the sums over its threads. `room` is
// (MOST + 1, COUNT, THREADS).
template <int MOST, int COUNT>
__device__ __forceinline__ void write_sums(const Backward &params, const ParameterSums<MOST, COUNT> &sums, const int64_t &first_d,
                                           const int &lanes, const int &gap, float (&room)[(MOST + 1) * COUNT * THREADS]) {
    const Inputs &p = params.inputs;
    const int width = static_cast<int>(p.width);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
#pragma unroll
        for (int k = 0; k < MOST; k++) room[(k * COUNT + c) * THREADS + threadIdx.x] = sums.weight[k][c];
        room[(MOST * COUNT + c) * THREADS + threadIdx.x] = sums.bias[c];
    }
    __syncthreads();
    const int channels = static_cast<int>(min(p.d_inner - first_d, int64_t(lanes) * COUNT));
    float *part = params.partials + int64_t(blockIdx.y) * p.d_inner * (width + 1);
    for (int i = threadIdx.x; i < channels * (width + 1); i += THREADS) {
        // The weights of one channel after those of another, as they are in memory; then the biases.
        const bool is_bias = i >= channels * width;
        const int channel = is_bias ? i - channels * width : i / width;
        const int k = is_bias ? MOST : i - channel * width + gap;
        const float *of = room + (k * COUNT + channel % COUNT) * THREADS + channel / COUNT;
        float sum = of[0];
        for (int j = lanes; j < THREADS; j += lanes) sum += of[j];
        part[is_bias ? p.d_inner * width + first_d + channel : first_d * width + i] = sum;
    }
}

template <typename T, int LEAST, int MOST, int COUNT, bool VECTOR>
__device__ __forceinline__ void run(const Backward &params) {
    const Inputs &p = params.inputs;
    constexpr int BEFORE = MOST - 1, TILE = Windows<MOST, COUNT>::TILE, AHEAD = sizeof(T) == 4 ? 1 : 2;
    const bool reverse = p.flags & FLAG_REVERSE, activate = p.flags & FLAG_SILU;
    const RowMap map(threadIdx.x, p.lane_shift);
    const int lanes = map.lanes, lane = map.lane;
    const int64_t out_step = reverse ? -p.d_inner : p.d_inner;
    const int width = static_cast<int>(p.width);
    __shared__ float room[(MOST + 1) * COUNT * THREADS];
    __shared__ typename Incoming<T, COUNT, VECTOR, 2, TILE, AHEAD>::Tiles tiles;

    for (int64_t first_d = int64_t(blockIdx.x) * lanes * COUNT; first_d < p.d_inner;
         first_d += int64_t(gridDim.x) * lanes * COUNT) {
        const int64_t d = first_d + lane * COUNT;
        const int count = static_cast<int>(max(int64_t(0), min(p.d_inner - d, int64_t(COUNT))));
        const Filter<LEAST, MOST, COUNT> filter(p.weight, p.bias, p.width, d, count);
        ParameterSums<MOST, COUNT> sums;

        const int64_t stride = int64_t(gridDim.y) * (THREADS >> p.lane_shift);
        for (int64_t index = int64_t(blockIdx.y) * (THREADS >> p.lane_shift) + map.row; index < p.runs.count && count > 0;
             index += stride) {
            const Run run = run_at(p.runs, index);
            const Line<T, COUNT, VECTOR> line(p, run, d, count);
            const int64_t step = run.step(run.first, reverse);
            // The input whose gradient is complete.
            T *d_x = static_cast<T *>(params.d_x) + (run.row * p.runs.len + step) * p.d_inner + d - BEFORE * out_step;
            const int there = static_cast<int>(min(run.len - run.first, int64_t(run.steps + width - 1)));
            const int end = static_cast<int>(min(run.len - run.first, int64_t(run.steps + width)));
            const Work<Filter<LEAST, MOST, COUNT>> work{params, run, filter, d, count, width, there, end};

            Incoming<T, COUNT, VECTOR, 2, TILE, AHEAD> incoming(tiles, count, there, run.steps + BEFORE);
            const T *d_out = static_cast<const T *>(params.d_out.data) + run.row * params.d_out.batch +
                             step * params.d_out.step + d * params.d_out.channel;
            incoming.set(0, line.x + run.first * line.step, line.step, line.channel);
            incoming.set(1, d_out, reverse ? -params.d_out.step : params.d_out.step, params.d_out.channel);
            incoming.start();
            Windows<MOST, COUNT> windows;
            float before[BEFORE][COUNT];
            line.read_window(before, run.first - filter.gap, filter.gap);
#pragma unroll
            for (int j = 0; j < BEFORE; j++) {
#pragma unroll
                for (int c = 0; c < COUNT; c++) windows.line[j][c] = before[j][c];
            }

            int i = 0;
            const auto tile = [&](auto inner) {
                Pack<T, COUNT> next[2][TILE];
                incoming.take(next);
#pragma unroll
                for (int t = 0; t < TILE; t++) {
                    float d_line[COUNT];
                    add_step<inner.value>(work, t, i + t, activate, next[0][t], next[1][t], windows, sums);
                    line_gradient<inner.value>(work, t, i + t, windows, d_line);
                    write_line_gradient<T, VECTOR, inner.value>(work, i + t, d_x, d_line);
                    d_x += out_step;
                }
                windows.move_on();
                i += TILE;
            };
            while (i < BEFORE && i < run.steps + BEFORE) tile(BoolConstant<false>());
            while (i + TILE <= run.steps) tile(BoolConstant<true>());
            while (i < run.steps + BEFORE) tile(BoolConstant<false>());
        }
        write_sums(params, sums, first_d, lanes, filter.gap, room);
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
