// How a block goes through segments forward.
#pragma once
#include <type_traits>

#include "halves.cuh"
#include "tile.cuh"

namespace s4d::forward {

struct Shared {
    // By tile, even and odd ones: the channels' inputs, and what each warp adds to the outputs.
    float inputs[2][WARPS][TILE], outputs[2][WARPS][TILE];
    float exchange[WARPS][CHUNKS * EXCHANGE];
    // A lane's part of K, where registers are too few for it.
    float4 within[WARPS][32][2];
};
static_assert(sizeof(Shared) == SMEM, "as it is launched");

// The matrices of a warp, in registers.
template <typename T, bool OUTPUT> struct Matrices {
    using Types = Products<T>;
    typename Types::ToState enter[STATE_TILES];
    typename Types::FromState read[OUTPUT ? STATE_TILES / Types::FROM_TILES : 1];
    using Within = typename Types::WithinChunk;
    // In shared memory or not.
    typename std::conditional<Types::IN_SHARED, Within &, Within>::type within;

    __device__ __forceinline__ Matrices(const Inputs &p, const Warp &warp, Lane lane, float4 (&in_shared)[2])
        : within(place(in_shared)) {
#pragma unroll
        for (int i = 0; i < STATE_TILES; i++) enter[i] = typename Types::ToState(p.enter + warp.table(p), lane, i);
        if constexpr (OUTPUT) {
#pragma unroll
            for (int i = 0; i < STATE_TILES / Types::FROM_TILES; i++) {
                read[i] = typename Types::FromState(p.read + warp.table(p), lane, i);
            }
            within = Within::template of<false>(p.kernel + warp.channel * CHUNK, lane, warp.is_first);
        }
    }

  private:
    static __device__ __forceinline__ decltype(auto) place(float4 (&in_shared)[2]) {
        if constexpr (Types::IN_SHARED) {
            static_assert(sizeof(Within) <= sizeof(in_shared), "room for it");
            return reinterpret_cast<Within &>(in_shared);
        } else {
            return Within();
        }
    }
};

// Carries a warp's states through the `steps` steps of a tile, and leaves what it adds to the outputs, if these are wanted.
template <typename T, bool OUTPUT, typename R>
__device__ __forceinline__ void advance(const Inputs &p, const Warp &warp, const Matrices<T, OUTPUT> &matrices, const Power<R> &power,
                                        Number<R> &x, const float *inputs, float *outputs, float *exchange, int steps) {
    using OfSteps = typename Products<T>::OfSteps;
    const Lane lane;
    OfSteps of_steps(inputs, lane);
    int chunks = steps / CHUNK, products = chunks * CHUNK;
    if constexpr (OUTPUT) {
        if (!of_steps.are_finite()) {
            // The products give what comes before.
            products = min(products, not_finite<false>(inputs));
            chunks = products / CHUNK;
            of_steps = OfSteps(inputs, lane, 0, products);
        }
    }
    if (products > 0) {
        to_states(exchange, lane, of_steps, [&](int i) -> const auto & { return matrices.enter[i]; });
        __syncwarp();
        carry(exchange, power, x, 0, chunks);
        if constexpr (OUTPUT) {
            if (chunks * CHUNK < products) keep(exchange, chunks, x);
            __syncwarp();
            TwoSums sums[STEP_TILES];
            within_chunks(sums, of_steps, matrices.within);
            Products<T>::from_states(sums, lane, exchange, [&](int i) -> const auto & { return matrices.read[i]; });
            write_steps(outputs, lane, sums, 0, products);
        }
        __syncwarp();
    }
    if (chunks * CHUNK < steps) {
        step_by_step(Step<R>(p, warp), x, inputs, outputs, chunks * CHUNK, OUTPUT ? products : steps, steps);
    }
}

// Goes through one segment after another: for the outputs and the final states, or for the chunk states.
template <typename T, bool OUTPUT> __device__ __forceinline__ void run(const Forward &params) {
    using R = typename Precision<T>::Real;
    extern __shared__ float4 memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const Inputs &p = params.inputs;
    const Block block(p);
    const Warp warp(p, block);
    const Matrices<T, OUTPUT> matrices(p, warp, Lane(), shared.within[warp.index][threadIdx.x % 32]);
    const Power<R> power(Number<double>{warp.powers(p)[2], warp.powers(p)[3]});

    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const Segment segment = segment_at(p.segments, at);
        if (!OUTPUT && segment.ends_sequence()) continue;
        Number<R> x = {0, 0};
        if (OUTPUT) x = incoming_state<R>(p, segment, warp);
        Staged<T> next;
        next.load(p.u, p, segment, block, threadIdx.x);
        int64_t first = 0;
        for (int tile = 0; first < segment.steps; first += TILE, tile++) {
            const int steps = static_cast<int>(min(segment.steps - first, int64_t(TILE))), half = tile % 2;
            next.write(shared.inputs[half][0]);
            if (first + TILE < segment.steps) next.load(p.u, p, segment, block, first + TILE + threadIdx.x);
            // Of this tile all inputs are there, and of the tile before it all outputs.
            __syncthreads();
            if (OUTPUT && tile > 0) {
                finish<T>(params.out, shared.outputs[1 - half][0], p, segment, block, first - TILE + threadIdx.x);
            }
            if (warp.exists) {
                advance<T, OUTPUT>(p, warp, matrices, power, x, shared.inputs[half][warp.local], shared.outputs[half][warp.index],
                                   shared.exchange[warp.index], steps);
            }
        }
        __syncthreads();
        if (OUTPUT && first > 0) {
            finish<T>(params.out, shared.outputs[(first / TILE + 1) % 2][0], p, segment, block, first - TILE + threadIdx.x);
        }
        const float re = static_cast<float>(x.re), im = static_cast<float>(x.im);
        if (!OUTPUT) {
            write_state(p.chunk_states, p, warp, segment.index, re, im);
        } else if (params.final_state && segment.ends_sequence()) {
            write_state(params.final_state, p, warp, segment.sequence, re, im);
        }
    }
}

}
