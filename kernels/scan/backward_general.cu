// The selective scan, backward, whatever its inputs: any stride and width, constant B and C, zero-order hold; and on devices
// whose blocks have too little shared memory for backward.cu, which is faster and says what the phases of a chunk are.
#include "../common/lane_map.cuh"
#include "backward.cuh"
#include "channel_sums.cuh"

namespace scan::backward_general {

constexpr int COLUMNS = CHANNELS / QUAD, TILES = CHUNK_STEPS / TILE, WARP_CHANNELS = 32 / STATE_LANES;
// Vectors of 4 in a step of B and C.
constexpr int PROJECTION_VECS = 2 * STATE_LANES;

// What a thread works on:
//
//   thread                    0  1  2  3  4  5  6  7  8 … 15  16 … 23  24 … 31    32 …     64 …     96 …
//   carries  channel          0  1  2  3  4  5  6  7  0 … 7   0 … 7    0 … 7      8 … 15   16 … 23  24 … 31
//            states           0-3                     4-7     8-11     12-15      as in the first warp
//   stages and finishes, in tiles of its half
//            step             0                       1       2        3          4 … 7    0 … 3    4 … 7
//            quad of channels 0  1  2  3  4  5  6  7  0 … 7   0 … 7    0 … 7      0 … 7    0 … 7    0 … 7
//            tiles            even                                                even     odd      odd
struct ThreadMap {
    int channel, state_group, column, row, half;

    __host__ __device__ constexpr explicit ThreadMap(int thread)
        : channel(thread / 32 * WARP_CHANNELS + thread % WARP_CHANNELS), state_group(thread % 32 / WARP_CHANNELS),
          column(thread % COLUMNS * QUAD), row(thread / COLUMNS % TILE), half(thread / (COLUMNS * TILE)) {}
};
static_assert(is_bijection<THREADS>([](int thread) {
    return ThreadMap(thread).channel * STATE_LANES + ThreadMap(thread).state_group;
}));
static_assert(is_bijection<THREADS>([](int thread) {
    const ThreadMap map(thread);
    return (map.half * TILE + map.row) * COLUMNS + map.column / QUAD;
}));

// The sums that the lanes of a channel leave for each step. Channels change places with each group of states, so that lanes do
// not meet in a bank.
struct StateSums {
    float2 steps[TILE][STATE_LANES][CHANNELS];
    float y[TILE][STATE_LANES][CHANNELS];

