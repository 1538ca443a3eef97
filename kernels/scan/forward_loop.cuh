// How the forward kernels go through segments, tile by tile. They differ in how B and C come in and how states are advanced, which
// is a struct of theirs, `Recurrence`: forward.cuh and forward_general.cuh have one each.
#pragma once
#include "forward_tile.cuh"

namespace scan::forward {

// The quad of a block's channels that a thread stages and finishes. Where all quads are whole, one that does not exist reads the
// last that does, and writes nothing.
template <typename Form> struct ChannelQuad : QuadMap<Form::THREADS, Form::CHANNELS_PER_LANE> {
    int count;
    int64_t d0;

    __device__ __forceinline__ explicit ChannelQuad(const Block &block)
        : QuadMap<Form::THREADS, Form::CHANNELS_PER_LANE>(threadIdx.x), count(max(0, min(block.width - this->column, QUAD))),
          d0(block.first + (Form::VECTOR ? min(this->column, block.width - QUAD) : this->column)) {}
};

// The biases and D of a block's channels: requested when this is made, and waited for when the first tile's loads are under way as
// well.
template <typename Form> struct ChannelVectors {
    static constexpr int CHANNELS = Form::CHANNELS, THREADS = Form::THREADS, COUNT = (2 * CHANNELS + THREADS - 1) / THREADS;
    float values[COUNT];

    __device__ __forceinline__ ChannelVectors(const Inputs &p, const Block &block) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const int i = threadIdx.x + k * THREADS, c = i % CHANNELS;
            const Vector &from = i < CHANNELS ? p.delta_bias : p.d;
            values[k] = i < 2 * CHANNELS && c < block.width ? element_or(from, block.first + c, 0.0f) : 0.0f;
        }
    }
    __device__ __forceinline__ void write(typename Form::OfChannels &to) const {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            const int i = threadIdx.x + k * THREADS;
            if (i < 2 * CHANNELS) to[i / CHANNELS][i % CHANNELS] = values[k];
        }
    }
};

// Walks the activations of a segment for the quads that a thread stages and finishes, a tile at a time.
template <typename Form> struct ActivationWalk {
    using T = typename Form::T;
    static constexpr int QUADS = Form::QUADS, ROWS = Form::ROWS;
    const ChannelQuad<Form> &quad;
    Walk<T, Form::VECTOR> u, delta, z;
    T *out;
    typename Distance<Form::VECTOR>::type out_step;

    // Of the thread's steps in a tile.
    using Packs = Pack<T, QUAD>[QUADS];

    __device__ __forceinline__ ActivationWalk(const Forward &params, const Segment &segment, const ChannelQuad<Form> &quad,
                                              bool reverse)
        : quad(quad), u(params.inputs.u, segment, segment.first + quad.row, quad.d0, reverse),
          delta(params.inputs.delta, segment, segment.first + quad.row, quad.d0, reverse),
          z(params.inputs.z, segment, segment.first + quad.row, quad.d0, reverse) {
        const Inputs &p = params.inputs;
        out = static_cast<T *>(params.out) +
              (segment.row * p.segments.len + segment.step(segment.first + quad.row, reverse)) * p.d_inner + quad.d0;
        out_step = reverse ? -p.d_inner : p.d_inner;
        opaque(out_step);
    }

    // The channels that are read of a step.
    __device__ __forceinline__ int count() const { return Form::VECTOR ? QUAD : quad.count; }
    // Puts the loads in flight of what is staged of a tile, of which `left` steps exist if it is `ragged`.
    template <bool RAGGED>
    __device__ __forceinline__ void load_next(Packs &next_u, Packs &next_delta, BoolConstant<RAGGED> ragged, int left) const {
#pragma unroll
        for (int k = 0; k < QUADS; k++) {
            const int there = !ragged || quad.row + k * ROWS < left ? count() : 0;
            next_u[k] = u.load(k * ROWS, there);
            next_delta[k] = delta.load(k * ROWS, there);
        }
    }
    // And of the gate, which is wanted when the tile is finished; this goes on to the next tile.
    template <bool RAGGED>
    __device__ __forceinline__ void load_gate(Packs &to, bool gated, BoolConstant<RAGGED> ragged, int left) {
#pragma unroll
        for (int k = 0; k < QUADS; k++) {
            to[k] = z.load(k * ROWS, gated && (!ragged || quad.row + k * ROWS < left) ? count() : 0);
        }
        z.advance(Form::STEPS);
    }
};

