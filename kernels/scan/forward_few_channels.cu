// The selective scan, forward, of few channels in the form that Mamba uses: 16 states or fewer, B and C that vary,
// contiguous channels and states.
//
// A lane carries one or two states, so that a thousand channels give every scheduler of a large device a warp, and
// sequences need not be split for that. Such a warp must not wait: others stage the next tile and finish the one before
// while it advances one.
#include "../common/lane_map.cuh"
#include "tile.cuh"

namespace scan::forward_few_channels {

// Steps are read ahead by groups.
constexpr int GROUP = 8;

// Where all threads of the block meet, whatever they do: warps come to it from different places. PTX allows that of a
// barrier in the aligned form, whose warps are not apart in themselves, but compute-sanitizer's synccheck takes it for an
// error; the other form, to be checked, is up to 13 % slower, as one that counts arrivals in memory is.
__device__ __forceinline__ void meet() {
#ifdef SYNCCHECK
    asm volatile("barrier.sync 1, %0;" ::"n"(THREADS) : "memory");
#else
    asm volatile("barrier.sync.aligned 1, %0;" ::"n"(THREADS) : "memory");
#endif
}

// Which states and channel a thread carries, with `LANES` lanes to a channel. The lowest bit of a lane is one of the states', and
// the next one of the channels': whatever is read in vectors of 4, a lane has a neighbour, one or two away, that reads the same.
// Such loads take half the time.
//
//   bits of a thread          6 5   4   3   2   1   0
//   16 lanes   state group          3   2   1       0
//              channel        2 1               0
//   8 lanes    state group              2   1       0
//              channel        3 2   1           0
template <int LANES> struct LaneMap {
    int state_group, channel;

    __host__ __device__ constexpr explicit LaneMap(unsigned thread) : state_group(), channel() {
        const int lane = thread % 32, above = lane / 4;
        state_group = lane % 2 + above % (LANES / 2) * 2;
        channel = thread / 32 * (32 / LANES) + lane / 2 % 2 + above / (LANES / 2) * 2;
    }
};
template <int LANES> constexpr bool deals_out_all() {
    return is_bijection<ROLE_THREADS>([](int thread) {
        return LaneMap<LANES>(thread).channel * LANES + LaneMap<LANES>(thread).state_group;
    });
}
static_assert(deals_out_all<STATE_BLOCK>() && deals_out_all<STATE_BLOCK / 2>());

// A tile, staged, and what the lanes make of it.
template <typename T, int STATES_PER_LANE> struct Tile {
    static constexpr int LANES = STATE_BLOCK / STATES_PER_LANE, CHANNELS = ROLE_THREADS / LANES, WIDTH = CHANNELS / 4;

    // Δ and Δu of two steps.
    float4 steps[CHANNELS][TILE / 2 + 1];
    // B and C of one state in two steps: of the next two steps beside it, or of the lane's other state.
    static constexpr int ROW = STATES_PER_LANE == 1 ? 2 * STATE_BLOCK : STATE_BLOCK, GAP = 8 / sizeof(T) / 2;
    alignas(16) Pack<T, 4> projections[TILE / 2 * STATE_BLOCK / ROW * (ROW + GAP)];
    // What each lane adds to y in four steps. (With the gaps, no lanes meet in a bank.)
    struct {
        float4 of[CHANNELS][TILE / 4 + 1];
        float4 gap[2];
    } outputs[LANES];

    static __device__ __forceinline__ int place(int two, int state) {
        return STATES_PER_LANE == 1 ? two / 2 * (ROW + GAP) + state * 2 + two % 2 : two * (ROW + GAP) + state;
    }
};

template <typename T, int STATES_PER_LANE> struct Shared {
    Tile<T, STATES_PER_LANE> tiles[2];
    // What the threads that stage hand to those that finish two tiles later: u in their two steps.
    Pack<T, Tile<T, STATES_PER_LANE>::WIDTH> u[3][2][ROLE_THREADS];
};
static_assert(sizeof(Shared<float, 1>) == ONE_SMEM + 4 * ONE_SMEM_PER_BYTE);
static_assert(sizeof(Shared<__half, 1>) == ONE_SMEM + 2 * ONE_SMEM_PER_BYTE);
static_assert(sizeof(Shared<float, 2>) == TWO_SMEM + 4 * TWO_SMEM_PER_BYTE);
static_assert(sizeof(Shared<__half, 2>) == TWO_SMEM + 2 * TWO_SMEM_PER_BYTE);
static_assert(Tile<float, 1>::CHANNELS == ONE_CHANNELS && Tile<float, 2>::CHANNELS == TWO_CHANNELS);

// For those who carry states, one or two each.
template <typename T, int STATES_PER_LANE>
__device__ __forceinline__ void advance(const Forward &params, Shared<T, STATES_PER_LANE> &shared) {
    using Tile = Tile<T, STATES_PER_LANE>;
    constexpr bool ACCURATE = sizeof(T) == 4;
    const Inputs &p = params.inputs;
    const Block block(p, blockIdx.x, Tile::CHANNELS);
    const LaneMap<Tile::LANES> map(threadIdx.x);
    const int first_state = map.state_group * STATES_PER_LANE;
    const int64_t channel = block.first + map.channel;
    const auto has = [&](int n) { return map.channel < block.width && first_state + n < p.d_state; };
    float a[STATES_PER_LANE];
#pragma unroll
    for (int n = 0; n < STATES_PER_LANE; n++) {
        a[n] = has(n) ? p.a.data[channel * p.a.channel + (first_state + n) * p.a.state] * LOG2_E : 0.0f;
    }
    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const Segment segment = segment_at(p.segments, at);
        const int64_t tiles = (segment.steps + TILE - 1) / TILE;
        float h[STATES_PER_LANE];
#pragma unroll
        for (int n = 0; n < STATES_PER_LANE; n++) {
            const States &from = p.initial_state;
            const int64_t at =
                segment.sequence * from.sequence + channel * from.channel + (first_state + n) * from.state;
            h[n] = from.data && has(n) ? from.data[at] : 0.0f;
        }
        const auto write = [&](float *to, int64_t index) {
#pragma unroll
            for (int n = 0; n < STATES_PER_LANE; n++) {
                if (has(n)) to[(index * p.d_inner + channel) * p.d_state + first_state + n] = h[n];
            }
        };
        meet();
        for (int64_t k = 0; k < tiles; k++) {
            Tile &tile = shared.tiles[k % 2];
            // Keeps the states before a step of the tile, if it is one at which they are kept.
            const auto keep = [&](int t) {
                const int64_t i = k * TILE + t;
                if (!params.checkpoints || !is_kept(p, t) || i == 0 || i >= segment.steps) return;
                write(params.checkpoints, checkpoint_slot(p, segment.row * p.segments.len + segment.start, i));
            };
            // What is read from shared memory for a group of steps.
            struct Operands {
                float steps[GROUP / 2][4];
                Pack<T, 4> projections[GROUP / 2][STATES_PER_LANE];
            } now, next;
            const auto read = [&](int group) {
#pragma unroll
                for (int i = 0; i < GROUP / 2; i++) {
                    read_shared(next.steps[i], &tile.steps[map.channel][group * (GROUP / 2) + i].x);
                }
#pragma unroll
                for (int i = 0; i < GROUP / 2 * STATES_PER_LANE; i += 2) {
                    const int two = group * (GROUP / 2) + i / STATES_PER_LANE;
                    const auto both = reinterpret_cast<const Pack<T, 8> &>(tile.projections[Tile::place(two, first_state)]);
                    Pack<T, 4> *const to = &next.projections[0][0] + i;
                    to[0] = both.half(0), to[1] = both.half(1);
                }
            };
            read(0);
#pragma unroll
            for (int group = 0; group < TILE / GROUP; group++) {
                now = next;
                if (group * GROUP % LEAST_CHECKPOINT_STEPS == 0) keep(group * GROUP);
                if (group + 1 < TILE / GROUP) read(group + 1);
                // Else the compiler would put the loads off until they are waited for.
                __syncwarp();
#pragma unroll
                for (int half = 0; half < GROUP; half += 4) {
                    float y[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int two = (half + i) / 2, odd = i % 2;
#pragma unroll
                        for (int n = 0; n < STATES_PER_LANE; n++) {
                            const Pack<T, 4> &both = now.projections[two][n];
                            const float step = now.steps[two][2 * odd], in = now.steps[two][2 * odd + 1];
                            h[n] = Decay<ACCURATE>(step * a[n]).advance(h[n], in * both[2 * odd]);
                            y[i] = n ? fmaf(both[2 * odd + 1], h[n], y[i]) : both[2 * odd + 1] * h[n];
                        }
                    }
                    write_shared(&tile.outputs[map.state_group].of[map.channel][(group * GROUP + half) / 4].x, y);
                }
            }
            meet();
        }
        if (params.final_state) write(params.final_state, segment.sequence);
    }
}

