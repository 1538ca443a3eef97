// The selective scan, forward, whatever its inputs; instances are in forward_general.cu and chunk_state.cu.
#pragma once
#include "forward.cuh"

namespace scan::forward_general {

using forward::OutputsInShared;
using forward::StepsInShared;

// What a lane's states are advanced by: log2(e) A, 1/A, and B and C where they are constant.
struct Coefficients {
    const Inputs &p;
    const bool &zoh, &compensate;
    const float (&a)[STATE_VEC], (&inverse_a)[STATE_VEC], (&constant_b)[STATE_VEC], (&constant_c)[STATE_VEC];
};

// Carries a lane's states, those of one block of 16, through a tile; `lost` is what rounding has taken from them.
template <typename T, bool SUMMARY, typename Steps, typename Outputs, typename Map>
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
            if (!SUMMARY) read_shared(c[i], &projections[first + i][1][map.state_group * STATE_VEC]);
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) {
                if (p.b.constant) b[i][n] = coefficients.constant_b[n];
                if (!SUMMARY && p.c.constant) c[i][n] = coefficients.constant_c[n];
            }
        }
#pragma unroll
        for (int i = 0; i < Steps::TOGETHER; i++) {
            const int t = first + i;
            float y[1];
            if (!SUMMARY && state_block > 0) read_shared(y, outputs.of(t, map.state_group, map.quad, map.part));
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
                if (!SUMMARY) y[0] = n || state_block ? fmaf(c[i][n], h[n], y[0]) : c[i][n] * h[n];
            }
            if (!SUMMARY) write_shared(outputs.of(t, map.state_group, map.quad, map.part), y);
        }
    }
}

