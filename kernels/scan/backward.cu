// The selective scan, backward, in the form that Mamba uses: B and C that vary, channels and states contiguous.
// backward_general.cu takes the rest. More than 16 states are a launch for each block of 16, and what they sum up is handed on
// in memory.
//
// Each warp carries 16 neighbouring channels by itself, through one chunk of 64 steps after another, the last first:
//
//   stage      Δ, Δu, B and C of the chunk are left in shared memory; the state before it is one that forward kept, and there
//              may be more within it
//   states     forward through the chunk, keeping the states before each tile of 8 steps
//   tile       for each tile, the last first:
//     forward  through the tile, keeping decays and states in registers
//     back     the recurrence of the gradient, which leaves each channel's sums over states in shared memory, and the sums
//              over channels (∂B, ∂C) on the tensor cores
//     finish   the sums of a channel become ∂u, ∂Δ and ∂z, while the next tile's forward goes on
//   write      the block's warps sum up ∂B and ∂C
//
// The warps meet only to stage B and C of a chunk and to sum up their gradients of them.
#include "../common/lane_map.cuh"
#include "backward.cuh"
#include "channel_sums.cuh"

// backward_narrow.cu makes the same kernel of lanes with one channel in place of a pair: wherever a pair is spoken of, and a quad of
// channels that a lane finishes, it is one channel there, and two.
#ifndef SCAN_BACKWARD_NARROW
namespace scan::backward {
#else
namespace scan::backward_narrow {
#endif
static_assert(LEAST_CHECKPOINT_STEPS % TILE == 0, "a state is kept before a tile");
static_assert(CHANNELS == WARPS * WARP_CHANNELS, "a warp's channels");

// A warp's pairs of channels, of which each lane has one; tiles of a chunk.
constexpr int PAIRS = WARP_CHANNELS / CHANNELS_PER_LANE, TILES = CHUNK_STEPS / TILE;
template <typename T> constexpr bool ACCURATE = sizeof(T) == 4;
// Of a lane's channels.
using LaneStates = float[CHANNELS_PER_LANE][STATE_VEC];
// Vectors of 4 in a step of B and C.
constexpr int PROJECTION_VECS = 2 * STATE_LANES;
// The channels that a lane stages and finishes of a step, a quad.
constexpr int PART = WARP_CHANNELS / 4;
// Two numbers for each of a lane's channels.
using LanePair = float[2 * CHANNELS_PER_LANE];

// What a lane of a warp works on:
//
//   lane                        0  1  2  3  4  5  6  7  8 … 15  16 … 23  24 … 31
//   carries    pair of channels 0  1  2  3  4  5  6  7  0 … 7   0 … 7    0 … 7
//              states           0-3                     4-7     8-11     12-15
//   stages and finishes, in a tile
//              step             0  0  0  0  1  1  1  1  2 … 3   4 … 5    6 … 7
//              quad of channels 0  1  2  3  0  1  2  3  0 … 3   0 … 3    0 … 3
struct LaneMap {
    int row, column, state_group, pair;

    __host__ __device__ constexpr explicit LaneMap(int lane)
        : row(lane / 4), column(lane % 4 * PART), state_group(lane / PAIRS),
          pair(lane % PAIRS) {}
};
static_assert(is_bijection<32>([](int lane) { return LaneMap(lane).state_group * PAIRS + LaneMap(lane).pair; }));
static_assert(is_bijection<32>([](int lane) { return (LaneMap(lane).row * WARP_CHANNELS + LaneMap(lane).column) / PART; }));

// What a warp keeps of its channels.
template <typename T> struct WarpShared {
    // The Δ of each pair of channels, and then their Δu. A tile that is done with leaves the sums of ∂B and ∂C over the warp's
    // channels in its place, (TILE, 2, STATE_BLOCK): the vectors of each step in an order of its own, so that lanes of
    // different steps do not meet in a bank.
    alignas(16) LanePair steps[CHUNK_STEPS][PAIRS];
    // The states before each tile. The gradient after the tile that is worked on is in the place after the tile's own.
    float4 states[TILES + 1][CHANNELS_PER_LANE][32];
    // What each lane adds to ∂/∂Δ and ∂/∂(Δu) of its one channel and then of the other in each step, and to y. (Neighbouring
    // steps are shifted against each other, so that lanes that read them do not meet in a bank.)
    alignas(16) LanePair gradients[TILE][STATE_LANES * PAIRS + (CHANNELS_PER_LANE == 2 ? 1 : 8)];
    alignas(16) float y[TILE][STATE_LANES * WARP_CHANNELS];
    // Of the tile that is worked on: ∂/∂y, and each lane's quads of u and of ∂out ∂silu(z)/∂z, which makes ∂/∂z of y + Du.
    alignas(16) float d_y[TILE][WARP_CHANNELS];
    alignas(16) float to_d_z[32][PART];
    Pack<T, PART> u[32];

    // Where the Δ of a quad's channel is among its steps; the Δu is CHANNELS_PER_LANE after it.
    static __device__ __forceinline__ constexpr int index_in_pairs(int c) {
        return c / CHANNELS_PER_LANE * 2 * CHANNELS_PER_LANE + c % CHANNELS_PER_LANE;
    }
    // Where a half of a tile, of which each has two, leaves its sums of ∂B and ∂C, and `at` so many numbers after it.
    __device__ __forceinline__ const float *sums_of(int half, int at) const {
        if (CHANNELS_PER_LANE == 2 || half % 2 == 0) return steps[half * (TILE / 2)][0] + at;
        return &states[half / 2 + 1][0][0].x + at;
    }
    __device__ __forceinline__ float *sums_of(int half, int at) {
        return const_cast<float *>(static_cast<const WarpShared &>(*this).sums_of(half, at));
    }
    static __device__ __forceinline__ int index_of_y(int t, int at) { return at ^ t % (4 / CHANNELS_PER_LANE) * WARP_CHANNELS; }
};

template <typename T> struct Shared {
    SegmentIndex next;
    Segment segment;
    Place<T> u, z, d_out, delta;
    // In the dense gradients, and in the sums of ∂B and ∂C: where the first step lies.
    int64_t gradients, lines;
    alignas(16) float projections[CHUNK_STEPS][2][STATE_BLOCK];
    alignas(16) float biases[CHANNELS], skips[CHANNELS];
    WarpShared<T> warps[WARPS];
};
static_assert(sizeof(Shared<float>) == SMEM + 4 * SMEM_PER_BYTE && sizeof(Shared<__half>) == SMEM + 2 * SMEM_PER_BYTE);

// What a lane works on, and with: all of it as the kernel has it, so that functions take it together.
template <typename T> struct Warp {
    const Backward &params;
    Shared<T> &shared;
    WarpShared<T> &mine;
    const Block &block;
    const LaneMap &map;
    const int &warp, &lane;
    const bool &exists, &reverse, &plus, &gated;
    const int &states, &first_state, &place_of_sums;
};

// A chunk of a segment: its number, the steps that there are, and the tiles of them.
struct Chunk {
    int index, remaining, tiles;
    // Its first step, in the sequence's direction and in the batch row, and the batch row's first step among those of all rows.
    int64_t first, step, row;
    // The direction of the steps in the batch row.
    int sign;

