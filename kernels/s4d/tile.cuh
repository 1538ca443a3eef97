// What the kernels over sequences share: how a block's work is laid out.
//
// A block has eight warps, and as many channels as their pairs fill warps. It carries them through one segment after another, a
// tile of 256 steps at a time: thread i stages step i, each warp works on its channel and pairs, and thread i finishes step i. The
// state that a lane carries from tile to tile is that of one pair. Within a tile there are 16 chunks:
//
//   to_states    what the inputs of each chunk leave in the state, on the tensor cores, goes to the exchange in shared memory;
//   carry        each lane goes through the chunks of its pair and leaves the states before them there;
//   from_states  these are read, and the chunks' own inputs, on the tensor cores.
//
// Steps after the last whole chunk are gone through one by one, and so is what comes after something that is not finite in a tile:
// the products of a chunk multiply with zeros what its earlier steps must not see.
#pragma once
#include "../common/async.cuh"
#include "../common/segments.cuh"
#include "products.cuh"

namespace s4d {

// The channels of a block.
struct Block {
    int channels, width;
    int64_t first;

    __device__ __forceinline__ explicit Block(const Inputs &p)
        : channels(WARPS / static_cast<int>(p.pair_blocks)), width(0), first(int64_t(blockIdx.x) * channels) {
        width = static_cast<int>(min(p.d_inner - first, int64_t(channels)));
    }
};

// The channel and the pairs of a warp, and its lane's pair.
struct Warp {
    int index, local, pair_block;
    bool exists, is_first;
    int64_t channel, pair;
    // Whether the lane's pair is there, or pads them.
    bool has_pair;

    __device__ __forceinline__ Warp(const Inputs &p, const Block &block, int thread = threadIdx.x)
        : index(thread / 32), local(index / static_cast<int>(p.pair_blocks)),
          pair_block(index % static_cast<int>(p.pair_blocks)), exists(local < block.width), is_first(pair_block == 0),
          channel(block.first + (exists ? local : 0)), pair(pair_block * PAIRS + thread % 32), has_pair(pair < p.d_state) {}

    // The same made once more, where it is not to be kept in registers in the meantime.
    static __device__ __forceinline__ Warp again(const Inputs &p) { return Warp(p, Block(p), reload_tid()); }

    // Where the warp's part of G or H begins, and the powers of the lane's pair.
    __device__ __forceinline__ int64_t table(const Inputs &p) const {
        return (channel * p.padded + pair_block * PAIRS) * 2 * CHUNK;
    }
    __device__ __forceinline__ const double *powers(const Inputs &p) const {
        return p.powers + (channel * p.padded + pair) * 4;
    }
    // Where the lane's number is in dense states.
    __device__ __forceinline__ int64_t state_at(const Inputs &p, int64_t index) const {
        return ((index * p.d_inner + channel) * p.d_state + pair) * 2;
    }
};

// What a step by itself takes: A̅, B̅ and 2 C of the lane's pair, and D in one lane of the channel.
template <typename R> struct Step {
    Number<R> power, enter, read;
    bool skips;
    float skip;

    __device__ __forceinline__ Step(const Inputs &p, const Warp &warp) : skips(warp.is_first && p.d.data), skip(0.0f) {
        const double *const powers = warp.powers(p);
        const float *const last = p.enter + warp.table(p) + threadIdx.x % 32 * 2 * CHUNK + CHUNK - 1;
        power = {static_cast<R>(powers[0]), static_cast<R>(powers[1])};
        enter = {last[0], last[CHUNK]};
        read = {0, 0};
        if (warp.has_pair) {
            const float *const c = p.c.data + warp.channel * p.c.channel + 2 * warp.pair * p.c.state;
            read = {R(2) * c[0], R(2) * c[p.c.state]};
        }
        if (skips) skip = p.d.data[warp.channel * p.d.channel];
    }
    __device__ __forceinline__ Number<R> advance(Number<R> x, float input) const {
        return multiply_add(power, x, enter * static_cast<R>(input));
    }
};

template <typename R> __device__ __forceinline__ R sum_lanes(R x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// A number in the exchange, or what stands for it there.
__device__ __forceinline__ void read_number(Number<float> &x, const float *from) {
    float two[2];
    read_shared(two, from);
    x = {two[0], two[1]};
}
__device__ __forceinline__ void write_number(float *to, Number<float> x) { write_shared(to, {x.re, x.im}); }

// Goes through the steps from `from` to `to` of a tile one by one, and writes the outputs from `first` on.
template <typename R>
__device__ __forceinline__ void step_by_step(const Step<R> &step, Number<R> &x, const float *inputs, float *outputs, int from,
                                             int first, int to) {
    for (int i = from; i < to; i++) {
        const float input = inputs[i];
        x = step.advance(x, input);
        if (i < first) continue;
        R y = sum_lanes(multiply_add(-step.read.im, x.im, step.read.re * x.re));
        if (step.skips) y = multiply_add(R(step.skip), R(input), y);
        if (threadIdx.x % 32 == 0) outputs[i] = static_cast<float>(y);
    }
}

// Leaves the lane's state in a row of the exchange.
template <typename R> __device__ __forceinline__ void keep(float *exchange, int row, Number<R> x) {
    write_shared(exchange + row * EXCHANGE + threadIdx.x % 32 * 2, {static_cast<float>(x.re), static_cast<float>(x.im)});
}

// Calls `visit` with the chunks from `from` to `to`; `BACK`, from the last to the first.
template <bool BACK, typename Visit> __device__ __forceinline__ void for_each_chunk(int from, int to, const Visit &visit) {
    if (to - from == CHUNKS) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) visit(BACK ? CHUNKS - 1 - i : i);
    } else {
#pragma unroll 1
        for (int i = from; i < to; i++) visit(BACK ? from + to - 1 - i : i);
    }
}

