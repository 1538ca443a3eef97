// The state update: the scan's step on a pool of states, in place.
//
// It is bound by reading and writing the states once, so threads follow the order in which states lie: `lanes` neighbouring
// threads hold a channel's, each four neighbouring ones, as they are stored, and in the fast kernel four more (so that
// what is computed for the channel is computed by half as many). A thread takes its channel through batch rows that share
// the row of A.
//
// The fast kernel does what Mamba uses: varying B and C, Euler's rule, up to 128 states; states contiguous and aligned;
// activations of fewer than 2^31 elements, so that indices are 32 bits wide (those of 64 would be half of all
// instructions, and more than the processors can issue while memory keeps up). The general one does everything, with the
// same bits.
#include "../common/lane_map.cuh"
#include "../common/math.cuh"
#include "../common/tensor.cuh"
#include "params.cuh"

namespace state_update {

// The lanes of a row of threads share the states of a channel; rows are channels.
static_assert(is_bijection_in_rows<THREADS>());

// Four states of a channel from `n` on, and their parameters.
template <typename T> struct Quad {
    int64_t n;
    int count;
    // log2(e) A, and 1/A where exact zero-order hold divides by it.
    float a[QUAD], inverse_a[QUAD];

    __device__ __forceinline__ Quad(const Update &p, int64_t channel, int64_t n, bool exists) : n(n) {
        count = exists ? static_cast<int>(max(int64_t(0), min(p.d_state - n, int64_t(QUAD)))) : 0;
        const float *at = p.a.data + channel * p.a.channel + n * p.a.state;
        const Pack<float, QUAD> row = load_vec_if<QUAD, false>(at, p.a.state, count, p.flags & FLAG_VECTOR);
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            a[i] = row[i] * LOG2_E;
            // Below this, (exp(ΔA) - 1)/A is Δ to more digits than an f32 has.
            inverse_a[i] = hold_inverse(row[i]);
        }
    }

    // B or C of one token.
    __device__ __forceinline__ void read(float (&to)[QUAD], const Projection &from, int64_t row, int64_t token,
                                         int64_t group, int64_t channel, bool whole) const {
        if (from.constant) {
            const float *at = static_cast<const float *>(from.data) + (channel * from.channel + n * from.state);
            const Pack<float, QUAD> pack = load_vec_if<QUAD, false>(at, from.state, count, whole);
#pragma unroll
            for (int i = 0; i < QUAD; i++) to[i] = pack[i];
        } else {
            const T *at = static_cast<const T *>(from.data) + (row * from.batch + token * from.step);
            at += group * from.group + n * from.state;
            const Pack<T, QUAD> pack = load_vec_if<QUAD, false>(at, from.state, count, whole);
#pragma unroll
            for (int i = 0; i < QUAD; i++) to[i] = pack[i];
        }
    }
};