    __device__ __forceinline__ Chunk(const Segment &segment, int index) : index(index) {
        remaining = static_cast<int>(min(segment.steps - int64_t(index) * CHUNK_STEPS, int64_t(CHUNK_STEPS)));
        tiles = (remaining + TILE - 1) / TILE;
    }
    __device__ __forceinline__ void find_steps(const Inputs &p, const Segment &segment, bool reverse) {
        first = segment.first + int64_t(index) * CHUNK_STEPS, step = segment.step(first, reverse);
        row = segment.row * p.segments.len;
        sign = reverse ? -1 : 1;
    }
};

// The recurrence of a lane's channels through the steps of a chunk in shared memory, forward.
template <typename T> struct Recurrence {
    // Decays are computed a few steps ahead: were it a tile, the compiler would put most of them off to the tile's end,
    // where they wait for the special-function unit in a row.
    static constexpr int AHEAD = 2;
    static_assert(TILE % AHEAD == 0, "the decays that are known at the end of a tile are of the first steps of the next");

    const Shared<T> &shared;
    WarpShared<T> &mine;
    const int &state_group, &pair;
    // log2(e) A
    const LaneStates &a;

    __device__ __forceinline__ void decays_at(int t, LaneStates &decays) const {
        float step[CHANNELS_PER_LANE];
        read_shared(step, mine.steps[t][pair]);
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) {
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) decays[c][n] = exp2_fast(step[c] * a[c][n]);
        }
    }

