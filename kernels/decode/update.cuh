// Carrying the states of a channel on by one token: what update.cu and projected.cu have in common.
//
// Threads follow the order in which states lie, as in state_update/update.cu, whose bits this gives for the same step sizes: a
// channel's states and ranks are divided into parts, four neighbouring ones in each. A lane has one part, or four where there are rows
// enough: the sums have one order, that of an exchange between as many lanes as there are parts.
#pragma once
#include "../common/async.cuh"
#include "../common/lane_map.cuh"
#include "../common/math.cuh"
#include "../common/tensor.cuh"
#include "typed.cuh"

namespace decode::update {

__device__ __forceinline__ float sum_lanes(float x, int lanes) {
    for (int offset = lanes >> 1; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

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

// Norms the three parts of a row's columns, ranks, B and C, by a warp each.
template <typename T, typename From>
__device__ __forceinline__ void norm_parts(float *staged, const From &columns, const Update &p) {
    switch (threadIdx.x / 32) {
    case 0: norm<T>(staged, columns, 0, p.dt_rank, p.dt_norm, p.dt_eps); break;
    case 1: norm<T>(staged, columns, p.dt_rank, p.d_state, p.b_norm, p.state_eps); break;
    case 2: norm<T>(staged, columns, p.dt_rank + p.d_state, p.d_state, p.c_norm, p.state_eps); break;
    }
}

// Stages the columns of a row.
template <typename T> __device__ __forceinline__ void stage(float *staged, const Update &p, int64_t row) {
    const Columns<T> columns(p, row);
    if (p.flags & FLAG_NORMS) return norm_parts<T>(staged, columns, p);
    const int count = static_cast<int>(p.dt_rank + 2 * p.d_state);
    for (int i = threadIdx.x; i < count; i += THREADS) staged[i] = columns[i];
}

// The sum over all parts of a channel, of which a lane has `COUNT`, in all of its lanes.
template <int COUNT> __device__ __forceinline__ float sum_parts(float (&sums)[COUNT], int lanes) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[i] = sum_lanes(sums[i], lanes);
#pragma unroll
    for (int apart = COUNT / 2; apart > 0; apart /= 2) {
#pragma unroll
        for (int i = 0; i < apart; i++) sums[i] += sums[i + apart];
    }
    return sums[0];
}

// What is the channel's: a lane's parts of the first ranks and states, and where the rest is. `WHOLE`: all that has states or ranks as
// its last dimension can be read and written in vectors of 4.
template <typename T, int COUNT, bool WHOLE> struct Channel {
    // Vectors of the projection that are held: with several parts, none.
    static constexpr int HELD = COUNT > 1 ? 0 : 4;
    int index, lane, lanes, rank;
    const T *weight_at;
    // Where the channel's projection is staged, the vectors of all of the block's channels together, `pitch` apart; null if it is not.
    const Pack<T, QUAD> *staged_weight;
    int pitch;
    const float *a_at;
    Pack<T, QUAD> weight[HELD > 0 ? HELD : 1];
    Pack<float, QUAD> a[COUNT];
    float bias, skip;

    __device__ __forceinline__ Channel(const Update &p, int index, const RowMap &map, const Pack<T, QUAD> *staged_weight = nullptr, int pitch = 0)
        : index(index), lane(map.lane), lanes(map.lanes), rank(static_cast<int>(p.dt_rank)), staged_weight(staged_weight), pitch(pitch) {
        weight_at = static_cast<const T *>(p.dt_weight.data) + index * p.dt_weight.row;
        a_at = p.a.data + index * p.a.channel;
#pragma unroll
        for (int i = 0; i < HELD; i++) weight[i] = read_weight(p, place(i));
#pragma unroll
        for (int i = 0; i < COUNT; i++) a[i] = read_a(p, place(i));
        bias = element_or(p.delta_bias, index, 0.0f), skip = element_or(p.d, index, 0.0f);
    }

    // Where the lane's vector `i` of states or ranks begins: all parts come before the first comes again.
    __device__ __forceinline__ int place(int i) const { return ((i / COUNT * lanes + lane) * COUNT + i % COUNT) * QUAD; }

    __device__ __forceinline__ Pack<T, QUAD> read_weight(const Update &p, int r) const {
        if (HELD == 0 && staged_weight) return r < rank ? staged_weight[r / QUAD * pitch] : Pack<T, QUAD>{};
        const int64_t distance = p.dt_weight.column;
        return load_vec<T, QUAD, WHOLE>(weight_at + r * (WHOLE ? 1 : distance), distance, rank - r);
    }

    __device__ __forceinline__ Pack<float, QUAD> read_a(const Update &p, int n) const {
        return load_vec<float, QUAD, WHOLE>(a_at + n * (WHOLE ? 1 : p.a.state), p.a.state, static_cast<int>(p.d_state) - n);
    }

    // The step size of a row, the same in all lanes.
    __device__ __forceinline__ float step_size(const float *staged, const Update &p) const {
        float sums[COUNT] = {};
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (place(i) >= rank) break;
            add(sums[i % COUNT], weight[i], staged, place(i));
        }
#pragma unroll 1
        for (int from = HELD; place(from) < rank; from += COUNT) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) add(sums[i], read_weight(p, place(from + i)), staged, place(from + i));
        }
        return softplus<T>(rounded<T>(sum_parts(sums, lanes)) + bias);
    }

    __device__ __forceinline__ void add(float &sum, const Pack<T, QUAD> &w, const float *staged, int r) const {
        if (r >= rank) return;
        const Pack<float, QUAD> x = load_vec<float, QUAD, WHOLE>(staged + r, 1, rank - r);
#pragma unroll
        for (int i = 0; i < QUAD; i++) sum = WHOLE || r + i < rank ? fmaf(w[i], x[i], sum) : sum;
    }
};

