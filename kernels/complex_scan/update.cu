// The scan with complex states on a pool of states, in place.
//
// `lanes` neighbouring threads share the states of a channel, each every `lanes`th one. A state is rounded to the pool's type
// after every token.
#include "../common/lane_map.cuh"
#include "step.cuh"

namespace complex_scan::update {

static_assert(is_bijection_in_rows<THREADS>());

// Brings a lane's states of a channel up to date by the token at `place`, and gives their part of Re(C h).
template <typename T, typename St>
__device__ __forceinline__ double advance(const Update &p, const RowMap &map, const Place &place, int64_t slot, const Step &step,
                                          St *kept) {
    double sum = 0;
    for (int64_t n = map.lane; n < p.d_state; n += map.lanes) {
        St *const state =
            static_cast<St *>(p.state.data) + slot * p.state.slot + place.channel * p.state.row + 2 * n * p.state.column;
        const Number<double> before = {widen(state[0]), widen(state[p.state.column])};
        const Number<double> decay = step.decay(number_of(p.a, place.channel, n));
        const Number<double> h = step.advance(decay, before, number_of<T>(p.b, place, n));
        sum += real_product(number_of<T>(p.c, place, n), h);
        const St re = narrow<St>(static_cast<float>(h.re)), im = narrow<St>(static_cast<float>(h.im));
        state[0] = re, state[p.state.column] = im;
        if (kept) kept[2 * n] = re, kept[2 * n + 1] = im;
    }
    return sum;
}

template <typename T, typename St> __device__ __forceinline__ void run(const Update &p) {
    const RowMap map(threadIdx.x, p.lane_shift);
    const int per_block = THREADS >> p.lane_shift;
    for (int64_t first = int64_t(blockIdx.x) * per_block; first < p.d_inner; first += int64_t(gridDim.x) * per_block) {
        // Lanes of no channel go through the sums with the others.
        const int64_t channel = first + map.row;
        const bool exists = channel < p.d_inner;
        const int64_t group = channel / p.group_channels;
        for (int64_t row = blockIdx.y; row < p.batch; row += gridDim.y) {
            const int64_t slot = slot_of(p.slots, row);
            for (int64_t token = 0; token < p.tokens; token++) {
                const int64_t at = (row * p.tokens + token) * p.d_inner + channel;
                const Place place = {row, token, channel, group};
                St *const kept = p.token_states ? static_cast<St *>(p.token_states) + at * p.d_state * 2 : nullptr;
                double sum = 0, u = 0;
                if (exists && slot >= 0) {
                    const Step step = Read::of<T>(p, place).step;
                    u = step.u;
                    sum = advance<T>(p, map, place, slot, step, kept);
                } else if (exists && kept) {
                    for (int64_t n = map.lane; n < p.d_state; n += map.lanes) kept[2 * n] = kept[2 * n + 1] = narrow<St>(0.0f);
                }
                sum = sum_lanes(sum, map.lanes);
                if (!exists || map.lane > 0) continue;
                double y = 0;
                if (slot >= 0) {
                    y = with_skip(sum, p.d, channel, u);
                    if (p.z.data) {
                        const double z = element<T>(p.z, place);
                        y *= z * sigmoid(z);
                    }
                }
                static_cast<T *>(p.out)[at] = narrow<T>(static_cast<float>(y));
            }
        }
    }
}

#define INSTANCE(NAME, T, St)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) complex_scan_update_##NAME(                                  \
        const __grid_constant__ Update params) {                                                                       \
        run<T, St>(params);                                                                                            \
    }

#define INSTANCES(NAME, T)                                                                                             \
    INSTANCE(NAME##_f32, T, float)                                                                                     \
    INSTANCE(NAME##_f16, T, __half)                                                                                    \
    INSTANCE(NAME##_bf16, T, __nv_bfloat16)

INSTANCES(f32, float)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)

}
