// What the kernels of the scan share: their arguments, and how the work of a block is laid out.
//
// A block carries neighbouring channels of one group through one segment after another, tile by tile:
//
//   stage    the threads read the tile's activations four channels at a time and leave Δ and what the recurrence takes in
//            in shared memory, so that the functions of a step are computed once for each channel however many lanes
//            share its states;
//   advance  each lane carries 4 states of one channel or of a quad in registers; a channel's 16 states are in 4 lanes (and
//            more than 16 take turns, a block of 16 at a time);
//   finish   the threads that staged four channels sum the lanes' parts of y up and write them.
//
// Loads of the next tile are in flight while a tile is advanced. Steps past the end are staged with Δ = 0,
// whatever softplus makes of it, so that every state passes through them unchanged and no loop depends on the length.
#pragma once
#include "../common/compiler.cuh"
#include "../common/math.cuh"
#include "../common/segments.cuh"
#include "../common/tensor.cuh"
#include "params.cuh"

namespace scan {

// The channels of a block.
struct Block {
    int64_t group, first;
    int width;

    __device__ __forceinline__ Block(const Inputs &p, uint32_t index, int channels) {
        group = index / static_cast<uint32_t>(p.group_blocks);
        const int64_t within = (index - group * p.group_blocks) * channels;
        first = group * p.group_channels + within;
        width = static_cast<int>(min(static_cast<int64_t>(channels), p.group_channels - within));
    }
};

// The distance of neighbouring steps: 32 bits wide where the host has seen that whole tiles can be stepped over so, which
// makes one instruction of an address.
template <bool VECTOR> struct Distance { using type = int64_t; };
template <> struct Distance<true> { using type = int; };

// Walks the steps of one batch row of an activation for the quad of channels from `d` on.
template <typename T, bool VECTOR> struct Walk {
    const T *at;
    typename Distance<VECTOR>::type step;
    int64_t channel;

    __device__ __forceinline__ Walk(const Activation &tensor, const Segment &segment, int64_t i, int64_t d, bool reverse)
        : at(static_cast<const T *>(tensor.data)), step(reverse ? -tensor.step : tensor.step), channel(tensor.channel) {
        at += segment.row * tensor.batch + segment.step(i, reverse) * tensor.step + d * tensor.channel;
        opaque(step);
    }
    __device__ __forceinline__ Pack<T, QUAD> load(int steps, int count) const {
        return load_vec<T, QUAD, VECTOR>(at + steps * step, channel, count);
    }
    __device__ __forceinline__ void advance(int steps) { at += steps * step; }
};

// The ΣΔ of the channels that a thread stages, summed with compensation (Kahan, 1965): a plain sum of a million equal steps
// loses the third digit, for while it lies between two powers of two all additions are rounded the same way.
struct DeltaSum {
    float total[QUAD] = {}, excess[QUAD] = {};

    __device__ __forceinline__ void add(const float (&steps)[QUAD]) {
#pragma unroll
        for (int c = 0; c < QUAD; c++) {
            const float step = steps[c] - excess[c], sum = total[c] + step;
            excess[c] = (sum - total[c]) - step;
            total[c] = sum;
        }
    }

