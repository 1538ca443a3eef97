// Carrying the states of a channel on by one token: what update.cu and projected.cu have in common.
//
// Threads follow the order in which states lie, as in state_update/update.cu, whose bits this gives for the same step sizes: a
// channel's states and ranks are divided into parts, four neighbouring ones in each. Here a lane has one part; in many_rows.cuh it has
// several, whose sums have the same order, that of an exchange between as many lanes as there are parts.
#pragma once
#include "../common/async.cuh"
#include "../common/lane_map.cuh"
#include "../common/math.cuh"
#include "../common/tensor.cuh"
#include "typed.cuh"

namespace decode::update {

// Where the columns of a row lie.
template <typename T> struct Columns {
    const T *data;
    int64_t distance;

    __device__ __forceinline__ Columns(const Update &p, int64_t row)
        : data(static_cast<const T *>(p.columns.data) + row * p.columns.row), distance(p.columns.column) {}
    __device__ __forceinline__ float operator[](int64_t i) const { return widen(data[i * distance]); }
};

// Columns that are staged already: what is normed takes their place.
struct StagedColumns {
    const float *data;
    __device__ __forceinline__ float operator[](int64_t i) const { return data[i]; }
};

// Norms `size` columns from `first` on, by the lanes of one warp, and rounds them as the operator one by one would.
template <typename T, typename From>
__device__ __forceinline__ void norm(float *staged, const From &columns, int64_t first, int64_t size,
                                     const Vector &weight, float eps) {
    const int lane = threadIdx.x % 32;
    float squares = 0.0f;
    for (int64_t i = lane; i < size; i += 32) squares = fmaf(columns[first + i], columns[first + i], squares);
    const float scale = 1.0f / sqrtf(sum_lanes(squares, 32) / static_cast<float>(size) + eps);
    for (int64_t i = lane; i < size; i += 32) {
        staged[first + i] = rounded<T>(columns[first + i] * scale * element_or(weight, i, 1.0f));
    }
}

// Norms the three parts of a row's columns, ranks, B and C, each by one of the warps of which this thread is one of `threads`.
template <typename T, typename From>
__device__ __forceinline__ void norm_parts(float *staged, const From &columns, const Update &p, int thread, int threads) {
    for (int part = thread / 32; part < 3; part += threads / 32) {
        const int64_t first = part == 0 ? 0 : p.dt_rank + (part - 1) * p.d_state;
        const Vector &weight = part == 0 ? p.dt_norm : part == 1 ? p.b_norm : p.c_norm;
        norm<T>(staged, columns, first, part == 0 ? p.dt_rank : p.d_state, weight, part == 0 ? p.dt_eps : p.state_eps);
    }
}

// Stages the columns of a row, by all threads.
template <typename T> __device__ __forceinline__ void stage_columns(float *staged, const Update &p, int64_t row) {
    const Columns<T> columns(p, row);
    if (p.flags & FLAG_NORMS) return norm_parts<T>(staged, columns, p, threadIdx.x, THREADS);
    const int count = static_cast<int>(p.dt_rank + 2 * p.d_state);
    for (int i = threadIdx.x; i < count; i += THREADS) staged[i] = columns[i];
}

// Adds the product of four ranks.
template <typename T>
__device__ __forceinline__ void add_product(float &sum, const Pack<T, QUAD> &w, const Pack<float, QUAD> &x, int count = QUAD) {
#pragma unroll
    for (int i = 0; i < QUAD; i++) sum = i < count ? fmaf(w[i], x[i], sum) : sum;
}

// The step size of what a channel's projection gives.
template <typename T> __device__ __forceinline__ float step_size_of(float projected, float bias) {
    return softplus<T>(rounded<T>(projected) + bias);
}

// Vectors of a projection that a lane holds where there are registers for it: of half types, ranks of up to 192 in four lanes, those of
// models to 2.8 billion parameters.
template <typename T> constexpr int MANY_HELD = sizeof(T) == 2 ? 12 : 4;

// What is the channel's: the lane's part of the first ranks and states, and where the rest is. `WHOLE`: all that has states or ranks as
// its last dimension can be read and written in vectors of 4. `HELD`: the vectors of the projection that are read with the rest; further
// ones are read when they are needed.
template <typename T, bool WHOLE, int HELD> struct Channel {
    int index, lane, lanes, rank;
    const T *weight_at;
    const float *a_at;
    Pack<T, QUAD> weight[HELD];
    Pack<float, QUAD> a;
    float bias, skip;

    __device__ __forceinline__ Channel(const Update &p, int index, const RowMap &map)
        : index(index), lane(map.lane), lanes(map.lanes), rank(static_cast<int>(p.dt_rank)) {
        weight_at = static_cast<const T *>(p.dt_weight.data) + index * p.dt_weight.row;
        a_at = p.a.data + index * p.a.channel;
#pragma unroll
        for (int i = 0; i < HELD; i++) weight[i] = read_weight(p, place(i));
        a = read_a(p, place(0));
        bias = element_or(p.delta_bias, index, 0.0f), skip = element_or(p.d, index, 0.0f);
    }

    // Where the lane's vector `i` of states or ranks begins: all parts come before the first comes again.
    __device__ __forceinline__ int place(int i) const { return (i * lanes + lane) * QUAD; }

    __device__ __forceinline__ Pack<T, QUAD> read_weight(const Update &p, int r) const {
        const int64_t distance = p.dt_weight.column;
        return load_vec<T, QUAD, WHOLE>(weight_at + r * (WHOLE ? 1 : distance), distance, rank - r);
    }

    __device__ __forceinline__ Pack<float, QUAD> read_a(const Update &p, int n) const {
        return load_vec<float, QUAD, WHOLE>(a_at + n * (WHOLE ? 1 : p.a.state), p.a.state, static_cast<int>(p.d_state) - n);
    }

    // The step size of a row, the same in all lanes.
    __device__ __forceinline__ float step_size(const float *staged, const Update &p) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (place(i) >= rank) break;
            add(sum, weight[i], staged, place(i));
        }
#pragma unroll 1
        for (int i = HELD; place(i) < rank; i++) add(sum, read_weight(p, place(i)), staged, place(i));
        return step_size_of<T>(sum_lanes(sum, lanes), bias);
    }

    __device__ __forceinline__ void add(float &sum, const Pack<T, QUAD> &w, const float *staged, int r) const {
        add_product(sum, w, load_vec<float, QUAD, WHOLE>(staged + r, 1, rank - r), WHOLE ? QUAD : rank - r);
    }
};

