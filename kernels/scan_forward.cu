// The selective scan, forward, and what segments of split sequences make of a zero state.
#include "scan.cuh"

struct ScanForward {
    ScanInputs in;
    void *out;
    // Null where not asked for.
    float *final_state, *checkpoints;
};
static_assert(sizeof(ScanForward) == 416, "as in src/cuda/params.rs");

// The states of one lane: `STATES` neighbouring ones of one channel from `state` on, where they exist.
template <int STATES> struct Lane {
    int64_t channel, state;
    bool exists;
    int count;

    __device__ __forceinline__ Lane(const ScanInputs &p, int64_t channel, bool exists, int64_t state)
        : channel(channel), state(state), exists(exists),
          count(exists ? static_cast<int>(max(int64_t(0), min(p.d_state - state, int64_t(STATES)))) : 0) {}

    __device__ __forceinline__ void read(float (&to)[STATES], const float *from, int64_t stride) const {
#pragma unroll
        for (int i = 0; i < STATES; i++) to[i] = i < count ? from[i * stride] : 0.0f;
    }
    __device__ __forceinline__ void write(float *to, const float (&from)[STATES]) const {
#pragma unroll
        for (int i = 0; i < STATES; i++) {
            if (i < count) to[i] = from[i];
        }
    }
    __device__ __forceinline__ void parameter(float (&to)[STATES], const Matrix &from) const {
        read(to, from.data + channel * from.channel + state * from.state, from.state);
    }
    // Where this lane's states lie in a dense (…, d_inner, d_state).
    __device__ __forceinline__ int64_t at(const ScanInputs &p, int64_t index) const {
        return (index * p.d_inner + channel) * p.d_state + state;
    }
};

// The state that enters a segment: the initial state, carried through what the segments before it are summed up by.
template <bool ACCURATE, int STATES>
__device__ __forceinline__ void enter(const ScanInputs &p, const Segment &segment, const Lane<STATES> &lane,
                                      const float (&a)[STATES], float (&h)[STATES]) {
#pragma unroll
    for (int i = 0; i < STATES; i++) h[i] = 0.0f;
    const States &initial = p.initial_state;
    if (initial.data) {
        lane.read(h, initial.data + segment.sequence * initial.sequence + lane.channel * initial.channel +
                         lane.state * initial.state, initial.state);
    }
    if (!p.reached || !lane.exists) return;
    for (int64_t before = segment.index - segment.rank; before < segment.index; before++) {
        const float sum = p.sums[before * p.d_inner + lane.channel];
        float reached[STATES];
        lane.read(reached, p.reached + lane.at(p, before), 1);
#pragma unroll
        for (int i = 0; i < STATES; i++) h[i] = Decay<ACCURATE>(sum * a[i]).advance(h[i], reached[i]);
    }
}