    static __device__ __forceinline__ int place(int channel, int state_group) { return channel ^ state_group * 8; }
};

template <typename T> struct Shared {
    // What all threads need again and again is here, for registers are few: the segment, the places of a chunk (`gradients` in
    // the dense gradients), the slot of the state before it, and whether that is kept, as it is but at the start of a sequence.
    SegmentIndex next;
    Segment segment;
    Place<T> u, delta, z, d_out, b, c;
    int64_t gradients, gradient_step;
    Place<float> lines;
    int64_t slot;
    // Δ and Δu (u with zero-order hold) of a chunk.
    alignas(16) float2 steps[CHUNK_STEPS][CHANNELS];
    float projections[CHUNK_STEPS][2][STATE_BLOCK];
    // Each lane's states after each tile but the last; when the next tile is done, the gradient of those instead.
    float4 states[TILES][THREADS];
    // ∂/∂y of a tile.
    float d_y[TILE][CHANNELS];
    StateSums sums;
    // Each warp's sums over channels of ∂B and ∂C.
    float d_projections[WARPS][TILE][2][STATE_BLOCK];
    float biases[CHANNELS], skips[CHANNELS];
    // The sums for each quad of a tile, which two threads take turns to add to.
    float4 d_skip[COLUMNS * TILE], d_bias[COLUMNS * TILE];
    bool begins_kept;
};
static_assert(sizeof(Shared<float>) == SMEM && sizeof(Shared<__half>) == SMEM);

// (exp(ΔA) - 1)/A
__device__ __forceinline__ float hold_weight(float minus_one, float inverse_a, float delta) {
    return inverse_a == 0.0f ? delta : minus_one * inverse_a;
}

// Its derivative by A: Δ² φ'(ΔA) with φ(x) = (e^x - 1)/x.
__device__ __forceinline__ float hold_weight_slope(float x, float inverse_a, float delta, float weight, float decay) {
    // φ'(x) = Σ x^k/(k! (k + 2)); the closed form loses as many digits as x has zeros.
    float p = fmaf(1.0f / 5760.0f, x, 1.0f / 840.0f);
    p = fmaf(p, x, 1.0f / 144.0f);
    p = fmaf(p, x, 1.0f / 30.0f);
    p = fmaf(p, x, 0.125f);
    p = fmaf(p, x, 1.0f / 3.0f);
    p = fmaf(p, x, 0.5f);
    const float far = (delta * decay - weight) * inverse_a;
    return fabsf(x) < 0.5f ? delta * delta * p : far;
}

// A thread's states, through the steps of a chunk in shared memory.
template <typename T> struct Recurrence {
    const Backward &params;
    const Inputs &p;
    Shared<T> &shared;
    const Block &block;
    const int &first_state, &channel, &state_group;
    const bool &zoh;
    // log2(e) A, and 1/A; B and C where they are constant.
    const float (&a)[STATE_VEC], (&inverse_a)[STATE_VEC], (&constant_b)[STATE_VEC], (&constant_c)[STATE_VEC];

    __device__ __forceinline__ Lane lane() const {
        const int thread = reload_tid(), channel = thread / 32 * WARP_CHANNELS + thread % WARP_CHANNELS;
        const int state = first_state + thread % 32 / WARP_CHANNELS * STATE_VEC;
        return Lane(p, block.first + channel, channel < block.width, state);
    }
    // The states before the chunk, or before a later tile of it.
    __device__ __forceinline__ void read_states(float (&h)[STATE_VEC], int tile) const {
        if (tile > 0) {
            read_shared(h, &shared.states[tile - 1][threadIdx.x].x);
        } else if (shared.begins_kept) {
            read_kept(h, 0);
        } else {
            lane().initial(h, p.initial_state, shared.segment.sequence);
        }
    }
    // The states before step `t` of the chunk, which forward has kept.
    __device__ __forceinline__ void read_kept(float (&h)[STATE_VEC], int t) const {
        const Lane lane = this->lane();
        lane.read(h, params.checkpoints + lane.at(p, shared.slot + (t >> static_cast<int>(p.checkpoint_log2))), 1);
    }
    // B or C of a step.
    __device__ __forceinline__ void coefficients(float (&b)[STATE_VEC], int which, int t) const {
        read_shared(b, &shared.projections[t][which][state_group * STATE_VEC]);
        if ((which ? p.c : p.b).constant) {
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) b[n] = which ? constant_c[n] : constant_b[n];
        }
    }
    // What multiplies B: the input, with zero-order hold times (exp(ΔA) - 1)/A.
    __device__ __forceinline__ float weight(int n, float delta, float decay) const {
        return hold_weight(Decay<true>(delta * a[n], decay).minus_one(), inverse_a[n], delta);
    }
    __device__ __forceinline__ float weighted(int n, float2 in, float decay) const {
        return zoh ? weight(n, in.x, decay) * in.y : in.y;
    }
    // A gradient of the state taken through a decay.
    __device__ __forceinline__ float decayed(int n, float delta, float decay, float g) const {
        return Decay<sizeof(T) == 4>(delta * a[n], decay).of(g);
    }
    // One step of a chunk forward, and its decays.
    __device__ __forceinline__ void advance(int t, float (&decays)[STATE_VEC], float (&to)[STATE_VEC],
                                            const float (&from)[STATE_VEC]) const {
        const float2 in = shared.steps[t][channel];
        float b[STATE_VEC];
        coefficients(b, 0, t);
#pragma unroll
        for (int n = 0; n < STATE_VEC; n++) {
            decays[n] = exp2_fast(in.x * a[n]);
            to[n] = fmaf(weighted(n, in, decays[n]), b[n], decays[n] * from[n]);
        }
    }
    // Forward through a chunk, for the states before each tile.
    __device__ __forceinline__ void find_states(int tiles) const {
        float h[STATE_VEC];
        read_states(h, 0);
        for (int tile = 0; tile + 1 < tiles; tile++) {
#pragma unroll
            for (int t = 0; t < TILE; t++) {
                float decays[STATE_VEC];
                advance(tile * TILE + t, decays, h, h);
            }
            // As the fast kernel does, whose bits these are.
            if (is_kept(p, (tile + 1) * TILE)) read_kept(h, (tile + 1) * TILE);
            shared.states[tile][threadIdx.x] = {h[0], h[1], h[2], h[3]};
        }
    }
};

