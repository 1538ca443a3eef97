// The update of many rows: a lane has PARTS parts of a channel's states and ranks, so that a step size is not computed once more for
// each part, and ROWS rows at a time, so that what is the channel's is read and widened once for them.
//
// But for the projections, which a block shares, warps do not wait for each other. What a warp's channels have of states in a row lies
// together, and comes to shared memory by asynchronous copies of neighbouring vectors, whichever lane they are for; each lane takes its
// own from there, and they go back the same way. The first are on their way before the kernels before have ended, and later ones a
// group of rows ahead.
#pragma once
#include "update.cuh"

namespace decode::update {

// The states of a warp's channels in a row, where they are staged.
template <typename St> struct StagedStates {
    // Elements of a vector, and vectors of a lane.
    static constexpr int SIZE = 16 / sizeof(St), VECTORS = PARTS * QUAD / SIZE;
    // What vectors of a lane lie apart: neither 8 lanes that read theirs nor 8 that copy what is neighbouring in memory meet in a bank.
    static constexpr int PITCH = 32 + 8 / VECTORS, COUNT = VECTORS * PITCH;
    static_assert(COUNT * 16 == 32 * PARTS * QUAD * sizeof(St) + STAGED_PADDING, "what the host has room for");
    using Vector = Pack<St, SIZE>;
    Vector *at;

    // Where the `i`th vector in memory is, and the `i`th of the lane.
    __device__ __forceinline__ Vector &in_memory(int i) const { return at[i % VECTORS * PITCH + i / VECTORS]; }
    __device__ __forceinline__ Vector &of_lane(int i) const { return at[i * PITCH + threadIdx.x % 32]; }

    // Part `i` of the lane's.
    __device__ __forceinline__ static Pack<St, QUAD> &part(Vector (&of)[VECTORS], int i) {
        if constexpr (SIZE == QUAD) {
            return of[i];
        } else {
            return of[i / 2].halves[i % 2];
        }
    }
};

// A sum over all parts of a channel, of which a lane has PARTS, in all of its lanes.
__device__ __forceinline__ float sum_parts(float (&sums)[PARTS], int lanes) {
#pragma unroll
    for (int i = 0; i < PARTS; i++) sums[i] = sum_lanes(sums[i], lanes);
#pragma unroll
    for (int apart = PARTS / 2; apart > 0; apart /= 2) {
#pragma unroll
        for (int i = 0; i < apart; i++) sums[i] += sums[i + apart];
    }
    return sums[0];
}

// Stages the projections of a block's `channels` channels from `first` on, the vectors of all of them together, `pitch` apart.
template <typename T> __device__ __forceinline__ void stage_weights(Pack<T, QUAD> *to, int pitch, const Update &p, int first, int channels) {
    const int vectors = static_cast<int>(p.dt_rank) / QUAD;
    // Neighbouring threads take neighbouring vectors; to divide once is enough.
    const int channel_step = THREADS / vectors, vector_step = THREADS % vectors;
    int channel = threadIdx.x / vectors, vector = threadIdx.x % vectors;
    const T *const from = static_cast<const T *>(p.dt_weight.data) + first * p.dt_weight.row;
    const int exist = static_cast<int>(p.d_inner) - first;
#pragma unroll 1
    while (channel < channels) {
        copy_async(to[vector * pitch + channel], from + (channel * p.dt_weight.row + vector * QUAD), channel < exist);
        channel += channel_step, vector += vector_step;
        if (vector >= vectors) vector -= vectors, channel++;
    }
}

// Stages the columns of ROWS rows from `row` on, or of the last one again, by a warp. All are asked for before the first is waited for,
// up to BATCH of a row by each lane.
template <typename T> __device__ __forceinline__ void stage_columns_of(float *to, int count, const Update &p, int row, int lane) {
    constexpr int BATCH = 4;
    const int last = static_cast<int>(p.rows) - 1;
    if (p.flags & FLAG_NORMS) {
#pragma unroll 1
        for (int k = 0; k < ROWS; k++) norm_parts<T>(to + k * count, Columns<T>(p, min(row + k, last)), p, lane, 32);
        return;
    }
#pragma unroll 1
    for (int from = lane; from < count; from += 32 * BATCH) {
        float x[ROWS][BATCH];
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            const Columns<T> columns(p, min(row + k, last));
#pragma unroll
            for (int i = 0; i < BATCH; i++) x[k][i] = from + 32 * i < count ? columns[from + 32 * i] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                if (from + 32 * i < count) to[k * count + from + 32 * i] = x[k][i];
            }
        }
    }
}

