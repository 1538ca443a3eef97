// The selective scan, forward, in the form that Mamba uses; instances are in forward.cu and chunk_state.cu.
#pragma once
#include "../common/lane_map.cuh"
#include "tile.cuh"

namespace scan::forward {

// Δ and what the recurrence takes in of a tile, as the lanes read them: in vectors of 4, `TOGETHER` steps of their `OWN` channels
// at once, neighbouring lanes what is contiguous.
template <int STEPS, int OWN, int QUADS> struct StepsInShared {
    static_assert(OWN == 1 || OWN == QUAD, "a channel or a quad to a lane");
    static constexpr int TOGETHER = OWN == 1 ? 2 : 1;

    // With a quad to a lane, those of Δ and then those of the input. Else the first channels of the quads, the second ones
    // and so on, of each both values of a step and of the next.
    alignas(16) float data[STEPS / TOGETHER][2 * TOGETHER][QUADS][4];

    __device__ __forceinline__ void write(int t, int quad, const float (&step)[QUAD], const float (&in)[QUAD]) {
        if constexpr (OWN == 1) {
#pragma unroll
            for (int c = 0; c < QUAD; c++) write_shared(&data[t / 2][c][quad][t % 2 * 2], {step[c], in[c]});
        } else {
            write_shared(data[t][0][quad], step);
            write_shared(data[t][1][quad], in);
        }
    }
    // `place` is that of the lane's channels: with one of each quad to a lane, the quads' first channels come first.
    __device__ __forceinline__ void read(int t, int place, float (&step)[TOGETHER][OWN], float (&in)[TOGETHER][OWN]) const {
        if constexpr (OWN == 1) {
            float pairs[4];
            read_shared(pairs, data[t / 2][0][place]);
            step[0][0] = pairs[0], in[0][0] = pairs[1], step[1][0] = pairs[2], in[1][0] = pairs[3];
        } else {
            read_shared(step[0], data[t][0][place]);
            read_shared(in[0], data[t][1][place]);
        }
    }
};

// What the lanes of a channel add to y in each step of a tile. The channels of a quad are turned by the lane, so that those
// which write the same channel of neighbouring quads do not meet in a bank.
template <int STEPS, int OWN, int QUADS> struct OutputsInShared {
    alignas(16) float data[STEPS][STATE_LANES][QUADS][QUAD];

    __device__ __forceinline__ float *of(int t, int sub, int quad, int part) {
        return &data[t][sub][quad][(part + sub) * OWN % QUAD];
    }
    __device__ __forceinline__ void read(int t, int sub, int quad, float (&to)[QUAD]) const {
        float turned[QUAD];
        read_shared(turned, data[t][sub][quad]);
#pragma unroll
        for (int c = 0; c < QUAD; c++) to[c] = turned[(c + sub * OWN) % QUAD];
    }
};

// Which channels and states a thread carries. Neighbouring lanes have the same channels of
// neighbouring quads, so that what they read and write in shared memory is contiguous. The bits of a lane are dealt out so that
// whatever is read in vectors of 4, a lane has a neighbour, one or two away, that reads the same: such loads take half the time.
//
//   bits of a thread           7 6 5 | 4   3   2   1   0
//   state group                      | 1           0
//   index of its channels      5 4 3 |     2   1       0
//
// Of `INDICES` = THREADS / 4 indices of `CHANNELS_PER_LANE` channels, each quad's first come first, then the second ones, and
// so on: index = channel in its quad / CHANNELS_PER_LANE · quads + quad.
template <int THREADS, int CHANNELS_PER_LANE> struct LaneMap {
    static constexpr int QUADS = THREADS / STATE_LANES * CHANNELS_PER_LANE / QUAD;
    int state_group, index, part, quad, channel;

    __host__ __device__ constexpr explicit LaneMap(unsigned thread) : LaneMap(thread, static_cast<int>(thread % 32)) {}

  private:
    __host__ __device__ constexpr LaneMap(unsigned thread, int lane)
        : state_group(lane / 2 % 2 + lane / 16 * 2), index(thread / 32 * 8 + lane % 2 + lane / 4 % 4 * 2),
          part(index / QUADS), quad(index % QUADS), channel(quad * QUAD + part * CHANNELS_PER_LANE) {}
};
// The quad of channels and the first of the steps of a tile that a thread stages and finishes: neighbouring threads have
// neighbouring quads.
template <int THREADS, int CHANNELS_PER_LANE> struct QuadMap {
    static constexpr int QUADS = LaneMap<THREADS, CHANNELS_PER_LANE>::QUADS;
    int column, row;

    __host__ __device__ constexpr explicit QuadMap(unsigned thread) : column(thread % QUADS * QUAD), row(thread / QUADS) {}
};
template <int THREADS, int CHANNELS_PER_LANE> constexpr bool deals_out_all() {
    using Lanes = LaneMap<THREADS, CHANNELS_PER_LANE>;
    using Quads = QuadMap<THREADS, CHANNELS_PER_LANE>;
    return is_bijection<THREADS>([](int thread) {
               return Lanes(thread).channel / CHANNELS_PER_LANE * STATE_LANES + Lanes(thread).state_group;
           }) &&
           is_bijection<THREADS>([](int thread) { return Quads(thread).row * Quads::QUADS + Quads(thread).column / QUAD; });
}
static_assert(deals_out_all<THREADS, 1>() && deals_out_all<THREADS, QUAD>() && deals_out_all<forward_general::THREADS, 1>());

// Stages the quads that a thread has loaded of a tile: Δ, and what the recurrence takes in. If the tile is `ragged`, `remaining`
// steps of it exist.
template <typename T, int ROWS, bool SUMMARY, int COUNT, bool RAGGED, typename Steps>
__device__ __forceinline__ void stage(Steps &staged, DeltaSum &delta_sum, Pack<T, QUAD> (&u)[COUNT],
                                      const Pack<T, QUAD> (&next_u)[COUNT], const Pack<T, QUAD> (&next_delta)[COUNT],
                                      const float (&bias)[QUAD], const int &row, const int &column, const bool &plus,
                                      const bool &zoh, BoolConstant<RAGGED> ragged, const int &remaining) {
    float steps[COUNT][QUAD];
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        u[k] = next_u[k];
#pragma unroll
        for (int c = 0; c < QUAD; c++) steps[k][c] = next_delta[k][c] + bias[c];
    }
    if (plus) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
#pragma unroll
            for (int c = 0; c < QUAD; c++) steps[k][c] = softplus<T>(steps[k][c]);
        }
    }
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        float in[QUAD];
#pragma unroll
        for (int c = 0; c < QUAD; c++) {
            if (ragged && row + k * ROWS >= remaining) steps[k][c] = 0.0f;
            in[c] = zoh ? u[k][c] : steps[k][c] * u[k][c];
        }
        if (SUMMARY) delta_sum.add(steps[k]);
        staged.write(row + k * ROWS, column / QUAD, steps[k], in);
    }
}