// What is summed over the steps that a thread carries its states through.
struct ParameterSums {
    float a[STATE_VEC] = {}, constant_b[STATE_VEC] = {}, constant_c[STATE_VEC] = {};
};

// Back through a tile: the gradient `g` of the state after it becomes that of the state before it. Each channel's sums over
// states are left in shared memory.
template <typename T>
__device__ __forceinline__ void go_back(const Recurrence<T> &recurrence, int lane, bool gated, int remaining, int tile,
                                        const float (&decays)[TILE][STATE_VEC], const float (&h)[TILE + 1][STATE_VEC],
                                        float (&g)[STATE_VEC], ParameterSums &parameters, ChannelSums<T> &sums) {
    Shared<T> &shared = recurrence.shared;
    const int state_group = recurrence.state_group, channel = recurrence.channel;
#pragma unroll
    for (int t = TILE - 1; t >= 0; t--) {
        const bool in_range = tile * TILE + t < remaining;
        const float2 in = shared.steps[tile * TILE + t][channel];
        const float d_y = shared.d_y[t][channel];
        float b[STATE_VEC], c[STATE_VEC], terms[2][4], d_delta = 0.0f, d_input = 0.0f, y = 0.0f;
        recurrence.coefficients(b, 0, tile * TILE + t);
        recurrence.coefficients(c, 1, tile * TILE + t);
#pragma unroll
        for (int n = 0; n < STATE_VEC; n++) {
            const float a = recurrence.a[n], inverse_a = recurrence.inverse_a[n];
            const float decay = decays[t][n], input = recurrence.weighted(n, in, decay);
            y = n ? fmaf(c[n], h[t + 1][n], y) : c[n] * h[t + 1][n];
            g[n] = fmaf(c[n], d_y, g[n]);
            const float d_b = g[n] * input, d_c = d_y * h[t + 1][n];
            terms[n / 2][n % 2] = d_b;
            terms[n / 2][2 + n % 2] = d_c;
            add_if(in_range, parameters.constant_b[n], d_b, 1.0f);
            add_if(in_range, parameters.constant_c[n], d_c, 1.0f);
            if (recurrence.zoh) {
                const float weight = recurrence.weight(n, in.x, decay);
                const float d_weighted = g[n] * b[n], d_weight = d_weighted * in.y;
                d_input = fmaf(d_weighted, weight, d_input);
                const float slope = hold_weight_slope(in.x * a * LN_2, inverse_a, in.x, weight, decay);
                add_if(in_range, parameters.a[n], d_weight, slope);
                // By Δ, which is counted in units of log2(e) here.
                d_delta = fmaf(d_weight, decay * LOG2_E, d_delta);
            } else {
                d_input = n ? fmaf(g[n], b[n], d_input) : g[n] * b[n];
            }
            // Through the decay: ∂/∂(ΔA) is that of the state before, times that state.
            g[n] = recurrence.decayed(n, in.x, decay, g[n]);
            const float d_log = g[n] * h[t][n];
            add_if(in_range, parameters.a[n], in.x, d_log);
            d_delta = n || recurrence.zoh ? fmaf(a, d_log, d_delta) : a * d_log;
        }
        sums.add(lane, t, terms);
        shared.sums.steps[t][state_group][StateSums::place(channel, state_group)] = {d_delta, d_input};
        if (gated) shared.sums.y[t][state_group][StateSums::place(channel, state_group)] = y;
    }
}