    // Writes the sums over all threads that stage the same `COLUMNS` quads of a block, of which this thread's has `count`
    // channels: `to` is its first one's place. `room` is shared memory for four floats of each thread, which nobody reads.
    template <int COLUMNS, int THREADS> __device__ __forceinline__ void write(float *room, float *to, int count) const {
        write_shared(room + threadIdx.x * QUAD, total);
        __syncthreads();
        if (threadIdx.x < COLUMNS) {
#pragma unroll
            for (int c = 0; c < QUAD; c++) {
                double sum = 0.0;
                for (int i = threadIdx.x; i < THREADS; i += COLUMNS) sum += room[i * QUAD + c];
                if (c < count) to[c] = static_cast<float>(sum);
            }
        }
        __syncthreads();
    }
};

// Walks B and C for a tile in shared memory, `(STEPS, 2, STATE_BLOCK)` with the states from `first_state` on: zero beyond the
// segment's end and beyond d_state, and where a projection is constant. Each thread brings in states in vectors of 4.
template <typename T, int STEPS, int THREADS, bool VECTOR> struct ProjectionWalk {
    static constexpr int ROW = 2 * STATE_LANES; // fours in a step
    static constexpr int COUNT = (STEPS * ROW + THREADS - 1) / THREADS, ROWS = THREADS / ROW;

    const T *at;
    typename Distance<VECTOR>::type step;
    int64_t state;
    int count, row;
    Pack<T, STATE_VEC> fours[COUNT];

    __device__ __forceinline__ ProjectionWalk(const Inputs &p, const Segment &segment, int64_t group, int64_t i,
                                              int64_t first_state) {
        const bool reverse = p.flags & FLAG_REVERSE;
        const int n = threadIdx.x % STATE_LANES * STATE_VEC;
        const Projection &from = threadIdx.x / STATE_LANES % 2 ? p.c : p.b;
        row = threadIdx.x / ROW;
        count = static_cast<int>(max(int64_t(0), min(p.d_state - first_state - n, int64_t(STATE_VEC))));
        if (from.constant || row >= STEPS) count = 0;
        step = reverse ? -from.step : from.step;
        state = from.state;
        at = static_cast<const T *>(from.data) + segment.row * from.batch + segment.step(i + row, reverse) * from.step +
             group * from.group + (first_state + n) * from.state;
        opaque(step);
        opaque(count);
    }

    // Has B and C walked from other states on, where both vary.
    __device__ __forceinline__ void change_states(const Inputs &p, int from_state, int first_state) {
        static_assert(STEPS % ROWS == 0, "all threads have steps");
        at += (first_state - from_state) * state;
        const int n = threadIdx.x % STATE_LANES * STATE_VEC;
        count = max(0, min(static_cast<int>(p.d_state) - first_state - n, STATE_VEC));
    }

    // Puts the loads in flight for a tile of which `left` steps exist; all of them, if it is not `RAGGED`.
    template <bool RAGGED> __device__ __forceinline__ void load(int left) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const bool there = (STEPS % ROWS == 0 && !RAGGED) || row + k * ROWS < left;
            fours[k] = load_vec<T, STATE_VEC, VECTOR>(at + k * ROWS * step, state, there ? count : 0);
        }
    }
    __device__ __forceinline__ void advance(int steps) { at += steps * step; }

    __device__ __forceinline__ void store(float *tile) const {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            if (STEPS % ROWS == 0 || row + k * ROWS < STEPS) {
                const float four[STATE_VEC] = {fours[k][0], fours[k][1], fours[k][2], fours[k][3]};
                write_shared(tile + STATE_VEC * (threadIdx.x + k * THREADS), four);
            }
        }
    }
};

// 4 neighbouring states of one channel from `state` on, where they exist.
struct Lane {
    int64_t channel, state;
    bool exists;
    int count;

    __device__ __forceinline__ Lane(const Inputs &p, int64_t channel, bool exists, int64_t state)
        : channel(channel), state(state), exists(exists),
          count(exists ? static_cast<int>(max(int64_t(0), min(p.d_state - state, int64_t(STATE_VEC)))) : 0) {}