// Finishes the quads that a thread has staged of a tile: sums the lanes' parts of y up, and writes what the skip connection and
// the gate make of it.
template <typename T, int ROWS, bool VECTOR, int COUNT, bool RAGGED, typename Outputs, typename Step>
__device__ __forceinline__ void finish(const Outputs &outputs, T *const &out, const Step &out_step,
                                       const Pack<T, QUAD> (&u)[COUNT], const Pack<T, QUAD> (&z)[COUNT],
                                       const float (&skip)[QUAD], const int &row, const int &column, const bool &gated,
                                       BoolConstant<RAGGED> ragged, const int &remaining, const int &count) {
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        const int t = row + k * ROWS;
        float parts[STATE_LANES][QUAD], y[QUAD];
#pragma unroll
        for (int s = 0; s < STATE_LANES; s++) outputs.read(t, s, column / QUAD, parts[s]);
#pragma unroll
        for (int c = 0; c < QUAD; c++) {
            y[c] = (parts[0][c] + parts[1][c]) + (parts[2][c] + parts[3][c]);
            y[c] = fmaf(skip[c], u[k][c], y[c]);
        }
        if (gated) {
#pragma unroll
            for (int c = 0; c < QUAD; c++) y[c] *= silu(z[k][c]);
        }
        store_narrowed<T, VECTOR>(out + k * ROWS * out_step, y, !ragged || t < remaining ? count : 0);
    }
}