// Two steps of a tile and a fourth of the block's channels, which a thread stages or finishes.
template <typename T, int STATES_PER_LANE> struct Part {
    static constexpr int CHANNELS = Tile<T, STATES_PER_LANE>::CHANNELS, WIDTH = CHANNELS / 4;
    static_assert(ROLE_THREADS / 4 * 2 == TILE, "all of them");

    const Block block;
    const int column, row;
    // A thread whose channels do not exist reads the last that do, and writes nothing.
    const bool exists;
    const int64_t d0;

    __device__ __forceinline__ explicit Part(const Inputs &p)
        : block(p, blockIdx.x, CHANNELS), column(threadIdx.x % 4 * WIDTH), row(threadIdx.x % ROLE_THREADS / 4 * 2),
          exists(column < block.width), d0(block.first + min(column, block.width - WIDTH)) {}

    __device__ __forceinline__ void read(float (&to)[WIDTH], const Vector &from) const {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) to[k] = exists ? element_or(from, d0 + k, 0.0f) : 0.0f;
    }
};

// Walks two steps of each tile, contiguous elements of a tensor from its `first` on, with those of the next tiles in
// flight: of one, or of an even and an odd one. (Two are faster with two states to a lane and slower with one.)
template <typename T, int COUNT, int AHEAD> struct Pairs {
    const T *at;
    int step;
    Pack<T, COUNT> next[AHEAD][2];

    __device__ __forceinline__ Pairs(const void *data, int64_t first, int64_t step, bool reverse)
        : at(static_cast<const T *>(data) + first), step(static_cast<int>(reverse ? -step : step)) {}

    // Puts the loads in flight for another tile, where there are such steps.
    __device__ __forceinline__ void load(bool odd, bool first, bool second) {
        next[odd % AHEAD][0] = load_vec<T, COUNT, true>(at, 1, first);
        next[odd % AHEAD][1] = load_vec<T, COUNT, true>(at + step, 1, second);
        at += TILE * step;
    }
    __device__ __forceinline__ const Pack<T, COUNT> (&of(bool odd) const)[2] { return next[odd % AHEAD]; }
};