    // One step, whose decays are known.
    __device__ __forceinline__ void advance(int t, const LaneStates &decays, LaneStates &to, const LaneStates &from) const {
        float in[CHANNELS_PER_LANE], b[STATE_VEC];
        read_shared(in, mine.steps[t][pair] + CHANNELS_PER_LANE);
        read_shared(b, &shared.projections[t][0][state_group * STATE_VEC]);
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) {
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) to[c][n] = fmaf(in[c], b[n], decays[c][n] * from[c][n]);
        }
    }

    // From the states before tile `tile` on, and those `apart` tiles after it if there are two CHAINS, through `count` tiles, for the
    // states before each of those that follow.
    template <int CHAINS>
    __device__ __forceinline__ void find_states_of(int tile, const int &apart, const int &count, const int &lane) const {
        // One goes on with its decays at a tile's end; two, of which few tiles are gone through, begin anew.
        constexpr bool GOES_ON = CHAINS == 1;
        LaneStates h[CHAINS], decays[CHAINS][AHEAD];
        const auto begin = [&] {
#pragma unroll
            for (int t = 0; t < AHEAD; t++) {
#pragma unroll
                for (int chain = 0; chain < CHAINS; chain++) {
                    decays_at((tile + chain * apart) * TILE + t, decays[chain][t]);
                }
            }
        };
#pragma unroll
        for (int chain = 0; chain < CHAINS; chain++) {
#pragma unroll
            for (int c = 0; c < CHANNELS_PER_LANE; c++) {
                read_shared(h[chain][c], &mine.states[tile + chain * apart][c][lane].x);
            }
        }
        if (GOES_ON) begin();
        for (const int end = tile + count; tile < end; tile++) {
            if (!GOES_ON) begin();
#pragma unroll
            for (int t = 0; t < TILE; t++) {
#pragma unroll
                for (int chain = 0; chain < CHAINS; chain++) {
                    const int step = (tile + chain * apart) * TILE + t;
                    LaneStates &decay = decays[chain][t % AHEAD];
                    advance(step, decay, h[chain], h[chain]);
                    if (GOES_ON || t + AHEAD < TILE) decays_at(step + AHEAD, decay);
                }
            }
#pragma unroll
            for (int chain = 0; chain < CHAINS; chain++) {
#pragma unroll
                for (int c = 0; c < CHANNELS_PER_LANE; c++) {
                    write_shared(&mine.states[tile + chain * apart + 1][c][lane].x, h[chain][c]);
                }
            }
        }
    }

    // The states before each tile of a chunk, of which the first is there, and those that forward has kept, one before each
    // `kept_tiles`. What follows two of these is found at the same time, as a step waits for the one before it. (From one kept state to
    // the next a rounded decay drifts by 2^-16 at most. The gradient of the state goes through the whole sequence.)
    __device__ __forceinline__ void find_states(const int &tiles, const int &kept_tiles, const int &lane) const {
        for (int first = 0; first < tiles; first += 2 * kept_tiles) {
            // Tiles to go through from each of the two.
            const int of_first = min(kept_tiles, tiles - first) - 1;
            const int of_second = max(min(kept_tiles, tiles - first - kept_tiles) - 1, 0);
            if (of_second > 0) find_states_of<2>(first, kept_tiles, of_second, lane);
            if (of_first > of_second) find_states_of<1>(first + of_second, 0, of_first - of_second, lane);
        }
    }

    // A tile from step `t0` on, keeping the decays and the states after each step.
    __device__ __forceinline__ void go_through(int t0, LaneStates (&decays)[TILE], LaneStates (&h)[TILE + 1]) const {
#pragma unroll
        for (int t = 0; t < TILE; t++) decays_at(t0 + t, decays[t]);
#pragma unroll
        for (int t = 0; t < TILE; t++) advance(t0 + t, decays[t], h[t + 1], h[t]);
    }
};

// For a tile in which a product of zero and infinity has spread over the columns of the sums over channels: sums each step
// alone, in the same way so that the others keep their bits, from the states and gradients at both ends of the tile.
template <typename T>
__device__ __forceinline__ void sum_again(const Recurrence<T> &recurrence, const int &lane, const int &tile,
                                          ChannelSums<T> &sums) {
    const auto &[shared, mine, state_group, pair, a] = recurrence;
    const int t0 = tile * TILE;
    LaneStates again;
#pragma unroll
    for (int c = 0; c < CHANNELS_PER_LANE; c++) read_shared(again[c], &mine.states[tile + 1][c][lane].x);
#pragma unroll 1
    for (int t = TILE - 1; t >= 0; t--) {
        LaneStates state, decay;
        float in[2 * CHANNELS_PER_LANE], d_y[CHANNELS_PER_LANE], c_[STATE_VEC], terms[2][4];
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) read_shared(state[c], &mine.states[tile][c][lane].x);
#pragma unroll 1
        for (int s = 0; s <= t; s++) {
            recurrence.decays_at(t0 + s, decay);
            recurrence.advance(t0 + s, decay, state, state);
        }
        read_shared(in, mine.steps[t0 + t][pair]);
        read_shared(d_y, &mine.d_y[t][pair * CHANNELS_PER_LANE]);
        read_shared(c_, &shared.projections[t0 + t][1][state_group * STATE_VEC]);
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) {
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) {
                const float gradient = fmaf(c_[n], d_y[c], again[c][n]);
                float &d_b = terms[n / 2][n % 2], &d_c = terms[n / 2][2 + n % 2];
                d_b = c ? fmaf(gradient, in[CHANNELS_PER_LANE + c], d_b) : gradient * in[CHANNELS_PER_LANE + c];
                d_c = c ? fmaf(d_y[c], state[c][n], d_c) : d_y[c] * state[c][n];
                again[c][n] = Decay<ACCURATE<T>>(in[c] * a[c][n], decay[c][n]).of(gradient);
            }
        }
        sums.replace(lane, t, terms);
    }
}

// The totals of a tile's sums over channels.
template <typename T>
__device__ __forceinline__ void total(const Recurrence<T> &recurrence, const int &lane, const int &tile, ChannelSums<T> &sums,
                                      float (&totals)[2][STATE_VEC]) {
    sums.total(lane, totals);
    if (!__all_sync(~0u, sums.are_finite(totals))) {
        sum_again(recurrence, lane, tile, sums);
        sums.total(lane, totals);
    }
}