// Carries the states of a lane's channels, those of one block of 16, through a tile.
template <typename T, int STEPS, bool SUMMARY, int OWN, typename Steps, typename Outputs, typename Map>
__device__ __forceinline__ void advance(const Steps &staged, const float (&projections)[STEPS][2][STATE_BLOCK], Outputs &outputs,
                                        const Map &map, const int &state_block, const float (&a)[OWN][STATE_VEC],
                                        float (&h)[OWN][STATE_VEC]) {
    constexpr bool ACCURATE = sizeof(T) == 4;
    // Operands are read ahead where there is room for them.
    constexpr bool AHEAD = OWN == 1;
    const int state_group = map.state_group, place = map.index, part = map.part, quad = map.quad;
    // What is read from shared memory for one step, or two.
    struct Operands {
        float step[Steps::TOGETHER][OWN], in[Steps::TOGETHER][OWN];
        float b[Steps::TOGETHER][STATE_VEC], c[Steps::TOGETHER][STATE_VEC];
    } now, next_operands;
    const auto read = [&](int t, Operands &to) {
        staged.read(t, place, to.step, to.in);
#pragma unroll
        for (int i = 0; i < Steps::TOGETHER; i++) {
            read_shared(to.b[i], &projections[t + i][0][state_group * STATE_VEC]);
            if (!SUMMARY) read_shared(to.c[i], &projections[t + i][1][state_group * STATE_VEC]);
        }
    };
    if (AHEAD) read(0, next_operands);
#pragma unroll(STEPS / (SUMMARY ? 4 : ACCURATE ? 2 : 1) / Steps::TOGETHER)
    for (int first = 0; first < STEPS; first += Steps::TOGETHER) {
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
            float y[OWN];
            if (!SUMMARY && state_block > 0) read_shared(y, outputs.of(t, state_group, quad, part));
#pragma unroll
            for (int k = 0; k < OWN; k++) {
#pragma unroll
                for (int n = 0; n < STATE_VEC; n++) {
                    const float x = now.step[i][k] * a[k][n];
                    h[k][n] = Decay<ACCURATE, bool>(x).advance(h[k][n], now.in[i][k] * now.b[i][n]);
                    if (!SUMMARY) y[k] = n || state_block ? fmaf(now.c[i][n], h[k][n], y[k]) : now.c[i][n] * h[k][n];
                }
            }
            if (!SUMMARY) write_shared(outputs.of(t, state_group, quad, part), y);
        }
    }
}