// Carries four states of a channel on, from `n` on, and adds their part of the output.
template <typename St, bool WHOLE>
__device__ __forceinline__ void advance(float &y, St *state, const Pack<St, QUAD> &h, const Pack<float, QUAD> &a, const float *b,
                                        const float *c, const Update &p, int n, float delta, float in) {
    const int count = static_cast<int>(p.d_state) - n;
    if (count <= 0) return;
    const Pack<float, QUAD> of_b = load_vec<float, QUAD, WHOLE>(b + n, 1, count),
                            of_c = load_vec<float, QUAD, WHOLE>(c + n, 1, count);
    float next[QUAD];
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        next[i] = Decay<true>(delta * (a[i] * LOG2_E)).advance(h[i], in * of_b[i]);
        const float longer = fmaf(of_c[i], next[i], y);
        // An infinite Δ or u would make NaN of states that do not exist.
        y = WHOLE || i < count ? longer : y;
    }
    store_vec<St, QUAD, WHOLE>(state + n * (WHOLE ? 1 : p.state.column), p.state.column, narrow_pack<St>(next), count);
}

// Asks for a channel's states of a row from state `n` on.
template <typename St> __device__ __forceinline__ void prefetch_states(const Update &p, int64_t row, int channel, int n) {
    const int64_t slot = slot_of(p.slots, row);
    if (slot < 0 || n >= p.d_state) return;
    prefetch(static_cast<const St *>(p.state.data) + (slot * p.state.slot + channel * p.state.row + n * p.state.column));
}

// A channel's update by one row, and what it reads beside the row's columns: the states first.
template <typename T, typename St, int COUNT, bool WHOLE> struct RowUpdate {
    using ChannelOf = Channel<T, COUNT, WHOLE>;
    St *state;
    // Whether the channel exists and the row is no padding.
    bool live;
    Pack<St, QUAD> h[COUNT];
    float u = 0.0f, z = 0.0f;

    __device__ __forceinline__ RowUpdate(const Update &p, const ChannelOf &channel, bool exists, int row) {
        const int64_t slot = slot_of(p.slots, row);
        live = exists && slot >= 0;
        state = static_cast<St *>(p.state.data) + (slot * p.state.slot + channel.index * p.state.row);
#pragma unroll
        for (int i = 0; i < COUNT; i++) h[i] = read_state(p, channel.place(i));
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

    // By the row's columns. All lanes of a warp take part in its sums.
    __device__ __forceinline__ void run(const Update &p, const ChannelOf &channel, bool exists, const float *staged, int row) const {
        const float *b = staged + p.dt_rank, *c = b + p.d_state;
        const int states = static_cast<int>(p.d_state);
        const float delta = channel.step_size(staged, p);
        float sums[COUNT] = {};
        if (live) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                advance<St, WHOLE>(sums[i], state, h[i], channel.a[i], b, c, p, channel.place(i), delta, delta * u);
            }
#pragma unroll 1
            for (int from = COUNT; channel.place(from) < states; from += COUNT) {
#pragma unroll
                for (int i = 0; i < COUNT; i++) {
                    const int n = channel.place(from + i);
                    advance<St, WHOLE>(sums[i], state, read_state(p, n), channel.read_a(p, n), b, c, p, n, delta, delta * u);
                }
            }
        }
        float y = sum_parts(sums, channel.lanes);
        if (channel.lane > 0 || !exists) return;
        y = fmaf(channel.skip, u, y);
        if (p.z.data) y *= silu(z);
        static_cast<T *>(p.out)[row * p.d_inner + channel.index] = narrow<T>(live ? y : 0.0f);
    }
};

}
