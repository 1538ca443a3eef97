// The state update: the scan's step on a pool of states, in place.
//
// It is bound by reading and writing the states once, so threads follow the order in which states lie: each holds four
// neighbouring states of one channel, as they are stored, and `lanes` neighbouring threads hold a channel. A thread takes
// its channel through batch rows that share the row of A, the loads of two of them in flight together.
//
// The fast kernel does what Mamba uses: varying B and C, Euler's rule, up to 128 states; states side by side and aligned;
// activations of fewer than 2^31 elements, so that indices are 32 bits wide (those of 64 would be half of all
// instructions, and more than the processors can issue while memory keeps up). The general one does everything, with the
// same bits.
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
    // Threads to a channel, a power of two up to 32, as a shift.
    int64_t lane_shift;
    uint64_t flags;
    Slots slots;
};
static_assert(sizeof(StateUpdate) == 2432, "as in src/cuda/params.rs");

constexpr uint64_t FLAG_SOFTPLUS = 1, FLAG_HOLD = 2;
// All that has states as its last dimension can be read and written by fours.
constexpr uint64_t FLAG_WHOLE = 4;
constexpr int THREADS = 128;
// The neighbouring states of a thread.
constexpr int QUAD = 4;

// Four states of a channel from `n` on, and their parameters.
template <typename T> struct Quad {
    int64_t n;
    int count;
    // log2(e) A, and 1/A where exact zero-order hold divides by it.
    float a[QUAD], inverse_a[QUAD];

    __device__ __forceinline__ Quad(const StateUpdate &p, int64_t channel, int64_t n, bool exists) : n(n) {
        count = exists ? static_cast<int>(max(int64_t(0), min(p.d_state - n, int64_t(QUAD)))) : 0;
        const float *at = p.a.data + channel * p.a.channel + n * p.a.state;
        const Pack<float, QUAD> row = fetch<QUAD, false>(at, p.a.state, count, p.flags & FLAG_WHOLE);
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            a[i] = row[i] * LOG2_E;
            // Below this, (exp(ΔA) - 1)/A is Δ to more digits than an f32 has.
            inverse_a[i] = fabsf(row[i]) < 1e-30f ? 0.0f : 1.0f / row[i];
        }
    }

    // B or C of one token.
    __device__ __forceinline__ void read(float (&to)[QUAD], const Projection &from, int64_t row, int64_t token,
                                         int64_t group, int64_t channel, bool whole) const {
        if (from.constant) {
            const float *at = static_cast<const float *>(from.data) + (channel * from.channel + n * from.state);
            const Pack<float, QUAD> pack = fetch<QUAD, false>(at, from.state, count, whole);
#pragma unroll
            for (int i = 0; i < QUAD; i++) to[i] = pack[i];
        } else {
            const T *at = static_cast<const T *>(from.data) + (row * from.batch + token * from.step);
            at += group * from.group + n * from.state;
            const Pack<T, QUAD> pack = fetch<QUAD, false>(at, from.state, count, whole);
#pragma unroll
            for (int i = 0; i < QUAD; i++) to[i] = pack[i];
        }
    }
};

