// Backward chunk states: the gradient that each segment of a split sequence hands to the one before it if the gradient after it
// is zero, and its ΣΔ.
#include "../common/lane_map.cuh"
#include "backward.cuh"

namespace scan::backward_chunk_state {

constexpr int COLUMNS = CHANNELS / QUAD;

// Which channel and states a thread carries:
//
//   thread         0 … 7   8 … 15   16 … 23   24 … 31   32 … 39   …
//   channel        0 … 7   0 … 7    0 … 7     0 … 7     8 … 15
//   states         0-3     4-7      8-11      12-15     0-3
struct LaneMap {
    int state_group, channel;

    __host__ __device__ constexpr explicit LaneMap(unsigned thread)
        : state_group(thread % 32 / 8), channel(thread / 32 * 8 + thread % 8) {}
};
static_assert(is_bijection<THREADS>([](int thread) {
    return LaneMap(thread).channel * STATE_LANES + LaneMap(thread).state_group;
}));

template <typename T, bool GENERAL> __device__ __forceinline__ void run(const Backward &params) {
    constexpr bool VECTOR = !GENERAL, ACCURATE = sizeof(T) == 4;
    constexpr int STEPS = THREADS / COLUMNS;
    __shared__ alignas(16) float2 steps[STEPS][CHANNELS];
    __shared__ alignas(16) float projections[STEPS][2][STATE_BLOCK];

    const Inputs &p = params.inputs;
    const bool reverse = p.flags & FLAG_REVERSE, plus = p.flags & FLAG_SOFTPLUS, gated = p.z.data;
    const Block block(p, blockIdx.x, CHANNELS);
    const int column = threadIdx.x % COLUMNS * QUAD, row = threadIdx.x / COLUMNS;
    const int count = max(0, min(block.width - column, QUAD));
    const int64_t d0 = block.first + column;
    const LaneMap map(threadIdx.x);
    const int first_state = static_cast<int>(params.first_state);
    float bias[QUAD];
#pragma unroll
    for (int c = 0; c < QUAD; c++) bias[c] = c < count ? element_or(p.delta_bias, d0 + c, 0.0f) : 0.0f;

    const Lane lane(p, block.first + map.channel, map.channel < block.width, first_state + map.state_group * STATE_VEC);
    float a[STATE_VEC], constant_c[STATE_VEC] = {};
    lane.template parameter<VECTOR>(a, p.a);
#pragma unroll
    for (int n = 0; n < STATE_VEC; n++) a[n] *= LOG2_E;
    if (GENERAL && p.c.constant) lane.constant(constant_c, p.c);

    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const Segment segment = segment_at(p.segments, at);
        // What a sequence starts with is not handed on.
        if (segment.first == 0) continue;
        float g[STATE_VEC] = {};
        DeltaSum delta_sum;
        const int64_t tiles = (segment.steps + STEPS - 1) / STEPS;
        for (int64_t tile = tiles - 1; tile >= 0; tile--) {
            const int64_t i = segment.first + tile * STEPS;
            const int left = static_cast<int>(min(segment.first + segment.steps - i, int64_t(STEPS)));
            const int there = row < left ? count : 0;
            const Walk<T, VECTOR> delta(p.delta, segment, i + row, d0, reverse);
            const Walk<T, VECTOR> z(p.z, segment, i + row, d0, reverse);
            const Walk<T, VECTOR> d_out(params.d_out, segment, i + row, d0, reverse);
            const Pack<T, QUAD> step = delta.load(0, there), gate = z.load(0, gated ? there : 0);
            const Pack<T, QUAD> from = d_out.load(0, there);
            ProjectionWalk<T, STEPS, THREADS, VECTOR> walk(p, segment, block.group, i, first_state);
            walk.template load<true>(left);
            float staged[2 * QUAD], deltas[QUAD];
#pragma unroll
            for (int c = 0; c < QUAD; c++) {
                float x = step[c] + bias[c];
                if (plus) x = softplus<T>(x);
                deltas[c] = row < left ? x : 0.0f;
                staged[2 * c] = deltas[c];
                staged[2 * c + 1] = gated ? from[c] * silu(gate[c]) : from[c];
            }
            delta_sum.add(deltas);
            __syncthreads();
            write_shared(&steps[row][column].x, staged);
            walk.store(&projections[0][0][0]);
            __syncthreads();
#pragma unroll 8
            for (int t = STEPS - 1; t >= 0; t--) {
                const float2 in = steps[t][map.channel];
                float c[STATE_VEC];
                read_shared(c, &projections[t][1][map.state_group * STATE_VEC]);
#pragma unroll
                for (int n = 0; n < STATE_VEC; n++) {
                    if (GENERAL && p.c.constant) c[n] = constant_c[n];
                    g[n] = Decay<ACCURATE>(in.x * a[n]).of(fmaf(c[n], in.y, g[n]));
                }
            }
        }
        lane.write_dense<VECTOR>(p.chunk_states + lane.at(p, segment.index), g);
        __syncthreads();
        // The same for each block of states.
        delta_sum.write<COLUMNS, THREADS>(&steps[0][0].x, p.delta_sums + segment.index * p.d_inner + d0, count);
    }
}

#define INSTANCE(NAME, T, GENERAL)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        scan_backward_chunk_state_##NAME(const __grid_constant__ Backward params) {                                    \
        run<T, GENERAL>(params);                                                                                       \
    }

#define INSTANCES(SUFFIX, T)                                                                                           \
    INSTANCE(fast_##SUFFIX, T, false)                                                                                  \
    INSTANCE(general_##SUFFIX, T, true)

INSTANCES(f32, float)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)

}
