// The recurrence of the forward scan in the form that Mamba uses; instances are in forward.cu and chunk_state.cu.
#pragma once
#include "forward_loop.cuh"

namespace scan::forward {

// Carries the states of a lane's channels, those of one block of 16, through a tile. Before the steps within it at which a
// state may be kept, `keep` is called with the step.
template <typename T, int STEPS, bool CHUNK_STATE, int CHANNELS_PER_LANE, typename Steps, typename Outputs, typename Map,
          typename Keep>
__device__ __forceinline__ void advance(const Steps &staged, const float (&projections)[STEPS][2][STATE_BLOCK], Outputs &outputs,
                                        const Map &map, const int &state_block, const float (&a)[CHANNELS_PER_LANE][STATE_VEC],
                                        float (&h)[CHANNELS_PER_LANE][STATE_VEC], const Keep &keep) {
    constexpr bool ACCURATE = sizeof(T) == 4;
    // Operands are read ahead where there is room for them.
    constexpr bool AHEAD = CHANNELS_PER_LANE == 1;
    const int state_group = map.state_group, place = map.index, part = map.part, quad = map.quad;
    // What is read from shared memory for one step, or two.
    struct Operands {
        float step[Steps::TOGETHER][CHANNELS_PER_LANE], in[Steps::TOGETHER][CHANNELS_PER_LANE];
        float b[Steps::TOGETHER][STATE_VEC], c[Steps::TOGETHER][STATE_VEC];
    } now, next_operands;
    const auto read = [&](int t, Operands &to) {
        staged.read(t, place, to.step, to.in);
#pragma unroll
        for (int i = 0; i < Steps::TOGETHER; i++) {
            read_shared(to.b[i], &projections[t + i][0][state_group * STATE_VEC]);
            if (!CHUNK_STATE) read_shared(to.c[i], &projections[t + i][1][state_group * STATE_VEC]);
        }
    };
    if (AHEAD) read(0, next_operands);
#pragma unroll(STEPS / (CHUNK_STATE ? 4 : ACCURATE ? 2 : 1) / Steps::TOGETHER)
    for (int first = 0; first < STEPS; first += Steps::TOGETHER) {
        if (!CHUNK_STATE && first > 0 && first % LEAST_CHECKPOINT_STEPS == 0) keep(first);
        if (AHEAD) {
            now = next_operands;
            if (first + Steps::TOGETHER < STEPS) read(first + Steps::TOGETHER, next_operands);
            // A fence for the compiler, which would put the loads off to their first use.
            __syncwarp();
        } else {
            read(first, now);
        }
#pragma unroll
        for (int i = 0; i < Steps::TOGETHER; i++) {
            const int t = first + i;
            float y[CHANNELS_PER_LANE];
            if (!CHUNK_STATE && state_block > 0) read_shared(y, outputs.of(t, state_group, quad, part));
#pragma unroll
            for (int k = 0; k < CHANNELS_PER_LANE; k++) {
#pragma unroll
                for (int n = 0; n < STATE_VEC; n++) {
                    const float x = now.step[i][k] * a[k][n];
                    h[k][n] = Decay<ACCURATE, bool>(x).advance(h[k][n], now.in[i][k] * now.b[i][n]);
                    if (!CHUNK_STATE) y[k] = n || state_block ? fmaf(now.c[i][n], h[k][n], y[k]) : now.c[i][n] * h[k][n];
                }
            }
            if (!CHUNK_STATE) write_shared(outputs.of(t, state_group, quad, part), y);
        }
    }
}

// The recurrence in the form that Mamba uses. B and C of the next tile, or with `MANY_STATES` of the next block of 16 states, are
// on their way while a tile is advanced.
template <typename T, int CHANNELS_PER_LANE, int STEPS, bool MANY_STATES, bool CHUNK_STATE> struct Recurrence {
    using Form = forward::Form<T, THREADS, CHANNELS_PER_LANE, STEPS, true, MANY_STATES, CHUNK_STATE>;
    static constexpr bool ZOH = false;
    ProjectionWalk<T, STEPS, THREADS, true> next;

    __device__ __forceinline__ Recurrence(const Inputs &p, const Segment &segment, const Block &block, const bool &)
        : next(p, segment, block.group, segment.first, 0) {}

    // Puts the loads in flight for a segment's first tile or a ragged one.
    template <bool RAGGED> __device__ __forceinline__ void load_first(int left) { next.template load<RAGGED>(left); }
    // And for the next tile, at the time when its activations are.
    template <bool RAGGED> __device__ __forceinline__ void load_next(int left) {
        if (!MANY_STATES) next.template load<RAGGED>(left);
    }
    __device__ __forceinline__ void stage(typename Form::Projections &projections) const { next.store(&projections[0][0][0]); }
    __device__ __forceinline__ void move_on() {
        if (!MANY_STATES) next.advance(STEPS);
    }

    // Carries the states through a tile that has been staged, `left` steps of it if it is `RAGGED`; `more` whole ones may follow.
    template <bool RAGGED>
    __device__ __forceinline__ void advance_tile(const typename Form::Steps &staged, typename Form::Projections &projections,
                                                 typename Form::Outputs &outputs, const CarriedStates<Form> &states,
                                                 typename CarriedStates<Form>::Held &held, const int64_t &i, const int &left,
                                                 const bool &more) {
        __syncthreads();
        for (int state_block = 0; state_block < states.state_blocks; state_block++) {
            if constexpr (MANY_STATES) {
                if (state_block > 0) {
                    __syncthreads();
                    next.store(&projections[0][0][0]);
                    __syncthreads();
                }
                states.fetch(held, state_block);
                states.read_rates(held, state_block);
                // Those of the next block of states, or of the first one in the next tile.
                if (state_block + 1 < states.state_blocks) {
                    next.change_states(states.p, state_block * STATE_BLOCK, (state_block + 1) * STATE_BLOCK);
                    next.template load<RAGGED>(left);
                } else {
                    next.change_states(states.p, state_block * STATE_BLOCK, 0);
                    next.advance(STEPS);
                    if (more) next.template load<false>(STEPS);
                }
            }
            advance<T, STEPS, CHUNK_STATE>(staged, projections, outputs, states.map, state_block, held.a, held.h, [&](int t) {
                if (is_kept(states.p, t) && (!RAGGED || t < left)) states.keep(held, state_block, i + t);
            });
            states.park(held, state_block);
        }
    }
};

}
