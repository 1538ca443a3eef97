// The selective scan, backward, whatever its inputs: any stride and width, constant B and C, zero-order hold; and on devices
// whose blocks have too little shared memory for backward.cu, which is faster.
#include "backward.cuh"
#include "channel_sums.cuh"

namespace scan::backward_general {

constexpr int COLUMNS = CHANNELS / QUAD, TILES = CHECKPOINT_STEPS / TILE;

// The sums that the lanes of a channel leave for each step. Channels change places with each sub, so that lanes do not
// meet in a bank.
struct Sums {
    float2 steps[TILE][STATE_LANES][CHANNELS];
    float y[TILE][STATE_LANES][CHANNELS];

    static __device__ __forceinline__ int place(int channel, int sub) { return channel ^ sub * 8; }
};

// Where a part's first step lies in a tensor, for the first channel of the block, and the distance of its steps.
struct Place {
    const void *at;
    int64_t step;
};

struct Shared {
    // What all threads need again and again is here, for registers are few: the segment, the places of a part, and the slot
    // of the state before it, negative at the start of a sequence.
    SegmentIndex next;
    Segment segment;
    Place u, delta, z, d_out, b, c, gradients, lines;
    int64_t slot;
    // Δ and Δu (u with zero-order hold) between two checkpoints.
    float2 steps[CHECKPOINT_STEPS][CHANNELS];
    float projections[CHECKPOINT_STEPS][2][STATE_BLOCK];
    // Each lane's states behind each tile but the last; when the next tile is done, the gradient of those instead.
    float4 states[TILES][THREADS];
    // ∂/∂y of a tile.
    float d_y[TILE][CHANNELS];
    Sums sums;
    // Each warp's sums over channels of ∂B and ∂C.
    float d_projections[WARPS][TILE][2][STATE_BLOCK];
    float biases[CHANNELS], skips[CHANNELS];
    // The sums for each quad of a tile, which two threads take turns to add to.
    float4 d_skip[COLUMNS * TILE], d_bias[COLUMNS * TILE];
};

static_assert(sizeof(Shared) == SMEM);

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

template <typename T> __device__ __forceinline__ void run(const Backward &params) {
    constexpr bool ACCURATE = sizeof(T) == 4;
    extern __shared__ float4 memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);

    const Inputs &p = params.inputs;
    const bool reverse = p.flags & FLAG_REVERSE, hold = p.flags & FLAG_ZOH;
    const bool plus = p.flags & FLAG_SOFTPLUS, gated = p.z.data;
    const Block block(p, blockIdx.x, CHANNELS);

    // As a member of a quad: half of the threads take every other tile.
    const int column = threadIdx.x % COLUMNS * QUAD, row = threadIdx.x / COLUMNS % TILE;
    const int half = threadIdx.x / (COLUMNS * TILE);
    const auto count = [&] { return max(0, min(block.width - reload_tid() % COLUMNS * QUAD, QUAD)); };
    for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
        const bool exists = c < block.width;
        shared.biases[c] = exists ? element_or(p.delta_bias, block.first + c, 0.0f) : 0.0f;
        shared.skips[c] = exists ? element_or(p.d, block.first + c, 0.0f) : 0.0f;
    }
    const int quad = threadIdx.x % (COLUMNS * TILE);
    shared.d_skip[quad] = shared.d_bias[quad] = {};
    __syncthreads();

    // As a lane of a channel: lanes that differ in the lowest two bits meet in a sum of the tensor cores, those that differ
    // in the third in neighbouring columns of it.
    const int lane_index = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int sub = lane_index / 8, own = warp * 8 + lane_index % 8;
    const int first_state = static_cast<int>(params.first_state);
    const auto lane_anew = [&] {
        const int thread = reload_tid(), channel = thread / 32 * 8 + thread % 8;
        return Lane(p, block.first + channel, channel < block.width, first_state + thread % 32 / 8 * STATE_VEC);
    };
    float a[STATE_VEC], inverse_a[STATE_VEC], constant_b[STATE_VEC] = {}, constant_c[STATE_VEC] = {};
    const Lane lane = lane_anew();
    lane.parameter<false>(a, p.a);