// The states that a lane carries: in each block of 16, four of each of its channels.
template <typename Form> struct CarriedStates {
    static constexpr int CHANNELS_PER_LANE = Form::CHANNELS_PER_LANE;
    const Inputs &p;
    const Block &block;
    const LaneMap<Form::THREADS, CHANNELS_PER_LANE> map;
    const int state_blocks;
    float *const parked;
    const bool from_zero;
    // Where states are kept for backward, if they are, and the sequence's first step among those of all batch rows.
    float *const checkpoints;
    int64_t start_of_sequence = 0;

    // Those of one block of 16, log2(e) A, and what rounding has taken from the states where they are compensated. Apart from the
    // numbers above: arrays that loops go through would keep these out of registers until the loops are unrolled, which is late.
    struct Held {
        float h[CHANNELS_PER_LANE][STATE_VEC], a[CHANNELS_PER_LANE][STATE_VEC], lost[CHANNELS_PER_LANE][STATE_VEC];
    };

    __device__ __forceinline__ CarriedStates(const Inputs &p, const Block &block, float4 *parking, float *checkpoints)
        : p(p), block(block), map(threadIdx.x),
          state_blocks(Form::PARKED ? static_cast<int>((p.d_state + STATE_BLOCK - 1) / STATE_BLOCK) : 1),
          parked(reinterpret_cast<float *>(parking + threadIdx.x)),
          from_zero(Form::CHUNK_STATE || (!p.initial_state.data && !p.chunk_states)), checkpoints(checkpoints) {}

    __device__ __forceinline__ Lane lane(int c, int state_block) const {
        return Lane(p, block.first + map.channel + c, map.channel + c < block.width,
                    state_block * STATE_BLOCK + map.state_group * STATE_VEC);
    }
    __device__ __forceinline__ void read_rates(Held &held, int state_block) const {
        scan::read_rates<Form::VECTOR>(held.a, [&](int c) { return lane(c, state_block); }, p.a);
    }
    __device__ __forceinline__ void park(const Held &held, int state_block) const {
        if (Form::PARKED) write_shared(parked + state_block * Form::THREADS * STATE_VEC, held.h[0]);
    }
    __device__ __forceinline__ void fetch(Held &held, int state_block) const {
        if (Form::PARKED) read_shared(held.h[0], parked + state_block * Form::THREADS * STATE_VEC);
    }
    // Has those before a segment held, or parked.
    __device__ __forceinline__ void start(Held &held, const Segment &segment) const {
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) {
#pragma unroll
            for (int n = 0; n < STATE_VEC; n++) held.lost[c][n] = 0.0f;
        }
        for (int state_block = 0; state_block < state_blocks; state_block++) {
            if (Form::PARKED) read_rates(held, state_block);
            if (from_zero) {
#pragma unroll
                for (int c = 0; c < CHANNELS_PER_LANE; c++) {
#pragma unroll
                    for (int n = 0; n < STATE_VEC; n++) held.h[c][n] = 0.0f;
                }
            } else {
#pragma unroll
                for (int c = 0; c < CHANNELS_PER_LANE; c++) {
                    incoming_state<Form::ACCURATE, Form::VECTOR>(p, segment, lane(c, state_block), held.a[c], held.h[c]);
                }
            }
            park(held, state_block);
        }
    }
    // Keeps a block's states, which are held, for backward: those before step `i` of the sequence.
    __device__ __forceinline__ void keep(const Held &held, int state_block, int64_t i) const {
        if (!checkpoints) return;
        const int64_t slot = checkpoint_slot(p, start_of_sequence, i);
#pragma unroll
        for (int c = 0; c < CHANNELS_PER_LANE; c++) {
            const Lane of_channel = lane(c, state_block);
            of_channel.template write_dense<Form::VECTOR>(checkpoints + of_channel.at(p, slot), held.h[c]);
        }
    }
    // Calls `write` with each of the channels and its states, block by block.
    template <typename Write> __device__ __forceinline__ void for_each(Held &held, const Write &write) const {
        for (int state_block = 0; state_block < state_blocks; state_block++) {
            fetch(held, state_block);
#pragma unroll
            for (int c = 0; c < CHANNELS_PER_LANE; c++) write(lane(c, state_block), held.h[c]);
        }
    }
};

