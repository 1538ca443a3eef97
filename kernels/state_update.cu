// The state update: the scan's step on a pool of states, in place.
//
// It is bound by reading and writing the states once, so threads follow the order in which states lie: each holds four
// neighbouring states of one channel, as they are stored, and `lanes` neighbouring threads hold a channel. A thread takes
// its channel through batch rows that share the row of A, the loads of two of them in flight together.
//
// `FAST` leaves out what Mamba does not use (constant B and C, exact zero-order hold, more than 128 states) and whatever
// does not lie side by side and aligned, for the sake of registers. The bits are the same.
#include "math.cuh"
#include "pool.cuh"
#include "tensor.cuh"

struct StateUpdate {
    Activation u, dt, z;
    Matrix a;
    Projection b, c;
    Vector d, dt_bias;
    Pool state;
    void *out;
    // (batch, tokens, d_inner, d_state); null where not asked for.
    void *token_states;
    int64_t batch, tokens, d_inner, d_state, group_channels;
    // Threads to a channel, a power of two up to 32, as a shift; batch rows that a thread works on at a time.
    int64_t lane_shift, rows;
    uint64_t flags;
    Slots slots;
};
static_assert(sizeof(StateUpdate) == 2440, "as in src/cuda/params.rs");

constexpr uint64_t FLAG_SOFTPLUS = 1, FLAG_HOLD = 2;
// All that has states as its last dimension can be read and written by fours.
constexpr uint64_t FLAG_WHOLE = 4;
constexpr int THREADS = 128;
// The neighbouring states of a thread.
constexpr int QUAD = 4;

// Four states of a channel from `n` on, and their parameters.
template <typename T, bool FAST> struct Quad {
    int64_t n;
    int count;
    // log2(e) A, and 1/A where exact zero-order hold divides by it.
    float a[QUAD], inverse_a[QUAD];

    __device__ __forceinline__ Quad(const StateUpdate &p, int64_t channel, int64_t n, bool exists) : n(n) {
        count = exists ? static_cast<int>(max(int64_t(0), min(p.d_state - n, int64_t(QUAD)))) : 0;
        const float *at = p.a.data + channel * p.a.channel + n * p.a.state;
        const Pack<float, QUAD> row = fetch<QUAD, FAST>(at, p.a.state, count, p.flags & FLAG_WHOLE);
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            a[i] = row[i] * LOG2_E;
            // Below this, (exp(ΔA) - 1)/A is Δ to more digits than an f32 has.
            if (!FAST) inverse_a[i] = fabsf(row[i]) < 1e-30f ? 0.0f : 1.0f / row[i];
        }
    }

    // B or C of one token, unless it is constant.
    __device__ __forceinline__ Pack<T, QUAD> varying(const Projection &from, int64_t row, int64_t token,
                                                     int64_t group, bool whole) const {
        if (!FAST && from.constant) return {};
        const T *at = static_cast<const T *>(from.data) + (row * from.batch + token * from.step);
        return fetch<QUAD, FAST>(at + (group * from.group + n * from.state), from.state, count, whole);
    }

    __device__ __forceinline__ void widen(float (&to)[QUAD], const Projection &from, const Pack<T, QUAD> &varying,
                                          int64_t channel, bool whole) const {
        if (!FAST && from.constant) {
            const float *at = static_cast<const float *>(from.data) + (channel * from.channel + n * from.state);
            const Pack<float, QUAD> row = fetch<QUAD, FAST>(at, from.state, count, whole);
#pragma unroll
            for (int i = 0; i < QUAD; i++) to[i] = row[i];
        } else {
#pragma unroll
            for (int i = 0; i < QUAD; i++) to[i] = varying[i];
        }
    }
};

