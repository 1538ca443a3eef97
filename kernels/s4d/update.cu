// S4D on a pool of states, in place.
//
// `lanes` neighbouring threads share the pairs of a channel, each every `lanes`th one. The arithmetic of a step is f64, and a state
// is rounded to the pool's type after every token.
#include "../common/lane_map.cuh"
#include "../common/tensor.cuh"
#include "number.cuh"

namespace s4d::update {

static_assert(is_bijection_in_rows<THREADS>());

template <typename T, typename St> __device__ __forceinline__ void run(const Update &p) {
    const RowMap map(threadIdx.x, p.lane_shift);
    const int per_block = THREADS >> p.lane_shift;
    for (int64_t first = int64_t(blockIdx.x) * per_block; first < p.d_inner; first += int64_t(gridDim.x) * per_block) {
        // Lanes of no channel go through the sums with the others.
        const int64_t channel = first + map.row;
        const bool exists = channel < p.d_inner;
        for (int64_t row = blockIdx.y; row < p.batch; row += gridDim.y) {
            const int64_t slot = slot_of(p.slots, row);
            for (int64_t token = 0; token < p.tokens; token++) {
                const int64_t at = (row * p.tokens + token) * p.d_inner + channel;
                const T *const u = static_cast<const T *>(p.u.data) + row * p.u.batch + token * p.u.step + channel * p.u.channel;
                const double input = exists && slot >= 0 ? widen(*u) : 0.0f;
                double sum = 0;
                for (int64_t n = map.lane; exists && n < p.d_state; n += map.lanes) {
                    St *const kept = p.token_states ? static_cast<St *>(p.token_states) + (at * p.d_state + n) * 2 : nullptr;
                    if (slot < 0) {
                        if (kept) kept[0] = kept[1] = narrow<St>(0.0f);
                        continue;
                    }
                    St *const state = static_cast<St *>(p.state.data) + slot * p.state.slot + channel * p.state.row +
                                      2 * n * p.state.column;
                    const float *const numbers = p.recurrence.data + channel * p.recurrence.sequence + n * p.recurrence.state;
                    const auto number = [&](int k) { return static_cast<double>(numbers[k * p.recurrence.channel]); };
                    const float *const c = p.c.data + channel * p.c.channel + 2 * n * p.c.state;
                    const Number<double> power = {number(0) + number(1), number(2) + number(3)};
                    const Number<double> before = {widen(state[0]), widen(state[p.state.column])};
                    const Number<double> x = multiply_add(power, before, Number<double>{number(4), number(5)} * input);
                    sum += static_cast<double>(c[0]) * x.re - static_cast<double>(c[p.c.state]) * x.im;
                    const St re = narrow<St>(static_cast<float>(x.re)), im = narrow<St>(static_cast<float>(x.im));
                    state[0] = re, state[p.state.column] = im;
                    if (kept) kept[0] = re, kept[1] = im;
                }
                sum = 2.0 * sum_lanes(sum, map.lanes);
                if (!exists || map.lane > 0) continue;
                if (p.d.data) sum = fma(static_cast<double>(p.d.data[channel * p.d.channel]), input, sum);
                static_cast<T *>(p.out)[at] = narrow<T>(slot < 0 ? 0.0f : static_cast<float>(sum));
            }
        }
    }
}

// A̅ in two parts and B̅, for a pair of each thread.
extern "C" __global__ void __launch_bounds__(THREADS) s4d_recurrence(const __grid_constant__ Recurrence params) {
    const Inputs &p = params.inputs;
    const int64_t count = p.d_inner * p.d_state;
    for (int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x; i < count; i += int64_t(gridDim.x) * THREADS) {
        const int64_t channel = i / p.d_state, n = i % p.d_state;
        const Pair of(p, channel, n);
        const Number<double> enter = of.weight * of.b;
        float *const to = params.to + channel * 6 * p.d_state + n;
        const auto write = [&](int k, double x) {
            to[k * p.d_state] = static_cast<float>(x);
            to[(k + 1) * p.d_state] = static_cast<float>(x - static_cast<float>(x));
        };
        write(0, of.power.re);
        write(2, of.power.im);
        to[4 * p.d_state] = static_cast<float>(enter.re), to[5 * p.d_state] = static_cast<float>(enter.im);
    }
}

#define INSTANCE(NAME, T, St)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) s4d_update_##NAME(const __grid_constant__ Update params) {   \
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