// Writes the block's sums of ∂B and ∂C over a chunk, the warps in order. (Where they go is read first: the first thread may be
// at the next chunk before the others have left this one.)
template <typename T>
__device__ __forceinline__ void write_projections(const Backward &params, const Shared<T> &shared, const Chunk &chunk,
                                                  const int &states) {
    const int remaining = chunk.remaining, sign = chunk.sign;
    const Inputs &p = params.inputs;
    float *const to = params.projections + shared.lines;
    __syncthreads();
    if (params.projections) {
        const int64_t all = p.group_blocks * params.steps * params.groups * p.d_state;
        const int64_t line = sign * params.groups * p.d_state;
        // Vectors of a half of a tile.
        constexpr int HALF = TILE / 2 * PROJECTION_VECS;
        const int thread = reload_tid(), first = thread % STATE_LANES * STATE_VEC, which = thread / STATE_LANES % 2;
#pragma unroll
        for (int k = 0; k < CHUNK_STEPS * PROJECTION_VECS / THREADS; k++) {
            const int t = thread / PROJECTION_VECS + k * (THREADS / PROJECTION_VECS);
            if (t >= remaining || first >= states) break;
            float sum[STATE_VEC];
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                float one[STATE_VEC];
                const int place = (thread ^ thread / PROJECTION_VECS % 4) + k * THREADS;
                read_shared(one, shared.warps[w].sums_of(place / HALF, place % HALF * STATE_VEC));
#pragma unroll
                for (int n = 0; n < STATE_VEC; n++) sum[n] = w ? sum[n] + one[n] : one[n];
            }
            store_narrowed<float, true>(to + which * all + t * line + first, sum, STATE_VEC);
        }
    }
}

// Writes a parameter's gradients of a quad of channels from `d` on: the sums over the lanes that have the quad, of which one
// `writes` them.
__device__ __forceinline__ void write_sums(const Backward &params, int64_t d, bool exists, int row,
                                           float (&partial)[PART], float *to) {
#pragma unroll
    for (int c = 0; c < PART; c++) {
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
            partial[c] += __shfl_xor_sync(~0u, partial[c], distance);
        }
    }
    if (to) store_narrowed<float, true>(to + blockIdx.y * params.inputs.d_inner + d, partial, exists && row == 0 ? PART : 0);
}

// What each channel of a quad gets of the sums over its states in step `row` of a tile.
template <typename T>
__device__ __forceinline__ void sum_states(const WarpShared<T> &mine, const LaneMap &map, bool gated, float (&d_delta)[PART],
                                           float (&d_input)[PART], float (&y)[PART]) {
    const int row = map.row, column = map.column;
#pragma unroll
    for (int s = 0; s < STATE_LANES; s += 2) {
        float one[2 * PART], two[2 * PART], one_y[PART] = {}, two_y[PART] = {};
        read_shared(one, mine.gradients[row][s * PAIRS + column / CHANNELS_PER_LANE]);
        read_shared(two, mine.gradients[row][(s + 1) * PAIRS + column / CHANNELS_PER_LANE]);
        if (gated) {
            read_shared(one_y, &mine.y[row][mine.index_of_y(row, s * WARP_CHANNELS + column)]);
            read_shared(two_y, &mine.y[row][mine.index_of_y(row, (s + 1) * WARP_CHANNELS + column)]);
        }
#pragma unroll
        for (int c = 0; c < PART; c++) {
            const float of_delta = one[2 * c] + two[2 * c], of_input = one[2 * c + 1] + two[2 * c + 1];
            const float of_y = one_y[c] + two_y[c];
            d_delta[c] = s ? d_delta[c] + of_delta : of_delta;
            d_input[c] = s ? d_input[c] + of_input : of_input;
            y[c] = s ? y[c] + of_y : of_y;
        }
    }
}

// Back through a tile: the gradient `g` of the state after it becomes that of the state before it. Each channel's sums over
// states are left in shared memory, `d_a` and the sums over channels are added to.
template <typename T>
__device__ __forceinline__ void go_back(const Recurrence<T> &recurrence, const int &lane, const bool &gated,
                                        const int &remaining, const int &tile, const LaneStates (&decays)[TILE],
                                        const LaneStates (&h)[TILE + 1], LaneStates &g, LaneStates &d_a, ChannelSums<T> &sums) {
    const Shared<T> &shared = recurrence.shared;
    WarpShared<T> &mine = recurrence.mine;
    const LaneStates &a = recurrence.a;
    const int state_group = recurrence.state_group, pair = recurrence.pair, t0 = tile * TILE;
    // What is read from shared memory for a step.
    struct Operands {
        float in[2 * CHANNELS_PER_LANE], d_y[CHANNELS_PER_LANE], b[STATE_VEC], c[STATE_VEC];
    } ahead;
    const auto read = [&](int t) {
        read_shared(ahead.in, mine.steps[t0 + t][pair]);
        read_shared(ahead.d_y, &mine.d_y[t][pair * CHANNELS_PER_LANE]);
        read_shared(ahead.b, &shared.projections[t0 + t][0][state_group * STATE_VEC]);
        read_shared(ahead.c, &shared.projections[t0 + t][1][state_group * STATE_VEC]);
    };
    read(TILE - 1);
#pragma unroll
    for (int t = TILE - 1; t >= 0; t--) {
        const auto [in, d_y, b, c_] = ahead;
        if (t > 0) read(t - 1);
        // A fence for the compiler, which would put the loads off to their first use.
        __syncwarp();
        float terms[2][4], gradients[2 * CHANNELS_PER_LANE], y[CHANNELS_PER_LANE];
        const bool in_range = t < remaining - t0;
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) {
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) {
                const Decay<ACCURATE<T>> decay(in[c] * a[c][n], decays[t][c][n]);
                const float state = h[t + 1][c][n];
                float &d_b = terms[n / 2][n % 2], &d_c = terms[n / 2][2 + n % 2];
                y[c] = n ? fmaf(c_[n], state, y[c]) : c_[n] * state;
                float gradient = fmaf(c_[n], d_y[c], g[c][n]);
                d_b = c ? fmaf(gradient, in[CHANNELS_PER_LANE + c], d_b) : gradient * in[CHANNELS_PER_LANE + c];
                d_c = c ? fmaf(d_y[c], state, d_c) : d_y[c] * state;
                float &d_input = gradients[2 * c + 1], &d_delta = gradients[2 * c];
                d_input = n ? fmaf(gradient, b[n], d_input) : gradient * b[n];
                // Through the decay: ∂/∂(ΔA) is that of the state before, times that state.
                g[c][n] = decay.of(gradient);
                const float d_log = g[c][n] * h[t][c][n];
                add_if(in_range, d_a[c][n], in[c], d_log);
                d_delta = n ? fmaf(a[c][n], d_log, d_delta) : a[c][n] * d_log;
            }
        }
        sums.add(lane, t, terms);
        write_shared(mine.gradients[t][lane], gradients);
        if (gated) write_shared(&mine.y[t][mine.index_of_y(t, lane * CHANNELS_PER_LANE)], y);
    }
}

