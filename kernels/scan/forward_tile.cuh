// A tile of the forward kernels: what they are made for, which thread does what, how the tile lies in shared memory, and how it is
// staged and finished.
#pragma once
#include "../common/lane_map.cuh"
#include "tile.cuh"

namespace scan::forward {

// Δ and what the recurrence takes in of a tile, as the lanes read them: in vectors of 4, `TOGETHER` steps of their channels at
// once, neighbouring lanes what is contiguous.
template <int STEPS, int CHANNELS_PER_LANE, int QUADS> struct StepsInShared {
    static_assert(CHANNELS_PER_LANE == 1 || CHANNELS_PER_LANE == QUAD, "a channel or a quad to a lane");
    static constexpr int TOGETHER = CHANNELS_PER_LANE == 1 ? 2 : 1;

    // With a quad to a lane, those of Δ and then those of the input. Else the first channels of the quads, the second ones
    // and so on, of each both values of a step and of the next.
    alignas(16) float data[STEPS / TOGETHER][2 * TOGETHER][QUADS][4];

    __device__ __forceinline__ void write(int t, int quad, const float (&step)[QUAD], const float (&in)[QUAD]) {
        if constexpr (CHANNELS_PER_LANE == 1) {
#pragma unroll
            for (int c = 0; c < QUAD; c++) write_shared(&data[t / 2][c][quad][t % 2 * 2], {step[c], in[c]});
        } else {
            write_shared(data[t][0][quad], step);
            write_shared(data[t][1][quad], in);
        }
    }
    // `place` is that of the lane's channels: with one of each quad to a lane, the quads' first channels come first.
    using OfLane = float[TOGETHER][CHANNELS_PER_LANE];
    __device__ __forceinline__ void read(int t, int place, OfLane &step, OfLane &in) const {
        if constexpr (CHANNELS_PER_LANE == 1) {
            float pairs[4];
            read_shared(pairs, data[t / 2][0][place]);
            step[0][0] = pairs[0], in[0][0] = pairs[1], step[1][0] = pairs[2], in[1][0] = pairs[3];
        } else {
            read_shared(step[0], data[t][0][place]);
            read_shared(in[0], data[t][1][place]);
        }
    }
};

// What the lanes of a channel add to y in each step of a tile. The channels of a quad are rotated by the lane, so that those
// which write the same channel of neighbouring quads do not meet in a bank.
template <int STEPS, int CHANNELS_PER_LANE, int QUADS> struct OutputsInShared {
    alignas(16) float data[STEPS][STATE_LANES][QUADS][QUAD];

    __device__ __forceinline__ float *of(int t, int state_group, int quad, int part) {
        return &data[t][state_group][quad][(part + state_group) * CHANNELS_PER_LANE % QUAD];
    }
    __device__ __forceinline__ void read(int t, int state_group, int quad, float (&to)[QUAD]) const {
        float rotated[QUAD];
        read_shared(rotated, data[t][state_group][quad]);
#pragma unroll
        for (int c = 0; c < QUAD; c++) to[c] = rotated[(c + state_group * CHANNELS_PER_LANE) % QUAD];
    }
};

// Which channels and states a thread carries. Neighbouring lanes have the same channels of neighbouring quads, so that what they
// read and write in shared memory is contiguous. The bits of a lane are dealt out so that whatever is read in vectors of 4, a lane
// has a neighbour, one or two away, that reads the same: such loads take half the time.
//
//   bits of a thread           7 6 5 | 4   3   2   1   0
//   state group                      | 1           0
//   index of its channels      5 4 3 |     2   1       0
//
// Of `INDICES` = THREADS / 4 indices of `CHANNELS_PER_LANE` channels, each quad's first come first, then the second ones, and
// so on: index = channel in its quad / CHANNELS_PER_LANE · quads + quad.
template <int THREADS, int CHANNELS_PER_LANE> struct LaneMap {
    static constexpr int QUADS = THREADS / STATE_LANES * CHANNELS_PER_LANE / QUAD;
    int state_group, index, part, quad, channel;

    __host__ __device__ constexpr explicit LaneMap(unsigned thread) : LaneMap(thread, static_cast<int>(thread % 32)) {}

  private:
    __host__ __device__ constexpr LaneMap(unsigned thread, int lane)
        : state_group(lane / 2 % 2 + lane / 16 * 2), index(thread / 32 * 8 + lane % 2 + lane / 4 % 4 * 2),
          part(index / QUADS), quad(index % QUADS), channel(quad * QUAD + part * CHANNELS_PER_LANE) {}
};
// The quad of channels and the first of the steps of a tile that a thread stages and finishes: neighbouring threads have
// neighbouring quads.
template <int THREADS, int CHANNELS_PER_LANE> struct QuadMap {
    static constexpr int QUADS = LaneMap<THREADS, CHANNELS_PER_LANE>::QUADS;
    int column, row;

    __host__ __device__ constexpr explicit QuadMap(unsigned thread) : column(thread % QUADS * QUAD), row(thread / QUADS) {}
};
template <int THREADS, int CHANNELS_PER_LANE> constexpr bool deals_out_all() {
    using Lanes = LaneMap<THREADS, CHANNELS_PER_LANE>;
    using Quads = QuadMap<THREADS, CHANNELS_PER_LANE>;
    return is_bijection<THREADS>([](int thread) {
               return Lanes(thread).channel / CHANNELS_PER_LANE * STATE_LANES + Lanes(thread).state_group;
           }) &&
           is_bijection<THREADS>([](int thread) { return Quads(thread).row * Quads::QUADS + Quads(thread).column / QUAD; });
}
static_assert(deals_out_all<THREADS, 1>() && deals_out_all<THREADS, QUAD>() && deals_out_all<forward_general::THREADS, 1>());

// What a kernel is made for: the activations' type, the threads of a block, the channels of a lane and the steps of a tile, and
//
//   VECTOR       channels and states are contiguous, and quads of channels whole;
//   PARKED       states are kept in dynamic shared memory while a lane advances those of another block of 16;
//   CHUNK_STATE  a segment is gone through from a zero state for its chunk state, and no output is written.
template <typename Element, int BLOCK_THREADS, int LANE_CHANNELS, int TILE_STEPS, bool VECTORS, bool PARKED_STATES, bool NO_OUTPUT>
struct Form {
    using T = Element;
    static constexpr int THREADS = BLOCK_THREADS, CHANNELS_PER_LANE = LANE_CHANNELS, STEPS = TILE_STEPS;
    static constexpr bool VECTOR = VECTORS, PARKED = PARKED_STATES, CHUNK_STATE = NO_OUTPUT, ACCURATE = sizeof(T) == 4;
    static constexpr int CHANNELS = THREADS / STATE_LANES * CHANNELS_PER_LANE;
    // Quads of channels, and how many of a tile's steps a thread stages and finishes of one: each `ROWS`th.
    static constexpr int COLUMNS = CHANNELS / QUAD, ROWS = THREADS / COLUMNS, QUADS = STEPS / ROWS;
    static_assert(QUADS * ROWS == STEPS && CHUNK_STEPS % STEPS == 0, "whole tiles");
    static_assert(!PARKED || CHANNELS_PER_LANE == 1, "the states that are parked are one channel's");

