// The causal convolution on a pool of states, in place.
//
// A thread holds the states of four neighbouring channels, as they are stored, and takes one batch row after another
// through its tokens. `FAST` is for filters of four weights where everything is contiguous and aligned.
#include "filter.cuh"
#include "params.cuh"

namespace conv::update {

template <typename T, typename St, int LEAST, int MOST, bool FAST> __device__ __forceinline__ void run(const Update &p) {
    constexpr int BEFORE = MOST - 1;
    const bool activate = p.flags & FLAG_SILU, whole = p.flags & FLAG_VECTOR;
    const RowMap map(threadIdx.x, p.lane_shift);
    const int lanes = map.lanes, lane = map.lane;
    const int64_t rows = p.width - 1;

    for (int64_t d = (int64_t(blockIdx.x) * lanes + lane) * QUAD; d < p.d_inner; d += int64_t(gridDim.x) * lanes * QUAD) {
        const int count = static_cast<int>(min(p.d_inner - d, int64_t(QUAD)));
        const Filter<LEAST, MOST, QUAD> filter(p.weight, p.bias, p.width, d, count);

        const int64_t stride = int64_t(gridDim.y) * (THREADS >> p.lane_shift);
        for (int64_t row = int64_t(blockIdx.y) * (THREADS >> p.lane_shift) + map.row; row < p.batch; row += stride) {
            const int64_t slot = slot_of(p.slots, row);
            const T *x = static_cast<const T *>(p.x.data) + row * p.x.batch + d * p.x.channel;
            T *out = static_cast<T *>(p.out) + row * p.tokens * p.d_inner + d;
            St *kept = static_cast<St *>(p.token_states) + row * p.tokens * rows * p.d_inner + d;
            if (slot < 0) {
                for (int64_t t = 0; t < p.tokens; t++) {
                    store_vec_if<QUAD, FAST>(out + t * p.d_inner, 1, Pack<T, QUAD>{}, count, whole);
                }
                for (int64_t j = 0; p.token_states && j < p.tokens * rows; j++) {
                    store_vec_if<QUAD, FAST>(kept + j * p.d_inner, 1, Pack<St, QUAD>{}, count, whole);
                }
                continue;
            }
            St *state = static_cast<St *>(p.state.data) + slot * p.state.slot + d * p.state.column;
            // The state's rows are the last of these, as the filter's weights are.
            Pack<St, QUAD> window[BEFORE];
#pragma unroll
            for (int j = 0; j < BEFORE; j++) {
                window[j] = {};
                if (!filter.has(j)) continue;
                window[j] = load_vec_if<QUAD, FAST>(state + (j - filter.gap) * p.state.row, p.state.column, count, whole);
            }
            for (int64_t t = 0; t < p.tokens; t++) {
                const Pack<T, QUAD> in = load_vec_if<QUAD, FAST>(x + t * p.x.step, p.x.channel, count, whole);
                float sum[QUAD], newest[QUAD];
#pragma unroll
                for (int c = 0; c < QUAD; c++) {
                    float line[MOST];
#pragma unroll
                    for (int j = 0; j < BEFORE; j++) line[j] = window[j][c];
                    newest[c] = line[BEFORE] = in[c];
                    sum[c] = filter.bias[c];
#pragma unroll
                    for (int k = 0; k < MOST; k++) {
                        if (filter.has(k)) sum[c] = fmaf(filter.weight[k][c], line[k], sum[c]);
                    }
                    if (activate) sum[c] = silu(sum[c]);
                }
                store_vec_if<QUAD, FAST>(out + t * p.d_inner, 1, narrow_pack<T>(sum), count, whole);
#pragma unroll
                for (int j = 0; j + 1 < BEFORE; j++) window[j] = window[j + 1];
                // An input is rounded as soon as it is part of the state, so that any number of tokens at once gives the
                // same bits.
                window[BEFORE - 1] = narrow_pack<St>(newest);
                if (!p.token_states) continue;
#pragma unroll
                for (int j = 0; j < BEFORE; j++) {
                    if (!filter.has(j)) continue;
                    store_vec_if<QUAD, FAST>(kept + (t * rows + j - filter.gap) * p.d_inner, 1, window[j], count, whole);
                }
            }
#pragma unroll
            for (int j = 0; j < BEFORE; j++) {
                if (!filter.has(j)) continue;
                store_vec_if<QUAD, FAST>(state + (j - filter.gap) * p.state.row, p.state.column, window[j], count, whole);
            }
        }
    }
}

#define INSTANCES(NAME, T, St)                                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        conv_update_fast_##NAME(const __grid_constant__ Update params) {                                               \
        run<T, St, 4, 4, true>(params);                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                           \
        conv_update_general_##NAME(const __grid_constant__ Update params) {                                            \
        run<T, St, 2, 8, false>(params);                                                                               \
    }

#define POOLS(NAME, T)                                                                                                 \
    INSTANCES(NAME##_f32, T, float)                                                                                    \
    INSTANCES(NAME##_f16, T, __half)                                                                                   \
    INSTANCES(NAME##_bf16, T, __nv_bfloat16)

POOLS(f32, float)
POOLS(f16, __half)
POOLS(bf16, __nv_bfloat16)

}