// The quad of step `t` of a chunk in an activation, `within` channels after the block's first.
template <typename T> __device__ __forceinline__ const T *quad_at(const Place<T> &place, int t, int within) {
    return place.at + (t * static_cast<int>(place.step) + within);
}

// Stages what the recurrence reads of a chunk: B and C, and the warp's Δ and Δu.
template <typename T>
__device__ __forceinline__ void stage(const Warp<T> &work, const Segment &segment, const Chunk &chunk) {
    const Inputs &p = work.params.inputs;
    Shared<T> &shared = work.shared;
    WarpShared<T> &mine = work.mine;
    const Block &block = work.block;
    const LaneMap &map = work.map;
    const int &warp = work.warp, &states = work.states, &first_state = work.first_state;
    const bool &exists = work.exists, &plus = work.plus;
    const int &remaining = chunk.remaining, &tiles = chunk.tiles, &sign = chunk.sign;
    const int64_t &i = chunk.step;
    const int row = map.row, column = map.column, within = warp * WARP_CHANNELS + column;
    constexpr int COUNT = CHUNK_STEPS * PROJECTION_VECS / THREADS;
    const bool of_c = threadIdx.x / STATE_LANES % 2;
    const int first = threadIdx.x % STATE_LANES * STATE_VEC;
    const Projection &from = of_c ? p.c : p.b;
    const T *const steps = static_cast<const T *>(from.data) + segment.row * from.batch + i * from.step +
                           block.group * from.group + first_state + first;
    Pack<T, STATE_VEC> vecs[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        const int t = threadIdx.x / PROJECTION_VECS + k * (THREADS / PROJECTION_VECS);
        vecs[k] = load_vec<T, STATE_VEC, true>(steps + t * (sign * static_cast<int>(from.step)), 1,
                                         t < remaining && first < states);
    }
    Pack<T, PART> x[TILES], step[TILES];
#pragma unroll
    for (int k = 0; k < TILES; k++) {
        const int t = row + k * TILE;
        x[k] = load_vec<T, PART, true>(quad_at(shared.u, t, within), 1, exists && t < remaining);
        step[k] = load_vec<T, PART, true>(quad_at(shared.delta, t, within), 1, exists && t < remaining);
    }
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        const float values[STATE_VEC] = {vecs[k][0], vecs[k][1], vecs[k][2], vecs[k][3]};
        write_shared(&shared.projections[0][0][0] + STATE_VEC * (threadIdx.x + k * THREADS), values);
    }
    float bias[PART];
    read_shared(bias, &shared.biases[warp * WARP_CHANNELS + column]);
    const auto stage = [&](auto count) {
        float deltas[count.value][PART];
#pragma unroll
        for (int k = 0; k < count.value; k++) {
#pragma unroll
            for (int c = 0; c < PART; c++) deltas[k][c] = step[k][c] + bias[c];
        }
        if (plus) {
#pragma unroll
            for (int k = 0; k < count.value; k++) {
#pragma unroll
                for (int c = 0; c < PART; c++) deltas[k][c] = softplus<T>(deltas[k][c]);
            }
        }
#pragma unroll
        for (int k = 0; k < count.value; k++) {
            float staged[2 * PART];
#pragma unroll
            for (int c = 0; c < PART; c++) {
                const float delta = row + k * TILE < remaining ? deltas[k][c] : 0.0f;
                staged[mine.index_in_pairs(c)] = delta;
                staged[mine.index_in_pairs(c) + CHANNELS_PER_LANE] = delta * x[k][c];
            }
            write_shared(mine.steps[row + k * TILE][column / CHANNELS_PER_LANE], staged);
        }
    };
    // Short sequences have few tiles.
    constexpr int FEW = 2;
    if (tiles <= FEW) {
        stage(IntConstant<FEW>());
    } else {
        stage(IntConstant<TILES>());
    }
}

