// How a block goes through segments from the last to the first.
//
// With `dy` the slope by an output, X the state before a chunk and Λ the slope by the state after it, the slopes of a chunk are
//
//   dX  = conj(A̅^16) Λ + Σ_t G_t dy_t         which is Λ of the chunk before
//   du_j = Σ_{t>=j} K_{t-j} dy_t + H_j · Λ
//   dG_t = dy_t X     dH_j = u_j Λ     dK_k = Σ_t dy_t u_{t-k}     d(A̅^16) = Λ conj(X)
//
// The last line is summed up over all chunks. A block keeps the states before each tile of its segment from a pass over them, and
// then takes the tiles from the last.
#pragma once
#include "halves.cuh"
#include "tile.cuh"

namespace s4d::backward {

struct Shared {
    // Of the tile: the channels' inputs and the slopes by their outputs, and what each warp adds to the slopes by the inputs.
    float inputs[WARPS][TILE], d_out[WARPS][TILE], d_inputs[WARPS][TILE];
    // The states before the tile's chunks, and the slopes by those after them.
    float states[WARPS][CHUNKS * EXCHANGE], slopes[WARPS][CHUNKS * EXCHANGE];
};
static_assert(sizeof(Shared) == SMEM, "as it is launched");

// The rows of a warp in it.
struct Rows {
    const float *inputs, *d_out;
    float *d_inputs, *states, *slopes;

    __device__ __forceinline__ Rows(Shared &shared, const Warp &warp)
        : inputs(shared.inputs[warp.local]), d_out(shared.d_out[warp.local]), d_inputs(shared.d_inputs[warp.index]),
          states(shared.states[warp.index]), slopes(shared.slopes[warp.index]) {}
};

// Steps of the chunks from `from` to `to`, of all of which the product with a tile's states is the sum over the chunks: as A, a row
// is a step (g is step 2g, g + 8 the one after it) and a column a chunk.
template <bool EXACT> struct OverChunks {
    Parts<4, EXACT> tiles[2];

    __device__ __forceinline__ OverChunks(const float *row, Lane lane, int from, int to) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float values[2][2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int chunk = 8 * i + 4 * half + lane.t;
                read_shared(values[half], row + chunk * CHUNK + 2 * lane.g);
                if (chunk < from || chunk >= to) values[half][0] = values[half][1] = 0.0f;
            }
            tiles[i] = Parts<4, EXACT>({values[0][0], values[0][1], values[1][0], values[1][1]});
        }
    }
    // Adds the product with what `value` gives of a chunk in the lane's column.
    template <typename Value> __device__ __forceinline__ void add_states(Sum &sum, Lane lane, const Value &value) const {
#pragma unroll
        for (int i = 0; i < 2; i++) sum.add(tiles[i], Parts<2>({value(8 * i + lane.t), value(8 * i + lane.t + 4)}));
    }
    template <typename Value> __device__ __forceinline__ void add_steps(Sum &sum, Lane lane, const Value &value) const {
        add_states(sum, lane, value);
    }
};

// That for the products of a type of activations.
template <typename T> struct OverChunksOf { using Type = OverChunks<Precision<T>::EXACT>; };
template <> struct OverChunksOf<__nv_bfloat16> { using Type = halves::OverChunks; };

// The slopes by K, G and H, as results of such products: of a tile of states, or of steps.
struct MatrixSlopes {
    float of_read[STATE_TILES][4] = {}, of_enter[STATE_TILES][4] = {}, of_kernel[2][4] = {};