template <typename T, typename St> __device__ __forceinline__ void general(const Update &p) {
    const RowMap map(threadIdx.x, p.lane_shift);
    const int lanes = map.lanes, lane = map.lane;
    const bool hold = p.flags & FLAG_ZOH, plus = p.flags & FLAG_SOFTPLUS, whole = p.flags & FLAG_VECTOR;
    const int rounds = static_cast<int>((p.d_state + QUAD * lanes - 1) / (QUAD * lanes));

    for (int64_t first = int64_t(blockIdx.x) * (THREADS >> p.lane_shift); first < p.d_inner;
         first += int64_t(gridDim.x) * (THREADS >> p.lane_shift)) {
        const int64_t channel = first + map.row;
        const bool exists = channel < p.d_inner;
        const int64_t group = exists ? channel / p.group_channels : 0;
        const float bias = exists ? element_or(p.delta_bias, channel, 0.0f) : 0.0f;
        const float skip = exists ? element_or(p.d, channel, 0.0f) : 0.0f;
        Quad<T> quad(p, channel, lane * QUAD, exists);

        for (int64_t row = blockIdx.y; row < p.batch; row += gridDim.y) {
            const int64_t slot = slot_of(p.slots, row);
            const bool live = exists && slot >= 0;
            St *state = static_cast<St *>(p.state.data) + (slot * p.state.slot + channel * p.state.row);
            St *kept = static_cast<St *>(p.token_states) + (row * p.tokens * p.d_inner + channel) * p.d_state;
            Pack<St, QUAD> h = {};
            for (int64_t t = 0; t < p.tokens; t++) {
                const auto element = [&](const Activation &from) {
                    const int64_t at = row * from.batch + t * from.step + channel * from.channel;
                    return live && from.data ? widen(static_cast<const T *>(from.data)[at]) : 0.0f;
                };
                const float u = element(p.u), z = element(p.z);
                float delta = element(p.delta) + bias, y = 0.0f;
                if (plus) delta = softplus<T>(delta);
                const float in = hold ? u : delta * u;
                for (int round = 0; round < rounds; round++) {
                    if (rounds > 1) quad = Quad<T>(p, channel, (round * lanes + lane) * QUAD, exists);
                    St *at = state + quad.n * p.state.column;
                    // What a round has left in the pool is what it would have kept, as both are rounded.
                    if (live && (t == 0 || rounds > 1)) h = load_vec_if<QUAD, false>(at, p.state.column, quad.count, whole);
                    if (live) {
                        float b[QUAD], c[QUAD], next[QUAD];
                        quad.read(b, p.b, row, t, group, channel, whole);
                        quad.read(c, p.c, row, t, group, channel, whole);
#pragma unroll
                        for (int i = 0; i < QUAD; i++) {
                            const Decay<true> decay(delta * quad.a[i]);
                            float weighted = in;
                            if (hold) weighted *= quad.inverse_a[i] == 0.0f ? delta : decay.minus_one() * quad.inverse_a[i];
                            next[i] = decay.advance(h[i], weighted * b[i]);
                            const float longer = fmaf(c[i], next[i], y);
                            // An infinite Δ or u would make NaN of states that do not exist.
                            y = i < quad.count ? longer : y;
                        }
                        h = narrow_pack<St>(next);
                        if (rounds > 1 || t + 1 == p.tokens) store_vec_if<QUAD, false>(at, p.state.column, h, quad.count, whole);
                    }
                    if (p.token_states) {
                        store_vec_if<QUAD, false>(kept + t * p.d_inner * p.d_state + quad.n, 1, h, quad.count, whole);
                    }
                }
                y = sum_lanes(y, lanes);
                if (lane > 0 || !exists) continue;
                y = fmaf(skip, u, y);
                if (p.z.data) y *= silu(z);
                static_cast<T *>(p.out)[(row * p.tokens + t) * p.d_inner + channel] = narrow<T>(live ? y : 0.0f);
            }
        }
    }
}