// As in backward.cu: sums each step of a tile alone.
template <typename T>
__device__ __forceinline__ void sum_again(const Recurrence<T> &recurrence, int lane, int tile, ChannelSums<T> &sums) {
    Shared<T> &shared = recurrence.shared;
    float again[STATE_VEC];
    read_shared(again, &shared.states[tile][threadIdx.x].x);
#pragma unroll 1
    for (int t = TILE - 1; t >= 0; t--) {
        float state[STATE_VEC], decays[STATE_VEC], c[STATE_VEC], terms[2][4];
        recurrence.read_states(state, tile);
#pragma unroll 1
        for (int s = 0; s <= t; s++) recurrence.advance(tile * TILE + s, decays, state, state);
        recurrence.coefficients(c, 1, tile * TILE + t);
        const float2 in = shared.steps[tile * TILE + t][recurrence.channel];
        const float d_y = shared.d_y[t][recurrence.channel];
#pragma unroll
        for (int n = 0; n < STATE_VEC; n++) {
            again[n] = fmaf(c[n], d_y, again[n]);
            terms[n / 2][n % 2] = again[n] * recurrence.weighted(n, in, decays[n]);
            terms[n / 2][2 + n % 2] = d_y * state[n];
            again[n] = recurrence.decayed(n, in.x, decays[n], again[n]);
        }
        sums.replace(lane, t, terms);
    }
}