// Calls `work` for each tile, with whether its number is odd.
template <typename Work> __device__ __forceinline__ void for_each_tile(int64_t tiles, Work work) {
    for (int64_t k = 0;; k += 2) {
        if (k >= tiles) break;
        work(BoolConstant<false>(), k);
        if (k + 1 >= tiles) break;
        work(BoolConstant<true>(), k + 1);
    }
}

// For those who stage: Δ, Δu, and B and C of each tile.
template <typename T, int STATES_PER_LANE>
__device__ __forceinline__ void stage(const Forward &params, Shared<T, STATES_PER_LANE> &shared) {
    using Part = Part<T, STATES_PER_LANE>;
    using Tile = Tile<T, STATES_PER_LANE>;
    const Inputs &p = params.inputs;
    const Part part(p);
    const bool reverse = p.flags & FLAG_REVERSE, plus = p.flags & FLAG_SOFTPLUS;
    const int row = part.row, state = threadIdx.x % 4 * STATE_VEC;
    const bool has_state = state < p.d_state;
    float biases[Part::WIDTH];
    part.read(biases, p.delta_bias);
    int ring = 0;
    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const Segment segment = segment_at(p.segments, at);
        const int64_t i = segment.step(row, reverse);
        const auto first = [&](const auto &tensor) { return segment.row * tensor.batch + i * tensor.step; };
        Pairs<T, Part::WIDTH, STATES_PER_LANE> u(p.u.data, first(p.u) + part.d0, p.u.step, reverse);
        Pairs<T, Part::WIDTH, STATES_PER_LANE> delta(p.delta.data, first(p.delta) + part.d0, p.delta.step, reverse);
        Pairs<T, STATE_VEC, STATES_PER_LANE> b(p.b.data, first(p.b) + part.block.group * p.b.group + state, p.b.step, reverse);
        Pairs<T, STATE_VEC, STATES_PER_LANE> c(p.c.data, first(p.c) + part.block.group * p.c.group + state, p.c.step, reverse);
        const auto load_next = [&](bool odd, int64_t left) {
            const bool one = row < left, two = row + 1 < left;
            u.load(odd, one, two), delta.load(odd, one, two);
            b.load(odd, one && has_state, two && has_state), c.load(odd, one && has_state, two && has_state);
        };
        load_next(false, segment.steps);
        if (STATES_PER_LANE == 2) load_next(true, segment.steps - TILE);
        const int64_t tiles = (segment.steps + TILE - 1) / TILE;
        const auto stage_tile = [&](auto odd, int64_t k) {
            Tile &tile = shared.tiles[odd.value];
            const auto &now_u = u.of(odd), &now_delta = delta.of(odd);
            const auto &now_b = b.of(odd), &now_c = c.of(odd);
            const int64_t left = segment.steps - k * TILE;
#pragma unroll
            for (int j = 0; j < Part::WIDTH; j++) {
                float steps[4];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float step = now_delta[i][j] + biases[j];
                    step = plus ? softplus<T>(step) : step;
                    step = row + i < left ? step : 0.0f;
                    steps[2 * i] = step, steps[2 * i + 1] = step * now_u[i][j];
                }
                write_shared(&tile.steps[part.column + j][row / 2].x, steps);
            }
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) {
                tile.projections[Tile::place(row / 2, state + n)] =
                    join(pair_up(now_b[0], now_c[0], n), pair_up(now_b[1], now_c[1], n));
            }