// Carries the state of a lane's pair through the chunks from `from` to `to`, what is left by each of which is in the exchange, where
// the state before it takes its place.
template <typename R> __device__ __forceinline__ void carry(float *exchange, const Power<R> &power, Number<R> &x, int from, int to) {
    for_each_chunk<false>(from, to, [&](int i) {
        float left[2];
        read_shared(left, exchange + i * EXCHANGE + threadIdx.x % 32 * 2);
        keep(exchange, i, x);
        x = power.advance(x, Number<float>{left[0], left[1]});
    });
}

// What a thread stages and finishes of a tile: a step of the block's channels.
template <typename T> struct Staged {
    Pack<T, QUAD> quads[WARPS / QUAD];

    // Where the channels' elements of step `i` of a segment are.
    static __device__ __forceinline__ const T *at(const Activation &from, const Inputs &p, const Segment &segment, const Block &block,
                                                  int64_t i) {
        const int64_t step = segment.step(segment.first + i, p.flags & FLAG_REVERSE);
        return static_cast<const T *>(from.data) + segment.row * from.batch + step * from.step + block.first * from.channel;
    }
    // Step `i` of a segment, zero if it is not there.
    __device__ __forceinline__ void load(const Activation &from, const Inputs &p, const Segment &segment, const Block &block,
                                         int64_t i) {
        const T *const first = at(from, p, segment, block, i);
        if constexpr (sizeof(T) == 2) {
            // Each lane reads another row: one load for it passes through the first-level cache once where two would twice.
            if (p.flags & FLAG_ROW) {
                uint4 row = {};
                if (i < segment.steps) row = *reinterpret_cast<const uint4 *>(first);
                take(reinterpret_cast<const Pack<T, WARPS> &>(row));
                return;
            }
        }
#pragma unroll
        for (int k = 0; k < WARPS / QUAD; k++) {
            const int count = i < segment.steps ? block.width - k * QUAD : 0;
            quads[k] = load_vec_if<QUAD, false>(first + k * QUAD * from.channel, from.channel, count, p.flags & FLAG_VECTOR);
        }
    }
    // A row that has been copied.
    __device__ __forceinline__ void take(const Pack<T, WARPS> &row) {
        static_assert(WARPS == 2 * QUAD, "both halves");
        quads[0] = row.half(0), quads[1] = row.half(1);
    }
    // To rows of numbers, or of halves as they are.
    template <typename S> __device__ __forceinline__ void write(S *rows) const {
#pragma unroll
        for (int c = 0; c < WARPS; c++) {
            if constexpr (sizeof(S) == sizeof(float)) {
                rows[c * TILE + threadIdx.x] = quads[c / QUAD][c % QUAD];
            } else {
                const uint32_t both = quads[c / QUAD].word(c % QUAD / 2);
                reinterpret_cast<uint16_t *>(rows)[c * TILE + threadIdx.x] = static_cast<uint16_t>(c % 2 ? both >> 16 : both);
            }
        }
    }
};