// What a thread works on, and with.
template <typename T> struct Work {
    const Backward &params;
    const Inputs &p;
    Shared<T> &shared;
    const Block &block;
    const ThreadMap &map;
    const int &first_state;
    const bool &reverse, &plus, &gated, &zoh;

    // The channels of the thread's quad that there are.
    __device__ __forceinline__ int count() const {
        return max(0, min(block.width - reload_tid() % COLUMNS * QUAD, QUAD));
    }
    // The quad of a chunk's step in an activation.
    __device__ __forceinline__ Pack<T, QUAD> load_quad(const Place<T> &place, const Activation &tensor, int t, int count) const {
        return load_vec<T, QUAD, false>(place.at + t * place.step + map.column * tensor.channel, tensor.channel, count);
    }

    // For one thread: where the chunk `index` of the segment lies in all tensors.
    __device__ __forceinline__ void locate(const Segment &segment, int index) const {
        const int64_t first = segment.first + int64_t(index) * CHUNK_STEPS;
        const int64_t i = segment.step(first, reverse), sign = reverse ? -1 : 1;
        const auto place = [&](const Activation &tensor) {
            return Place<T>::template of<false>(tensor, segment.row, i, block.first, sign);
        };
        shared.u = place(p.u);
        shared.delta = place(p.delta);
        shared.z = place(p.z);
        shared.d_out = place(params.d_out);
        const auto place_of_projection = [&](const Projection &tensor) {
            const int64_t at = segment.row * tensor.batch + i * tensor.step + block.group * tensor.group +
                               first_state * tensor.state;
            return Place<T>{static_cast<const T *>(tensor.data) + at, sign * tensor.step};
        };
        shared.b = place_of_projection(p.b);
        shared.c = place_of_projection(p.c);
        const int64_t row = segment.row * p.segments.len;
        shared.gradients = (row + i) * p.d_inner + block.first, shared.gradient_step = sign * p.d_inner;
        const int64_t part_of_group = blockIdx.x % static_cast<uint32_t>(p.group_blocks);
        const int64_t lines = (part_of_group * params.steps + row + i) * params.groups;
        shared.lines = {params.projections + (lines + block.group) * p.d_state, sign * params.groups * p.d_state};
        shared.slot = checkpoint_slot(p, row + segment.start, first), shared.begins_kept = first > 0;
    }

    // Stages what the recurrence reads of a chunk.
    __device__ __forceinline__ void stage(int remaining) const {
        constexpr int ROWS = THREADS / COLUMNS, COUNT = CHUNK_STEPS * PROJECTION_VECS / THREADS;
        const int first_row = threadIdx.x / COLUMNS;
        const int which = threadIdx.x / STATE_LANES % 2, first = threadIdx.x % STATE_LANES * STATE_VEC;
        const Projection &projection = which ? p.c : p.b;
        const Place<T> place = which ? shared.c : shared.b;
        const int64_t states = p.d_state - first_state - first;
        const int readable =
            projection.constant ? 0 : static_cast<int>(max(int64_t(0), min(states, int64_t(STATE_VEC))));
        Pack<T, STATE_VEC> vecs[COUNT];
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const int t = threadIdx.x / PROJECTION_VECS + k * (THREADS / PROJECTION_VECS);
            const T *at = place.at + t * place.step + first * projection.state;
            vecs[k] = load_vec<T, STATE_VEC, false>(at, projection.state, t < remaining ? readable : 0);
        }
        Pack<T, QUAD> u[CHUNK_STEPS / ROWS], delta[CHUNK_STEPS / ROWS];
#pragma unroll
        for (int k = 0; k < CHUNK_STEPS / ROWS; k++) {
            const int t = first_row + k * ROWS, there = t < remaining ? count() : 0;
            u[k] = load_quad(shared.u, p.u, t, there);
            delta[k] = load_quad(shared.delta, p.delta, t, there);
        }
        float bias[QUAD];
        read_shared(bias, &shared.biases[map.column]);
#pragma unroll
        for (int k = 0; k < CHUNK_STEPS / ROWS; k++) {
            const bool in_range = first_row + k * ROWS < remaining;
            float staged[2 * QUAD];
#pragma unroll
            for (int c = 0; c < QUAD; c++) {
                float step = delta[k][c] + bias[c];
                if (plus) step = softplus<T>(step);
                staged[2 * c] = in_range ? step : 0.0f;
                staged[2 * c + 1] = zoh ? u[k][c] : staged[2 * c] * u[k][c];
            }
            write_shared(&shared.steps[first_row + k * ROWS][map.column].x, staged);
        }
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const float values[STATE_VEC] = {vecs[k][0], vecs[k][1], vecs[k][2], vecs[k][3]};
            write_shared(&shared.projections[0][0][0] + STATE_VEC * (threadIdx.x + k * THREADS), values);
        }
    }

    // Half of the threads stage ∂/∂y of a tile while the other half finish the one after it.
    __device__ __forceinline__ void stage_d_y(int tile, int remaining) const {
        if (tile % 2 != map.half) return;
        const int t = tile * TILE + map.row, there = t < remaining ? count() : 0;
        const Pack<T, QUAD> z = load_quad(shared.z, p.z, t, gated ? there : 0);
        const Pack<T, QUAD> d_out = load_quad(shared.d_out, params.d_out, t, there);
        float d_y[QUAD];
#pragma unroll
        for (int c = 0; c < QUAD; c++) d_y[c] = gated ? d_out[c] * silu(z[c]) : d_out[c];
        write_shared(&shared.d_y[map.row][map.column], d_y);
    }

    // What each channel of the thread's quad gets of the sums over its states.
    __device__ __forceinline__ void sum_states(float (&d_delta)[QUAD], float (&d_input)[QUAD], float (&y)[QUAD]) const {
        const int row = map.row, column = map.column;
        // Not unrolled: what is loaded ahead of its use would take more registers than there are.
#pragma unroll 1
        for (int s = 0; s < STATE_LANES; s += 2) {
            float one[2 * QUAD], two[2 * QUAD], one_y[QUAD] = {}, two_y[QUAD] = {};
            read_shared(one, &shared.sums.steps[row][s][StateSums::place(column, s)].x);
            read_shared(two, &shared.sums.steps[row][s + 1][StateSums::place(column, s + 1)].x);
            if (gated) {
                read_shared(one_y, &shared.sums.y[row][s][StateSums::place(column, s)]);
                read_shared(two_y, &shared.sums.y[row][s + 1][StateSums::place(column, s + 1)]);
            }
#pragma unroll
            for (int c = 0; c < QUAD; c++) {
                d_delta[c] += one[2 * c] + two[2 * c];
                d_input[c] += one[2 * c + 1] + two[2 * c + 1];
                y[c] += one_y[c] + two_y[c];
            }
        }
    }

    // Finishes a tile.
    __device__ __forceinline__ void finish(int tile, int remaining) const {
        if (tile % 2 != map.half) return;
        const int t = tile * TILE + map.row, there = t < remaining ? count() : 0;
        // Read again: kept since they were staged, they would take registers from the recurrence.
        const Pack<T, QUAD> u = load_quad(shared.u, p.u, t, there);
        const Pack<T, QUAD> z = load_quad(shared.z, p.z, t, gated ? there : 0);
        const Pack<T, QUAD> d_out = load_quad(shared.d_out, params.d_out, t, there);
        float d_delta[QUAD] = {}, d_input[QUAD] = {}, y[QUAD] = {}, skip[QUAD];
        read_shared(skip, &shared.skips[map.column]);
        const int64_t at = shared.gradients + (t * shared.gradient_step + map.column);
        sum_states(d_delta, d_input, y);
        if (params.partial_sums) carry<false>(params, at, there, d_delta, d_input, y);
        if (!is_last_block(params)) return;
        float d_y[QUAD], d_u[QUAD], d_step[QUAD], d_z[QUAD];
#pragma unroll
        for (int c = 0; c < QUAD; c++) {
            const float gate = z[c], d = d_out[c], s = sigmoid(gate);
            d_y[c] = gated ? d * (gate * s) : d;
            input_gradients<T>(shared.steps[t][map.column + c].x, u[c], skip[c], d_y[c], d * silu_slope(gate, s), d_delta[c],
                               d_input[c], y[c], plus, zoh, d_u[c], d_step[c], d_z[c]);
        }
        if (gated) store_narrowed<T, false>(static_cast<T *>(params.d_z) + at, d_z, there);
        store_narrowed<T, false>(static_cast<T *>(params.d_u) + at, d_u, there);
        store_narrowed<T, false>(static_cast<T *>(params.d_delta) + at, d_step, there);
        if (!there) return;
        const int quad = threadIdx.x % (COLUMNS * TILE);
        float4 &d_skip = shared.d_skip[quad], &d_bias = shared.d_bias[quad];
        d_skip = {fmaf(d_y[0], u[0], d_skip.x), fmaf(d_y[1], u[1], d_skip.y), fmaf(d_y[2], u[2], d_skip.z),
                  fmaf(d_y[3], u[3], d_skip.w)};
        d_bias = {d_bias.x + d_step[0], d_bias.y + d_step[1], d_bias.z + d_step[2], d_bias.w + d_step[3]};
    }

    // Writes the block's sums of ∂B and ∂C over a tile, the warps in order.
    __device__ __forceinline__ void write_projections(int tile, int remaining) const {
#pragma unroll
        for (int k = 0; k < TILE * 2 * STATE_BLOCK / THREADS; k++) {
            const int t = threadIdx.x / (2 * STATE_BLOCK) + k * (THREADS / (2 * STATE_BLOCK));
            const int which = threadIdx.x / STATE_BLOCK % 2, n = threadIdx.x % STATE_BLOCK;
            const int64_t state = first_state + n;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += shared.d_projections[w][t][which][n];
            const int i = tile * TILE + t;
            if (i < remaining && state < p.d_state && params.projections) {
                float *const line = const_cast<float *>(shared.lines.at) + i * shared.lines.step;
                const int64_t all = p.group_blocks * params.steps * params.groups * p.d_state;
                line[which * all + state] = sum;
            }
        }
    }

    // Writes a parameter's gradients: the sums over the threads of each quad, in order.
    __device__ __forceinline__ void write_sums(const float4 (&partials)[COLUMNS * TILE], float *to) const {
        if (!to || threadIdx.x >= block.width) return;
        float sum = 0.0f;
        for (int i = 0; i < TILE; i++) sum += (&partials[i * COLUMNS + threadIdx.x / QUAD].x)[threadIdx.x % QUAD];
        to[blockIdx.y * p.d_inner + block.first + threadIdx.x] = sum;
    }
};

