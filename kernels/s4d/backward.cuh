// How a block goes through segments from the last to the first.
#pragma once
#include "slopes.cuh"

namespace s4d::backward {

// The tiles of G that are in shared memory, where any are.
constexpr int READ_IN_SHARED = 5;

template <typename T> struct Shared {
    // Of the tile: the channels' inputs and the slopes by their outputs.
    typename Products<T>::InTile inputs[WARPS][TILE], d_out[WARPS][TILE];
    // The slopes by the states after the tile's chunks; when these have been used, what each warp adds to the slopes by the inputs and,
    // from TILE on, `Ahead`.
    float slopes[WARPS][CHUNKS * EXCHANGE];
    // A lane's sums of the slopes by K, for which there are no registers.
    float4 of_kernel[WARPS][STEP_TILES][32];
    // H, K and a part of G, where they are here.
    Operands<Products<T>::IN_SHARED ? STATE_TILES : 1> enter[WARPS];
    Operands<Products<T>::IN_SHARED ? STEP_TILES : 1> within[WARPS];
    Operands<Products<T>::IN_SHARED ? READ_IN_SHARED : 1> read[WARPS];
    KeptPlace places[WARPS];
    Arrival arrivals[WARPS];
};
static_assert(sizeof(Shared<__nv_bfloat16>) == SMEM && sizeof(Shared<float>) == OF_OTHERS, "as it is launched");

// The rows of a warp in it.
template <typename T> struct Rows {
    using S = typename Products<T>::InTile;
    const S *inputs, *d_out;
    float *slopes;

    // `index` is the warp's in its block.
    __device__ __forceinline__ Rows(Shared<T> &shared, const Warp &warp, int index)
        : inputs(shared.inputs[warp.local]), d_out(shared.d_out[warp.local]), slopes(shared.slopes[index]) {}
};

// The matrices of a warp: G in registers, H, K and the rest of G in shared memory or made of the tables.
template <typename T> struct Matrices {
    using Types = Products<T>;
    using FromState = typename Types::FromState;
    using WithinChunk = typename Types::WithinChunk;
    using ToState = typename Types::ToState;
    static constexpr int IN_REGISTERS = STATE_TILES - (Types::IN_SHARED ? READ_IN_SHARED : 0);
    ToState first[IN_REGISTERS];

    __device__ __forceinline__ Matrices(const Inputs &p, Shared<T> &shared, const Warp &warp, Lane lane) {
#pragma unroll
        for (int i = 0; i < IN_REGISTERS; i++) first[i] = ToState(p.read + warp.table(p), lane, i);
        if constexpr (Types::IN_SHARED) {
            const int at = threadIdx.x % 32;
#pragma unroll
            for (int i = IN_REGISTERS; i < STATE_TILES; i++) {
                shared.read[warp.index][i - IN_REGISTERS][at] = ToState(p.read + warp.table(p), lane, i).steps;
            }
#pragma unroll
            for (int k = 0; k < STATE_TILES / 2; k++) {
                const FromState enter(p.enter + warp.table(p), lane, k);
#pragma unroll
                for (int j = 0; j < STEP_TILES; j++) shared.enter[warp.index][2 * k + j][at] = enter.tiles[j];
            }
            const WithinChunk within = WithinChunk::template of<true>(p.kernel + warp.channel * CHUNK, lane, warp.is_first);
#pragma unroll
            for (int j = 0; j < STEP_TILES; j++) shared.within[warp.index][j][at] = within.tiles[j];
        }
    }
    __device__ __forceinline__ ToState read(const Shared<T> &shared, int index, Lane lane, int i) const {
        if constexpr (Types::IN_SHARED) {
            if (i >= IN_REGISTERS) {
                ToState matrix;
                matrix.steps = shared.read[index][i - IN_REGISTERS][lane.index()];
                return matrix;
            }
        }
        return first[i];
    }
    static __device__ __forceinline__ FromState enter(const Inputs &p, const Shared<T> &shared, const Warp &warp, int index, Lane lane, int i) {
        if constexpr (Types::IN_SHARED) {
            FromState matrix;
#pragma unroll
            for (int j = 0; j < STEP_TILES; j++) matrix.tiles[j] = shared.enter[index][2 * i + j][lane.index()];
            return matrix;
        } else {
            return FromState(p.enter + warp.table(p), lane, i);
        }
    }
    static __device__ __forceinline__ WithinChunk within(const Inputs &p, const Shared<T> &shared, const Warp &warp, int index, Lane lane) {
        if constexpr (Types::IN_SHARED) {
            WithinChunk matrix;
#pragma unroll
            for (int j = 0; j < STEP_TILES; j++) matrix.tiles[j] = shared.within[index][j][lane.index()];
            return matrix;
        } else {
            return WithinChunk::template of<true>(p.kernel + warp.channel * CHUNK, lane, warp.is_first);
        }
    }
};

// Adds to the slopes by K of a warp: of products of inputs with slopes by outputs, of which a row is the input's step and a column that
// of the output.
template <typename Steps>
__device__ __forceinline__ void add_within(float4 (&of_kernel)[STEP_TILES][32], Lane lane, const Steps &inputs, const Steps &d_out) {
    Sum sums[STEP_TILES];
    inputs.add_steps(sums, d_out);
#pragma unroll
    for (int n = 0; n < STEP_TILES; n++) {
        const float4 before = of_kernel[n][lane.index()];
        of_kernel[n][lane.index()] = {before.x + sums[n][0], before.y + sums[n][1], before.z + sums[n][2], before.w + sums[n][3]};
    }
}

// Writes them for the row of blocks. `exchange` is free by now.
__device__ __forceinline__ void write_within(const Backward &params, const Warp &warp, Lane lane,
                                             const float4 (&of_kernel)[STEP_TILES][32], float *exchange) {
#pragma unroll
    for (int n = 0; n < STEP_TILES; n++) {
        const float4 sums = of_kernel[n][lane.index()];
        float *const at = exchange + 2 * lane.g * (CHUNK + 1) + 4 * lane.t + n;
        at[0] = sums.x, at[2] = sums.y, at[CHUNK + 1] = sums.z, at[CHUNK + 3] = sums.w;
    }
    __syncwarp();
    const int lag = lane.index();
    if (lag < CHUNK) {
        float sum = 0.0f;
        for (int step = 0; step + lag < CHUNK; step++) sum += exchange[step * (CHUNK + 1) + step + lag];
        params.of_kernel[(blockIdx.y * params.inputs.d_inner + warp.channel) * OF_KERNEL + lag] = sum;
    }
}

// Goes back through the steps from `from` to `to` one by one. `write` is called with the slope by each one's input.
template <typename T, typename R, typename Write>
__device__ __forceinline__ void step_back(const Step<R> &step, Number<R> &d_state, const PairSlopes &sums, const Rows<T> &rows, int from,
                                          int to, const Write &write) {
    Number<R> of_enter = {0, 0};
    R of_skip = 0;
#pragma unroll 1
    for (int i = to - 1; i >= from; i--) {
        const R input = static_cast<float>(rows.inputs[i]), d_y = static_cast<float>(rows.d_out[i]);
        d_state = d_state + step.read.conj() * d_y;
        of_enter = of_enter + d_state * input;
        R d_u = sum_lanes(multiply_add(step.enter.im, d_state.im, step.enter.re * d_state.re));
        if (step.skips) d_u = multiply_add(R(step.skip), d_y, d_u), of_skip = multiply_add(d_y, input, of_skip);
        write(i, static_cast<float>(d_u));
        d_state = step.power.conj() * d_state;
    }
    sums.add(2, of_enter);
    if (sums.of_skip) *sums.of_skip += static_cast<float>(of_skip);
}

// Goes back through the first `chunks` chunks of a tile, and leaves the slopes by their inputs where the slopes by states were. `ask`
// is called as soon as the exchange is free from TILE on.
template <typename T, typename R, typename Ask>
__device__ __forceinline__ void chunks_back(const Backward &params, Shared<T> &shared, const Warp &warp, int index, Lane lane,
                                            const Matrices<T> &matrices, const Power<R> &power, Number<R> &d_state,
                                            MatrixSlopes &of_enter, int chunks, const Ask &ask) {
    using Types = Products<T>;
    using OfSteps = typename Types::OfSteps;
    using Slope = typename Types::Slope;
    using OverChunks = typename OverChunksOf<T>::Type;
    const Inputs &p = params.inputs;
    const Rows<T> rows(shared, warp, index);
    int first = 0, products = 0;
    const auto slopes_by_outputs = [&] {
        return products == 0 ? OfSteps(rows.d_out, lane) : OfSteps(rows.d_out, lane, products, TILE);
    };
    {
        OfSteps d_out(rows.d_out, lane);
        if (!d_out.are_finite()) {
            // The products give what comes after. (Of the chunks before, nothing is summed up: the sums are not finite either.)
            products = not_finite<true>(rows.d_out) + 1;
            first = min((products + CHUNK - 1) / CHUNK, chunks);
            d_out = slopes_by_outputs();
        }
        to_states(rows.slopes, lane, d_out, [&](int i) { return matrices.read(shared, index, lane, i); });
    }
    __syncwarp();
    // Each lane carries the slope by its pair's state, and leaves it where the chunk before finds it.
    const auto keep = [&](int chunk, Number<float> x) {
        write_number(rows.slopes + chunk * EXCHANGE + lane.index() * 2, Slope(x));
    };
    const auto rounded = [&] { return Number<float>{static_cast<float>(d_state.re), static_cast<float>(d_state.im)}; };
    const Power<R> back = power.conj();
    for_each_chunk<true>(first, chunks, [&](int i) {
        Number<float> left;
        read_number(left, rows.slopes + i * EXCHANGE + lane.index() * 2);
        keep(i, rounded());
        d_state = back.advance(d_state, left);
    });
    if (first > 0 || chunks < CHUNKS) {
        // What stands in the rows of no chunk is multiplied by zeros.
#pragma unroll 1
        for (int i = 0; i < CHUNKS; i++) {
            if (i < first || i >= chunks) keep(i, {0.0f, 0.0f});
        }
        if (first > 0) keep(first - 1, rounded());
    }
    __syncwarp();
    {
        const OverChunks inputs(rows.inputs, lane, first, chunks);
        of_enter.add<Slope>(lane, inputs, rows.slopes);
        if (warp.is_first) add_within(shared.of_kernel[index], lane, inputs, OverChunks(rows.d_out, lane, first, chunks));
    }
    TwoSums of_steps[STEP_TILES];
    within_chunks(of_steps, slopes_by_outputs(), Matrices<T>::within(p, shared, warp, index, lane));
    Types::from_slopes(of_steps, lane, rows.slopes, [&](int i) { return Matrices<T>::enter(p, shared, warp, index, lane, i); });
    __syncwarp();
    ask();
    write_steps(rows.slopes, lane, of_steps, products, chunks * CHUNK);
    if (first > 0) {
        const Warp warp = Warp::again(p);
        const int last = min(products, chunks * CHUNK);
        step_back(Step<R>(p, warp), d_state, PairSlopes(params, warp), rows, 0, first * CHUNK, [&](int i, float d_u) {
            if (i < last && lane.index() == 0) rows.slopes[i] = d_u;
        });
    }
}

// Goes back through the `steps` steps of a tile. `ask` is called once, for the next one.
template <typename T, typename R, typename Ask>
__device__ __forceinline__ void differentiate(const Backward &params, Shared<T> &shared, const Warp &warp, const Matrices<T> &matrices,
                                              const Power<R> &power, Number<R> &d_state, MatrixSlopes &of_enter, int steps,
                                              const Ask &ask) {
    // (Addresses are made in each tile, which takes few instructions, and no registers in between.)
    const int thread = reload_tid(), index = thread / 32, chunks = steps / CHUNK;
    const Lane lane(thread);
    // A lane has the slope by the input of one of the steps after the last whole chunk: there is no room for it before the chunks are done.
    float after = 0.0f;
    if (chunks * CHUNK < steps) {
        const Warp warp = Warp::again(params.inputs);
        const Rows<T> rows(shared, warp, index);
        step_back(Step<R>(params.inputs, warp), d_state, PairSlopes(params, warp), rows, chunks * CHUNK, steps, [&](int i, float d_u) {
            if (i % CHUNK == lane.index()) after = d_u;
        });
    }
    if (chunks > 0) {
        chunks_back<T>(params, shared, warp, index, lane, matrices, power, d_state, of_enter, chunks, ask);
    } else {
        ask();
    }
    if (chunks * CHUNK + lane.index() < steps && lane.index() < CHUNK) shared.slopes[index][chunks * CHUNK + lane.index()] = after;
}

// Carries the slopes by a warp's states back through the steps of a tile, and finds nothing else.
template <typename T, typename R>
__device__ __forceinline__ void retreat(const Inputs &p, Shared<T> &shared, const Warp &warp, const Power<R> &power, Number<R> &d_state,
                                        int steps) {
    const Rows<T> rows(shared, warp, warp.index);
    const Lane lane;
    const typename Products<T>::OfSteps d_out(rows.d_out, lane);
    const int chunks = steps / CHUNK;
    if (chunks * CHUNK < steps) {
        const Step<R> step(p, warp);
        for (int i = steps - 1; i >= chunks * CHUNK; i--) {
            d_state = step.power.conj() * (d_state + step.read.conj() * R(static_cast<float>(rows.d_out[i])));
        }
    }
    if (chunks > 0) {
        const float *const read = p.read + warp.table(p);
        to_states(rows.slopes, lane, d_out, [&](int i) { return typename Products<T>::ToState(read, lane, i); });
        __syncwarp();
        const Power<R> back = power.conj();
        for_each_chunk<true>(0, chunks, [&](int i) {
            Number<float> left;
            read_number(left, rows.slopes + i * EXCHANGE + threadIdx.x % 32 * 2);
            d_state = back.advance(d_state, left);
        });
    }
}

// Writes the slopes by the inputs of a tile, which the channels' warps have left in the exchange.
template <typename T>
__device__ __forceinline__ void finish_back(const Backward &params, const KeptPlace &place, Shared<T> &shared, int64_t first) {
    const Inputs &p = params.inputs;
    const Place now = place.get();
    if constexpr (Ahead<T>::BY_BOXES) {
        const int thread = reload_tid(), lane = thread % 32;
        // A box has all steps of a warp, which the end of a sequence may not.
        if (Ahead<T>::are_boxes(p) && first + thread - lane + BOX_STEPS <= now.segment.steps) {
            Ahead<T> &rows = Ahead<T>::of(shared);
            rows.d_u[Ahead<T>::row(p, lane)] = finished_row<T, CHUNKS * EXCHANGE>(shared.slopes[0]);
            fence_boxes();
            __syncwarp();
            if (lane == 0) BoxAt(p, now, first + thread).store(params.d_u_boxes, rows.d_u);
            return;
        }
    }
    finish<T, CHUNKS * EXCHANGE>(params.d_u, shared.slopes[0], p, now.segment, now.block, first + threadIdx.x);
}

template <typename T> __device__ __forceinline__ void run(const Backward &params) {
    using R = typename Precision<T>::Real;
    extern __shared__ __align__(128) float4 memory[];
    Shared<T> &shared = *reinterpret_cast<Shared<T> *>(memory);
    const Inputs &p = params.inputs;
    init_arrivals<T>(shared.arrivals);
    const Warp warp(p, Block(p));
    const Matrices<T> matrices(p, shared, warp, Lane());
    const Power<R> power(Number<double>{warp.powers(p)[2], warp.powers(p)[3]});
    MatrixSlopes of_enter;
    for (int n = 0; n < STEP_TILES; n++) shared.of_kernel[warp.index][n][threadIdx.x % 32] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (warp.exists) {
        const PairSlopes of_steps(params, warp);
        of_steps.clear(2);
        if (of_steps.of_skip) *of_steps.of_skip = 0.0f;
    }

    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const KeptPlace &place = shared.places[warp.index];
        shared.places[warp.index].put({at, segment_at(p.segments, at), Block(p)});
        Number<R> d_state = incoming_slope<R>(params, place.get().segment, Warp::again(p));
        const auto ask = [&](int64_t first) {
            if (p.flags & FLAG_ROW && first >= 0) Ahead<T>::of(shared).ask(params, place.get(), shared.arrivals, first);
        };
        // (Before a segment without steps, where no tile is.)
        int64_t first = (place.get().segment.steps + TILE - 1) / TILE * TILE - TILE;
        ask(first);
        for (; first >= 0; first -= TILE) {
            // (Nobody reads the tile after this one any more: all have met since.)
            stage<T>(params, place, shared, first);
            const int steps = static_cast<int>(min(place.get().segment.steps - first, int64_t(TILE)));
            if (warp.exists) {
                differentiate<T>(params, shared, warp, matrices, power, d_state, of_enter, steps, [&] { ask(first - TILE); });
            }
            __syncthreads();
            finish_back<T>(params, place, shared, first);
        }
        at = place.get().index;
        const Segment ended = place.get().segment;
        if (params.d_initial_state && ended.first == 0) {
            const float re = static_cast<float>(d_state.re), im = static_cast<float>(d_state.im);
            write_state(params.d_initial_state, p, Warp::again(p), ended.sequence, re, im);
        }
    }
    // (Of the last tile's slopes by inputs.)
    if (Ahead<T>::BY_BOXES) wait_for_boxes();
    __syncthreads();
    if (!warp.exists) return;
    const Warp again = Warp::again(p);
    of_enter.write(params.of_enter, p, again, Lane());
    if (!again.is_first) return;
    write_within(params, again, Lane(), shared.of_kernel[again.index], shared.slopes[again.index]);
}

// The slopes by the states before segments of split sequences, from zero after each.
template <typename T> __device__ __forceinline__ void run_chunk_state(const Backward &params) {
    using R = typename Precision<T>::Real;
    extern __shared__ __align__(128) float4 memory[];
    Shared<T> &shared = *reinterpret_cast<Shared<T> *>(memory);
    const Inputs &p = params.inputs;
    const Block block(p);
    const Warp warp(p, block);
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
            if (warp.exists) retreat<T>(p, shared, warp, power, d_state, steps);
        }
        const float re = static_cast<float>(d_state.re), im = static_cast<float>(d_state.im);
        write_state(params.d_chunk_states, p, warp, segment.index, re, im);
    }
}

}