// For one thread: where a chunk lies in all tensors.
template <typename T>
__device__ __forceinline__ void locate(const Warp<T> &work, const Segment &segment, const Chunk &chunk) {
    const Backward &params = work.params;
    Shared<T> &shared = work.shared;
    const Block &block = work.block;
    const int64_t i = chunk.step, flat = chunk.row;
    const int sign = chunk.sign, first_state = work.first_state;
    const Inputs &p = params.inputs;
    const auto place = [&](const Activation &tensor) {
        return Place<T>::template of<true>(tensor, segment.row, i, block.first, sign);
    };
    shared.u = place(p.u);
    shared.z = place(p.z);
    shared.d_out = place(params.d_out);
    shared.delta = place(p.delta);
    shared.gradients = (flat + i) * p.d_inner + block.first;
    const int64_t blocks = blockIdx.x % static_cast<uint32_t>(p.group_blocks) * params.steps;
    shared.lines = ((blocks + flat + i) * params.groups + block.group) * p.d_state + first_state;
}

// Prefetches to L2 what the tiles of a chunk before its last will be loaded from, and what the chunk before it will stage.
template <typename T>
__device__ __forceinline__ void prefetch_tensors(const Warp<T> &work, const Chunk &chunk) {
    const Shared<T> &shared = work.shared;
    const Block &block = work.block;
    const int lane = work.lane, warp = work.warp, remaining = chunk.remaining;
    const bool gated = work.gated;
#pragma unroll
    for (int k = 0; k < CHUNK_STEPS / 32; k++) {
        const int t = lane + k * 32, first = warp * WARP_CHANNELS;
        const auto prefetch_step = [&](const Place<T> &place, int t) {
            prefetch(place.at + (t * static_cast<int>(place.step) + first));
        };
        if (t < remaining && first < block.width) {
            if (gated) prefetch_step(shared.z, t);
            prefetch_step(shared.d_out, t);
        }
        if (chunk.index > 0 && first < block.width) {
            prefetch_step(shared.u, t - CHUNK_STEPS);
            prefetch_step(shared.delta, t - CHUNK_STEPS);
        }
    }
}

// Makes of what a lane has loaded of a step what going back and finishing need.
template <typename T>
__device__ __forceinline__ void open(WarpShared<T> &mine, const LaneMap &map, const int &lane, const bool &gated,
                                     const Pack<T, PART> &u, const Pack<T, PART> &z, const Pack<T, PART> &d_out) {
    float d_y[PART], to_d_z[PART];
#pragma unroll
    for (int c = 0; c < PART; c++) {
        const float gate = z[c], d = d_out[c], s = sigmoid(gate);
        d_y[c] = gated ? d * (gate * s) : d;
        to_d_z[c] = d * silu_slope(gate, s);
    }
    write_shared(&mine.d_y[map.row][map.column], d_y);
    write_shared(mine.to_d_z[lane], to_d_z);
    mine.u[lane] = u;
    __syncwarp();
}

// The state before a chunk.
template <typename LaneOf>
__device__ __forceinline__ void read_state_before(const Backward &params, const Segment &segment, const Chunk &chunk,
                                                  const LaneOf &lane_of, LaneStates &h) {
#pragma unroll
    for (int c = 0; c < CHANNELS_PER_LANE; c++) {
        const Lane lane = lane_of(c);
        if (chunk.first == 0) {
            lane.initial(h[c], params.inputs.initial_state, segment.sequence);
        } else {
            const int64_t slot = checkpoint_slot(params.inputs, chunk.row + segment.start, chunk.first);
            lane.read_dense<true>(h[c], params.checkpoints + lane.at(params.inputs, slot));
        }
    }
}

// Starts copying to shared memory the states within a chunk that forward has kept.
template <typename T, typename LaneOf>
__device__ __forceinline__ void copy_kept_states(const Warp<T> &work, const Segment &segment, const Chunk &chunk,
                                                 const LaneOf &lane_of) {
    const Inputs &p = work.params.inputs;
    const int steps = checkpoint_steps(p);
    for (int t = steps; t < chunk.remaining; t += steps) {
        const int64_t slot = checkpoint_slot(p, chunk.row + segment.start, chunk.first + t);
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) {
            const Lane of_channel = lane_of(c);
            auto &to = reinterpret_cast<Pack<float, STATE_VEC> &>(work.mine.states[t / TILE][c][work.lane]);
            copy_async(to, work.params.checkpoints + of_channel.at(p, slot), of_channel.count > 0);
        }
    }
    commit_copies();
}