// `GENERAL` takes everything: any stride and width, constant B and C, zero-order hold, more than STATES·LANES states (by
// turns, kept in dynamic shared memory meanwhile), compensated sums. Without it the kernel is what Mamba uses, in quads of
// channels and pairs of states that are side by side and aligned. A `SUMMARY` runs a segment from zero for the state that
// it reaches, and writes no output.
template <typename T, int STATES, int LANES, int CHANNELS, int STEPS, bool GENERAL, bool SUMMARY>
__device__ __forceinline__ void scan_forward(const ScanForward &params) {
    constexpr int THREADS = CHANNELS * LANES, TURN = STATES * LANES;
    constexpr int COLUMNS = CHANNELS / QUAD, ROWS = THREADS / COLUMNS, QUADS = STEPS / ROWS;
    constexpr bool WHOLE = !GENERAL, ACCURATE = sizeof(T) == 4;
    static_assert(QUADS * ROWS == STEPS && CHECKPOINT_STEPS % STEPS == 0 && STATES % 4 == 0, "whole tiles");

    __shared__ alignas(16) float2 inputs[STEPS][CHANNELS];
    __shared__ alignas(16) float outputs[SUMMARY ? 1 : STEPS][CHANNELS][LANES];
    __shared__ alignas(16) float projections[STEPS][2][TURN];
    extern __shared__ float4 carried[];

    const ScanInputs &p = params.in;
    const bool reverse = p.flags & FLAG_REVERSE, hold = GENERAL && (p.flags & FLAG_HOLD);
    const bool plus = p.flags & FLAG_SOFTPLUS;
    const Block block(p, blockIdx.x, CHANNELS);

    // As a member of a quad.
    const int column = threadIdx.x % COLUMNS * QUAD, row = threadIdx.x / COLUMNS;
    const int64_t d0 = block.first + column;
    const int count = max(0, min(block.width - column, QUAD));
    float bias[QUAD], skip[QUAD];
#pragma unroll
    for (int c = 0; c < QUAD; c++) {
        bias[c] = c < count ? p.delta_bias.at(d0 + c, 0.0f) : 0.0f;
        skip[c] = c < count ? p.d.at(d0 + c, 0.0f) : 0.0f;
    }

    // As a lane of a channel.
    const int own = threadIdx.x / LANES, sub = threadIdx.x % LANES;
    const int turns = GENERAL ? static_cast<int>((p.d_state + TURN - 1) / TURN) : 1;

    for (int64_t index = blockIdx.y; index < p.segments.count; index += gridDim.y) {
        const Segment segment = p.segments.get(index);
        if (SUMMARY && segment.ends_sequence()) continue;

        float a[STATES], h[STATES], total = 0.0f;
        const auto begin_turn = [&](int turn) {
            const Lane<STATES> lane(p, block.first + own, own < block.width, turn * TURN + sub * STATES);
            lane.parameter(a, p.a);
#pragma unroll
            for (int i = 0; i < STATES; i++) a[i] *= LOG2_E;
            return lane;
        };
        for (int turn = 0; turn < turns; turn++) {
            const Lane<STATES> lane = begin_turn(turn);
            if constexpr (SUMMARY) {
#pragma unroll
                for (int i = 0; i < STATES; i++) h[i] = 0.0f;
            } else {
                enter<ACCURATE>(p, segment, lane, a, h);
            }
            if (GENERAL) write_shared(reinterpret_cast<float *>(carried + turn * THREADS + threadIdx.x), h);
        }

        using Step = Pack<T, QUAD>;
        Walk<T, WHOLE> u(p.u, segment, segment.first + row, d0, reverse);
        Walk<T, WHOLE> delta(p.delta, segment, segment.first + row, d0, reverse);
        Walk<T, WHOLE> z(p.z, segment, segment.first + row, d0, reverse);
        T *out = static_cast<T *>(params.out) +
                 (segment.row * p.segments.len + segment.step(segment.first + row, reverse)) * p.d_inner + d0;
        const int64_t out_step = reverse ? -p.d_inner : p.d_inner;
        using Projections = ProjectionWalk<T, STEPS, TURN, THREADS, WHOLE>;
        Projections next(p, segment, block.group, segment.first, 0);

        Step next_u[QUADS], next_delta[QUADS];
        const auto load_next = [&](int left) {
#pragma unroll
            for (int k = 0; k < QUADS; k++) {
                const int there = row + k * ROWS < left ? count : 0;
                next_u[k] = u.load(k * ROWS, there);
                next_delta[k] = delta.load(k * ROWS, there);
            }
            if (!GENERAL) next.load(left);
        };
        const int64_t end = segment.first + segment.steps;
        load_next(static_cast<int>(min(end - segment.first, int64_t(STEPS))));

        for (int64_t i = segment.first; i < end; i += CHECKPOINT_STEPS) {
          if (!SUMMARY && params.checkpoints && i > 0) {
            const int64_t slot =
                (segment.row * p.segments.len + segment.start) / CHECKPOINT_STEPS + i / CHECKPOINT_STEPS - 1;
            for (int turn = 0; turn < turns; turn++) {
                const Lane<STATES> lane(p, block.first + own, own < block.width, turn * TURN + sub * STATES);
                if (GENERAL) read_shared(h, reinterpret_cast<const float *>(carried + turn * THREADS + threadIdx.x));
                lane.write(params.checkpoints + lane.at(p, slot), h);
            }
          }
          // Steps that are left of this part and, for the loads ahead, of the next.
          int left = static_cast<int>(min(end - i, int64_t(CHECKPOINT_STEPS + STEPS)));
          const int last = max(0, left - CHECKPOINT_STEPS);
          for (; left > last; left -= STEPS) {
            // Stage.
            Step tile_u[QUADS], tile_z[QUADS];
            float steps[QUADS][QUAD];
#pragma unroll
            for (int k = 0; k < QUADS; k++) {
                tile_u[k] = next_u[k];
#pragma unroll
                for (int c = 0; c < QUAD; c++) steps[k][c] = next_delta[k][c] + bias[c];
            }
            if (plus) {
#pragma unroll
                for (int k = 0; k < QUADS; k++) {
#pragma unroll
                    for (int c = 0; c < QUAD; c++) steps[k][c] = softplus<T>(steps[k][c]);
                }
            }
            if (left < STEPS) {
#pragma unroll
                for (int k = 0; k < QUADS; k++) {
#pragma unroll
                    for (int c = 0; c < QUAD; c++) steps[k][c] = row + k * ROWS < left ? steps[k][c] : 0.0f;
                }
            }
#pragma unroll
            for (int k = 0; k < QUADS; k++) {
                float staged[2 * QUAD];
#pragma unroll
                for (int c = 0; c < QUAD; c++) {
                    staged[2 * c] = steps[k][c];
                    staged[2 * c + 1] = hold ? tile_u[k][c] : steps[k][c] * tile_u[k][c];
                }
                write_shared(&inputs[row + k * ROWS][column].x, staged);
            }
            if (!GENERAL) next.store(&projections[0][0][0]);
            if (!SUMMARY && z.at) {
#pragma unroll
                for (int k = 0; k < QUADS; k++) tile_z[k] = z.load(k * ROWS, row + k * ROWS < left ? count : 0);
                z.advance(STEPS);
            }
            u.advance(STEPS);
            delta.advance(STEPS);
            if (!GENERAL) next.advance(STEPS);
            load_next(left - STEPS);
            if (!GENERAL) __syncthreads();

            // Advance.
            for (int turn = 0; turn < turns; turn++) {
                const Lane<STATES> lane =
                    GENERAL ? begin_turn(turn) : Lane<STATES>(p, block.first + own, own < block.width, sub * STATES);
                float inverse_a[STATES], constant_b[STATES], constant_c[STATES];
                if constexpr (GENERAL) {
                    read_shared(h, reinterpret_cast<const float *>(carried + turn * THREADS + threadIdx.x));
                    const int64_t at = i + (min(end - i, int64_t(CHECKPOINT_STEPS + STEPS)) - left);
                    Projections tile(p, segment, block.group, at, turn * TURN);
                    tile.load(left);
                    __syncthreads();
                    tile.store(&projections[0][0][0]);
                    __syncthreads();
                    lane.parameter(inverse_a, p.a);
#pragma unroll
                    for (int n = 0; n < STATES; n++) {
                        // Below this, (exp(ΔA) - 1)/A is Δ to more digits than an f32 has.
                        inverse_a[n] = fabsf(inverse_a[n]) < 1e-30f ? 0.0f : 1.0f / inverse_a[n];
                    }
                    const auto constant = [&](float(&to)[STATES], const Projection &from) {
                        const float *data = static_cast<const float *>(from.data);
                        if (from.constant) {
                            lane.read(to, data + lane.channel * from.channel + lane.state * from.state, from.state);
                        }
                    };
                    constant(constant_b, p.b);
                    constant(constant_c, p.c);
                }
                float lost[STATES] = {};
#pragma unroll(GENERAL ? 1 : STEPS / 2)
                for (int t = 0; t < STEPS; t++) {
                    const float2 in = inputs[t][own];
                    float b[STATES], c[STATES];
                    read_shared(b, &projections[t][0][sub * STATES]);
                    if (!SUMMARY) read_shared(c, &projections[t][1][sub * STATES]);
                    if (SUMMARY && turn == 0) total += in.x;
                    float y[STATES / 4];
#pragma unroll
                    for (int n = 0; n < STATES; n++) {
                        const float x = in.x * a[n];
                        if constexpr (GENERAL) {
                            if (p.b.constant) b[n] = constant_b[n];
                            if (!SUMMARY && p.c.constant) c[n] = constant_c[n];
                            if (hold || (p.flags & FLAG_COMPENSATE)) {
                                const float minus_one = exp2_minus_one(x);
                                float weighted = in.y;
                                if (hold) weighted *= inverse_a[n] == 0.0f ? in.x : minus_one * inverse_a[n];
                                // What rounding takes from the state is given back in the next step.
                                const float change = fmaf(minus_one, h[n], weighted * b[n]) + lost[n];
                                const float sum = h[n] + change;
                                if (p.flags & FLAG_COMPENSATE) lost[n] = change - (sum - h[n]);
                                h[n] = sum;
                            } else {
                                h[n] = Decay<ACCURATE>(x).advance(h[n], in.y * b[n]);
                            }
                        } else {
                            h[n] = Decay<ACCURATE>(x).advance(h[n], in.y * b[n]);
                        }
                        if constexpr (!SUMMARY) {
                            // By fours, as the lanes of a channel sum them, so that any number of lanes gives the same.
                            float &sum = y[n / 4];
                            if (n % 4) {
                                sum = fmaf(c[n], h[n], sum);
                            } else {
                                sum = turn ? fmaf(c[n], h[n], outputs[t][own][sub]) : c[n] * h[n];
                            }
                        }
                    }
                    if constexpr (!SUMMARY) {
                        static_assert(STATES == 4 || STATES == 16, "the sum of a channel's fours");
                        if constexpr (STATES == 16) y[0] = (y[0] + y[1]) + (y[2] + y[3]);
                        outputs[t][own][sub] = y[0];
                    }
                }
                if (GENERAL) write_shared(reinterpret_cast<float *>(carried + turn * THREADS + threadIdx.x), h);
            }
            __syncthreads();

            // Finish.
            if constexpr (!SUMMARY) {
#pragma unroll
                for (int k = 0; k < QUADS; k++) {
                    const int t = row + k * ROWS;
                    float parts[QUAD * LANES], y[QUAD];
                    read_shared(parts, outputs[t][column]);
#pragma unroll
                    for (int c = 0; c < QUAD; c++) {
                        const float *part = parts + c * LANES;
                        static_assert(LANES == 1 || LANES == 4, "the sum of a channel's lanes");
                        if constexpr (LANES == 1) y[c] = part[0];
                        else y[c] = (part[0] + part[1]) + (part[2] + part[3]);
                        y[c] = fmaf(skip[c], tile_u[k][c], y[c]);
                        if (z.at) y[c] *= silu(tile_z[k][c]);
                    }
                    store<T, WHOLE>(out + k * ROWS * out_step, y, t < left ? count : 0);
                }
                out += STEPS * out_step;
            }
          }
        }

        for (int turn = 0; turn < turns; turn++) {
            const Lane<STATES> lane(p, block.first + own, own < block.width, turn * TURN + sub * STATES);
            if (GENERAL) read_shared(h, reinterpret_cast<const float *>(carried + turn * THREADS + threadIdx.x));
            if constexpr (SUMMARY) {
                lane.write(p.reached + lane.at(p, segment.index), h);
            } else if (params.final_state && segment.ends_sequence()) {
                lane.write(params.final_state + lane.at(p, segment.sequence), h);
            }
        }
        if (SUMMARY && sub == 0 && own < block.width) p.sums[segment.index * p.d_inner + block.first + own] = total;
    }
}

// An extra block on an SM is worth more than the registers.
#define INSTANCE(NAME, T, STATES, LANES, CHANNELS, STEPS, GENERAL, BLOCKS)                                             \
    extern "C" __global__ void __launch_bounds__(CHANNELS *LANES, BLOCKS)                                              \
        scan_forward_##NAME(const __grid_constant__ ScanForward params) {                                              \
        scan_forward<T, STATES, LANES, CHANNELS, STEPS, GENERAL, false>(params);                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(CHANNELS *LANES, BLOCKS)                                              \
        scan_summary_##NAME(const __grid_constant__ ScanForward params) {                                              \
        scan_forward<T, STATES, LANES, CHANNELS, STEPS, GENERAL, true>(params);                                        \
    }

#define INSTANCES(SUFFIX, T)                                                                                           \
    INSTANCE(wide_##SUFFIX, T, 16, 1, 128, 8, false, 5)                                                                \
    INSTANCE(narrow_##SUFFIX, T, 4, 4, 64, 16, false, 3)                                                               \
    INSTANCE(general_##SUFFIX, T, 4, 4, 64, 16, true, 2)

INSTANCES(f32, float)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)