// A warp of a block, and what it has of its channels.
template <typename T, typename St> struct ManyRows {
    using Staged = StagedStates<St>;
    static constexpr int VECTORS = Staged::VECTORS, WARPS = THREADS / 32;
    using Steps = float[ROWS];

    const Update &p;
    const Slots &slots;
    unsigned char *const memory;
    const RowMap map;
    const int warp, lane;
    // The block's channels, its first one and the warp's; the lane's, which is the last one where it has none: all lanes of a warp take part
    // in its sums.
    const int channels, first, of_warp, index;
    const bool exists;
    const int rows, rank, d_state, distance;
    float *const columns;
    Pack<float, QUAD> a[PARTS];
    float bias, skip;

    __device__ __forceinline__ ManyRows(const Update &p, const Slots &slots, unsigned char *memory)
        : p(p), slots(slots), memory(memory), map(threadIdx.x, p.part_shift - PARTS_SHIFT), warp(threadIdx.x / 32), lane(threadIdx.x % 32),
          channels(THREADS / map.lanes), first(blockIdx.x * channels), of_warp(first + warp * (32 / map.lanes)),
          index(min(first + map.row, static_cast<int>(p.d_inner) - 1)), exists(first + map.row < p.d_inner),
          rows(static_cast<int>(p.rows)), rank(static_cast<int>(p.dt_rank)), d_state(static_cast<int>(p.d_state)),
          distance(rank + 2 * d_state), columns(reinterpret_cast<float *>(memory) + warp * (ROWS * distance)) {}

    // Where the block's projections are staged, with a vector between those of all channels, so that a channel's lie in different banks.
    __device__ __forceinline__ Pack<T, QUAD> *weights() const { return reinterpret_cast<Pack<T, QUAD> *>(memory + p.weights); }
    __device__ __forceinline__ int pitch() const { return channels + 1; }
    // The states of the `k`th row of a group.
    __device__ __forceinline__ Staged staged(int stage, int k) const {
        auto *const states = reinterpret_cast<typename Staged::Vector *>(memory + p.states);
        return {states + ((stage * WARPS + warp) * ROWS + k) * Staged::COUNT};
    }
    // Four columns of the `k`th row.
    __device__ __forceinline__ Pack<float, QUAD> column(int k, int at) const {
        return *reinterpret_cast<const Pack<float, QUAD> *>(columns + (k * distance + at));
    }
    // Where the lane's part `i` begins, of states or of ranks: all parts of all lanes come before the first lane has more.
    __device__ __forceinline__ int place(int i) const { return ((i / PARTS * map.lanes + map.lane) * PARTS + i % PARTS) * QUAD; }
    // The slot of a row; negative for padding, and for rows beyond the last.
    __device__ __forceinline__ int64_t slot(int row) const { return row < rows ? slot_of(slots, row) : -1; }

    // Calls `visit` with each vector of the warp's states in a slot that this lane copies: its number, its place, and whether it exists.
    template <typename Visit> __device__ __forceinline__ void for_each_vector(int64_t slot, const Visit &visit) const {
        St *const at = static_cast<St *>(p.state.data) + (slot * p.state.slot + of_warp * p.state.row);
        const int count = slot < 0 ? 0 : min(static_cast<int>(p.d_inner) - of_warp, 32) * map.lanes * VECTORS;
#pragma unroll
        for (int i = lane; i < 32 * VECTORS; i += 32) visit(i, at + i * Staged::SIZE, i < count);
    }

    // Asks for the states of a group of rows, if there is one.
    __device__ __forceinline__ void ask(int row, int stage) const {
        if (row < rows) {
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
                const Staged to = staged(stage, k);
                for_each_vector(slot(row + k), [&](int i, St *from, bool exists) { copy_async(to.in_memory(i), from, exists); });
            }
        }
        commit_copies();
    }

    // Puts them back.
    __device__ __forceinline__ void write_back(int row, int stage) const {
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
            const Staged from = staged(stage, k);
            for_each_vector(slot(row + k), [&](int i, St *to, bool exists) {
                if (exists) *reinterpret_cast<typename Staged::Vector *>(to) = from.in_memory(i);
            });
        }
    }

    __device__ __forceinline__ void read_channel() {
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            a[i] = *reinterpret_cast<const Pack<float, QUAD> *>(p.a.data + (index * p.a.channel + place(i)));
        }
        bias = element_or(p.delta_bias, index, 0.0f), skip = element_or(p.d, index, 0.0f);
    }

    // The lane's element of a row of the input or of the gate.
    __device__ __forceinline__ float read(const Rows &from, int row) const {
        return widen(static_cast<const T *>(from.data)[min(row, rows - 1) * from.row + index * from.column]);
    }

    // The step sizes of the rows at hand.
    __device__ __forceinline__ void step_sizes(Steps &delta) const {
        float sums[ROWS][PARTS] = {};
#pragma unroll 1
        for (int from = 0; place(from) < rank; from += PARTS) {
#pragma unroll
            for (int i = 0; i < PARTS; i++) {
                const int r = place(from + i);
                if (r >= rank) break;
                const Pack<T, QUAD> w = weights()[r / QUAD * pitch() + map.row];
#pragma unroll
                for (int k = 0; k < ROWS; k++) add_product(sums[k][i], w, column(k, r));
            }
        }
#pragma unroll
        for (int k = 0; k < ROWS; k++) delta[k] = step_size_of<T>(sum_parts(sums[k], map.lanes), bias);
    }

    // Carries their states on, where they are staged; `y`: the sums over them.
    __device__ __forceinline__ void advance_all(int stage, const Steps &delta, const Steps &u, Steps &y) const {
        typename Staged::Vector h[ROWS][VECTORS];
        float sums[ROWS][PARTS] = {};
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) h[k][i] = staged(stage, k).of_lane(i);
        }
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            const int b = rank + place(i), c = b + d_state;
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
                Pack<St, QUAD> &four = Staged::part(h[k], i);
                four = advance<St, true>(sums[k][i], four, a[i], column(k, b), column(k, c), delta[k], delta[k] * u[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < ROWS; k++) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) staged(stage, k).of_lane(i) = h[k][i];
            y[k] = sum_parts(sums[k], map.lanes);
        }
    }

    __device__ __forceinline__ void run() {
        // What no kernel of a recording writes, but for this one, is read before those before this one have ended.
        int row = blockIdx.y * ROWS;
        const int step = gridDim.y * ROWS;
        stage_weights(weights(), pitch(), p, first, channels);
        ask(row, 0);
        ask(row + step, 1);
        read_channel();
        wait_for_last();
#pragma unroll 1
        for (int stage = 0; row < rows; row += step, stage ^= 1) {
            Steps u, z, delta, y;
            // Of padding too, so that nobody waits for a slot.
#pragma unroll
            for (int k = 0; k < ROWS; k++) u[k] = read(p.u, row + k), z[k] = p.z.data ? read(p.z, row + k) : 0.0f;
            stage_columns_of<T>(columns, distance, p, row, lane);
            bool live[ROWS];
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
                live[k] = exists && slot(row + k) >= 0;
                u[k] = live[k] ? u[k] : 0.0f, z[k] = live[k] ? z[k] : 0.0f;
            }
            // The states of these rows; and, with the first, the projections that other warps have asked for.
            wait_for_copies<STAGES - 1>();
            if (row < step) {
                __syncthreads();
            } else {
                __syncwarp();
            }
            step_sizes(delta);
            advance_all(stage, delta, u, y);
#pragma unroll
            for (int k = 0; k < ROWS; k++) {
                if (map.lane == 0 && exists && row + k < rows) write_output<T>(p, row + k, index, output_of(p, live[k], y[k], skip, u[k], z[k]));
            }
            __syncwarp();
            write_back(row, stage);
            // All have taken theirs, and the columns.
            __syncwarp();
            ask(row + STAGES * step, stage);
        }
    }
};

}