// Goes through a chunk: forward, for the states before its tiles, and then back, tile by tile.
template <bool MANY_STATES, typename T, typename LaneOf>
__device__ __forceinline__ void go_through(const Warp<T> &work, const Recurrence<T> &recurrence, const Segment &segment,
                                           const Chunk &chunk, const LaneOf &lane_of, LaneStates &g, LaneStates &d_a,
                                           float (&d_skip)[PART], float (&d_bias)[PART]) {
    const Backward &params = work.params;
    const Inputs &p = params.inputs;
    Shared<T> &shared = work.shared;
    WarpShared<T> &mine = work.mine;
    const LaneMap &map = work.map;
    const int &warp = work.warp, &lane = work.lane, &place_of_sums = work.place_of_sums;
    const bool &exists = work.exists, &reverse = work.reverse, &plus = work.plus, &gated = work.gated;
    const int row = map.row, column = map.column;
    const int within = warp * WARP_CHANNELS + column;
    // What the lane finishes, a tile at a time from the last on: where it is read and, in the dense gradients, written.
    const int last_t = (chunk.tiles - 1) * TILE + row;
    const T *from_u = quad_at(shared.u, last_t, within), *from_z = quad_at(shared.z, last_t, within);
    const T *from_d_out = quad_at(shared.d_out, last_t, within);
    int64_t at = shared.gradients + (last_t * (chunk.sign * static_cast<int>(p.d_inner)) + within);
    const int back = reverse ? TILE : -TILE;
    Pack<T, PART> next_u, next_z, next_d_out;
    // Puts the loads in flight of what the lane finishes next; `t` is the step, for which there may be nothing to finish.
    const auto load_next = [&](int t) {
        const int count = exists && t >= 0 && t < chunk.remaining ? PART : 0;
        next_u = load_vec<T, PART, true>(from_u, 1, count);
        next_z = load_vec<T, PART, true>(from_z, 1, gated ? count : 0);
        next_d_out = load_vec<T, PART, true>(from_d_out, 1, count);
        from_u += int64_t(back) * static_cast<int>(p.u.step);
        from_z += int64_t(back) * static_cast<int>(p.z.step);
        from_d_out += int64_t(back) * static_cast<int>(params.d_out.step);
    };
    prefetch_tensors(work, chunk);

    LaneStates h[TILE + 1];
    read_state_before(params, segment, chunk, lane_of, h[0]);
    copy_kept_states(work, segment, chunk, lane_of);
    stage(work, segment, chunk);
    wait_for_copies<0>();
    __syncthreads();

#pragma unroll
    for (int c = 0; c < CHANNELS_PER_LANE; c++) write_shared(&mine.states[0][c][lane].x, h[0][c]);
    recurrence.find_states(chunk.tiles, checkpoint_steps(p) / TILE, lane);

    load_next(last_t);
    if (MANY_STATES && exists && last_t < chunk.remaining) prefetch_partial_sums(params, at);
    LaneStates decays[TILE];
#pragma unroll
    for (int c = 0; c < CHANNELS_PER_LANE; c++) read_shared(h[0][c], &mine.states[chunk.tiles - 1][c][lane].x);
    recurrence.go_through((chunk.tiles - 1) * TILE, decays, h);
    open(mine, map, lane, gated, next_u, next_z, next_d_out);
    for (int tile = chunk.tiles - 1; tile >= 0; tile--) {
        const int t0 = tile * TILE, mine_t = t0 + row;
        const bool wanted = exists && mine_t < chunk.remaining;
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) write_shared(&mine.states[tile + 1][c][lane].x, g[c]);

        // Back.
        ChannelSums<T> sums;
        go_back(recurrence, lane, gated, chunk.remaining, tile, decays, h, g, d_a, sums);
        __syncwarp();

        float totals[2][STATE_VEC];
        total(recurrence, lane, tile, sums, totals);

        // Finishes the tile, and goes forward through the one that comes next, if there is one, at the same time: the one waits
        // for shared memory, the other for the special-function unit.
        const auto finish = [&](auto more) {
            const int next = tile > 0 ? tile - 1 : 1;
            if (more) {
                load_next(mine_t - TILE);
#pragma unroll
                for (int c = 0; c < CHANNELS_PER_LANE; c++) read_shared(h[0][c], &mine.states[next][c][lane].x);
            }
            // What each channel gets of the sums over its states.
            float d_delta[PART], d_input[PART], y[PART];
            sum_states(mine, map, gated, d_delta, d_input, y);

            float in[2 * PART], skip[PART], d_y[PART], to_d_z[PART];
            read_shared(in, mine.steps[mine_t][column / CHANNELS_PER_LANE]);
            read_shared(skip, &shared.skips[warp * WARP_CHANNELS + column]);
            read_shared(d_y, &mine.d_y[row][column]);
            read_shared(to_d_z, mine.to_d_z[lane]);
            const Pack<T, PART> x = mine.u[lane];
            // Everyone has read what the sums over channels are going to replace.
            __syncwarp();
            write_shared(mine.sums_of(2 * tile, place_of_sums), totals[0]);
            write_shared(mine.sums_of(2 * tile + 1, place_of_sums), totals[1]);
            if constexpr (MANY_STATES) {
                carry<true>(params, at, wanted ? PART : 0, d_delta, d_input, y);
                if (exists && tile > 0) prefetch_partial_sums(params, at + int64_t(back) * static_cast<int>(p.d_inner));
            }
            if (more) recurrence.go_through(next * TILE, decays, h);

            if (!MANY_STATES || is_last_block(params)) {
                float d_z[PART], d_u[PART], d_step[PART];
#pragma unroll
                for (int c = 0; c < PART; c++) {
                    input_gradients<T>(in[mine.index_in_pairs(c)], x[c], skip[c], d_y[c], to_d_z[c], d_delta[c], d_input[c],
                                       y[c], plus, false, d_u[c], d_step[c], d_z[c]);
                    d_skip[c] = wanted ? fmaf(d_y[c], x[c], d_skip[c]) : d_skip[c];
                    d_bias[c] = wanted ? d_bias[c] + d_step[c] : d_bias[c];
                }
                store_narrowed_if(gated && wanted, static_cast<T *>(params.d_z) + at, d_z);
                store_narrowed_if(wanted, static_cast<T *>(params.d_u) + at, d_u);
                store_narrowed_if(wanted, static_cast<T *>(params.d_delta) + at, d_step);
            }
            at += int64_t(back) * static_cast<int>(p.d_inner);
            if (more && tile > 0) open(mine, map, lane, gated, next_u, next_z, next_d_out);
        };
        // (Two instances take more registers than there are with many states. Tile 0 goes through tile 1 again then, and drops
        // it, as tile 0's steps are being replaced.)
        if (!MANY_STATES && tile == 0) {
            finish(BoolConstant<false>());
            break;
        }
        finish(BoolConstant<true>());
    }
}

