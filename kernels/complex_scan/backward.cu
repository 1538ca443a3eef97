// The scan with complex states, backward. It needs nothing from a forward pass: a block goes forward through a sequence, keeping
// the states before each chunk of CHECKPOINT_STEPS steps, and then back, chunk by chunk and tile by tile, finding the states of a
// chunk again.
//
// Slopes by a complex number are those by its real and by its imaginary part: where y = w x, that by x is that by y times the
// conjugate of w.
#include "block.cuh"

namespace complex_scan::backward {

struct Shared {
    Tile tile;
    double d_y[TILE][CHANNELS];
    StateSums d_u, d_delta, y;
    // Each thread's states before the tiles of a chunk, but for the first.
    Number<double> states[CHECKPOINT_STEPS / TILE - 1][THREADS];
    // The terms of ∂B and ∂C, in a row for each real number of a step; rows do not meet in a bank.
    float terms[TILE][4][THREADS + 1];
};
static_assert(sizeof(Shared) == SMEM);

// What a thread works on, and with.
template <typename T> struct Work {
    const Backward &params;
    const Inputs &p;
    Shared &shared;
    const Block &block;
    const ThreadMap &map;
    const Carried &carried;
    const Segment &segment;
    const int64_t &round;

    __device__ __forceinline__ bool reverse() const { return p.flags & FLAG_REVERSE; }
    // Whether sums over channels are wanted.
    __device__ __forceinline__ bool varies() const { return !p.b.constant || !p.c.constant; }
    // Steps of the tile from step `first` on.
    __device__ __forceinline__ int count(int64_t first) const {
        return static_cast<int>(min(int64_t(TILE), segment.steps - first));
    }
    __device__ __forceinline__ Step step(int t) const { return shared.tile.steps[t][map.channel]; }
    // The state before a chunk, where the block keeps it.
    __device__ __forceinline__ double *checkpoint(int64_t chunk) const {
        const int64_t of_block = int64_t(blockIdx.y) * gridDim.x + blockIdx.x;
        return params.checkpoints + ((of_block * params.chunks + chunk - 1) * THREADS + threadIdx.x) * 2;
    }
    __device__ __forceinline__ Number<double> before_chunk(int64_t chunk) const {
        if (chunk == 0) return carried.read(p.initial_state, segment.sequence);
        const double *const from = checkpoint(chunk);
        return {from[0], from[1]};
    }

    // Carries the state through a tile.
    __device__ __forceinline__ void advance(int64_t first, Number<double> &h) const {
        Staged::stage<T>(p, block, map, segment, first, shared.tile);
        __syncthreads();
        for (int t = 0; carried.exists && t < TILE; t++) {
            const Number<double> b = number_of<T>(p.b, carried.place(segment, first + t, reverse()), carried.n);
            h = step(t).advance(step(t).decay(carried.a), h, b);
        }
        __syncthreads();
    }
    // Forward through all chunks but the last, for the states before chunks.
    __device__ __forceinline__ void find_checkpoints() const {
        Number<double> h = before_chunk(0);
        for (int64_t chunk = 1; chunk * CHECKPOINT_STEPS < segment.steps; chunk++) {
            for (int tile = 0; tile < CHECKPOINT_STEPS / TILE; tile++) {
                advance((chunk - 1) * CHECKPOINT_STEPS + tile * TILE, h);
            }
            double *const to = checkpoint(chunk);
            to[0] = h.re, to[1] = h.im;
        }
    }
};

// What a thread sums up over the steps that it carries its state through.
struct ParameterSums {
    Number<double> a = {0, 0}, b = {0, 0}, c = {0, 0};
};
// And over those that it finishes.
struct ChannelSums {
    double skip = 0, bias = 0;
};

// What a thread finishes: a step with the slope that comes in.
struct Finished {
    Staged staged;
    double d_out, z, d_y;
};

template <typename T> __device__ __forceinline__ Finished stage(const Work<T> &work, int64_t first) {
    Finished step{Staged::stage<T>(work.p, work.block, work.map, work.segment, first, work.shared.tile), 0, 0, 0};
    if (step.staged.exists) {
        step.d_y = step.d_out = element<T>(work.params.d_out, step.staged.place);
        if (work.p.z.data) {
            step.z = element<T>(work.p.z, step.staged.place);
            step.d_y *= step.z * sigmoid(step.z);
        }
        work.shared.d_y[work.map.step][work.map.column] = step.d_y;
    }
    return step;
}

// Back through step `t` of a tile: the slope `d_h` by the state after it becomes that by the state before it. The terms of
// sums over states and over channels are left in shared memory.
template <typename T>
__device__ __forceinline__ void step_back(const Work<T> &work, int t, const Place &at, Number<double> before,
                                          Number<double> after, Number<double> decay, Number<double> &d_h,
                                          ParameterSums &sums) {
    const auto [delta, u] = work.step(t);
    const double twice = 2.0 * work.shared.d_y[t][work.map.channel];
    double d_u = 0, d_delta = 0, y = 0;
    Number<double> d_b = {0, 0}, d_c = {0, 0};
    if (work.carried.exists) {
        const Number<double> b = number_of<T>(work.p.b, at, work.carried.n), c = number_of<T>(work.p.c, at, work.carried.n);
        y = real_product(c, after);
        d_h = d_h + c.conj() * twice;
        d_c = after.conj() * twice;
        d_b = d_h * (delta * u);
        const double through_input = real_product(d_h, b.conj());
        d_u = through_input * delta;
        d_h = d_h * decay.conj();
        const Number<double> d_exponent = d_h * before.conj();
        d_delta = fma(through_input, u, real_product(d_exponent, work.carried.a.conj()));
        sums.a = sums.a + d_exponent * delta;
        sums.b = sums.b + d_b;
        sums.c = sums.c + d_c;
    }
    work.shared.d_u.add(work.map, t, d_u);
    work.shared.d_delta.add(work.map, t, d_delta);
    if (work.p.z.data) work.shared.y.add(work.map, t, y);
    if (work.varies()) {
        float(&terms)[4][THREADS + 1] = work.shared.terms[t];
        terms[0][threadIdx.x] = static_cast<float>(d_b.re), terms[1][threadIdx.x] = static_cast<float>(d_b.im);
        terms[2][threadIdx.x] = static_cast<float>(d_c.re), terms[3][threadIdx.x] = static_cast<float>(d_c.im);
    }
}

// Writes the slopes of a step.
template <typename T>
__device__ __forceinline__ void finish(const Work<T> &work, const Finished &step, ChannelSums &sums) {
    if (!step.staged.exists) return;
    const Inputs &p = work.p;
    const auto [delta, u] = step.staged.read.step;
    const int64_t at = step.staged.at(p), channel = step.staged.place.channel;
    const auto write = [&](void *to, double x) { static_cast<T *>(to)[at] = narrow<T>(static_cast<float>(x)); };
    double d_u = work.shared.d_u.of(work.map);
    if (p.d.data) d_u = fma(static_cast<double>(element_or(p.d, channel, 0.0f)), step.d_y, d_u);
    const double d_delta = work.shared.d_delta.of(work.map) * step.staged.read.slope;
    write(work.params.d_u, d_u);
    write(work.params.d_delta, d_delta);
    if (p.z.data) {
        const double y = with_skip(work.shared.y.of(work.map), p.d, channel, u), s = sigmoid(step.z);
        write(work.params.d_z, step.d_out * y * (s * fma(step.z, 1.0 - s, 1.0)));
    }
    sums.skip = fma(step.d_y, u, sums.skip);
    sums.bias += d_delta;
}

// Adds a tile's terms of ∂B and ∂C, over the channels in order, to what the rounds before have left of the part.
template <typename T> __device__ __forceinline__ void add_projections(const Work<T> &work, int64_t first, int count) {
    const Inputs &p = work.p;
    const int shift = static_cast<int>(p.lane_shift), all = count * 4 << shift;
    for (int k = threadIdx.x; k < all; k += THREADS) {
        const int n = k & (work.map.lanes - 1), row = k >> shift & 3, t = k >> (shift + 2);
        const bool of_c = row / 2;
        if (n >= p.d_state || (of_c ? p.c : p.b).constant) continue;
        double sum = 0;
        for (int c = 0; c < work.map.channels; c++) sum += work.shared.terms[t][row][(c << shift) + n];
        const int64_t step = work.segment.row * p.segments.len + work.segment.step(first + t, work.reverse());
        const int64_t line = (work.block.part * work.params.steps + step) * work.params.groups + work.block.group;
        float *const to = (of_c ? work.params.of_c : work.params.of_b) + (line * p.d_state + n) * 2 + row % 2;
        // The same thread as in the round before.
        *to = static_cast<float>(work.round ? *to + sum : sum);
    }
}

// Back through a tile from whose first step on the state before is `h`.
template <typename T>
__device__ __forceinline__ void go_back(const Work<T> &work, int64_t first, Number<double> h, Number<double> &d_h,
                                        ParameterSums &parameters, ChannelSums &channels) {
    const int count = work.count(first);
    const Finished step = stage(work, first);
    __syncthreads();
    Number<double> states[TILE + 1] = {h}, decays[TILE];
#pragma unroll
    for (int t = 0; t < TILE; t++) {
        if (work.carried.exists && t < count) {
            const Number<double> b =
                number_of<T>(work.p.b, work.carried.place(work.segment, first + t, work.reverse()), work.carried.n);
            decays[t] = work.step(t).decay(work.carried.a);
            states[t + 1] = work.step(t).advance(decays[t], states[t], b);
        } else {
            decays[t] = {0, 0}, states[t + 1] = {0, 0};
        }
    }
#pragma unroll
    for (int t = TILE - 1; t >= 0; t--) {
        if (t >= count) continue;
        const Place at = work.carried.place(work.segment, first + t, work.reverse());
        step_back(work, t, at, states[t], states[t + 1], decays[t], d_h, parameters);
    }
    __syncthreads();
    finish(work, step, channels);
    if (work.varies()) add_projections(work, first, count);
}

// Goes through a sequence and back.
template <typename T>
__device__ __forceinline__ void go_through(const Work<T> &work, ParameterSums &parameters, ChannelSums &channels) {
    const Segment &segment = work.segment;
    Shared &shared = work.shared;
    work.find_checkpoints();
    Number<double> d_h = work.carried.read(work.params.d_final_state, segment.sequence);
    for (int64_t chunk = (segment.steps + CHECKPOINT_STEPS - 1) / CHECKPOINT_STEPS - 1; chunk >= 0; chunk--) {
        const int64_t first = chunk * CHECKPOINT_STEPS;
        const int64_t steps = min(segment.steps - first, int64_t(CHECKPOINT_STEPS));
        const int tiles = static_cast<int>((steps + TILE - 1) / TILE);
        const Number<double> before = work.before_chunk(chunk);
        Number<double> h = before;
        for (int tile = 0; tile + 1 < tiles; tile++) {
            work.advance(first + tile * TILE, h);
            shared.states[tile][threadIdx.x] = h;
        }
        for (int tile = tiles - 1; tile >= 0; tile--) {
            h = tile > 0 ? shared.states[tile - 1][threadIdx.x] : before;
            go_back(work, first + tile * TILE, h, d_h, parameters, channels);
        }
    }
    float *const to = work.params.d_initial_state;
    if (to && work.carried.exists) write(to + work.carried.at(work.p, segment.sequence), d_h);
}

// Writes what the row of blocks has summed up for the gradients of parameters.
__device__ __forceinline__ void write_sums(const Backward &params, Shared &shared, const Block &block, const ThreadMap &map,
                                           const Carried &carried, const ParameterSums &parameters,
                                           const ChannelSums &channels) {
    const Inputs &p = params.inputs;
    const int64_t row = blockIdx.y;
    if (carried.exists) {
        write(params.d_a + carried.at(p, row), parameters.a);
        if (params.d_b) write(params.d_b + carried.at(p, row), parameters.b);
        if (params.d_c) write(params.d_c + carried.at(p, row), parameters.c);
    }
    __syncthreads();
    // The sums over the steps of a tile, in order.
    const auto sum_steps = [&](float *to, double of_thread) {
        if (!to) return;
        if (map.step < TILE) shared.d_y[map.step][map.column] = of_thread;
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < block.width) {
            double sum = 0;
            for (int t = 0; t < TILE; t++) sum += shared.d_y[t][threadIdx.x];
            to[row * p.d_inner + block.first + threadIdx.x] = static_cast<float>(sum);
        }
        __syncthreads();
    };
    sum_steps(params.d_d, channels.skip);
    sum_steps(params.d_bias, channels.bias);
}

template <typename T> __device__ __forceinline__ void run(const Backward &params) {
    extern __shared__ double2 memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const Inputs &p = params.inputs;
    const ThreadMap map(threadIdx.x, p.lane_shift);
    for (int64_t round = 0; round < p.rounds; round++) {
        const Block block(p, blockIdx.x, round);
        // The last part may have fewer channels.
        if (block.width == 0) break;
        const Carried carried(p, block, map);
        ParameterSums parameters;
        ChannelSums channels;
        for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
            const Segment segment = segment_at(p.segments, at);
            const Work<T> work{params, p, shared, block, map, carried, segment, round};
            go_through(work, parameters, channels);
        }
        write_sums(params, shared, block, map, carried, parameters, channels);
    }
}

#define INSTANCE(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) complex_scan_backward_##SUFFIX(                              \
        const __grid_constant__ Backward params) {                                                                     \
        run<T>(params);                                                                                                \
    }

INSTANCE(f32, float)
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)

}