template <typename T, typename St, bool FAST>
__device__ __forceinline__ void state_update(const StateUpdate &p) {
    // More would not fit in the registers.
    constexpr int ROWS = FAST ? 2 : 1;
    const int lanes = 1 << p.lane_shift, sub = threadIdx.x & (lanes - 1);
    const bool hold = !FAST && (p.flags & FLAG_HOLD), plus = p.flags & FLAG_SOFTPLUS, whole = p.flags & FLAG_WHOLE;
    const int turns = FAST ? 1 : static_cast<int>((p.d_state + QUAD * lanes - 1) / (QUAD * lanes));
    const int rows = static_cast<int>(p.rows);

    for (int64_t first_channel = int64_t(blockIdx.x) * (THREADS >> p.lane_shift); first_channel < p.d_inner;
         first_channel += int64_t(gridDim.x) * (THREADS >> p.lane_shift)) {
        const int64_t channel = first_channel + (threadIdx.x >> p.lane_shift);
        const bool exists = channel < p.d_inner;
        const int64_t group = exists ? channel / p.group_channels : 0;
        const float bias = exists ? p.dt_bias.at(channel, 0.0f) : 0.0f;
        const float skip = exists ? p.d.at(channel, 0.0f) : 0.0f;
        Quad<T, FAST> quad(p, channel, sub * QUAD, exists);

        for (int64_t first = int64_t(blockIdx.y) * rows; first < p.batch; first += int64_t(gridDim.y) * rows) {
            // Null for rows that are not there or padding.
            St *state[ROWS];
            Pack<St, QUAD> h[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                state[r] = nullptr;
                h[r] = {};
                if (r >= rows || first + r >= p.batch || !exists) continue;
                const int64_t slot = p.slots.of(first + r);
                if (slot < 0) continue;
                state[r] = static_cast<St *>(p.state.data) + (slot * p.state.slot + channel * p.state.row);
                if (turns == 1) {
                    h[r] = fetch<QUAD, FAST>(state[r] + quad.n * p.state.column, p.state.column, quad.count, whole);
                }
            }

            for (int64_t t = 0; t < p.tokens; t++) {
                T u[ROWS], dt[ROWS], z[ROWS];
                Pack<T, QUAD> b[ROWS], c[ROWS];
                const auto element = [&](const Activation &from, int64_t row) {
                    return static_cast<const T *>(from.data)[row * from.batch + t * from.step + channel * from.channel];
                };
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    u[r] = dt[r] = z[r] = narrow<T>(0.0f);
                    if (!state[r]) continue;
                    u[r] = element(p.u, first + r);
                    dt[r] = element(p.dt, first + r);
                    if (p.z.data) z[r] = element(p.z, first + r);
                }
                float y[ROWS], delta[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; r++) y[r] = 0.0f;
                for (int turn = 0; turn < turns; turn++) {
                    if (turns > 1) quad = Quad<T, FAST>(p, channel, (turn * lanes + sub) * QUAD, exists);
                    // The states behind the last token, which are rounded as those in the pool are.
                    const int64_t column = quad.n * p.state.column;
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        if (!state[r]) continue;
                        b[r] = quad.varying(p.b, first + r, t, group, whole);
                        c[r] = quad.varying(p.c, first + r, t, group, whole);
                        if (turns > 1) h[r] = fetch<QUAD, FAST>(state[r] + column, p.state.column, quad.count, whole);
                    }
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        if (!state[r]) continue;
                        if (turn == 0) {
                            delta[r] = widen(dt[r]) + bias;
                            if (plus) delta[r] = softplus<T>(delta[r]);
                        }
                        const float in = hold ? widen(u[r]) : delta[r] * widen(u[r]);
                        float b_row[QUAD], c_row[QUAD], next[QUAD];
                        quad.widen(b_row, p.b, b[r], channel, whole);
                        quad.widen(c_row, p.c, c[r], channel, whole);
                        float sum = y[r];
#pragma unroll
                        for (int i = 0; i < QUAD; i++) {
                            const Decay<true> decay(delta[r] * quad.a[i]);
                            float weighted = in;
                            if (hold) {
                                weighted *= quad.inverse_a[i] == 0.0f ? delta[r] : decay.value * quad.inverse_a[i];
                            }
                            next[i] = decay.advance(h[r][i], weighted * b_row[i]);
                            const float longer = fmaf(c_row[i], next[i], sum);
                            // An infinite Δ or u would make NaN of states that do not exist.
                            sum = i < quad.count ? longer : sum;
                        }
                        y[r] = sum;
                        h[r] = pack<St, QUAD>(next);
                        if (turns > 1 || t + 1 == p.tokens) {
                            keep<QUAD, FAST>(state[r] + column, p.state.column, h[r], quad.count, whole);
                        }
                        if (p.token_states) {
                            St *to = static_cast<St *>(p.token_states) +
                                     (((first + r) * p.tokens + t) * p.d_inner + channel) * p.d_state + quad.n;
                            keep<QUAD, FAST>(to, 1, h[r], quad.count, whole);
                        }
                    }
                }
                for (int offset = lanes >> 1; offset > 0; offset >>= 1) {
#pragma unroll
                    for (int r = 0; r < ROWS; r++) y[r] += __shfl_xor_sync(0xffffffffu, y[r], offset);
                }
                if (sub > 0 || !exists) continue;
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    if (r >= rows || first + r >= p.batch) continue;
                    float out = fmaf(skip, widen(u[r]), y[r]);
                    if (p.z.data) out *= silu(widen(z[r]));
                    static_cast<T *>(p.out)[((first + r) * p.tokens + t) * p.d_inner + channel] =
                        narrow<T>(state[r] ? out : 0.0f);
                }
            }
            if (!p.token_states) continue;
            // What padding rows leave.
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                if (state[r] || r >= rows || first + r >= p.batch || !exists) continue;
                for (int64_t t = 0; t < p.tokens; t++) {
                    St *to = static_cast<St *>(p.token_states) +
                             (((first + r) * p.tokens + t) * p.d_inner + channel) * p.d_state;
                    for (int64_t n = sub; n < p.d_state; n += lanes) to[n] = narrow<St>(0.0f);
                }
            }
        }
    }
}

#define INSTANCE(NAME, T, St, FAST)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                           \
        state_update_##NAME(const __grid_constant__ StateUpdate params) {                                              \
        state_update<T, St, FAST>(params) ;                                                                            \
    }

#define INSTANCES(NAME, T, St)                                                                                         \
    INSTANCE(fast_##NAME, T, St, true)                                                                                 \
    INSTANCE(general_##NAME, T, St, false)

#define STATES(NAME, T)                                                                                                \
    INSTANCES(NAME##_f32, T, float)                                                                                    \
    INSTANCES(NAME##_f16, T, __half)                                                                                   \
    INSTANCES(NAME##_bf16, T, __nv_bfloat16)

STATES(f32, float)
STATES(f16, __half)
STATES(bf16, __nv_bfloat16)