    // Adds the products of steps with what is in the exchange.
    template <typename Steps>
    static __device__ __forceinline__ void add(float (&to)[STATE_TILES][4], Lane lane, const Steps &steps, const float *exchange) {
#pragma unroll
        for (int n = 0; n < STATE_TILES; n++) {
            Sum sums;
            steps.add_states(sums, lane, [&](int chunk) { return exchange[chunk * EXCHANGE + 8 * n + lane.g]; });
            // The tensor cores round towards zero, which would add up.
#pragma unroll
            for (int k = 0; k < 4; k++) to[n][k] += sums[k];
        }
    }
    // Those by K: of inputs and of the slopes by outputs.
    template <typename Steps>
    __device__ __forceinline__ void add_within(Lane lane, const Steps &inputs, const float *d_out, int from, int to) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            Sum sums;
            inputs.add_steps(sums, lane, [&](int chunk) {
                return chunk >= from && chunk < to ? d_out[chunk * CHUNK + 8 * n + lane.g] : 0.0f;
            });
#pragma unroll
            for (int k = 0; k < 4; k++) of_kernel[n][k] += sums[k];
        }
    }
    // Writes those of a warp for the row of blocks. `exchange` is free by now.
    __device__ __forceinline__ void write(const Backward &params, const Warp &warp, Lane lane, float *exchange) const {
        const Inputs &p = params.inputs;
        const int64_t at = int64_t(blockIdx.y) * p.d_inner * p.padded * 2 * CHUNK + warp.table(p);
#pragma unroll
        for (int n = 0; n < STATE_TILES; n++) {
#pragma unroll
            for (int part = 0; part < 2; part++) {
                const int64_t to = at + (8 * n + 2 * lane.t + part) * CHUNK + 2 * lane.g;
                write_shared(params.of_read + to, {of_read[n][part], of_read[n][2 + part]});
                write_shared(params.of_enter + to, {of_enter[n][part], of_enter[n][2 + part]});
            }
        }
        if (!warp.is_first) return;
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                exchange[(2 * lane.g + k / 2) * (CHUNK + 1) + 8 * n + 2 * lane.t + k % 2] = of_kernel[n][k];
            }
        }
        __syncwarp();
        const int lag = threadIdx.x % 32;
        if (lag < CHUNK) {
            float sum = 0.0f;
            for (int step = 0; step + lag < CHUNK; step++) sum += exchange[step * (CHUNK + 1) + step + lag];
            params.of_kernel[(blockIdx.y * p.d_inner + warp.channel) * OF_KERNEL + lag] = sum;
        }
    }
};

// The slopes by the numbers of a lane's pair, where the row of blocks has them: by A̅^16 of whole chunks, and by A̅, B̅ and C, and D, of
// steps that are gone through one by one. These are too few to hold their sums in registers.
struct PairSlopes {
    double *of_pair;
    float *of_skip;

    __device__ __forceinline__ PairSlopes(const Backward &params, const Warp &warp) {
        const Inputs &p = params.inputs;
        const int64_t channel = blockIdx.y * p.d_inner + warp.channel;
        of_pair = params.of_pairs + (channel * p.padded + warp.pair) * 8;
        of_skip = warp.is_first && threadIdx.x % 32 == 0 ? params.of_kernel + channel * OF_KERNEL + CHUNK : nullptr;
    }
    __device__ __forceinline__ void clear() const {
        for (int i = 0; i < 8; i++) of_pair[i] = 0.0;
        if (of_skip) *of_skip = 0.0f;
    }
    template <typename R> __device__ __forceinline__ void add(int i, Number<R> x) const {
        of_pair[2 * i] += x.re, of_pair[2 * i + 1] += x.im;
    }
};

// Carries the slope by the state of a lane's pair back through the chunks from `from` to `to`. `states` has the states before them.
template <typename R>
__device__ __forceinline__ void carry_back(float *slopes, const float *states, const Power<R> &power, Number<R> &d_state,
                                           Number<R> &of_chunk, int from, int to) {
    carry<true>(slopes, power.conj(), d_state, from, to, [&](int i) {
        float state[2];
        read_shared(state, states + i * EXCHANGE + threadIdx.x % 32 * 2);
        of_chunk = multiply_add(d_state, Number<R>{state[0], -state[1]}, of_chunk);
    });
}