// Four states of a channel after a step, of which `count` exist; their part of the output is added to `y`. `b` and `c`: theirs.
template <typename St, bool WHOLE>
__device__ __forceinline__ Pack<St, QUAD> advance(float &y, const Pack<St, QUAD> &h, const Pack<float, QUAD> &a, const Pack<float, QUAD> &b,
                                                  const Pack<float, QUAD> &c, float delta, float in, int count = QUAD) {
    float next[QUAD];
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        next[i] = Decay<true>(delta * (a[i] * LOG2_E)).advance(h[i], in * b[i]);
        const float longer = fmaf(c[i], next[i], y);
        // An infinite Δ or u would make NaN of states that do not exist.
        y = WHOLE || i < count ? longer : y;
    }
    return narrow_pack<St>(next);
}

// The output of a row's channel, of the sum over its states.
__device__ __forceinline__ float output_of(const Update &p, bool live, float y, float skip, float u, float z) {
    y = fmaf(skip, u, y);
    if (p.z.data) y *= silu(z);
    return live ? y : 0.0f;
}
template <typename T> __device__ __forceinline__ void write_output(const Update &p, int row, int index, float output) {
    static_cast<T *>(p.out)[row * p.d_inner + index] = narrow<T>(output);
}

// Asks for a channel's states of a row from state `n` on.
template <typename St> __device__ __forceinline__ void prefetch_states(const Update &p, const Slots &slots, int64_t row, int channel, int n) {
    const int64_t slot = slot_of(slots, row);
    if (slot < 0 || n >= p.d_state) return;
    prefetch(static_cast<const St *>(p.state.data) + (slot * p.state.slot + channel * p.state.row + n * p.state.column));
}

// A channel's update by one row, and what it reads beside the row's columns: the states first.
template <typename T, typename St, bool WHOLE, int HELD> struct RowUpdate {
    using ChannelOf = Channel<T, WHOLE, HELD>;
    St *state;
    // Whether the channel exists and the row is no padding.
    bool live;
    Pack<St, QUAD> h;
    float u = 0.0f, z = 0.0f;

    __device__ __forceinline__ RowUpdate(const Update &p, int64_t slot, const ChannelOf &channel, bool exists) {
        live = exists && slot >= 0;
        state = static_cast<St *>(p.state.data) + (slot * p.state.slot + channel.index * p.state.row);
        h = read_state(p, channel.place(0));
    }

    // What other kernels may have written, beside the columns.
    __device__ __forceinline__ void read_inputs(const Update &p, const ChannelOf &channel, int row) {
        if (live) u = widen(static_cast<const T *>(p.u.data)[row * p.u.row + channel.index * p.u.column]);
        if (live && p.z.data) z = widen(static_cast<const T *>(p.z.data)[row * p.z.row + channel.index * p.z.column]);
    }

    __device__ __forceinline__ Pack<St, QUAD> read_state(const Update &p, int n) const {
        const int left = live ? static_cast<int>(p.d_state) - n : 0;
        return load_vec<St, QUAD, WHOLE>(state + n * (WHOLE ? 1 : p.state.column), p.state.column, left);
    }

    // By the row's columns; gives the output, the same in all of a channel's lanes. All lanes of a warp take part in its sums.
    __device__ __forceinline__ float run(const Update &p, const ChannelOf &channel, const float *staged) const {
        const float *b = staged + p.dt_rank, *c = b + p.d_state;
        const int states = static_cast<int>(p.d_state);
        const float delta = channel.step_size(staged, p);
        float y = 0.0f;
        const auto advance_from = [&](int n, const Pack<St, QUAD> &h, const Pack<float, QUAD> &a) {
            const int count = states - n;
            const Pack<float, QUAD> of_b = load_vec<float, QUAD, WHOLE>(b + n, 1, count),
                                    of_c = load_vec<float, QUAD, WHOLE>(c + n, 1, count);
            const Pack<St, QUAD> next = advance<St, WHOLE>(y, h, a, of_b, of_c, delta, delta * u, count);
            store_vec<St, QUAD, WHOLE>(state + n * (WHOLE ? 1 : p.state.column), p.state.column, next, count);
        };
        if (live) {
            if (channel.place(0) < states) advance_from(channel.place(0), h, channel.a);
#pragma unroll 1
            for (int i = 1; channel.place(i) < states; i++) {
                advance_from(channel.place(i), read_state(p, channel.place(i)), channel.read_a(p, channel.place(i)));
            }
        }
        return output_of(p, live, sum_lanes(y, channel.lanes), channel.skip, u, z);
    }
};

}