#pragma unroll
            for (int i = 0; i < 2; i++) shared.u[ring][i][threadIdx.x % ROLE_THREADS] = now_u[i];
            ring = ring == 2 ? 0 : ring + 1;
            load_next(odd, left - STATES_PER_LANE * TILE);
            meet();
        };
        for_each_tile(tiles, stage_tile);
        meet();
    }
}

// For those who finish: what the lanes add to y, with the skip connection and the gate.
template <typename T, int STATES_PER_LANE>
__device__ __forceinline__ void finish(const Forward &params, Shared<T, STATES_PER_LANE> &shared) {
    using Part = Part<T, STATES_PER_LANE>;
    using Tile = Tile<T, STATES_PER_LANE>;
    const Inputs &p = params.inputs;
    const Part part(p);
    const bool reverse = p.flags & FLAG_REVERSE, gated = p.z.data;
    const int row = part.row;
    float skips[Part::WIDTH];
    part.read(skips, p.d);
    int ring = 0;
    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const Segment segment = segment_at(p.segments, at);
        const int64_t i = segment.step(row, reverse);
        const auto first = [&](const auto &tensor) { return segment.row * tensor.batch + i * tensor.step; };
        Pairs<T, Part::WIDTH, STATES_PER_LANE> z(p.z.data, first(p.z) + part.d0, p.z.step, reverse);
        T *out = static_cast<T *>(params.out) + (segment.row * p.segments.len + i) * p.d_inner + part.d0;
        const int out_step = static_cast<int>(reverse ? -p.d_inner : p.d_inner);
        const auto load_next = [&](bool odd, int64_t left) {
            z.load(odd, gated && row < left, gated && row + 1 < left);
        };
        load_next(false, segment.steps);
        if (STATES_PER_LANE == 2) load_next(true, segment.steps - TILE);
        meet();
        const int64_t tiles = (segment.steps + TILE - 1) / TILE;
        const auto finish_tile = [&](auto odd, int64_t k) {
            meet();
            const Tile &tile = shared.tiles[odd.value];
            const auto &u = shared.u[ring];
            ring = ring == 2 ? 0 : ring + 1;
            const int64_t left = segment.steps - k * TILE;
            float y[2][Part::WIDTH];
#pragma unroll
            for (int j = 0; j < Part::WIDTH; j++) {
                float sums[2][2] = {};
#pragma unroll
                for (int s = 0; s < Tile::LANES; s++) {
                    float two[2];
                    read_shared(two, &tile.outputs[s].of[part.column + j][0].x + row);
                    sums[s % 2][0] += two[0], sums[s % 2][1] += two[1];
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    y[i][j] = fmaf(skips[j], u[i][threadIdx.x % ROLE_THREADS][j], sums[0][i] + sums[1][i]);
                    y[i][j] *= gated ? silu(z.of(odd)[i][j]) : 1.0f;
                }
            }
            load_next(odd, left - STATES_PER_LANE * TILE);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                store_narrowed<T, true>(out + i * out_step, y[i], part.exists && row + i < left ? Part::WIDTH : 0);
            }
            out += TILE * out_step;
        };
        for_each_tile(tiles, finish_tile);
    }
}

template <typename T, int STATES_PER_LANE> __device__ __forceinline__ void run(const Forward &params) {
    extern __shared__ float4 memory[];
    Shared<T, STATES_PER_LANE> &shared = *reinterpret_cast<Shared<T, STATES_PER_LANE> *>(memory);
    // All pass the same barriers of a segment: one before each tile is advanced, when it is staged, and one after the last.
    // What is staged next has been advanced two tiles before, and what is finished then is the tile before.
    const int role = threadIdx.x / ROLE_THREADS;
    if (role == 0) {
        advance(params, shared);
    } else if (role == 1) {
        stage(params, shared);
    } else {
        finish(params, shared);
    }
}

#define INSTANCES(SUFFIX, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        scan_forward_few_channels_one_state_##SUFFIX(const __grid_constant__ Forward params) {                               \
        run<T, 1>(params);                                                                                             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        scan_forward_few_channels_two_states_##SUFFIX(const __grid_constant__ Forward params) {                               \
        run<T, 2>(params);                                                                                             \
    }

INSTANCES(f32, float)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)

}