// Goes back through the steps from `from`, where a chunk begins, to `to` one by one. `x` is the state before them; the rows of the
// exchanges from there on are free. The slopes by the inputs before `last` are written.
template <typename R>
__device__ __forceinline__ void step_back(const Step<R> &step, Number<R> x, Number<R> &d_state, const PairSlopes &sums, const Rows &rows,
                                          int from, int last, int to) {
    const int place = threadIdx.x % 32 * 2;
    Number<R> of_power = {0, 0}, of_enter = {0, 0}, of_read = {0, 0};
    R of_skip = 0;
    const auto kept = [&](const float *at) { return Number<R>{at[place], at[place + 1]}; };
    // The states before the chunks, then those before each step of a chunk.
    for (int i = from; i < to; i++) {
        if (i % CHUNK == 0) keep(rows.states, i / CHUNK, x);
        x = step.advance(x, rows.inputs[i]);
    }
    for (int chunk = (to - 1) / CHUNK; chunk >= from / CHUNK; chunk--) {
        const int first = chunk * CHUNK, end = min(first + CHUNK, to);
        x = kept(rows.states + chunk * EXCHANGE);
        for (int i = first; i < end; i++) {
            keep(rows.slopes, i - first, x);
            x = step.advance(x, rows.inputs[i]);
        }
        Number<R> after = x;
        for (int i = end - 1; i >= first; i--) {
            const Number<R> before = kept(rows.slopes + (i - first) * EXCHANGE);
            const R input = rows.inputs[i], d_y = rows.d_out[i];
            d_state = d_state + step.read.conj() * d_y;
            of_read = of_read + after.conj() * (R(2) * d_y);
            of_power = multiply_add(d_state, before.conj(), of_power);
            of_enter = of_enter + d_state * input;
            R d_u = sum_lanes(multiply_add(step.enter.im, d_state.im, step.enter.re * d_state.re));
            if (step.skips) d_u = multiply_add(R(step.skip), d_y, d_u), of_skip = multiply_add(d_y, input, of_skip);
            if (threadIdx.x % 32 == 0 && i < last) rows.d_inputs[i] = static_cast<float>(d_u);
            d_state = step.power.conj() * d_state;
            after = before;
        }
    }
    sums.add(1, of_power);
    sums.add(2, of_enter);
    sums.add(3, of_read);
    if (sums.of_skip) *sums.of_skip += static_cast<float>(of_skip);
}

// Goes back through the `steps` steps of a tile, before which the state is `x`.
template <typename T, typename R>
__device__ __forceinline__ void differentiate(const Backward &params, const Warp &warp, const Power<R> &power, Number<R> x,
                                              Number<R> &d_state, MatrixSlopes &matrices, Number<R> &of_chunk, const Rows &rows,
                                              int steps) {
    using Types = Products<T>;
    using OfSteps = typename Types::OfSteps;
    using OverChunks = typename OverChunksOf<T>::Type;
    const Inputs &p = params.inputs;
    const float *const enter = p.enter + warp.table(p), *const read = p.read + warp.table(p);
    const Lane lane;
    const int chunks = steps / CHUNK;
    Number<R> now = x;
    if (chunks > 0) {
        const OfSteps inputs(rows.inputs, lane);
        to_states(rows.states, lane, inputs, [&](int i) { return typename Types::ToState(enter, lane, i); });
        __syncwarp();
        carry<false>(rows.states, power, now, 0, chunks, [](int) {});
    }
    if (chunks * CHUNK < steps) {
        __syncwarp();
        step_back(Step<R>(p, warp), now, d_state, PairSlopes(params, warp), rows, chunks * CHUNK, steps, steps);
        if (chunks == 0) return;
        __syncwarp();
    }
    OfSteps d_out(rows.d_out, lane);
    int first = 0, products = 0;
    if (!d_out.are_finite()) {
        // The products give what comes after. (Of the chunks before, nothing is summed up: the sums are not finite either.)
        products = not_finite<true>(rows.d_out) + 1;
        first = min((products + CHUNK - 1) / CHUNK, chunks);
        d_out = OfSteps(rows.d_out, lane, products, TILE);
    }
    to_states(rows.slopes, lane, d_out, [&](int i) { return typename Types::ToState(read, lane, i); });
    __syncwarp();
    carry_back(rows.slopes, rows.states, power, d_state, of_chunk, first, chunks);
    // What stands in the rows of no chunk is multiplied by zeros.
    for (int i = 0; i < CHUNKS; i++) {
        if (i >= first && i < chunks) continue;
        keep(rows.states, i, Number<float>{0.0f, 0.0f});
        keep(rows.slopes, i, Number<float>{0.0f, 0.0f});
    }
    if (first > 0) keep(rows.slopes, first - 1, d_state);
    __syncwarp();
    {
        TwoSums sums[STEP_TILES];
        const float *const kernel = p.kernel + warp.channel * CHUNK;
        within_chunks(sums, d_out, Types::WithinChunk::template of<true>(kernel, lane, warp.is_first));
        Types::from_states(sums, lane, rows.slopes, [&](int i) { return typename Types::FromState(enter, lane, i); });
        write_steps(rows.d_inputs, lane, sums, products, chunks * CHUNK);
    }
    MatrixSlopes::add(matrices.of_read, lane, OverChunks(rows.d_out, lane, first, chunks), rows.states);
    const OverChunks inputs(rows.inputs, lane, first, chunks);
    MatrixSlopes::add(matrices.of_enter, lane, inputs, rows.slopes);
    if (warp.is_first) matrices.add_within(lane, inputs, rows.d_out, first, chunks);
    if (first > 0) {
        __syncwarp();
        step_back(Step<R>(p, warp), x, d_state, PairSlopes(params, warp), rows, 0, min(products, chunks * CHUNK), first * CHUNK);
    }
}