// Carries a block's channels through one segment after another. A `Recurrence` is made for each segment, and is told when the loads
// for a segment's first tile, a ragged tile and the next tile are to be put in flight, when a tile is staged, and when to move on.
template <typename Recurrence> __device__ __forceinline__ void run(const Forward &params) {
    using Form = typename Recurrence::Form;
    using T = typename Form::T;
    constexpr int STEPS = Form::STEPS, ROWS = Form::ROWS, QUADS = Form::QUADS;
    constexpr bool CHUNK_STATE = Form::CHUNK_STATE;
    __shared__ typename Form::Steps staged;
    __shared__ typename Form::Outputs outputs;
    __shared__ alignas(16) typename Form::Projections projections;
    __shared__ alignas(16) typename Form::OfChannels of_channels;
    extern __shared__ float4 parking[];

    const Inputs &p = params.inputs;
    const bool reverse = p.flags & FLAG_REVERSE, plus = p.flags & FLAG_SOFTPLUS, gated = p.z.data;
    const bool zoh = Recurrence::ZOH && p.flags & FLAG_ZOH;
    const Block block(p, blockIdx.x, Form::CHANNELS);
    const ChannelQuad<Form> quad(block);
    const ChannelVectors<Form> vectors(p, block);
    bool is_first = true;
    CarriedStates<Form> states(p, block, parking, params.checkpoints);
    typename CarriedStates<Form>::Held held;
    // A tile may have more steps than lie between two kept states: it keeps those within it. (A number of its own would be one too
    // many in registers.)
    const auto span = [&] { return max(checkpoint_steps(p), STEPS); };

    for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
        const Segment segment = segment_at(p.segments, at);
        if (CHUNK_STATE && segment.ends_sequence()) continue;
        const int64_t end = segment.first + segment.steps;
        states.start_of_sequence = segment.row * p.segments.len + segment.start;
        ActivationWalk<Form> activations(params, segment, quad, reverse);
        Recurrence recurrence(p, segment, block, zoh);
        Pack<T, QUAD> next_u[QUADS], next_delta[QUADS];
        const auto load_first = [&](auto ragged, int left) {
            activations.load_next(next_u, next_delta, ragged, left);
            recurrence.template load_first<ragged.value>(left);
        };
        int64_t whole = segment.steps / STEPS;
        if (whole > 0) load_first(BoolConstant<false>(), STEPS);
        if (is_first) {
            if (!Form::PARKED) states.read_rates(held, 0);
            vectors.write(of_channels);
            __syncthreads();
            is_first = false;
        }
        [[maybe_unused]] DeltaSum delta_sum;
        states.start(held, segment);

        // Takes the tile from step `i` on, `left` steps of it if it is `ragged`, whose loads are under way, through its phases, and
        // has the tile after it loaded if there are `more` whole ones.
        const auto tile = [&](auto ragged, int64_t i, int left, bool more) {
            Pack<T, QUAD> tile_u[QUADS], tile_z[QUADS];
            float bias[QUAD];
            read_shared(bias, &of_channels[0][quad.column]);
            stage<T, ROWS, CHUNK_STATE>(staged, delta_sum, tile_u, next_u, next_delta, bias, quad.row, quad.column, plus, zoh,
                                        ragged, left);
            recurrence.stage(projections);
            if (!CHUNK_STATE) activations.load_gate(tile_z, gated, ragged, left);
            activations.u.advance(STEPS);
            activations.delta.advance(STEPS);
            recurrence.move_on();
            if (more) {
                activations.load_next(next_u, next_delta, BoolConstant<false>(), STEPS);
                recurrence.template load_next<false>(STEPS);
            }
            recurrence.template advance_tile<ragged.value>(staged, projections, outputs, states, held, i, left, more);
            __syncthreads();
            if constexpr (!CHUNK_STATE) {
                float skip[QUAD];
                read_shared(skip, &of_channels[1][quad.column]);
                finish<T, ROWS, Form::VECTOR>(outputs, activations.out, activations.out_step, tile_u, tile_z, skip, quad.row,
                                              quad.column, gated, ragged, left, quad.count);
                activations.out += STEPS * activations.out_step;
            }
        };

        // Whole tiles, those between two checkpoints together, then what is left.
        for (int64_t i = segment.first; i < end; i += span()) {
            if (!CHUNK_STATE && i > 0) {
                for (int state_block = 0; state_block < states.state_blocks; state_block++) {
                    states.fetch(held, state_block);
                    states.keep(held, state_block, i);
                }
            }
            const int tiles = static_cast<int>(min(whole, int64_t(span() / STEPS)));
            whole -= tiles;
            for (int k = 0; k < tiles; k++) {
                tile(BoolConstant<false>(), i + k * STEPS, STEPS, k + 1 < tiles || whole > 0);
            }
            const int64_t rest = i + tiles * STEPS;
            if (tiles < span() / STEPS && rest < end) {
                const int left = static_cast<int>(end - rest);
                load_first(BoolConstant<true>(), left);
                tile(BoolConstant<true>(), rest, left, false);
            }
        }

        if constexpr (CHUNK_STATE) {
            float *const to = p.delta_sums + segment.index * p.d_inner + quad.d0;
            delta_sum.write<Form::COLUMNS, Form::THREADS>(&staged.data[0][0][0][0], to, quad.count);
        }
        states.for_each(held, [&](const Lane &lane, const float(&h)[STATE_VEC]) {
            if constexpr (CHUNK_STATE) {
                lane.write_dense<Form::VECTOR>(p.chunk_states + lane.at(p, segment.index), h);
            } else if (params.final_state && segment.ends_sequence()) {
                lane.write(params.final_state + lane.at(p, segment.sequence), h);
            }
        });
    }
}

}