// The sum over neighbouring lanes, the same in each of them.
__device__ __forceinline__ float sum_lanes(float x, int lanes) {
    for (int offset = lanes >> 1; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

template <typename T, typename St> __device__ __forceinline__ void general(const StateUpdate &p) {
    const int lanes = 1 << p.lane_shift, sub = threadIdx.x & (lanes - 1);
    const bool hold = p.flags & FLAG_HOLD, plus = p.flags & FLAG_SOFTPLUS, whole = p.flags & FLAG_WHOLE;
    const int turns = static_cast<int>((p.d_state + QUAD * lanes - 1) / (QUAD * lanes));

    for (int64_t first = int64_t(blockIdx.x) * (THREADS >> p.lane_shift); first < p.d_inner;
         first += int64_t(gridDim.x) * (THREADS >> p.lane_shift)) {
        const int64_t channel = first + (threadIdx.x >> p.lane_shift);
        const bool exists = channel < p.d_inner;
        const int64_t group = exists ? channel / p.group_channels : 0;
        const float bias = exists ? p.dt_bias.at(channel, 0.0f) : 0.0f;
        const float skip = exists ? p.d.at(channel, 0.0f) : 0.0f;
        Quad<T> quad(p, channel, sub * QUAD, exists);

        for (int64_t row = blockIdx.y; row < p.batch; row += gridDim.y) {
            const int64_t slot = p.slots.of(row);
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
                float delta = element(p.dt) + bias, y = 0.0f;
                if (plus) delta = softplus<T>(delta);
                const float in = hold ? u : delta * u;
                for (int turn = 0; turn < turns; turn++) {
                    if (turns > 1) quad = Quad<T>(p, channel, (turn * lanes + sub) * QUAD, exists);
                    St *at = state + quad.n * p.state.column;
                    // What a turn has left in the pool is what it would have kept, as both are rounded.
                    if (live && (t == 0 || turns > 1)) h = fetch<QUAD, false>(at, p.state.column, quad.count, whole);
                    if (live) {
                        float b[QUAD], c[QUAD], next[QUAD];
                        quad.read(b, p.b, row, t, group, channel, whole);
                        quad.read(c, p.c, row, t, group, channel, whole);
#pragma unroll
                        for (int i = 0; i < QUAD; i++) {
                            const Decay<true> decay(delta * quad.a[i]);
                            float weighted = in;
                            if (hold) weighted *= quad.inverse_a[i] == 0.0f ? delta : decay.value * quad.inverse_a[i];
                            next[i] = decay.advance(h[i], weighted * b[i]);
                            const float longer = fmaf(c[i], next[i], y);
                            // An infinite Δ or u would make NaN of states that do not exist.
                            y = i < quad.count ? longer : y;
                        }
                        h = pack<St, QUAD>(next);
                        if (turns > 1 || t + 1 == p.tokens) keep<QUAD, false>(at, p.state.column, h, quad.count, whole);
                    }
                    if (p.token_states) {
                        keep<QUAD, false>(kept + t * p.d_inner * p.d_state + quad.n, 1, h, quad.count, whole);
                    }
                }
                y = sum_lanes(y, lanes);
                if (sub > 0 || !exists) continue;
                y = fmaf(skip, u, y);
                if (p.z.data) y *= silu(z);
                static_cast<T *>(p.out)[(row * p.tokens + t) * p.d_inner + channel] = narrow<T>(live ? y : 0.0f);
            }
        }
    }
}

// `ROWS` batch rows at a time.
template <typename T, typename St, int ROWS> __device__ __forceinline__ void fast(const StateUpdate &p) {
    const int lanes = 1 << p.lane_shift, sub = threadIdx.x & (lanes - 1);
    const bool plus = p.flags & FLAG_SOFTPLUS;
    const uint32_t d_inner = p.d_inner, d_state = p.d_state, batch = p.batch, tokens = p.tokens;
    // Threads that have no states work on some that are there, and do not write.
    const uint32_t own = blockIdx.x * (THREADS >> p.lane_shift) + (threadIdx.x >> p.lane_shift);
    const bool holds = own < d_inner && sub * QUAD < d_state, writes = own < d_inner && sub == 0;
    const uint32_t channel = min(own, d_inner - 1), n = sub * QUAD < d_state ? sub * QUAD : 0;

    const float bias = p.dt_bias.at(channel, 0.0f), skip = p.d.at(channel, 0.0f);
    const Quad<T> quad(p, channel, n, true);
    const uint32_t group = channel / static_cast<uint32_t>(p.group_channels);
    const T *u_data = static_cast<const T *>(p.u.data), *dt_data = static_cast<const T *>(p.dt.data);
    const T *z_data = static_cast<const T *>(p.z.data);
    const T *b_data = static_cast<const T *>(p.b.data), *c_data = static_cast<const T *>(p.c.data);
    const uint32_t u_at = channel * uint32_t(p.u.channel), dt_at = channel * uint32_t(p.dt.channel);
    const uint32_t z_at = channel * uint32_t(p.z.channel);
    const uint32_t b_at = group * uint32_t(p.b.group) + n, c_at = group * uint32_t(p.c.group) + n;
    St *pool = static_cast<St *>(p.state.data) + (channel * p.state.row + n);

    for (uint32_t first = blockIdx.y * ROWS; first < batch; first += gridDim.y * ROWS) {
        uint32_t row[ROWS];
        bool exists[ROWS], live[ROWS];
        St *state[ROWS];
        Pack<St, QUAD> h[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            exists[r] = first + r < batch;
            row[r] = exists[r] ? first + r : first;
            const int64_t slot = p.slots.of(row[r]);
            live[r] = exists[r] && slot >= 0;
            state[r] = pool + slot * p.state.slot;
            h[r] = load<St, QUAD, true>(state[r], 1, live[r] && holds ? QUAD : 0);
        }
        for (uint32_t t = 0; t < tokens; t++) {
            T u[ROWS], dt[ROWS], z[ROWS];
            Pack<T, QUAD> b[ROWS], c[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                u[r] = u_data[row[r] * uint32_t(p.u.batch) + t * uint32_t(p.u.step) + u_at];
                dt[r] = dt_data[row[r] * uint32_t(p.dt.batch) + t * uint32_t(p.dt.step) + dt_at];
                z[r] = z_data ? z_data[row[r] * uint32_t(p.z.batch) + t * uint32_t(p.z.step) + z_at] : T();
                const uint32_t b_row = row[r] * uint32_t(p.b.batch) + t * uint32_t(p.b.step) + b_at;
                const uint32_t c_row = row[r] * uint32_t(p.c.batch) + t * uint32_t(p.c.step) + c_at;
                b[r] = load<T, QUAD, true>(b_data + b_row, 1, QUAD);
                c[r] = load<T, QUAD, true>(c_data + c_row, 1, QUAD);
            }
            // Nothing above is to wait for its use: all of it shall be in flight.
            __syncwarp();
            float y[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float delta = widen(dt[r]) + bias, next[QUAD];
                const float plused = softplus<T>(delta);
                delta = plus ? plused : delta;
                const float in = delta * widen(u[r]);
                y[r] = 0.0f;
#pragma unroll
                for (int i = 0; i < QUAD; i++) {
                    next[i] = Decay<true>(delta * quad.a[i]).advance(h[r][i], in * b[r][i]);
                    y[r] = fmaf(c[r][i], next[i], y[r]);
                }
                if (sub * QUAD >= d_state) y[r] = 0.0f;
                h[r] = pack<St, QUAD>(next);
            }
#pragma unroll
            for (int r = 0; r < ROWS; r++) y[r] = sum_lanes(y[r], lanes);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float out = fmaf(skip, widen(u[r]), y[r]);
                const float gated = out * silu(widen(z[r]));
                out = z_data ? gated : out;
                const uint32_t at = (row[r] * tokens + t) * d_inner + channel;
                if (writes && exists[r]) static_cast<T *>(p.out)[at] = narrow<T>(live[r] ? out : 0.0f);
                if (p.token_states && holds && exists[r]) {
                    St *to = static_cast<St *>(p.token_states) + (int64_t(at) * d_state + n);
                    put<St, QUAD, true>(to, 1, live[r] ? h[r] : Pack<St, QUAD>{}, QUAD);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) put<St, QUAD, true>(state[r], 1, h[r], live[r] && holds ? QUAD : 0);
    }
}

#define INSTANCE(NAME, KERNEL, BLOCKS)                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        state_update_##NAME(const __grid_constant__ StateUpdate params) {                                              \
        KERNEL(params);                                                                                                \
    }

#define INSTANCES(NAME, T, St)                                                                                         \
    INSTANCE(fast_1_##NAME, (fast<T, St, 1>), 8)                                                                       \
    INSTANCE(fast_2_##NAME, (fast<T, St, 2>), 7)                                                                       \
    INSTANCE(general_##NAME, (general<T, St>), 6)

#define STATES(NAME, T)                                                                                                \
    INSTANCES(NAME##_f32, T, float)                                                                                    \
    INSTANCES(NAME##_f16, T, __half)                                                                                   \
    INSTANCES(NAME##_bf16, T, __nv_bfloat16)

STATES(f32, float)
STATES(f16, __half)
STATES(bf16, __nv_bfloat16)