// With `MANY_STATES` there are more than 16 states, of which a launch takes 16.
template <typename T, bool MANY_STATES> __device__ __forceinline__ void run(const Backward &params) {
    extern __shared__ float4 memory[];
    Shared<T> &shared = *reinterpret_cast<Shared<T> *>(memory);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    WarpShared<T> &mine = shared.warps[warp];

    const Inputs &p = params.inputs;
    const bool reverse = p.flags & FLAG_REVERSE, plus = p.flags & FLAG_SOFTPLUS, gated = p.z.data;
    const Block block(p, blockIdx.x, CHANNELS);
    for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
        const bool exists = c < block.width;
        shared.biases[c] = exists ? element_or(p.delta_bias, block.first + c, 0.0f) : 0.0f;
        shared.skips[c] = exists ? element_or(p.d, block.first + c, 0.0f) : 0.0f;
    }

    const LaneMap map(lane);
    const int row = map.row, column = map.column, state_group = map.state_group, pair = map.pair;
    // Whether there is the quad of channels that the lane stages and finishes.
    const bool exists = warp * WARP_CHANNELS + column < block.width;
    const int64_t d0 = block.first + warp * WARP_CHANNELS + column;
    float d_skip[PART] = {}, d_bias[PART] = {};
    // Where the lane leaves its sums of ∂B and ∂C among those of a tile.
    const int sums_t = sum_step(lane);
    int place_of_sums = sums_t * 2 * STATE_BLOCK + ((sum_of_c(lane) * STATE_LANES + state_group) ^ sums_t) * STATE_VEC;
    opaque(place_of_sums);
    // The first state of the block of 16, and how many there are from there on.
    const int first_state = MANY_STATES ? static_cast<int>(params.first_state) : 0;
    const int states = static_cast<int>(p.d_state) - first_state;
    const auto lane_of = [&](int c) {
        const int thread = reload_tid(), channel = thread / 32 * WARP_CHANNELS + thread % PAIRS * CHANNELS_PER_LANE + c;
        return Lane(p, block.first + channel, channel < block.width, first_state + thread % 32 / PAIRS * STATE_VEC);
    };
    LaneStates a, d_a = {};
    read_rates<true>(a, lane_of, p.a);
    const Warp<T> work{params,      shared, mine, block, map,         warp,   lane,         exists, reverse,
                       plus, gated, states, first_state, place_of_sums};
    const Recurrence<T> recurrence{shared, mine, state_group, pair, a};

    if (threadIdx.x == 0) shared.next = SegmentIndex(p.segments.per_row);
    for (int64_t index = blockIdx.y; index < p.segments.count; index += gridDim.y) {
        take_segment(shared, p.segments);
        const Segment &segment = shared.segment;
        LaneStates g = {};
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) incoming_grad<ACCURATE<T>, true>(params, segment, lane_of(c), a[c], g[c]);

        for (int i = static_cast<int>((segment.steps - 1) / CHUNK_STEPS); i >= 0; i--) {
            Chunk chunk(segment, i);
            if (chunk.remaining <= 0) break; // an empty sequence
            chunk.find_steps(p, segment, reverse);
            if (threadIdx.x == 0) locate(work, segment, chunk);
            __syncthreads();
            go_through<MANY_STATES>(work, recurrence, segment, chunk, lane_of, g, d_a, d_skip, d_bias);
            write_projections(params, shared, chunk, states);
        }
        if (params.d_initial_state && segment.first == 0) {
#pragma unroll
            for (int c = 0; c < CHANNELS_PER_LANE; c++) {
                const Lane lane = lane_of(c);
                lane.write(params.d_initial_state + lane.at(p, segment.sequence), g[c]);
            }
        }
    }
#pragma unroll
    for (int c = 0; c < CHANNELS_PER_LANE; c++) {
        const Lane lane = lane_of(c);
        lane.write(params.d_a + lane.at(p, blockIdx.y), d_a[c]);
    }
    write_sums(params, d0, exists, row, d_skip, params.d_d);
    write_sums(params, d0, exists, row, d_bias, params.d_bias);
}

#define INSTANCE(NAME, T, MANY_STATES, BLOCKS)                                                                         \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        scan_backward_##NAME(const __grid_constant__ Backward params) {                                                \
        run<T, MANY_STATES>(params);                                                                                   \
    }

#ifndef SCAN_BACKWARD_NARROW
#define INSTANCES(SUFFIX, T)                                                                                           \
    INSTANCE(fast_##SUFFIX, T, false, 2)                                                                               \
    INSTANCE(many_states_##SUFFIX, T, true, 2)
#else
#define INSTANCES(SUFFIX, T) INSTANCE(narrow_##SUFFIX, T, false, 3)
#endif

INSTANCES(f32, float)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)

}
