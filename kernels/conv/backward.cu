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

// What a thread works on in a run, and with: all of it as the kernel has it, so that functions take it together.
template <typename T, int LEAST, int MOST, int COUNT, bool VECTOR> struct Work {
    // Steps of a tile, and the positions before its first that the filter reaches.
    static constexpr int TILE = 4, BEFORE = MOST - 1;
    using Window = float[BEFORE + TILE][COUNT];

    const Backward &params;
    const Run &run;
    const Filter<LEAST, MOST, COUNT> &filter;
    const int64_t &d;
    const int &count, &width;
    const bool &activate;
    // The steps that there are of the run and those after it that its inputs reach. Positions of the line from `end` on are of the
    // final state.
    const int &there, &end;
    // The line and g in a tile, and what is summed over runs.
    Window &window, &g;
    float (&d_weight)[MOST][COUNT], (&d_bias)[COUNT];

    // The functions below take step `t` of the tile from step `i` of the run on. `INNER` where all steps are the run's own and no
    // gradient is one of a state's.

    // Computes g, and adds to the gradients of the parameters what the run's own steps do.
    template <bool INNER>
    __device__ __forceinline__ void add_step(const int &i, int t, const Pack<T, COUNT> &x, const Pack<T, COUNT> &d_out) const {
        const bool is_own = INNER || i + t < run.steps;
#pragma unroll
        for (int c = 0; c < COUNT; c++) {
            window[BEFORE + t][c] = x[c];
            float d_sum = d_out[c];
            const float sum = filter.apply(window + t, c), s = sigmoid(sum);
            d_sum = activate ? d_sum * silu_slope(sum, s) : d_sum;
            // After the end there is no sum, and what stands there need not be a number.
            g[BEFORE + t][c] = INNER || i + t < there ? d_sum : 0.0f;
            if (is_own) {
#pragma unroll
                for (int k = 0; k < MOST; k++) {
                    if (filter.has(k)) d_weight[k][c] = fmaf(d_sum, window[t + k][c], d_weight[k][c]);
                }
                d_bias[c] += d_sum;
            }
        }
    }

    // The gradient of the line where the step is the last that meets it.
    template <bool INNER> __device__ __forceinline__ void line_gradient(const int &i, int t, float (&d_line)[COUNT]) const {
#pragma unroll
        for (int c = 0; c < COUNT; c++) {
            d_line[c] = 0.0f;
#pragma unroll
            for (int k = 0; k < MOST; k++) {
                // Beyond the ends of the sequence no weight has been met: not even an infinite one, whose product with a zero
                // there would be NaN.
                const bool met = INNER || (i + t - k >= 0 && i + t - k < there);
                if (filter.has(k) && met) {
                    d_line[c] = fmaf(filter.weight[k][c], g[BEFORE + t - k][c], d_line[c]);
                }
            }
        }
        const int position = position_of(i, t);
        if (!INNER && params.d_final_state.data && position >= end && position < run.steps + width - 1) {
            const StateRows &state = params.d_final_state;
            const float *at =
                state.data + run.sequence * state.sequence + (position - end) * state.row + d * state.channel;
#pragma unroll
            for (int c = 0; c < COUNT; c++) {
                if (c < count) d_line[c] += at[c * state.channel];
            }
        }
    }

    // Writes it to the input at `d_x`, or to the initial state.
    template <bool INNER>
    __device__ __forceinline__ void write(const int &i, int t, T *const &d_x, const float (&d_line)[COUNT]) const {
        const int position = position_of(i, t);
        if (INNER || i + t >= BEFORE) {
            const int left = INNER || i + t < run.steps + BEFORE ? count : 0;
            store_vec<T, COUNT, VECTOR>(d_x, 1, narrow_pack<T>(d_line), left);
        } else if (params.d_initial_state && run.first == 0 && position >= 0) {
            float *to = params.d_initial_state + (run.sequence * (width - 1) + position) * params.inputs.d_inner + d;
#pragma unroll
            for (int c = 0; c < COUNT; c++) {
                if (c < count) to[c] = d_line[c];
            }
        }
    }

    // Goes on to the next tile.
    __device__ __forceinline__ void move_on(int &i) const {
#pragma unroll
        for (int j = 0; j < BEFORE; j++) {
#pragma unroll
            for (int c = 0; c < COUNT; c++) window[j][c] = window[TILE + j][c], g[j][c] = g[TILE + j][c];
        }
        i += TILE;
    }

  private:
    // In the line from the run's start on, where weights that there are not would have come first.
    __device__ __forceinline__ int position_of(const int &i, int t) const { return i + t - filter.gap; }
};