// Goes through a chunk of which `remaining` steps exist: forward, for the states before its tiles, and then back, tile by tile.
template <typename T>
__device__ __forceinline__ void go_through(const Work<T> &work, const Recurrence<T> &recurrence, int remaining,
                                           float (&g)[STATE_VEC], ParameterSums &parameters) {
    Shared<T> &shared = work.shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = (remaining + TILE - 1) / TILE;
    work.stage(remaining);
    work.stage_d_y(tiles - 1, remaining);
    __syncthreads();
    recurrence.find_states(tiles);
    for (int tile = tiles - 1; tile >= 0; tile--) {
        float decays[TILE][STATE_VEC], h[TILE + 1][STATE_VEC];
        recurrence.read_states(h[0], tile);
#pragma unroll
        for (int t = 0; t < TILE; t++) recurrence.advance(tile * TILE + t, decays[t], h[t + 1], h[t]);

        write_shared(&shared.states[tile][threadIdx.x].x, g);
        ChannelSums<T> sums;
        go_back(recurrence, lane, work.gated, remaining, tile, decays, h, g, parameters, sums);
        float totals[2][STATE_VEC];
        sums.total(lane, totals);
        if (!__all_sync(~0u, sums.are_finite(totals))) {
            sum_again(recurrence, lane, tile, sums);
            sums.total(lane, totals);
        }
        const int t = sum_step(lane), which = sum_of_c(lane), first = recurrence.state_group * STATE_VEC;
        write_shared(&shared.d_projections[warp][t][which][first], totals[0]);
        write_shared(&shared.d_projections[warp][4 + t][which][first], totals[1]);
        __syncthreads();
        work.finish(tile, remaining);
        work.write_projections(tile, remaining);
        if (tile > 0) work.stage_d_y(tile - 1, remaining);
        __syncthreads();
    }
}