    using Steps = StepsInShared<STEPS, CHANNELS_PER_LANE, COLUMNS>;
    using Outputs = OutputsInShared<CHUNK_STATE ? 1 : STEPS, CHANNELS_PER_LANE, COLUMNS>;
    using Projections = float[STEPS][2][STATE_BLOCK];
    // The biases, and D.
    using OfChannels = float[2][CHANNELS];
};

// Stages the quads that a thread has loaded of a tile: Δ, and what the recurrence takes in. If the tile is `ragged`, `remaining`
// steps of it exist.
template <typename T, int ROWS, bool CHUNK_STATE, int COUNT, bool RAGGED, typename Steps>
__device__ __forceinline__ void stage(Steps &staged, DeltaSum &delta_sum, Pack<T, QUAD> (&u)[COUNT],
                                      const Pack<T, QUAD> (&next_u)[COUNT], const Pack<T, QUAD> (&next_delta)[COUNT],
                                      const float (&bias)[QUAD], const int &row, const int &column, const bool &plus,
                                      const bool &zoh, BoolConstant<RAGGED> ragged, const int &remaining) {
    float steps[COUNT][QUAD];
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        u[k] = next_u[k];
#pragma unroll
        for (int c = 0; c < QUAD; c++) steps[k][c] = next_delta[k][c] + bias[c];
    }
    if (plus) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
#pragma unroll
            for (int c = 0; c < QUAD; c++) steps[k][c] = softplus<T>(steps[k][c]);
        }
    }
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        float in[QUAD];
#pragma unroll
        for (int c = 0; c < QUAD; c++) {
            if (ragged && row + k * ROWS >= remaining) steps[k][c] = 0.0f;
            in[c] = zoh ? u[k][c] : steps[k][c] * u[k][c];
        }
        if (CHUNK_STATE) delta_sum.add(steps[k]);
        staged.write(row + k * ROWS, column / QUAD, steps[k], in);
    }
}

// Finishes the quads that a thread has staged of a tile: sums the lanes' parts of y up, and writes what the skip connection and
// the gate make of it.
template <typename T, int ROWS, bool VECTOR, int COUNT, bool RAGGED, typename Outputs, typename Step>
__device__ __forceinline__ void finish(const Outputs &outputs, T *const &out, const Step &out_step,
                                       const Pack<T, QUAD> (&u)[COUNT], const Pack<T, QUAD> (&z)[COUNT],
                                       const float (&skip)[QUAD], const int &row, const int &column, const bool &gated,
                                       BoolConstant<RAGGED> ragged, const int &remaining, const int &count) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        const int t = row + k * ROWS;
        float parts[STATE_LANES][QUAD], y[QUAD];
#pragma unroll
        for (int s = 0; s < STATE_LANES; s++) outputs.read(t, s, column / QUAD, parts[s]);
#pragma unroll
        for (int c = 0; c < QUAD; c++) {
            y[c] = (parts[0][c] + parts[1][c]) + (parts[2][c] + parts[3][c]);
            y[c] = fmaf(skip[c], u[k][c], y[c]);
        }
        if (gated) {
#pragma unroll
            for (int c = 0; c < QUAD; c++) y[c] *= silu(z[k][c]);
        }
        store_narrowed<T, VECTOR>(out + k * ROWS * out_step, y, !ragged || t < remaining ? count : 0);
    }
}

}