#pragma unroll
    for (int n = 0; n < STATE_VEC; n++) {
        inverse_a[n] = hold_inverse(a[n]);
        a[n] *= LOG2_E;
    }
    if (p.b.constant) lane.constant(constant_b, p.b);
    if (p.c.constant) lane.constant(constant_c, p.c);
    float d_a[STATE_VEC] = {}, d_constant_b[STATE_VEC] = {}, d_constant_c[STATE_VEC] = {};

    if (threadIdx.x == 0) shared.next = SegmentIndex(p.segments.per_row);
    for (int64_t index = blockIdx.y; index < p.segments.count; index += gridDim.y) {
        take_segment(shared, p.segments);
        const Segment &segment = shared.segment;

        const Lane lane = lane_anew();
        float g[STATE_VEC] = {};
        incoming_grad<ACCURATE, false>(params, segment, lane, a, g);

        for (int part = static_cast<int>((segment.steps - 1) / CHECKPOINT_STEPS); part >= 0; part--) {
            const int left = static_cast<int>(min(segment.steps - int64_t(part) * CHECKPOINT_STEPS,
                                                  int64_t(CHECKPOINT_STEPS)));
            const int tiles = (left + TILE - 1) / TILE;
            if (left <= 0) break; // an empty sequence
            if (threadIdx.x == 0) {
                const int64_t i0 = segment.first + int64_t(part) * CHECKPOINT_STEPS;
                const int64_t i = segment.step(i0, reverse), sign = reverse ? -1 : 1;
                const auto place = [&](const Activation &tensor) {
                    const int64_t at = segment.row * tensor.batch + i * tensor.step + block.first * tensor.channel;
                    return Place{static_cast<const T *>(tensor.data) + at, sign * tensor.step};
                };
                shared.u = place(p.u);
                shared.delta = place(p.delta);
                shared.z = place(p.z);
                shared.d_out = place(params.d_out);
                const auto place_of_projection = [&](const Projection &tensor) {
                    const int64_t at = segment.row * tensor.batch + i * tensor.step + block.group * tensor.group +
                                       first_state * tensor.state;
                    return Place{static_cast<const T *>(tensor.data) + at, sign * tensor.step};
                };
                shared.b = place_of_projection(p.b);
                shared.c = place_of_projection(p.c);
                const int64_t flat = segment.row * p.segments.len, at = (flat + i) * p.d_inner + block.first;
                shared.gradients = {reinterpret_cast<const void *>(at), sign * p.d_inner};
                const int64_t part_of_group = blockIdx.x % static_cast<uint32_t>(p.group_blocks);
                const int64_t lines = (part_of_group * params.steps + flat + i) * params.groups;
                shared.lines = {params.projections + (lines + block.group) * p.d_state,
                                sign * params.groups * p.d_state};
                shared.slot = i0 ? (flat + segment.start) / CHECKPOINT_STEPS + i0 / CHECKPOINT_STEPS - 1 : -1;
            }
            __syncthreads();
            // The quad of a tile's step in an activation.
            const auto load_quad = [&](const Place &place, const Activation &tensor, int i, int there) {
                const T *at = static_cast<const T *>(place.at);
                at += i * place.step + column * tensor.channel;
                return load_vec<T, QUAD, false>(at, tensor.channel, there);
            };

            // Stage what the recurrence reads.
            {
                constexpr int ROWS = THREADS / COLUMNS, FOURS = 2 * STATE_LANES;
                const int first_row = threadIdx.x / COLUMNS;
                // B and C, four states at a time.
                const int which = threadIdx.x / STATE_LANES % 2, four = threadIdx.x % STATE_LANES * STATE_VEC;
                const Projection &projection = which ? p.c : p.b;
                const Place place = which ? shared.c : shared.b;
                const int64_t states = p.d_state - first_state - four;
                const int readable =
                    projection.constant ? 0 : static_cast<int>(max(int64_t(0), min(states, int64_t(STATE_VEC))));
                Pack<T, STATE_VEC> fours[CHECKPOINT_STEPS * FOURS / THREADS];
#pragma unroll
                for (int k = 0; k < CHECKPOINT_STEPS * FOURS / THREADS; k++) {
                    const int t = threadIdx.x / FOURS + k * (THREADS / FOURS);
                    const int64_t distance = place.step;
                    const T *at = static_cast<const T *>(place.at) + t * distance + four * projection.state;
                    fours[k] = load_vec<T, STATE_VEC, false>(at, projection.state, t < left ? readable : 0);
                }
                Pack<T, QUAD> x[CHECKPOINT_STEPS / ROWS], step[CHECKPOINT_STEPS / ROWS];
#pragma unroll
                for (int k = 0; k < CHECKPOINT_STEPS / ROWS; k++) {
                    const int t = first_row + k * ROWS, there = t < left ? count() : 0;
                    x[k] = load_quad(shared.u, p.u, t, there);
                    step[k] = load_quad(shared.delta, p.delta, t, there);
                }
                float bias[QUAD];
                read_shared(bias, &shared.biases[column]);
#pragma unroll
                for (int k = 0; k < CHECKPOINT_STEPS / ROWS; k++) {
                    const bool there = first_row + k * ROWS < left;
                    float staged[2 * QUAD];
#pragma unroll
                    for (int c = 0; c < QUAD; c++) {
                        float delta = step[k][c] + bias[c];
                        if (plus) delta = softplus<T>(delta);
                        staged[2 * c] = there ? delta : 0.0f;
                        staged[2 * c + 1] = hold ? x[k][c] : staged[2 * c] * x[k][c];
                    }
                    write_shared(&shared.steps[first_row + k * ROWS][column].x, staged);
                }
#pragma unroll
                for (int k = 0; k < CHECKPOINT_STEPS * FOURS / THREADS; k++) {
                    const float values[STATE_VEC] = {fours[k][0], fours[k][1], fours[k][2], fours[k][3]};
                    write_shared(&shared.projections[0][0][0] + STATE_VEC * (threadIdx.x + k * THREADS), values);
                }
            }

            // Half of the threads stage a tile while the other half finish the one behind it.
            const auto stage_d_y = [&](int tile) {
                if (tile % 2 != half) return;
                const int i = tile * TILE + row, there = i < left ? count() : 0;
                const Pack<T, QUAD> tile_z = load_quad(shared.z, p.z, i, gated ? there : 0);
                const Pack<T, QUAD> tile_d_out = load_quad(shared.d_out, params.d_out, i, there);
                float d_y[QUAD];
#pragma unroll
                for (int c = 0; c < QUAD; c++) {
                    d_y[c] = gated ? tile_d_out[c] * silu(tile_z[c]) : tile_d_out[c];
                }
                write_shared(&shared.d_y[row][column], d_y);
            };
            stage_d_y(tiles - 1);
            __syncthreads();

            // The states before the part, or before a later tile of it.
            const auto read_states = [&](float(&h)[STATE_VEC], int tile) {
                if (tile > 0) {
                    read_shared(h, &shared.states[tile - 1][threadIdx.x].x);
                } else if (const Lane lane = lane_anew(); shared.slot >= 0) {
                    lane.read(h, params.checkpoints + lane.at(p, shared.slot), 1);
                } else {
                    lane.initial(h, p.initial_state, segment.sequence);
                }
            };
            const auto coefficients = [&](float(&b)[STATE_VEC], int which, int t) {
                read_shared(b, &shared.projections[t][which][sub * STATE_VEC]);
                if ((which ? p.c : p.b).constant) {
#pragma unroll
                    for (int n = 0; n < STATE_VEC; n++) b[n] = which ? constant_c[n] : constant_b[n];
                }
            };
            // What multiplies B: the input, with zero-order hold times (exp(ΔA) - 1)/A.
            const auto weight_of = [&](int n, float delta, float decay) {
                return hold_weight(Decay<true>(delta * a[n], decay).minus_one(), inverse_a[n], delta);
            };
            const auto weighted = [&](int n, float2 in, float decay) {
                return hold ? weight_of(n, in.x, decay) * in.y : in.y;
            };
            // A gradient of the state taken through a decay, see backward.cu.
            const auto decayed = [&](int n, float delta, float decay, float g) {
                return Decay<ACCURATE>(delta * a[n], decay).of(g);
            };
            {
                float h[STATE_VEC];
                read_states(h, 0);
                for (int tile = 0; tile + 1 < tiles; tile++) {
#pragma unroll
                    for (int t = 0; t < TILE; t++) {
                        const float2 in = shared.steps[tile * TILE + t][own];
                        float b[STATE_VEC];
                        coefficients(b, 0, tile * TILE + t);
#pragma unroll
                        for (int n = 0; n < STATE_VEC; n++) {
                            const float decay = exp2_fast(in.x * a[n]);
                            h[n] = fmaf(weighted(n, in, decay), b[n], decay * h[n]);
                        }
                    }
                    shared.states[tile][threadIdx.x] = {h[0], h[1], h[2], h[3]};
                }
            }

            for (int tile = tiles - 1; tile >= 0; tile--) {
                // Forward through the tile, keeping decays and states.
                float decays[TILE][STATE_VEC], h[TILE + 1][STATE_VEC];
                read_states(h[0], tile);
#pragma unroll
                for (int t = 0; t < TILE; t++) {
                    const float2 in = shared.steps[tile * TILE + t][own];
                    float b[STATE_VEC];
                    coefficients(b, 0, tile * TILE + t);
#pragma unroll
                    for (int n = 0; n < STATE_VEC; n++) {
                        decays[t][n] = exp2_fast(in.x * a[n]);
                        h[t + 1][n] = fmaf(weighted(n, in, decays[t][n]), b[n], decays[t][n] * h[t][n]);
                    }
                }

                // And back.
                write_shared(&shared.states[tile][threadIdx.x].x, g);
                float sums[2][2][4] = {}; // half of the tile, pair of states
#pragma unroll
                for (int t = TILE - 1; t >= 0; t--) {
                    const bool exists = tile * TILE + t < left;
                    const float2 in = shared.steps[tile * TILE + t][own];
                    const float d_y = shared.d_y[t][own];
                    float b[STATE_VEC], c[STATE_VEC], terms[2][4], d_delta = 0.0f, d_input = 0.0f, y = 0.0f;
                    coefficients(b, 0, tile * TILE + t);
                    coefficients(c, 1, tile * TILE + t);
#pragma unroll
                    for (int n = 0; n < STATE_VEC; n++) {
                        const float decay = decays[t][n], input = weighted(n, in, decay);
                        y = n ? fmaf(c[n], h[t + 1][n], y) : c[n] * h[t + 1][n];
                        g[n] = fmaf(c[n], d_y, g[n]);
                        const float d_b = g[n] * input, d_c = d_y * h[t + 1][n];
                        terms[n / 2][n % 2] = d_b;
                        terms[n / 2][2 + n % 2] = d_c;
                        add_if(exists, d_constant_b[n], d_b, 1.0f);
                        add_if(exists, d_constant_c[n], d_c, 1.0f);
                        if (hold) {
                            const float weight = weight_of(n, in.x, decay);
                            const float d_weighted = g[n] * b[n], d_weight = d_weighted * in.y;
                            d_input = fmaf(d_weighted, weight, d_input);
                            const float slope =
                                hold_weight_slope(in.x * a[n] * LN_2, inverse_a[n], in.x, weight, decay);
                            add_if(exists, d_a[n], d_weight, slope);
                            // By Δ, which is counted in units of log2(e) here.
                            d_delta = fmaf(d_weight, decay * LOG2_E, d_delta);
                        } else {
                            d_input = n ? fmaf(g[n], b[n], d_input) : g[n] * b[n];
                        }
                        // Through the decay: ∂/∂(ΔA) is that of the state before, times that state.
                        g[n] = decayed(n, in.x, decay, g[n]);
                        const float d_log = g[n] * h[t][n];
                        add_if(exists, d_a[n], in.x, d_log);
                        d_delta = n || hold ? fmaf(a[n], d_log, d_delta) : a[n] * d_log;
                    }
                    const float first = lane_index / 4 == t % 4 ? 1.0f : 0.0f;
                    const float second = lane_index / 4 == 4 + t % 4 ? 1.0f : 0.0f;
                    sum_channels<T>(sums[t / 4][0], terms[0], first, second);
                    sum_channels<T>(sums[t / 4][1], terms[1], first, second);
                    shared.sums.steps[t][sub][Sums::place(own, sub)] = {d_delta, d_input};
                    if (gated) shared.sums.y[t][sub][Sums::place(own, sub)] = y;
                }

                float finite = 0.0f;
#pragma unroll
                for (int k = 0; k < 16; k++) finite = fmaf(sums[k / 8][k / 4 % 2][k % 4], 0.0f, finite);
                if (!__all_sync(~0u, finite == 0.0f)) {
                    // A product of zero and infinity has spread over the columns. Sum each step alone, in the same
                    // way so that the others keep their bits, from the states and gradients at both ends of the tile.
                    float again[STATE_VEC];
                    read_shared(again, &shared.states[tile][threadIdx.x].x);
#pragma unroll 1
                    for (int t = TILE - 1; t >= 0; t--) {
                        float state[STATE_VEC], c[STATE_VEC], d_b[STATE_VEC], d_c[STATE_VEC];
                        read_states(state, tile);
                        float2 in;
#pragma unroll 1
                        for (int s = 0; s <= t; s++) {
                            in = shared.steps[tile * TILE + s][own];
                            float b[STATE_VEC];
                            coefficients(b, 0, tile * TILE + s);
#pragma unroll
                            for (int n = 0; n < STATE_VEC; n++) {
                                const float decay = exp2_fast(in.x * a[n]);
                                state[n] = fmaf(weighted(n, in, decay), b[n], decay * state[n]);
                            }
                        }
                        coefficients(c, 1, tile * TILE + t);
                        const float d_y = shared.d_y[t][own];
#pragma unroll
                        for (int n = 0; n < STATE_VEC; n++) {
                            const float decay = exp2_fast(in.x * a[n]);
                            again[n] = fmaf(c[n], d_y, again[n]);
                            d_b[n] = again[n] * weighted(n, in, decay);
                            d_c[n] = d_y * state[n];
                            again[n] = decayed(n, in.x, decay, again[n]);
                        }
                        const float first = lane_index / 4 == t % 4 ? 1.0f : 0.0f;
                        const float second = lane_index / 4 == 4 + t % 4 ? 1.0f : 0.0f;
#pragma unroll
                        for (int pair = 0; pair < 2; pair++) {
                            float of_b[4] = {}, of_c[4] = {};
                            sum_channels<T>(of_b, {d_b[2 * pair], d_b[2 * pair + 1], 0.0f, 0.0f}, first, second);
                            sum_channels<T>(of_c, {0.0f, 0.0f, d_c[2 * pair], d_c[2 * pair + 1]}, first, second);
                            // Into the column that the step has: its lanes, and the even or the odd of their two.
#pragma unroll
                            for (int k = 0; k < 8; k++) {
                                const bool has = lane_index % 2 == t % 4 / 2 && k % 2 == t % 2 && k / 4 == t / 4;
                                const float one = lane_index % 4 < 2 ? of_b[k % 4] : of_c[k % 4];
                                if (has) sums[k / 4][pair][k % 4] = one;
                            }
                        }
                    }
                }

                // A lane's sums are those of a sub, in two rows, one for each half of the warp's channels; the halves'
                // lanes share the steps. Columns are the steps, first of ∂B and then of ∂C.
                const int upper = lane_index / 4 % 2;
                float totals[2][STATE_VEC];
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    const float(&d)[4] = sums[k / 4][k / 2 % 2];
                    const float even = d[k % 2 * 2], odd = d[k % 2 * 2 + 1];
                    totals[k / 4][k % 4] = (upper ? odd : even) + __shfl_xor_sync(~0u, upper ? even : odd, 4);
                }
                {
                    const int t = lane_index % 2 * 2 + upper, which = lane_index / 2 % 2;
                    float(&to)[TILE][2][STATE_BLOCK] = shared.d_projections[warp];
                    write_shared(&to[t][which][sub * STATE_VEC], totals[0]);
                    write_shared(&to[4 + t][which][sub * STATE_VEC], totals[1]);
                }
                __syncthreads();

                // Finish: what each channel gets of the sums over its states.
                if (tile % 2 == half) {
                    const int i = tile * TILE + row, there = i < left ? count() : 0;
                    const Pack<T, QUAD> x = load_quad(shared.u, p.u, i, there);
                    // Read again: kept since they were staged, they would take registers from the recurrence.
                    const Pack<T, QUAD> tile_z = load_quad(shared.z, p.z, i, gated ? there : 0);
                    const Pack<T, QUAD> tile_d_out = load_quad(shared.d_out, params.d_out, i, there);
                    float d_delta[QUAD] = {}, d_input[QUAD] = {}, y[QUAD] = {}, skip[QUAD];
                    read_shared(skip, &shared.skips[column]);
                    const Place place = shared.gradients;
                    const int64_t distance = place.step;
                    const int64_t at = reinterpret_cast<int64_t>(place.at) + (i * distance + column);
                    // Not unrolled: what is loaded ahead of its use would take more registers than there are.
#pragma unroll 1
                    for (int s = 0; s < STATE_LANES; s += 2) {
                        float one[2 * QUAD], two[2 * QUAD], one_y[QUAD] = {}, two_y[QUAD] = {};
                        read_shared(one, &shared.sums.steps[row][s][Sums::place(column, s)].x);
                        read_shared(two, &shared.sums.steps[row][s + 1][Sums::place(column, s + 1)].x);
                        if (gated) {
                            read_shared(one_y, &shared.sums.y[row][s][Sums::place(column, s)]);
                            read_shared(two_y, &shared.sums.y[row][s + 1][Sums::place(column, s + 1)]);
                        }
#pragma unroll
                        for (int c = 0; c < QUAD; c++) {
                            d_delta[c] += one[2 * c] + two[2 * c];
                            d_input[c] += one[2 * c + 1] + two[2 * c + 1];
                            y[c] += one_y[c] + two_y[c];
                        }
                    }
                    if (params.partial_sums) carry<false>(params, at, there, d_delta, d_input, y);
                    if (is_last_block(params)) {
                        float d_y[QUAD], d_u[QUAD], d_step[QUAD];
                        if (gated) {
                            float d_z[QUAD];
#pragma unroll
                            for (int c = 0; c < QUAD; c++) {
                                const float d_out = tile_d_out[c], z = tile_z[c], s = sigmoid(z);
                                d_z[c] = d_out * silu_slope(z, s) * fmaf(skip[c], x[c], y[c]);
                                d_y[c] = d_out * (z * s);
                            }
                            store_narrowed<T, false>(static_cast<T *>(params.d_z) + at, d_z, there);
                        } else {
#pragma unroll
                            for (int c = 0; c < QUAD; c++) d_y[c] = tile_d_out[c];
                        }
#pragma unroll
                        for (int c = 0; c < QUAD; c++) {
                            const float delta = shared.steps[tile * TILE + row][column + c].x;
                            d_u[c] = fmaf(skip[c], d_y[c], hold ? d_input[c] : d_input[c] * delta);
                            float d = d_delta[c] * LN_2;
                            if (!hold) d = fmaf(d_input[c], x[c], d);
                            if (plus) d *= softplus_slope<T>(delta);
                            d_step[c] = d;
                        }
                        store_narrowed<T, false>(static_cast<T *>(params.d_u) + at, d_u, there);
                        store_narrowed<T, false>(static_cast<T *>(params.d_delta) + at, d_step, there);
                        if (there) {
                            float4 &d_skip = shared.d_skip[quad], &d_bias = shared.d_bias[quad];
                            d_skip = {fmaf(d_y[0], x[0], d_skip.x), fmaf(d_y[1], x[1], d_skip.y),
                                      fmaf(d_y[2], x[2], d_skip.z), fmaf(d_y[3], x[3], d_skip.w)};
                            d_bias = {d_bias.x + d_step[0], d_bias.y + d_step[1], d_bias.z + d_step[2],
                                      d_bias.w + d_step[3]};
                        }
                    }
                }
                // The block's sums of ∂B and ∂C, the warps in order.
#pragma unroll
                for (int k = 0; k < TILE * 2 * STATE_BLOCK / THREADS; k++) {
                    const int t = threadIdx.x / (2 * STATE_BLOCK) + k * (THREADS / (2 * STATE_BLOCK));
                    const int which = threadIdx.x / STATE_BLOCK % 2, n = threadIdx.x % STATE_BLOCK;
                    const int64_t state = first_state + n;
                    float sum = 0.0f;
#pragma unroll
                    for (int w = 0; w < WARPS; w++) sum += shared.d_projections[w][t][which][n];
                    const int i = tile * TILE + t;
                    if (i < left && state < p.d_state && params.projections) {
                        const Place place = shared.lines;
                        float *line = static_cast<float *>(const_cast<void *>(place.at)) + i * place.step;
                        const int64_t all = p.group_blocks * params.steps * params.groups * p.d_state;
                        line[which * all + state] = sum;
                    }
                }
                if (tile > 0) stage_d_y(tile - 1);
                __syncthreads();
            }
        }
        if (params.d_initial_state && segment.first == 0) {
            const Lane lane = lane_anew();
            lane.write(params.d_initial_state + lane.at(p, segment.sequence), g);
        }
    }
    const Lane last = lane_anew();
    last.write(params.d_a + last.at(p, blockIdx.y), d_a);
    if (params.d_b) last.write(params.d_b + last.at(p, blockIdx.y), d_constant_b);
    if (params.d_c) last.write(params.d_c + last.at(p, blockIdx.y), d_constant_c);

    // Sums over the threads of a quad, in order.
    __syncthreads();
    const auto sum_quads = [&](const float4(&parts)[COLUMNS * TILE], float *to) {
        if (!to || threadIdx.x >= block.width) return;
        float sum = 0.0f;
        for (int i = 0; i < TILE; i++) {
            sum += (&parts[i * COLUMNS + threadIdx.x / QUAD].x)[threadIdx.x % QUAD];
        }
        to[blockIdx.y * p.d_inner + block.first + threadIdx.x] = sum;
    };
    sum_quads(shared.d_skip, params.d_d);
    sum_quads(shared.d_bias, params.d_bias);
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