template <typename T> __device__ __forceinline__ void run(const Backward &params) {
    extern __shared__ float4 memory[];
    Shared<T> &shared = *reinterpret_cast<Shared<T> *>(memory);
    const Inputs &p = params.inputs;
    const bool reverse = p.flags & FLAG_REVERSE, zoh = p.flags & FLAG_ZOH;
    const bool plus = p.flags & FLAG_SOFTPLUS, gated = p.z.data;
    const Block block(p, blockIdx.x, CHANNELS);
    for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
        const bool exists = c < block.width;
        shared.biases[c] = exists ? element_or(p.delta_bias, block.first + c, 0.0f) : 0.0f;
        shared.skips[c] = exists ? element_or(p.d, block.first + c, 0.0f) : 0.0f;
    }
    const int quad = threadIdx.x % (COLUMNS * TILE);
    shared.d_skip[quad] = shared.d_bias[quad] = {};
    __syncthreads();

    const ThreadMap map(threadIdx.x);
    const int first_state = static_cast<int>(params.first_state);
    float a[STATE_VEC], inverse_a[STATE_VEC], constant_b[STATE_VEC] = {}, constant_c[STATE_VEC] = {};
    const Recurrence<T> recurrence{params,           p,   shared, block,     first_state, map.channel,
                                   map.state_group, zoh, a,      inverse_a, constant_b,  constant_c};
    const Work<T> work{params, p, shared, block, map, first_state, reverse, plus, gated, zoh};
    const Lane lane = recurrence.lane();
    lane.parameter<false>(a, p.a);
#pragma unroll
    for (int n = 0; n < STATE_VEC; n++) {
        inverse_a[n] = hold_inverse(a[n]);
        a[n] *= LOG2_E;
    }
    if (p.b.constant) lane.constant(constant_b, p.b);
    if (p.c.constant) lane.constant(constant_c, p.c);
    ParameterSums parameters;

    if (threadIdx.x == 0) shared.next = SegmentIndex(p.segments.per_row);
    for (int64_t index = blockIdx.y; index < p.segments.count; index += gridDim.y) {
        take_segment(shared, p.segments);
        const Segment &segment = shared.segment;
        const Lane lane = recurrence.lane();
        float g[STATE_VEC] = {};
        incoming_grad<sizeof(T) == 4, false>(params, segment, lane, a, g);
        for (int chunk = static_cast<int>((segment.steps - 1) / CHUNK_STEPS); chunk >= 0; chunk--) {
            const int64_t after = segment.steps - int64_t(chunk) * CHUNK_STEPS;
            const int remaining = static_cast<int>(min(after, int64_t(CHUNK_STEPS)));
            if (remaining <= 0) break; // an empty sequence
            if (threadIdx.x == 0) work.locate(segment, chunk);
            __syncthreads();
            go_through(work, recurrence, remaining, g, parameters);
        }
        if (params.d_initial_state && segment.first == 0) {
            const Lane lane = recurrence.lane();
            lane.write(params.d_initial_state + lane.at(p, segment.sequence), g);
        }
    }
    const Lane last = recurrence.lane();
    last.write(params.d_a + last.at(p, blockIdx.y), parameters.a);
    if (params.d_b) last.write(params.d_b + last.at(p, blockIdx.y), parameters.constant_b);
    if (params.d_c) last.write(params.d_c + last.at(p, blockIdx.y), parameters.constant_c);
    __syncthreads();
    work.write_sums(shared.d_skip, params.d_d);
    work.write_sums(shared.d_bias, params.d_bias);
}

#define INSTANCE(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        scan_backward_general_##SUFFIX(const __grid_constant__ Backward params) {                                      \
        run<T>(params);                                                                                                \
    }

INSTANCE(f32, float)
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)

}
