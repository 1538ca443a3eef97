// The state update of one token with the projection of its step sizes: what comes from x_proj is normed, the step size of each channel
// projected, its state carried on, read and gated.
//
// Threads follow the order in which states lie, as in state_update/update.cu, whose bits this gives for the same step sizes:
// `lanes` neighbouring threads hold a channel's states, four neighbouring ones each, and divide its ranks in the same way.
#include "../common/lane_map.cuh"
#include "../common/launch.cuh"
#include "../common/math.cuh"
#include "../common/tensor.cuh"
#include "typed.cuh"

namespace decode::update {

// The lanes of a row of threads share the states of a channel; rows are channels.
static_assert(is_bijection_in_rows<THREADS>());

__device__ __forceinline__ float sum_lanes(float x, int lanes) {
    for (int offset = lanes >> 1; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Where the columns of a row lie.
template <typename T> struct Columns {
    const T *data;
    int64_t distance;

    __device__ __forceinline__ Columns(const Update &p, int64_t row)
        : data(static_cast<const T *>(p.columns.data) + row * p.columns.row), distance(p.columns.column) {}
    __device__ __forceinline__ float operator[](int64_t i) const { return widen(data[i * distance]); }
};

// Norms `size` columns from `first` on, by the lanes of one warp, and rounds them as the operator one by one would.
template <typename T>
__device__ __forceinline__ void norm(float *staged, const Columns<T> &columns, int64_t first, int64_t size,
                                     const Vector &weight, float eps) {
    const int lane = threadIdx.x % 32;
    float squares = 0.0f;
    for (int64_t i = lane; i < size; i += 32) squares = fmaf(columns[first + i], columns[first + i], squares);
    const float scale = 1.0f / sqrtf(sum_lanes(squares, 32) / static_cast<float>(size) + eps);
    for (int64_t i = lane; i < size; i += 32) {
        staged[first + i] = rounded<T>(columns[first + i] * scale * element_or(weight, i, 1.0f));
    }
}

// Stages the columns of a row: ranks, B and C.
template <typename T> __device__ __forceinline__ void stage(float *staged, const Update &p, int64_t row) {
    const Columns<T> columns(p, row);
    if (!(p.flags & FLAG_NORMS)) {
        for (int64_t i = threadIdx.x; i < p.dt_rank + 2 * p.d_state; i += THREADS) staged[i] = columns[i];
        return;
    }
    switch (threadIdx.x / 32) {
    case 0: norm<T>(staged, columns, 0, p.dt_rank, p.dt_norm, p.dt_eps); break;
    case 1: norm<T>(staged, columns, p.dt_rank, p.d_state, p.b_norm, p.state_eps); break;
    case 2: norm<T>(staged, columns, p.dt_rank + p.d_state, p.d_state, p.c_norm, p.state_eps); break;
    }
}

// The step size of a channel, the same in all of its lanes.
template <typename T>
__device__ __forceinline__ float step_size(const float *staged, const Update &p, int64_t channel, const RowMap &map) {
    const T *weight = static_cast<const T *>(p.dt_weight.data) + channel * p.dt_weight.row;
    float sum = 0.0f;
    for (int64_t r = map.lane * QUAD; r < p.dt_rank; r += map.lanes * QUAD) {
        const int count = static_cast<int>(min(p.dt_rank - r, int64_t(QUAD)));
        const Pack<T, QUAD> w =
            load_vec_if<QUAD, false>(weight + r * p.dt_weight.column, p.dt_weight.column, count, p.flags & FLAG_VECTOR);
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            if (i < count) sum = fmaf(w[i], staged[r + i], sum);
        }
    }
    const float delta = rounded<T>(sum_lanes(sum, map.lanes)) + element_or(p.delta_bias, channel, 0.0f);
    return softplus<T>(delta);
}

// Carries a lane's states of a channel on, and gives its part of the output.
template <typename St>
__device__ __forceinline__ float advance(St *state, const float *b, const float *c, const Update &p, int64_t channel,
                                         const RowMap &map, float delta, float in) {
    float y = 0.0f;
    for (int64_t n = map.lane * QUAD; n < p.d_state; n += map.lanes * QUAD) {
        const bool whole = p.flags & FLAG_VECTOR;
        const int count = static_cast<int>(min(p.d_state - n, int64_t(QUAD)));
        const float *a = p.a.data + channel * p.a.channel + n * p.a.state;
        const Pack<float, QUAD> decay = load_vec_if<QUAD, false>(a, p.a.state, count, whole);
        St *at = state + n * p.state.column;
        const Pack<St, QUAD> h = load_vec_if<QUAD, false>(at, p.state.column, count, whole);
        float next[QUAD];
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            const float of_b = i < count ? b[n + i] : 0.0f, of_c = i < count ? c[n + i] : 0.0f;
            next[i] = Decay<true>(delta * (decay[i] * LOG2_E)).advance(h[i], in * of_b);
            const float longer = fmaf(of_c, next[i], y);
            // An infinite Δ or u would make NaN of states that do not exist.
            y = i < count ? longer : y;
        }
        store_vec_if<QUAD, false>(at, p.state.column, narrow_pack<St>(next), count, whole);
    }
    return y;
}

// Asks for what is read of a channel beside what other kernels have just written.
template <typename T, typename St>
__device__ __forceinline__ void prefetch_channel(const Update &p, int64_t row, int64_t channel, const RowMap &map) {
    const int64_t slot = slot_of(p.slots, row);
    const St *state = static_cast<const St *>(p.state.data) + (slot * p.state.slot + channel * p.state.row);
    const T *weight = static_cast<const T *>(p.dt_weight.data) + channel * p.dt_weight.row;
    for (int64_t n = map.lane * QUAD; n < p.d_state; n += map.lanes * QUAD) {
        if (slot >= 0) prefetch(state + n * p.state.column);
        prefetch(p.a.data + channel * p.a.channel + n * p.a.state);
    }
    for (int64_t r = map.lane * QUAD; r < p.dt_rank; r += map.lanes * QUAD) prefetch(weight + r * p.dt_weight.column);
    if (map.lane > 0) return;
    if (p.delta_bias.data) prefetch(p.delta_bias.data + channel * p.delta_bias.channel);
    if (p.d.data) prefetch(p.d.data + channel * p.d.channel);
}

template <typename T, typename St> __device__ __forceinline__ void run(const Update &p) {
    extern __shared__ float staged[];
    begin_next();
    const RowMap map(threadIdx.x, p.lane_shift);
    const int64_t channel = int64_t(blockIdx.x) * (THREADS >> p.lane_shift) + map.row;
    const bool exists = channel < p.d_inner;
    const float *b = staged + p.dt_rank, *c = b + p.d_state;
    if (exists && blockIdx.y < p.rows) prefetch_channel<T, St>(p, blockIdx.y, channel, map);
    wait_for_last();
    for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
        // Nobody reads the columns of the row before any more.
        __syncthreads();
        stage<T>(staged, p, row);
        __syncthreads();
        const int64_t slot = slot_of(p.slots, row);
        const bool live = exists && slot >= 0;
        float delta = 0.0f, u = 0.0f, y = 0.0f;
        // All lanes of a warp take part in its sums, those without a channel for the last one.
        delta = step_size<T>(staged, p, min(channel, p.d_inner - 1), map);
        if (live) {
            u = widen(static_cast<const T *>(p.u.data)[row * p.u.row + channel * p.u.column]);
            St *state = static_cast<St *>(p.state.data) + (slot * p.state.slot + channel * p.state.row);
            y = advance(state, b, c, p, channel, map, delta, delta * u);
        }
        y = sum_lanes(y, map.lanes);
        if (map.lane > 0 || !exists) continue;
        y = fmaf(element_or(p.d, channel, 0.0f), u, y);
        if (p.z.data && live) y *= silu(widen(static_cast<const T *>(p.z.data)[row * p.z.row + channel * p.z.column]));
        static_cast<T *>(p.out)[row * p.d_inner + channel] = narrow<T>(live ? y : 0.0f);
    }
}

#define INSTANCE(NAME, T, St)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) decode_update_##NAME(const __grid_constant__ Update params) { \
        run<T, St>(params);                                                                                            \
    }

#define POOLS(NAME, T)                                                                                                 \
    INSTANCE(NAME##_f32, T, float)                                                                                     \
    INSTANCE(NAME##_f16, T, __half)                                                                                    \
    INSTANCE(NAME##_bf16, T, __nv_bfloat16)

POOLS(f32, float)
POOLS(f16, __half)
POOLS(bf16, __nv_bfloat16)

}