// A thread's step of all channels of a block, where a warp has all pairs of one.
template <typename T, int PITCH> __device__ __forceinline__ uint4 finished_row(const float *rows) {
    const auto two = [&](int c) { return narrow_pair(rows[c * PITCH + threadIdx.x], rows[(c + 1) * PITCH + threadIdx.x], T()); };
    return {two(0), two(2), two(4), two(6)};
}

// Writes step `i` of a segment, which the channels' warps have left in `rows`, PITCH apart.
template <typename T, int PITCH = TILE>
__device__ __forceinline__ void finish(void *to, const float *rows, const Inputs &p, const Segment &segment, const Block &block,
                                       int64_t i) {
    if (i >= segment.steps) return;
    const int64_t step = segment.row * p.segments.len + segment.step(segment.first + i, p.flags & FLAG_REVERSE);
    T *const at = static_cast<T *>(to) + step * p.d_inner + block.first;
    if constexpr (sizeof(T) == 2) {
        if (p.flags & FLAG_ROW) {
            *reinterpret_cast<uint4 *>(at) = finished_row<T, PITCH>(rows);
            return;
        }
    }
    const int pair_blocks = static_cast<int>(p.pair_blocks);
#pragma unroll
    for (int k = 0; k < WARPS / QUAD; k++) {
        float values[QUAD] = {};
        if (k * QUAD >= block.width) break;
#pragma unroll
        for (int c = 0; c < QUAD; c++) {
            if (k * QUAD + c >= block.width) break;
            const float *const row = rows + (k * QUAD + c) * pair_blocks * PITCH + threadIdx.x;
            values[c] = row[0];
#pragma unroll 1
            for (int b = 1; b < pair_blocks; b++) values[c] += row[b * PITCH];
        }
        store_vec_if<QUAD, false>(at + k * QUAD, 1, narrow_pack<T>(values), block.width - k * QUAD, p.flags & FLAG_VECTOR);
    }
}

// A̅ to the number of steps of the segments of a sequence of which this one is not the first.
template <typename R> __device__ __forceinline__ Power<R> segment_power(const double *powers, int64_t steps) {
    return Power<R>(power(Number<double>{powers[2], powers[3]}, static_cast<uint64_t>(steps) / CHUNK));
}

template <typename R>
__device__ __forceinline__ Number<R> read_state(const States &states, const Warp &warp, int64_t sequence) {
    if (!states.data || !warp.has_pair) return {0, 0};
    const float *const at =
        states.data + sequence * states.sequence + warp.channel * states.channel + 2 * warp.pair * states.state;
    return {at[0], at[states.state]};
}

__device__ __forceinline__ void write_state(float *to, const Inputs &p, const Warp &warp, int64_t index, float re, float im) {
    if (!warp.exists || !warp.has_pair) return;
    float *const at = to + warp.state_at(p, index);
    at[0] = re, at[1] = im;
}

// The state before a segment: that before its sequence, carried through the segments in between.
template <typename R> __device__ __forceinline__ Number<R> incoming_state(const Inputs &p, const Segment &segment, const Warp &warp) {
    Number<R> x = read_state<R>(p.initial_state, warp, segment.sequence);
    if (!p.chunk_states || segment.rank == 0 || !warp.has_pair) return x;
    // All before it are as long: a division of 32 bits, as segments are whole chunks.
    const uint32_t chunks = static_cast<uint32_t>(segment.first / CHUNK) / static_cast<uint32_t>(segment.rank);
    const Power<R> power = segment_power<R>(warp.powers(p), int64_t(chunks) * CHUNK);
#pragma unroll 4
    for (int64_t before = segment.index - segment.rank; before < segment.index; before++) {
        const float *const reached = p.chunk_states + warp.state_at(p, before);
        x = power.advance(x, Number<float>{reached[0], reached[1]});
    }
    return x;
}

}
