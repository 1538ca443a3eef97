// What the passes of the causal convolution share: their arguments, and how the work is laid out.
//
// A thread walks a few neighbouring channels through a run of steps with the last inputs in registers, so that each input
// is read once, but for the few before its run that every run reads again. Runs, and the warps that walk them, are many.
#pragma once
#include "../common/async.cuh"
#include "../common/compiler.cuh"
#include "filter.cuh"
#include "params.cuh"

namespace conv {

// A part of a sequence: `steps` steps from the `first`-th in the direction of the convolution on.
struct Run {
    int64_t sequence;
    // The batch row, where the sequence starts in it, and the sequence's length.
    int64_t row, start, len;
    int64_t first;
    int steps;

    __device__ __forceinline__ bool ends_sequence() const { return first + steps == len; }

    // The step of the batch row that is the sequence's `i`-th in the direction of the convolution.
    __device__ __forceinline__ int64_t step(int64_t i, bool reverse) const {
        return reverse ? start + len - 1 - i : start + i;
    }
};

__device__ __forceinline__ Run run_at(const Runs &runs, int64_t index) {
    Run run;
    if (runs.packed) {
        // The last sequence that starts at this run or before it. (One without steps may have none.)
        int64_t low = 0, high = runs.sequences;
        while (high - low > 1) {
            const int64_t middle = low + (high - low) / 2;
            if (runs.packed[middle].first_run <= index) low = middle;
            else high = middle;
        }
        run.sequence = low;
        run.row = 0;
        run.start = runs.packed[low].start;
        run.len = runs.packed[low + 1].start - run.start;
        run.first = (index - runs.packed[low].first_run) * runs.steps;
    } else {
        run.sequence = run.row = index / runs.per_row;
        run.start = 0;
        run.len = runs.len;
        run.first = (index - run.row * runs.per_row) * runs.steps;
    }
    run.steps = static_cast<int>(min(runs.steps, run.len - run.first));
    return run;
}

// Brings each thread the steps of its channels in `LINES` tensors, tile by tile, with `AHEAD` tiles on their way to shared
// memory while one is worked on: what is in flight takes no registers. Tensors that cannot be copied whole are read when
// they are wanted.
template <typename T, int COUNT, bool VECTOR, int LINES, int TILE, int AHEAD> struct Incoming {
    using Tiles = Pack<T, COUNT>[VECTOR ? AHEAD + 1 : 1][LINES][TILE][VECTOR ? THREADS : 1];

    // `count` channels of the `steps` steps that there are, and zeros up to the `taken` ones that will be taken.
    __device__ __forceinline__ Incoming(Tiles &tiles, int count, int steps, int taken)
        : tiles(tiles), count(count), steps(steps), taken(taken) {}

    // The `line`th tensor's first step, and how far its steps and channels are apart.
    __device__ __forceinline__ void set(int line, const T *first, int64_t step_distance, int64_t channel_distance) {
        at[line] = first, step[line] = step_distance, channel[line] = channel_distance;
    }
    // Once all are set.
    __device__ __forceinline__ void start() {
#pragma unroll
        for (int k = 0; VECTOR && k < AHEAD; k++) copy();
    }
    __device__ __forceinline__ void take(Pack<T, COUNT> (&tile)[LINES][TILE]) {
        if constexpr (VECTOR) {
            copy();
            wait_for_copies<AHEAD>();
#pragma unroll
            for (int l = 0; l < LINES; l++) {
#pragma unroll
                for (int t = 0; t < TILE; t++) tile[l][t] = tiles[from][l][t][threadIdx.x];
            }
            from = from == AHEAD ? 0 : from + 1;
        } else {
#pragma unroll
            for (int l = 0; l < LINES; l++) {
#pragma unroll
                for (int t = 0; t < TILE; t++) {
                    tile[l][t] = load_vec<T, COUNT, false>(at[l] + t * step[l], channel[l], asked + t < steps ? count : 0);
                }
                at[l] += TILE * step[l];
            }
            asked += TILE;
        }
    }

  private:
    Tiles &tiles;
    const T *at[LINES];
    int64_t step[LINES], channel[LINES];
    // Steps that have been requested, and the places of the next tile to copy and to take.
    int count, steps, taken, asked = 0, to = 0, from = 0;

    __device__ __forceinline__ void copy() {
        // (Nothing is on its way when the last tile has been taken.)
        if (asked < taken) {
#pragma unroll
            for (int t = 0; t < TILE; t++) {
#pragma unroll
                for (int l = 0; l < LINES; l++) {
                    copy_async(tiles[to][l][t][threadIdx.x], at[l], asked + t < steps);
                    at[l] += step[l];
                }
            }
        }
        commit_copies();
        asked += TILE;
        to = to == AHEAD ? 0 : to + 1;
    }
};

// The line of one sequence that the filter slides over, for some neighbouring channels: the initial state's rows, then
// the inputs.
template <typename T, int COUNT, bool VECTOR> struct Line {
    const float *before;
    const T *x;
    int64_t row, step, channel, state_channel;
    int rows, count;

    __device__ __forceinline__ Line(const Inputs &p, const Run &run, int64_t d, int count)
        : before(p.initial_state.data), row(p.initial_state.row), channel(p.x.channel),
          state_channel(p.initial_state.channel), rows(static_cast<int>(p.width) - 1), count(count) {
        const bool reverse = p.flags & FLAG_REVERSE;
        if (before) before += run.sequence * p.initial_state.sequence + d * p.initial_state.channel;
        step = reverse ? -p.x.step : p.x.step;
        x = static_cast<const T *>(p.x.data) + run.row * p.x.batch + run.step(0, reverse) * p.x.step + d * channel;
    }

    // The rows from `position` on, but for the first `gap`, which may be the state's. All loads are under way before any is
    // waited for.
    template <int COUNT_OF_ROWS>
    __device__ __forceinline__ void read_window(float (&to)[COUNT_OF_ROWS][COUNT], int64_t position, int gap) const {
        Pack<T, COUNT> packs[COUNT_OF_ROWS];
#pragma unroll
        for (int j = 0; j < COUNT_OF_ROWS; j++) {
            const int64_t at = position + j - rows;
            packs[j] = load_vec<T, COUNT, VECTOR>(x + at * step, channel, j >= gap && at >= 0 ? count : 0);
        }
#pragma unroll
        for (int j = 0; j < COUNT_OF_ROWS; j++) {
#pragma unroll
            for (int c = 0; c < COUNT; c++) to[j][c] = packs[j][c];
        }
        if (!before || position >= rows) return;
#pragma unroll
        for (int j = 0; j < COUNT_OF_ROWS; j++) {
            if (j >= gap && position + j < rows) read(to[j], position + j);
        }
    }

    // The row at `position`, which may be one of the state's.
    __device__ __forceinline__ void read(float (&to)[COUNT], int64_t position) const {
#pragma unroll
        for (int c = 0; c < COUNT; c++) to[c] = 0.0f;
        if (position >= rows) {
            const Pack<T, COUNT> pack = load_vec<T, COUNT, VECTOR>(x + (position - rows) * step, channel, count);
#pragma unroll
            for (int c = 0; c < COUNT; c++) to[c] = pack[c];
        } else if (before) {
#pragma unroll
            for (int c = 0; c < COUNT; c++) {
                if (c < count) to[c] = before[position * row + c * state_channel];
            }
        }
    }
};

}
