// The recurrence of the forward scan, whatever its inputs; instances are in forward_general.cu and chunk_state.cu.
#pragma once
#include "forward_loop.cuh"

namespace scan::forward_general {

// What a lane's states are advanced by: log2(e) A, 1/A, and B and C where they are constant.
struct Coefficients {
    const Inputs &p;
    const bool &zoh, &compensate;
    const float (&a)[STATE_VEC], (&inverse_a)[STATE_VEC], (&constant_b)[STATE_VEC], (&constant_c)[STATE_VEC];
};

// Carries a lane's states, those of one block of 16, through a tile; `lost` is what rounding has taken from them.
template <typename T, bool CHUNK_STATE, typename Steps, typename Outputs, typename Map>
__device__ __forceinline__ void advance(const Coefficients &coefficients, const Steps &staged,
                                        const float (&projections)[TILE][2][STATE_BLOCK], Outputs &outputs, const Map &map,
                                        const int &state_block, float (&h)[STATE_VEC], float (&lost)[STATE_VEC]) {
    const Inputs &p = coefficients.p;
    const bool &zoh = coefficients.zoh, &compensate = coefficients.compensate;
    const float(&a)[STATE_VEC] = coefficients.a, (&inverse_a)[STATE_VEC] = coefficients.inverse_a;
#pragma unroll 1
    for (int first = 0; first < TILE; first += Steps::TOGETHER) {
        float step[Steps::TOGETHER][1], in[Steps::TOGETHER][1];
        float b[Steps::TOGETHER][STATE_VEC], c[Steps::TOGETHER][STATE_VEC];
        staged.read(first, map.index, step, in);
#pragma unroll
        for (int i = 0; i < Steps::TOGETHER; i++) {
            read_shared(b[i], &projections[first + i][0][map.state_group * STATE_VEC]);
            if (!CHUNK_STATE) read_shared(c[i], &projections[first + i][1][map.state_group * STATE_VEC]);
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) {
                if (p.b.constant) b[i][n] = coefficients.constant_b[n];
                if (!CHUNK_STATE && p.c.constant) c[i][n] = coefficients.constant_c[n];
            }
        }
#pragma unroll
        for (int i = 0; i < Steps::TOGETHER; i++) {
            const int t = first + i;
            float y[1];
            if (!CHUNK_STATE && state_block > 0) read_shared(y, outputs.of(t, map.state_group, map.quad, map.part));
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) {
                const float x = step[i][0] * a[n];
                if (zoh || compensate) {
                    const Decay<true> decay(x);
                    float weighted = in[i][0];
                    if (zoh) {
                        const float by_a = decay.minus_one() * inverse_a[n];
                        weighted *= inverse_a[n] == 0.0f ? step[i][0] : by_a;
                    }
                    const float input = weighted * b[i][n];
                    if (compensate) {
                        decay.advance(h[n], lost[n], input);
                    } else {
                        h[n] = decay.advance(h[n], input);
                    }
                } else {
                    h[n] = Decay<sizeof(T) == 4, bool>(x).advance(h[n], in[i][0] * b[i][n]);
                }
                if (!CHUNK_STATE) y[0] = n || state_block ? fmaf(c[i][n], h[n], y[0]) : c[i][n] * h[n];
            }
            if (!CHUNK_STATE) write_shared(outputs.of(t, map.state_group, map.quad, map.part), y);
        }
    }
}

// The recurrence whatever the inputs: states are parked, however few there are, and B and C are read when they are wanted.
template <typename T, bool CHUNK_STATE> struct Recurrence {
    using Form = forward::Form<T, THREADS, 1, TILE, false, true, CHUNK_STATE>;
    static constexpr bool ZOH = true;
    const Inputs &p;
    const Segment &segment;
    const Block &block;
    const bool &zoh;
    const bool compensate;

    // States are compensated by the sequence's own length, so that it gets the same bits whatever it is packed with.
    __device__ __forceinline__ Recurrence(const Inputs &p, const Segment &segment, const Block &block, const bool &zoh)
        : p(p), segment(segment), block(block), zoh(zoh),
          compensate((p.flags & FLAG_COMPENSATE) && segment.len > LONG_SEQUENCE) {}

    template <bool RAGGED> __device__ __forceinline__ void load_first(int) const {}
    template <bool RAGGED> __device__ __forceinline__ void load_next(int) const {}
    __device__ __forceinline__ void stage(typename Form::Projections &) const {}
    __device__ __forceinline__ void move_on() const {}

    // Carries the states through a tile from step `i` on that has been staged, `left` steps of it if it is `RAGGED`.
    template <bool RAGGED>
    __device__ __forceinline__ void advance_tile(const typename Form::Steps &staged, typename Form::Projections &projections,
                                                 typename Form::Outputs &outputs, const forward::CarriedStates<Form> &states,
                                                 typename forward::CarriedStates<Form>::Held &held, const int64_t &i,
                                                 const int &left, const bool &) {
        for (int state_block = 0; state_block < states.state_blocks; state_block++) {
            ProjectionWalk<T, TILE, THREADS, false> walk(p, segment, block.group, i, state_block * STATE_BLOCK);
            walk.template load<RAGGED>(left);
            __syncthreads();
            walk.store(&projections[0][0][0]);
            __syncthreads();
            states.fetch(held, state_block);
            states.read_rates(held, state_block);
            float inverse_a[STATE_VEC], constant_b[STATE_VEC], constant_c[STATE_VEC];
            const Lane lane = states.lane(0, state_block);
            lane.template parameter<false>(inverse_a, p.a);
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) inverse_a[n] = hold_inverse(inverse_a[n]);
            if (p.b.constant) lane.constant(constant_b, p.b);
            if (p.c.constant) lane.constant(constant_c, p.c);
            // What rounding takes is not parked.
            if (states.state_blocks > 1) {
#pragma unroll
                for (int n = 0; n < STATE_VEC; n++) held.lost[0][n] = 0.0f;
            }
            const Coefficients coefficients{p, zoh, compensate, held.a[0], inverse_a, constant_b, constant_c};
            advance<T, CHUNK_STATE>(coefficients, staged, projections, outputs, states.map, state_block, held.h[0], held.lost[0]);
            states.park(held, state_block);
        }
    }
};

}