// With `MANY_STATES` there are more than 16 states, which take turns by blocks of 16 in each tile and are kept in dynamic shared
// memory meanwhile.
//
// A `SUMMARY` runs a segment from zero for the state that it reaches, and writes no output.
template <typename T, int OWN, int STEPS, bool MANY_STATES, bool SUMMARY>
__device__ __forceinline__ void run(const Forward &params) {
    constexpr int CHANNELS = THREADS / STATE_LANES * OWN;
    constexpr int COLUMNS = CHANNELS / QUAD, ROWS = THREADS / COLUMNS, QUADS = STEPS / ROWS;
    constexpr bool ACCURATE = sizeof(T) == 4;
    static_assert(QUADS * ROWS == STEPS && CHECKPOINT_STEPS % STEPS == 0, "whole tiles");
    static_assert(!MANY_STATES || OWN == 1, "the states that take turns are one channel's");

    using Steps = StepsInShared<STEPS, OWN, COLUMNS>;
    __shared__ Steps staged;
    __shared__ OutputsInShared<SUMMARY ? 1 : STEPS, OWN, COLUMNS> outputs;
    __shared__ alignas(16) float projections[STEPS][2][STATE_BLOCK];
    // The biases, and D.
    __shared__ alignas(16) float of_channels[2][CHANNELS];
    extern __shared__ float4 carried[];

    const Inputs &p = params.inputs;
    const bool reverse = p.flags & FLAG_REVERSE, plus = p.flags & FLAG_SOFTPLUS, gated = p.z.data;
    const Block block(p, blockIdx.x, CHANNELS);

    // As a member of a quad. One that does not exist reads the last that does, and writes nothing.
    const QuadMap<THREADS, OWN> quads(threadIdx.x);
    const int column = quads.column, row = quads.row;
    const int count = max(0, min(block.width - column, QUAD));
    const int64_t d0 = block.first + min(column, block.width - QUAD);
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

    // As a lane of channels: the `part`th of a quad.
    const LaneMap<THREADS, OWN> map(threadIdx.x);
    const int sub = map.state_group, place = map.index, part = map.part, quad = map.quad, own = map.channel;
    const int turns = MANY_STATES ? static_cast<int>((p.d_state + STATE_BLOCK - 1) / STATE_BLOCK) : 1;
    const auto lane_of = [&](int c, int turn) {
        return Lane(p, block.first + own + c, own + c < block.width, turn * STATE_BLOCK + sub * STATE_VEC);
    };
    float *const parked = reinterpret_cast<float *>(carried + threadIdx.x);

    const bool from_zero = SUMMARY || (!p.initial_state.data && !p.chunk_states);
    float a[OWN][STATE_VEC];
    const auto read_a = [&](int turn) { read_rates<true>(a, [&](int c) { return lane_of(c, turn); }, p.a); };

    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const Segment segment = segment_at(p.segments, at);
        if (SUMMARY && segment.ends_sequence()) continue;
        const int64_t end = segment.first + segment.steps;
        using Step = Pack<T, QUAD>;
        Walk<T, true> u(p.u, segment, segment.first + row, d0, reverse);
        Walk<T, true> delta(p.delta, segment, segment.first + row, d0, reverse);
        Walk<T, true> z(p.z, segment, segment.first + row, d0, reverse);
        T *out = static_cast<T *>(params.out) +
                 (segment.row * p.segments.len + segment.step(segment.first + row, reverse)) * p.d_inner + d0;
        typename Distance<true>::type out_step = reverse ? -p.d_inner : p.d_inner;
        opaque(out_step);
        using Projections = ProjectionWalk<T, STEPS, THREADS, true>;
        Projections next(p, segment, block.group, segment.first, 0);

        Step next_u[QUADS], next_delta[QUADS];
        const auto load_next = [&](auto ragged, int left) {
#pragma unroll
            for (int k = 0; k < QUADS; k++) {
                const int there = !ragged || row + k * ROWS < left ? QUAD : 0;
                next_u[k] = u.load(k * ROWS, there);
                next_delta[k] = delta.load(k * ROWS, there);
            }
            if (!MANY_STATES) next.template load<ragged.value>(left);
        };
        const auto load_first = [&](auto ragged, int left) {
            load_next(ragged, left);
            if (MANY_STATES) next.template load<ragged.value>(left);
        };
        int64_t whole = segment.steps / STEPS;
        if (whole > 0) load_first(BoolConstant<false>(), STEPS);
        if (is_first) {
            if (!MANY_STATES) read_a(0);
#pragma unroll
            for (int k = 0; k < ONCE; k++) {
                const int i = threadIdx.x + k * THREADS;
                if (i < 2 * CHANNELS) of_channels[i / CHANNELS][i % CHANNELS] = once[k];
            }
            __syncthreads();
            is_first = false;
        }

        float h[OWN][STATE_VEC];
        [[maybe_unused]] DeltaSum delta_sum;
        for (int turn = 0; turn < turns; turn++) {
            if (MANY_STATES) read_a(turn);
            if (from_zero) {
#pragma unroll
                for (int c = 0; c < OWN; c++) {
#pragma unroll
                    for (int n = 0; n < STATE_VEC; n++) h[c][n] = 0.0f;
                }
            } else {
#pragma unroll
                for (int c = 0; c < OWN; c++) incoming_state<ACCURATE, true>(p, segment, lane_of(c, turn), a[c], h[c]);
            }
            if (MANY_STATES) write_shared(parked + turn * THREADS * STATE_VEC, h[0]);
        }

        // Carries the states through a tile, `left` steps of it if it is ragged, for which `next` holds what there is to
        // stage, and has the tile after it loaded if there are `more` whole ones.
        const auto tile = [&](auto ragged, int64_t i, int left, bool more) {
            // Stage.
            Step tile_u[QUADS], tile_z[QUADS];
            float bias[QUAD];
            read_shared(bias, &of_channels[0][column]);
            stage<T, ROWS, SUMMARY>(staged, delta_sum, tile_u, next_u, next_delta, bias, row, column, plus, false,
                                    ragged, left);
            next.store(&projections[0][0][0]);
            if (!SUMMARY) {
#pragma unroll
                for (int k = 0; k < QUADS; k++) {
                    tile_z[k] = z.load(k * ROWS, gated && (!ragged || row + k * ROWS < left) ? QUAD : 0);
                }
                z.advance(STEPS);
            }
            u.advance(STEPS);
            delta.advance(STEPS);
            if (!MANY_STATES) next.advance(STEPS);
            if (more) load_next(BoolConstant<false>(), STEPS);
            __syncthreads();

            // Advance.
            for (int turn = 0; turn < turns; turn++) {
                if constexpr (MANY_STATES) {
                    if (turn > 0) {
                        __syncthreads();
                        next.store(&projections[0][0][0]);
                        __syncthreads();
                    }
                    read_shared(h[0], parked + turn * THREADS * STATE_VEC);
                    read_a(turn);
                    // Those of the next turn, or of the first one in the next tile.
                    if (turn + 1 < turns) {
                        next.turn(p, turn * STATE_BLOCK, (turn + 1) * STATE_BLOCK);
                        next.template load<ragged.value>(left);
                    } else {
                        next.turn(p, turn * STATE_BLOCK, 0);
                        next.advance(STEPS);
                        if (more) next.template load<false>(STEPS);
                    }
                }
                advance<T, STEPS, SUMMARY>(staged, projections, outputs, map, turn, a, h);
                if (MANY_STATES) write_shared(parked + turn * THREADS * STATE_VEC, h[0]);
            }
            __syncthreads();

            // Finish.
            if constexpr (!SUMMARY) {
                float skip[QUAD];
                read_shared(skip, &of_channels[1][column]);
                finish<T, ROWS, true>(outputs, out, out_step, tile_u, tile_z, skip, row, column, gated,
                                       ragged, left, count);
                out += STEPS * out_step;
            }
        };

        // Whole tiles, those between two checkpoints together, then what is left.
        for (int64_t i = segment.first; i < end; i += CHECKPOINT_STEPS) {
            if (!SUMMARY && params.checkpoints && i > 0) {
                const int64_t slot = checkpoint_slot(segment.row * p.segments.len + segment.start, i);
                for (int turn = 0; turn < turns; turn++) {
                    if (MANY_STATES) read_shared(h[0], parked + turn * THREADS * STATE_VEC);
#pragma unroll
                    for (int c = 0; c < OWN; c++) {
                        const Lane lane = lane_of(c, turn);
                        lane.write(params.checkpoints + lane.at(p, slot), h[c]);
                    }
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
                load_first(BoolConstant<true>(), left);
                tile(BoolConstant<true>(), rest, left, false);
            }
        }

        if constexpr (SUMMARY) {
            delta_sum.write<COLUMNS, THREADS>(&staged.data[0][0][0][0], p.delta_sums + segment.index * p.d_inner + d0, count);
        }
        for (int turn = 0; turn < turns; turn++) {
            if (MANY_STATES) read_shared(h[0], parked + turn * THREADS * STATE_VEC);
#pragma unroll
            for (int c = 0; c < OWN; c++) {
                const Lane lane = lane_of(c, turn);
                if constexpr (SUMMARY) {
                    lane.write_dense<true>(p.chunk_states + lane.at(p, segment.index), h[c]);
                } else if (params.final_state && segment.ends_sequence()) {
                    lane.write(params.final_state + lane.at(p, segment.sequence), h[c]);
                }
            }
        }
    }
}

}