// Carries the states of a warp forward through a whole tile.
template <typename T, typename R>
__device__ __forceinline__ void advance(const Inputs &p, const Warp &warp, const Power<R> &power, Number<R> &x, const Rows &rows) {
    const Lane lane;
    const typename Products<T>::OfSteps inputs(rows.inputs, lane);
    const float *const enter = p.enter + warp.table(p);
    to_states(rows.states, lane, inputs, [&](int i) { return typename Products<T>::ToState(enter, lane, i); });
    __syncwarp();
    carry<false>(rows.states, power, x, 0, CHUNKS, [](int) {});
}

// Carries the slopes by a warp's states back through the steps of a tile, and finds nothing else.
template <typename T, typename R>
__device__ __forceinline__ void retreat(const Inputs &p, const Warp &warp, const Power<R> &power, Number<R> &d_state,
                                        const Rows &rows, int steps) {
    const Lane lane;
    const typename Products<T>::OfSteps d_out(rows.d_out, lane);
    const int chunks = steps / CHUNK;
    if (chunks * CHUNK < steps) {
        const Step<R> step(p, warp);
        for (int i = steps - 1; i >= chunks * CHUNK; i--) {
            d_state = step.power.conj() * (d_state + step.read.conj() * R(rows.d_out[i]));
        }
    }
    if (chunks > 0) {
        const float *const read = p.read + warp.table(p);
        to_states(rows.slopes, lane, d_out, [&](int i) { return typename Products<T>::ToState(read, lane, i); });
        __syncwarp();
        carry<true>(rows.slopes, power.conj(), d_state, 0, chunks, [](int) {});
    }
}

// The slope by the state after a segment: that by the final state, carried back through the segments in between.
template <typename R>
__device__ __forceinline__ Number<R> incoming_slope(const Backward &params, const Segment &segment, const Warp &warp) {
    const Inputs &p = params.inputs;
    Number<R> x = read_state<R>(params.d_final_state, warp, segment.sequence);
    if (segment.ends_sequence() || !warp.has_pair) return x;
    const int64_t last = segment.index + (p.segments.packed ? p.segments.packed[segment.index].segments_after
                                                             : p.segments.per_row - 1 - segment.rank);
    const Power<R> whole = segment_power<R>(warp.powers(p), segment.steps).conj();
    // The last, which may be shorter, has gone back to where it begins by itself; what enters it is carried through it here.
    const int64_t steps_of_last = segment.len - (segment.first + (last - segment.index) * segment.steps);
    const Number<double> step = {warp.powers(p)[0], warp.powers(p)[1]};
    const Power<R> short_one = Power<R>(power(step, static_cast<uint64_t>(steps_of_last))).conj();
    for (int64_t after = last; after > segment.index; after--) {
        const float *const reached = params.d_chunk_states + warp.state_at(p, after);
        x = (after == last ? short_one : whole).advance(x, Number<float>{reached[0], reached[1]});
    }
    return x;
}