// States take turns by blocks of 16 in each tile, and are kept in dynamic shared memory meanwhile.
//
// A `SUMMARY` runs a segment from zero for the state that it reaches, and writes no output.
template <typename T, bool SUMMARY> __device__ __forceinline__ void run(const Forward &params) {
    constexpr int STEPS = TILE;
    constexpr int COLUMNS = CHANNELS / QUAD, ROWS = THREADS / COLUMNS, QUADS = STEPS / ROWS;
    constexpr bool ACCURATE = sizeof(T) == 4;
    static_assert(QUADS * ROWS == STEPS && CHECKPOINT_STEPS % STEPS == 0, "whole tiles");

    using Steps = StepsInShared<STEPS, 1, COLUMNS>;
    __shared__ Steps staged;
    __shared__ OutputsInShared<SUMMARY ? 1 : STEPS, 1, COLUMNS> outputs;
    __shared__ alignas(16) float projections[STEPS][2][STATE_BLOCK];
    // The biases, and D.
    __shared__ alignas(16) float of_channels[2][CHANNELS];
    extern __shared__ float4 carried[];

    const Inputs &p = params.inputs;
    const bool reverse = p.flags & FLAG_REVERSE, zoh = p.flags & FLAG_ZOH;
    const bool plus = p.flags & FLAG_SOFTPLUS, gated = p.z.data;
    const Block block(p, blockIdx.x, CHANNELS);

    // As a member of a quad. One that does not exist reads the last that does, and writes nothing.
    const forward::QuadMap<THREADS, 1> quads(threadIdx.x);
    const int column = quads.column, row = quads.row;
    const int count = max(0, min(block.width - column, QUAD));
    const int64_t d0 = block.first + column;
    // What a block reads once is requested here, and waited for when the first tile's loads are under way as well.
    constexpr int ONCE = (2 * CHANNELS + THREADS - 1) / THREADS;
    float once[ONCE];
#pragma unroll
    for (int k = 0; k < ONCE; k++) {
        const int i = threadIdx.x + k * THREADS, c = i % CHANNELS;
        const Vector &from = i < CHANNELS ? p.delta_bias : p.d;
        once[k] = i < 2 * CHANNELS && c < block.width ? element_or(from, block.first + c, 0.0f) : 0.0f;
    }
    bool is_first = true;

    const forward::LaneMap<THREADS, 1> map(threadIdx.x);
    const int own = map.channel;
    const int turns = static_cast<int>((p.d_state + STATE_BLOCK - 1) / STATE_BLOCK);
    const auto lane_of = [&](int c, int turn) {
        return Lane(p, block.first + own + c, own + c < block.width, turn * STATE_BLOCK + map.state_group * STATE_VEC);
    };
    float *const parked = reinterpret_cast<float *>(carried + threadIdx.x);

    const bool from_zero = SUMMARY || (!p.initial_state.data && !p.chunk_states);
    float a[1][STATE_VEC];
    const auto read_a = [&](int turn) { read_rates<false>(a, [&](int c) { return lane_of(c, turn); }, p.a); };

    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const Segment segment = segment_at(p.segments, at);
        if (SUMMARY && segment.ends_sequence()) continue;
        const int64_t end = segment.first + segment.steps;
        // By the sequence's own length, so that it gets the same bits whatever it is packed with.
        const bool compensate = (p.flags & FLAG_COMPENSATE) && segment.len > LONG_SEQUENCE;

        using Step = Pack<T, QUAD>;
        Walk<T, false> u(p.u, segment, segment.first + row, d0, reverse);
        Walk<T, false> delta(p.delta, segment, segment.first + row, d0, reverse);
        Walk<T, false> z(p.z, segment, segment.first + row, d0, reverse);
        T *out = static_cast<T *>(params.out) +
                 (segment.row * p.segments.len + segment.step(segment.first + row, reverse)) * p.d_inner + d0;
        typename Distance<false>::type out_step = reverse ? -p.d_inner : p.d_inner;
        opaque(out_step);
        using Projections = ProjectionWalk<T, STEPS, THREADS, false>;

        Step next_u[QUADS], next_delta[QUADS];
        const auto load_next = [&](auto ragged, int left) {
#pragma unroll
            for (int k = 0; k < QUADS; k++) {
                const int there = !ragged || row + k * ROWS < left ? count : 0;
                next_u[k] = u.load(k * ROWS, there);
                next_delta[k] = delta.load(k * ROWS, there);
            }
        };
        int64_t whole = segment.steps / STEPS;
        if (whole > 0) load_next(BoolConstant<false>(), STEPS);
        if (is_first) {
#pragma unroll
            for (int k = 0; k < ONCE; k++) {
                const int i = threadIdx.x + k * THREADS;
                if (i < 2 * CHANNELS) of_channels[i / CHANNELS][i % CHANNELS] = once[k];
            }
            __syncthreads();
            is_first = false;
        }

        float h[1][STATE_VEC];
        [[maybe_unused]] DeltaSum delta_sum;
        // What rounding has taken from the states, where they are compensated. (Those that take turns start each tile from zero.)
        float lost[STATE_VEC] = {};
        for (int turn = 0; turn < turns; turn++) {
            read_a(turn);
            if (from_zero) {
#pragma unroll
                for (int n = 0; n < STATE_VEC; n++) h[0][n] = 0.0f;
            } else {
                incoming_state<ACCURATE, false>(p, segment, lane_of(0, turn), a[0], h[0]);
            }
            write_shared(parked + turn * THREADS * STATE_VEC, h[0]);
        }

        // Carries the states through a tile, `left` steps of it if it is ragged, for which `next` holds what there is to
        // stage, and has the tile after it loaded if there are `more` whole ones.
        const auto tile = [&](auto ragged, int64_t i, int left, bool more) {
            // Stage.
            Step tile_u[QUADS], tile_z[QUADS];
            float bias[QUAD];
            read_shared(bias, &of_channels[0][column]);
            forward::stage<T, ROWS, SUMMARY>(staged, delta_sum, tile_u, next_u, next_delta, bias, row, column, plus, zoh,
                                             ragged, left);
            if (!SUMMARY) {
#pragma unroll
                for (int k = 0; k < QUADS; k++) {
                    tile_z[k] = z.load(k * ROWS, gated && (!ragged || row + k * ROWS < left) ? count : 0);
                }
                z.advance(STEPS);
            }
            u.advance(STEPS);
            delta.advance(STEPS);
            if (more) load_next(BoolConstant<false>(), STEPS);

            // Advance.
            for (int turn = 0; turn < turns; turn++) {
                Projections tile(p, segment, block.group, i, turn * STATE_BLOCK);
                tile.template load<ragged.value>(left);
                __syncthreads();
                tile.store(&projections[0][0][0]);
                __syncthreads();
                read_shared(h[0], parked + turn * THREADS * STATE_VEC);
                read_a(turn);
                float inverse_a[STATE_VEC], constant_b[STATE_VEC], constant_c[STATE_VEC];
                const Lane lane = lane_of(0, turn);
                lane.template parameter<false>(inverse_a, p.a);
#pragma unroll
                for (int n = 0; n < STATE_VEC; n++) inverse_a[n] = hold_inverse(inverse_a[n]);
                if (p.b.constant) lane.constant(constant_b, p.b);
                if (p.c.constant) lane.constant(constant_c, p.c);
                if (turns > 1) {
#pragma unroll
                    for (int n = 0; n < STATE_VEC; n++) lost[n] = 0.0f;
                }
                const Coefficients coefficients{p, zoh, compensate, a[0], inverse_a, constant_b, constant_c};
                advance<T, SUMMARY>(coefficients, staged, projections, outputs, map, turn, h[0], lost);
                write_shared(parked + turn * THREADS * STATE_VEC, h[0]);
            }
            __syncthreads();

            // Finish.
            if constexpr (!SUMMARY) {
                float skip[QUAD];
                read_shared(skip, &of_channels[1][column]);
                forward::finish<T, ROWS, false>(outputs, out, out_step, tile_u, tile_z, skip, row, column, gated,
                                                ragged, left, count);
                out += STEPS * out_step;
            }
        };

        // Whole tiles, those between two checkpoints together, then what is left.
        for (int64_t i = segment.first; i < end; i += CHECKPOINT_STEPS) {
            if (!SUMMARY && params.checkpoints && i > 0) {
                const int64_t slot = checkpoint_slot(segment.row * p.segments.len + segment.start, i);
                for (int turn = 0; turn < turns; turn++) {
                    read_shared(h[0], parked + turn * THREADS * STATE_VEC);
                    const Lane lane = lane_of(0, turn);
                    lane.write(params.checkpoints + lane.at(p, slot), h[0]);
                }
            }
            const int tiles = static_cast<int>(min(whole, int64_t(CHECKPOINT_STEPS / STEPS)));
            whole -= tiles;
            for (int k = 0; k < tiles; k++) {
                tile(BoolConstant<false>(), i + k * STEPS, STEPS, k + 1 < tiles || whole > 0);
            }
            const int64_t rest = i + tiles * STEPS;
            if (tiles < CHECKPOINT_STEPS / STEPS && rest < end) {
                const int left = static_cast<int>(end - rest);
                load_next(BoolConstant<true>(), left);
                tile(BoolConstant<true>(), rest, left, false);
            }
        }

        if constexpr (SUMMARY) {
            delta_sum.write<COLUMNS, THREADS>(&staged.data[0][0][0][0], p.delta_sums + segment.index * p.d_inner + d0, count);
        }
        for (int turn = 0; turn < turns; turn++) {
            read_shared(h[0], parked + turn * THREADS * STATE_VEC);
            const Lane lane = lane_of(0, turn);
            if constexpr (SUMMARY) {
                lane.write_dense<false>(p.chunk_states + lane.at(p, segment.index), h[0]);
            } else if (params.final_state && segment.ends_sequence()) {
                lane.write(params.final_state + lane.at(p, segment.sequence), h[0]);
            }
        }
    }
}

}