// Writes the gradients of the parameters of a block's channels, from `first_d` on: the sums over its threads. `sums` is
// (MOST + 1, COUNT, THREADS).
template <int LEAST, int MOST, int COUNT>
__device__ __forceinline__ void write_sums(const Backward &params, const Filter<LEAST, MOST, COUNT> &filter,
                                           const float (&d_weight)[MOST][COUNT], const float (&d_bias)[COUNT],
                                           const int64_t &first_d, const int &lanes, const int &width,
                                           float (&sums)[(MOST + 1) * COUNT * THREADS]) {
    const Inputs &p = params.inputs;
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

template <typename T, int LEAST, int MOST, int COUNT, bool VECTOR>
__device__ __forceinline__ void run(const Backward &params) {
    using Work = Work<T, LEAST, MOST, COUNT, VECTOR>;
    const Inputs &p = params.inputs;
    constexpr int BEFORE = Work::BEFORE, TILE = Work::TILE, AHEAD = sizeof(T) == 4 ? 1 : 2;
    const bool reverse = p.flags & FLAG_REVERSE, activate = p.flags & FLAG_SILU;
    const RowMap map(threadIdx.x, p.lane_shift);
    const int lanes = map.lanes;
    const int64_t out_step = reverse ? -p.d_inner : p.d_inner;
    const int width = static_cast<int>(p.width);
    __shared__ float sums[(MOST + 1) * COUNT * THREADS];
    __shared__ typename Incoming<T, COUNT, VECTOR, 2, TILE, AHEAD>::Tiles tiles;

    for (int64_t first_d = int64_t(blockIdx.x) * lanes * COUNT; first_d < p.d_inner;
         first_d += int64_t(gridDim.x) * lanes * COUNT) {
        const int64_t d = first_d + map.lane * COUNT;
        const int count = static_cast<int>(max(int64_t(0), min(p.d_inner - d, int64_t(COUNT))));
        const Filter<LEAST, MOST, COUNT> filter(p.weight, p.bias, p.width, d, count);
        float d_weight[MOST][COUNT] = {}, d_bias[COUNT] = {};

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

            const Work work{params, run, filter, d, count, width, activate, there, end, window, g, d_weight, d_bias};
            int i = 0;
            const auto tile = [&](auto inner) {
                constexpr bool INNER = inner.value;
                Pack<T, COUNT> next[2][TILE];
                incoming.take(next);
#pragma unroll
                for (int t = 0; t < TILE; t++) {
                    float d_line[COUNT];
                    work.template add_step<INNER>(i, t, next[0][t], next[1][t]);
                    work.template line_gradient<INNER>(i, t, d_line);
                    work.template write<INNER>(i, t, d_x, d_line);
                    d_x += out_step;
                }
                work.move_on(i);
            };
            while (i < BEFORE && i < run.steps + BEFORE) tile(BoolConstant<false>());
            while (i + TILE <= run.steps) tile(BoolConstant<true>());
            while (i < run.steps + BEFORE) tile(BoolConstant<false>());
        }
        write_sums(params, filter, d_weight, d_bias, first_d, lanes, width, sums);
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