template <typename T> __device__ __forceinline__ void run(const Backward &params) {
    using R = typename Precision<T>::Real;
    extern __shared__ float4 memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const Inputs &p = params.inputs;
    const Block block(p);
    const Warp warp(p, block);
    const Rows rows(shared, warp);
    const Power<R> power(Number<double>{warp.powers(p)[2], warp.powers(p)[3]});
    float *const checkpoints = params.checkpoints +
                               ((int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * params.tiles * THREADS + threadIdx.x) * 2;
    MatrixSlopes matrices;
    Number<R> of_chunk = {0, 0};
    if (warp.exists) PairSlopes(params, warp).clear();

    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const Segment segment = segment_at(p.segments, at);
        const int64_t tiles = (segment.steps + TILE - 1) / TILE;
        Number<R> x = incoming_state<R>(p, segment, warp);
        // What is staged of a tile is asked for a tile ahead.
        Staged<T> inputs, d_out;
        inputs.load(p.u, p, segment, block, threadIdx.x);
        for (int64_t tile = 0; tile < tiles; tile++) {
            write_shared(checkpoints + tile * THREADS * 2, {static_cast<float>(x.re), static_cast<float>(x.im)});
            if (tile + 1 == tiles) break;
            __syncthreads();
            inputs.write(shared.inputs[0]);
            inputs.load(p.u, p, segment, block, (tile + 1) * TILE + threadIdx.x);
            __syncthreads();
            if (warp.exists) advance<T>(p, warp, power, x, rows);
        }
        Number<R> d_state = incoming_slope<R>(params, segment, warp);
        if (tiles > 0) d_out.load(params.d_out, p, segment, block, (tiles - 1) * TILE + threadIdx.x);
        for (int64_t tile = tiles - 1; tile >= 0; tile--) {
            const int64_t first = tile * TILE;
            __syncthreads();
            inputs.write(shared.inputs[0]);
            d_out.write(shared.d_out[0]);
            if (tile > 0) {
                inputs.load(p.u, p, segment, block, first - TILE + threadIdx.x);
                d_out.load(params.d_out, p, segment, block, first - TILE + threadIdx.x);
            }
            float before[2];
            read_shared(before, checkpoints + tile * THREADS * 2);
            __syncthreads();
            const int steps = static_cast<int>(min(segment.steps - first, int64_t(TILE)));
            if (warp.exists) differentiate<T>(params, warp, power, Number<R>{before[0], before[1]}, d_state, matrices, of_chunk, rows, steps);
            __syncthreads();
            finish<T>(params.d_u, shared.d_inputs[0], p, segment, block, first + threadIdx.x);
        }
        if (params.d_initial_state && segment.first == 0) {
            const float re = static_cast<float>(d_state.re), im = static_cast<float>(d_state.im);
            write_state(params.d_initial_state, p, warp, segment.sequence, re, im);
        }
    }
    if (!warp.exists) return;
    __syncwarp();
    matrices.write(params, warp, Lane(), rows.states);
    PairSlopes(params, warp).add(0, of_chunk);
}

// The slopes by the states before segments of split sequences, from zero after each.
template <typename T> __device__ __forceinline__ void run_chunk_state(const Backward &params) {
    using R = typename Precision<T>::Real;
    extern __shared__ float4 memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const Inputs &p = params.inputs;
    const Block block(p);
    const Warp warp(p, block);
    const Rows rows(shared, warp);
    const Power<R> power(Number<double>{warp.powers(p)[2], warp.powers(p)[3]});
    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const Segment segment = segment_at(p.segments, at);
        if (segment.first == 0) continue;
        Number<R> d_state = {0, 0};
        int64_t tile = (segment.steps - 1) / TILE;
        Staged<T> d_out;
        d_out.load(params.d_out, p, segment, block, tile * TILE + threadIdx.x);
        for (; tile >= 0; tile--) {
            const int64_t first = tile * TILE;
            __syncthreads();
            d_out.write(shared.d_out[0]);
            if (tile > 0) d_out.load(params.d_out, p, segment, block, first - TILE + threadIdx.x);
            __syncthreads();
            const int steps = static_cast<int>(min(segment.steps - first, int64_t(TILE)));
            if (warp.exists) retreat<T>(p, warp, power, d_state, rows, steps);
        }
        const float re = static_cast<float>(d_state.re), im = static_cast<float>(d_state.im);
        write_state(params.d_chunk_states, p, warp, segment.index, re, im);
    }
}

}