template <typename T, typename St> __device__ __forceinline__ void fast(const Update &p) {
    const RowMap map(threadIdx.x, p.lane_shift);
    const int lanes = map.lanes, lane = map.lane;
    const bool plus = p.flags & FLAG_SOFTPLUS;
    const uint32_t d_inner = p.d_inner, d_state = p.d_state, batch = p.batch, tokens = p.tokens;
    // Threads that have no states work on some that are there, and do not write.
    const uint32_t thread_channel = blockIdx.x * (THREADS >> p.lane_shift) + map.row;
    const bool exists = thread_channel < d_inner, writes = exists && lane == 0;
    const uint32_t channel = min(thread_channel, d_inner - 1);
    bool has[QUADS], holds[QUADS];
    uint32_t n[QUADS];
#pragma unroll
    for (int q = 0; q < QUADS; q++) {
        n[q] = (q * lanes + lane) * QUAD;
        has[q] = n[q] < d_state;
        holds[q] = has[q] && exists;
        if (!has[q]) n[q] = 0;
    }

    const float bias = element_or(p.delta_bias, channel, 0.0f), skip = element_or(p.d, channel, 0.0f);
    const Quad<T> quads[QUADS] = {{p, channel, n[0], true}, {p, channel, n[1], true}};
    const uint32_t group = channel / static_cast<uint32_t>(p.group_channels);
    const T *u_data = static_cast<const T *>(p.u.data), *delta_data = static_cast<const T *>(p.delta.data);
    const T *z_data = static_cast<const T *>(p.z.data);
    const T *b_data = static_cast<const T *>(p.b.data), *c_data = static_cast<const T *>(p.c.data);
    const uint32_t u_at = channel * uint32_t(p.u.channel), delta_at = channel * uint32_t(p.delta.channel);
    const uint32_t z_at = channel * uint32_t(p.z.channel);
    const uint32_t b_at = group * uint32_t(p.b.group), c_at = group * uint32_t(p.c.group);
    St *pool = static_cast<St *>(p.state.data) + channel * p.state.row;

    for (uint32_t row = blockIdx.y; row < batch; row += gridDim.y) {
        const int64_t slot = slot_of(p.slots, row);
        const bool live = slot >= 0;
        St *const state = pool + slot * p.state.slot;
        Pack<St, QUAD> h[QUADS];
#pragma unroll
        for (int q = 0; q < QUADS; q++) h[q] = load_vec<St, QUAD, true>(state + n[q], 1, live && holds[q] ? QUAD : 0);
        for (uint32_t t = 0; t < tokens; t++) {
            const T u = u_data[row * uint32_t(p.u.batch) + t * uint32_t(p.u.step) + u_at];
            const T raw = delta_data[row * uint32_t(p.delta.batch) + t * uint32_t(p.delta.step) + delta_at];
            const T z = z_data ? z_data[row * uint32_t(p.z.batch) + t * uint32_t(p.z.step) + z_at] : T();
            const T *const b_row = b_data + (row * uint32_t(p.b.batch) + t * uint32_t(p.b.step) + b_at);
            const T *const c_row = c_data + (row * uint32_t(p.c.batch) + t * uint32_t(p.c.step) + c_at);
            Pack<T, QUAD> b[QUADS], c[QUADS];
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                b[q] = load_vec<T, QUAD, true>(b_row + n[q], 1, QUAD);
                c[q] = load_vec<T, QUAD, true>(c_row + n[q], 1, QUAD);
            }
            // Nothing above is to wait for its use: all of it shall be in flight.
            __syncwarp();
            float delta = widen(raw) + bias, y = 0.0f;
            const float plused = softplus<T>(delta);
            delta = plus ? plused : delta;
            const float in = delta * widen(u);
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                float next[QUAD], of_quad = 0.0f;
#pragma unroll
                for (int i = 0; i < QUAD; i++) {
                    next[i] = Decay<true>(delta * quads[q].a[i]).advance(h[q][i], in * b[q][i]);
                    of_quad = fmaf(c[q][i], next[i], of_quad);
                }
                // As the general kernel sums lanes: those that are furthest apart first.
                y += has[q] ? of_quad : 0.0f;
                h[q] = narrow_pack<St>(next);
            }
            y = fmaf(skip, widen(u), sum_lanes(y, lanes));
            const float gated = y * silu(widen(z));
            y = z_data ? gated : y;
            const uint32_t at = (row * tokens + t) * d_inner + channel;
            if (writes) static_cast<T *>(p.out)[at] = narrow<T>(live ? y : 0.0f);
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                if (!p.token_states || !holds[q]) continue;
                St *to = static_cast<St *>(p.token_states) + (int64_t(at) * d_state + n[q]);
                store_vec<St, QUAD, true>(to, 1, live ? h[q] : Pack<St, QUAD>{}, QUAD);
            }
        }
#pragma unroll
        for (int q = 0; q < QUADS; q++) store_vec<St, QUAD, true>(state + n[q], 1, h[q], live && holds[q] ? QUAD : 0);
    }
}

#define INSTANCE(NAME, KERNEL, BLOCKS)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        state_update_##NAME(const __grid_constant__ Update params) {                                                   \
        KERNEL(params);                                                                                                \
    }

// Blocks to a processor, measured: half states in half steps gain from 8 of them, wider ones lose a quarter, as the compiler
// then has fewer loads under way.
#define INSTANCES(NAME, T, St)                                                                                         \
    INSTANCE(fast_##NAME, (fast<T, St>), (sizeof(T) == 2 && sizeof(St) == 2 ? 8 : 6))                                                                            \
    INSTANCE(general_##NAME, (general<T, St>), 6)

#define POOLS(NAME, T)                                                                                                 \
    INSTANCES(NAME##_f32, T, float)                                                                                    \
    INSTANCES(NAME##_f16, T, __half)                                                                                   \
    INSTANCES(NAME##_bf16, T, __nv_bfloat16)

POOLS(f32, float)
POOLS(f16, __half)
POOLS(bf16, __nv_bfloat16)

}
