// How a block goes through segments forward in time for the slopes that take the states:
//
//   dG_t = dy_t X     d(A̅^16) = Σ Λ conj(X) = Σ W conj(Y) + Λ_end conj(Y_end)     Y' = A̅^16 Y + X
//
// With X and W as in slopes.cuh, summed up over all chunks, and Y zero before a segment: the derivative of the state by A̅^16, which
// goes forward as the state does, where Λ would go back.
#pragma once
#include "slopes.cuh"

namespace s4d::backward_states {

using namespace backward;

template <typename T> struct Shared {
    // Of the tile: the channels' inputs and the slopes by their outputs.
    typename Products<T>::InTile inputs[WARPS][TILE], d_out[WARPS][TILE];
    // The states before the tile's chunks, and what the chunks' outputs add to the slopes by these; when these have been used, from TILE
    // on, `Ahead`.
    float states[WARPS][CHUNKS * EXCHANGE], slopes[WARPS][CHUNKS * EXCHANGE];
    // G, where it is here.
    Operands<Products<T>::IN_SHARED ? STATE_TILES : 1> read[WARPS];
    KeptPlace places[WARPS];
    Arrival arrivals[WARPS];
};
constexpr int SIZE = sizeof(Shared<__nv_bfloat16>);
static_assert(SIZE == backward_states::SMEM && sizeof(Shared<float>) == backward_states::OF_OTHERS, "as it is launched");

// The matrices of a warp: H in registers, G in shared memory or made of the tables.
template <typename T> struct Matrices {
    using ToState = typename Products<T>::ToState;
    ToState enter[STATE_TILES];

    __device__ __forceinline__ Matrices(const Inputs &p, Shared<T> &shared, const Warp &warp, Lane lane) {
#pragma unroll
        for (int i = 0; i < STATE_TILES; i++) {
            enter[i] = ToState(p.enter + warp.table(p), lane, i);
            if constexpr (Products<T>::IN_SHARED) {
                shared.read[warp.index][i][threadIdx.x % 32] = ToState(p.read + warp.table(p), lane, i).steps;
            }
        }
    }
    // `index` is the warp's in its block.
    static __device__ __forceinline__ ToState read(const Inputs &p, const Shared<T> &shared, const Warp &warp, int index, Lane lane, int i) {
        if constexpr (Products<T>::IN_SHARED) {
            ToState matrix;
            matrix.steps = shared.read[index][i][lane.index()];
            return matrix;
        } else {
            return ToState(p.read + warp.table(p), lane, i);
        }
    }
};

// A pair's state, and its derivative by A̅^16 or, after steps that have been gone through one by one, by A̅.
template <typename R> struct Derived {
    Number<R> state, derivative = {0, 0};
};

// Goes through the last steps of a segment, from `from` to `to` of a tile, one by one.
template <typename T, typename R>
__device__ __forceinline__ void step_forward(const Step<R> &step, const double *powers, Derived<R> &now, const PairSlopes &sums,
                                             const typename Products<T>::InTile *inputs, const typename Products<T>::InTile *d_out,
                                             int from, int to) {
    Number<R> of_power = {0, 0}, of_read = {0, 0};
    // That of A̅^16 by A̅.
    const Number<double> by_power = power(Number<double>{powers[0], powers[1]}, CHUNK - 1) * double(CHUNK);
    now.derivative = now.derivative * Number<R>{static_cast<R>(by_power.re), static_cast<R>(by_power.im)};
#pragma unroll 1
    for (int i = from; i < to; i++) {
        const R d_y = static_cast<float>(d_out[i]);
        now.derivative = multiply_add(step.power, now.derivative, now.state);
        now.state = step.advance(now.state, static_cast<float>(inputs[i]));
        of_read = of_read + now.state.conj() * (R(2) * d_y);
        of_power = multiply_add(step.read.conj() * d_y, now.derivative.conj(), of_power);
    }
    sums.add(1, of_power);
    sums.add(3, of_read);
}

// Goes through the `steps` steps of a tile. `ask` is called for the next one, if this is not the last.
template <typename T, typename R, typename Ask>
__device__ __forceinline__ void differentiate(const Backward &params, Shared<T> &shared, const Warp &warp, const Matrices<T> &matrices,
                                              const Power<R> &power, Derived<R> &now, MatrixSlopes &of_read, Number<R> &of_chunk,
                                              int steps, const Ask &ask) {
    using Types = Products<T>;
    using OfSteps = typename Types::OfSteps;
    const Inputs &p = params.inputs;
    const auto *const inputs = shared.inputs[warp.local], *const d_out = shared.d_out[warp.local];
    // (Addresses are made in each tile, which takes few instructions, and no registers in between.)
    const int thread = reload_tid(), index = thread / 32;
    const Lane lane(thread);
    float *const states = shared.states[index], *const slopes = shared.slopes[index];
    const int chunks = steps / CHUNK;
    if (chunks > 0) {
        to_states(states, lane, OfSteps(inputs, lane), [&](int i) -> const auto & { return matrices.enter[i]; });
        to_states(slopes, lane, OfSteps(d_out, lane), [&](int i) { return Matrices<T>::read(p, shared, warp, index, lane, i); });
        __syncwarp();
        for_each_chunk<false>(0, chunks, [&](int i) {
            const int at = i * EXCHANGE + lane.index() * 2;
            Number<float> left, slope;
            read_number(left, states + at);
            read_number(slope, slopes + at);
            const Number<float> state = {static_cast<float>(now.state.re), static_cast<float>(now.state.im)};
            write_number(states + at, state);
            of_chunk = multiply_add(Number<R>{slope.re, slope.im}, now.derivative.conj(), of_chunk);
            now.derivative = power.advance(now.derivative, state);
            now.state = power.advance(now.state, left);
        });
        // What stands in the rows of no chunk is multiplied by zeros.
#pragma unroll 1
        for (int i = chunks; i < CHUNKS; i++) keep(states, i, Number<float>{0.0f, 0.0f});
        __syncwarp();
        ask();
        using OverChunks = typename OverChunksOf<T>::Type;
        of_read.add<Number<float>>(lane, OverChunks(d_out, lane, 0, chunks), states);
    }
    if (chunks * CHUNK < steps) {
        const Warp warp = shared.places[index].warp(p);
        step_forward<T>(Step<R>(p, warp), warp.powers(p), now, PairSlopes(params, warp), inputs, d_out, chunks * CHUNK, steps);
    }
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
    MatrixSlopes of_read;
    Number<R> of_chunk = {0, 0};
    if (warp.exists) {
        const PairSlopes of_steps(params, warp);
        of_steps.clear(0), of_steps.clear(1), of_steps.clear(3);
    }

    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const KeptPlace &place = shared.places[warp.index];
        shared.places[warp.index].put({at, segment_at(p.segments, at), Block(p)});
        Derived<R> now = {incoming_state<R>(p, place.get().segment, place.warp(p))};
        const auto ask = [&](int tile) {
            const int64_t first = int64_t(tile) * TILE;
            if (!(p.flags & FLAG_ROW) || first >= place.get().segment.steps) return;
            Ahead<T>::of(shared).ask(params, place.get(), shared.arrivals, first);
        };
        ask(0);
        for (int tile = 0; int64_t(tile) * TILE < place.get().segment.steps; tile++) {
            const int64_t first = int64_t(tile) * TILE;
            // Nobody reads the tile before this one any more.
            __syncthreads();
            stage<T>(params, place, shared, first);
            const int64_t left = place.get().segment.steps - first;
            const int steps = static_cast<int>(min(left, int64_t(TILE)));
            if (warp.exists) {
                differentiate<T>(params, shared, warp, matrices, power, now, of_read, of_chunk, steps, [&] { ask(tile + 1); });
            }
        }
        at = place.get().index;
        if (!warp.exists) continue;
        const Segment ended = place.get().segment;
        const Warp warp = place.warp(p);
        const Number<R> d_state = incoming_slope<R>(params, ended, warp);
        if (ended.steps % CHUNK == 0) {
            of_chunk = multiply_add(d_state, now.derivative.conj(), of_chunk);
        } else {
            PairSlopes(params, warp).add(1, d_state * now.derivative.conj());
        }
    }
    if (!warp.exists) return;
    const Warp again = shared.places[reload_tid() / 32].warp(p);
    of_read.write(params.of_read, p, again, Lane());
    PairSlopes(params, again).add(0, of_chunk);
}

}