    __device__ __forceinline__ void read(float (&to)[STATE_VEC], const float *from, int64_t stride) const {
#pragma unroll
        for (int i = 0; i < STATE_VEC; i++) to[i] = i < count ? from[i * stride] : 0.0f;
    }
    __device__ __forceinline__ void write(float *to, const float (&from)[STATE_VEC]) const {
#pragma unroll
        for (int i = 0; i < STATE_VEC; i++) {
            if (i < count) to[i] = from[i];
        }
    }
    // The same where they are contiguous: in one piece if all lanes have all or none of them, and aligned.
    template <bool VECTOR> __device__ __forceinline__ void read_dense(float (&to)[STATE_VEC], const float *from) const {
        const Pack<float, STATE_VEC> states = load_vec<float, STATE_VEC, VECTOR>(from, 1, count);
#pragma unroll
        for (int i = 0; i < STATE_VEC; i++) to[i] = states[i];
    }
    template <bool VECTOR> __device__ __forceinline__ void write_dense(float *to, const float (&from)[STATE_VEC]) const {
        store_narrowed<float, VECTOR>(to, from, count);
    }
    __device__ __forceinline__ const float *in(const Matrix &from) const {
        return from.data + channel * from.channel + state * from.state;
    }
    template <bool VECTOR> __device__ __forceinline__ void parameter(float (&to)[STATE_VEC], const Matrix &from) const {
        if (VECTOR && is_vectorizable(from)) {
            read_dense<true>(to, in(from));
        } else {
            read(to, in(from), from.state);
        }
    }
    // The state before a sequence; zero if none is given.
    __device__ __forceinline__ void initial(float (&to)[STATE_VEC], const States &from, int64_t sequence) const {
#pragma unroll
        for (int n = 0; n < STATE_VEC; n++) to[n] = 0.0f;
        if (!from.data) return;
        read(to, from.data + sequence * from.sequence + channel * from.channel + state * from.state, from.state);
    }
    __device__ __forceinline__ void constant(float (&to)[STATE_VEC], const Projection &from) const {
        read(to, static_cast<const float *>(from.data) + channel * from.channel + state * from.state, from.state);
    }
    // Where this lane's states lie in a dense (…, d_inner, d_state).
    __device__ __forceinline__ int64_t at(const Inputs &p, int64_t index) const {
        return (index * p.d_inner + channel) * p.d_state + state;
    }
};

// The steps between two states of a sequence that forward keeps.
__device__ __forceinline__ int checkpoint_steps(const Inputs &p) { return 1 << static_cast<int>(p.checkpoint_log2); }
// Whether it keeps the one before a step that is so far from a multiple of all such numbers, the first step excepted.
__device__ __forceinline__ bool is_kept(const Inputs &p, int t) { return (t & (checkpoint_steps(p) - 1)) == 0; }
// Where forward keeps the state before step `i` of a sequence, a multiple of those steps other than zero; `start` is the
// sequence's first step among those of all batch rows.
__device__ __forceinline__ int64_t checkpoint_slot(const Inputs &p, int64_t start, int64_t i) {
    const int log2 = static_cast<int>(p.checkpoint_log2);
    return (start >> log2) + (i >> log2) - 1;
}

// log2(e) A of a lane's channels. It is requested together, so that none of the loads waits for another.
template <bool VECTOR, int CHANNELS_PER_LANE, typename LaneOf>
__device__ __forceinline__ void read_rates(float (&a)[CHANNELS_PER_LANE][STATE_VEC], const LaneOf &lane_of, const Matrix &from) {
    if (VECTOR && is_vectorizable(from)) {
        Pack<float, STATE_VEC> packs[CHANNELS_PER_LANE];
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) {
            packs[c] = load_vec<float, STATE_VEC, true>(lane_of(c).in(from), 1, lane_of(c).count);
        }
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) {
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) a[c][n] = packs[c][n];
        }
    } else {
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) lane_of(c).read(a[c], lane_of(c).in(from), from.state);
    }
#pragma unroll
    for (int c = 0; c < CHANNELS_PER_LANE; c++) {
#pragma unroll
        for (int n = 0; n < STATE_VEC; n++) a[c][n] *= LOG2_E;
    }
}

// The state at a segment's start: the initial state, propagated through the chunk states of the segments before it.
template <bool ACCURATE, bool VECTOR>
__device__ __forceinline__ void incoming_state(const Inputs &p, const Segment &segment, const Lane &lane,
                                      const float (&a)[STATE_VEC], float (&h)[STATE_VEC]) {
    lane.initial(h, p.initial_state, segment.sequence);
    if (!p.chunk_states || !lane.exists) return;
    [[maybe_unused]] float lost[STATE_VEC] = {};
#pragma unroll 8
    for (int64_t before = segment.index - segment.rank; before < segment.index; before++) {
        const float sum = p.delta_sums[before * p.d_inner + lane.channel];
        float reached[STATE_VEC];
        lane.read_dense<VECTOR>(reached, p.chunk_states + lane.at(p, before));
#pragma unroll
        for (int i = 0; i < STATE_VEC; i++) {
            const Decay<ACCURATE> decay(sum * a[i]);
            if constexpr (ACCURATE) {
                decay.advance(h[i], lost[i], reached[i]);
            } else {
                h[i] = decay.advance(h[i], reached[i]);
            }
        }
    }
}

}
