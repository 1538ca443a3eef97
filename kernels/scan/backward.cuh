// What the kernels of the backward scan share.
#pragma once
#include "../common/async.cuh"
#include "tile.cuh"

namespace scan {

// Whether this launch takes the last block of 16 states.
__device__ __forceinline__ bool is_last_block(const Backward &params) {
    return params.first_state + STATE_BLOCK >= params.inputs.d_state;
}

// Adds to what a quad's channels get of the sums over their states that of the blocks of states before, and hands it on if there
// is one to come. `at` is the quad's place in a dense activation, of which `count` channels exist.
template <bool VECTOR>
__device__ __forceinline__ void carry(const Backward &params, int64_t at, int count, float (&d_delta)[QUAD],
                                      float (&d_input)[QUAD], float (&y)[QUAD]) {
    float *const carried = params.partial_sums + 3 * at;
    const auto sum = [&](int which, float (&sums)[QUAD]) {
        float *const of_quad = carried + which * (VECTOR ? QUAD : count);
        if (params.first_state > 0) {
            const Pack<float, QUAD> before = load_vec<float, QUAD, VECTOR>(of_quad, 1, count);
#pragma unroll
            for (int c = 0; c < QUAD; c++) sums[c] += before[c];
        }
        if (!is_last_block(params)) store_narrowed<float, VECTOR>(of_quad, sums, count);
    };
    sum(0, d_delta);
    sum(1, d_input);
    if (params.inputs.z.data) sum(2, y);
}

// Prefetches to L2 what `carry` reads for the quad of channels at `at`.
__device__ __forceinline__ void prefetch_partial_sums(const Backward &params, int64_t at) {
    if (params.first_state == 0) return;
    const float *const carried = params.partial_sums + 3 * at;
    prefetch(carried);
    prefetch(carried + 2 * QUAD);
}

// Adds x y to a sum if it is `wanted`, by predicate and not by a factor: past the end of a sequence zero times an infinite
// state would be NaN.
__device__ __forceinline__ void add_if(bool wanted, float &sum, float x, float y) {
    asm("{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %3, 0;\n@wanted fma.rn.f32 %0, %1, %2, %0;\n}"
        : "+f"(sum)
        : "f"(x), "f"(y), "r"(static_cast<int>(wanted)));
}

// Leaves the block's next segment in shared memory, for all of its threads.
template <typename Shared> __device__ __forceinline__ void take_segment(Shared &shared, const Segments &segments) {
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.segment = segment_at(segments, shared.next);
        shared.next.next(segments.per_row);
    }
    __syncthreads();
}

// The gradients of a step's u, Δ and z in one channel, of which `d_y` is ∂/∂y, `to_d_z` ∂out ∂silu(z)/∂z, and `d_delta`,
// `d_input` and `y` are the sums over states: of ∂/∂Δ through the decays, in units of log2(e), of ∂/∂(Δu), or with zero-order
// hold (`zoh`) ∂/∂u, and of y.
template <typename T>
__device__ __forceinline__ void input_gradients(float delta, float u, float skip, float d_y, float to_d_z, float d_delta,
                                                float d_input, float y, bool plus, bool zoh, float &to_u, float &to_delta,
                                                float &to_z) {
    const float slope = softplus_slope<T>(delta);
    to_z = to_d_z * fmaf(skip, u, y);
    to_u = fmaf(skip, d_y, zoh ? d_input : d_input * delta);
    const float through_decays = d_delta * LN_2;
    to_delta = (zoh ? through_decays : fmaf(d_input, u, through_decays)) * (plus ? slope : 1.0f);
}

// Where a chunk's first step lies in a tensor, for the first channel of the block, and the distance of its steps.
template <typename T> struct Place {
    const T *at;
    int64_t step;

    // Of step `i` of the batch row and channel `d`; the steps go on in the direction of `sign`. Channels are contiguous if the
    // kernel is for such tensors (`VECTOR`).
    template <bool VECTOR>
    static __device__ __forceinline__ Place of(const Activation &tensor, int64_t row, int64_t i, int64_t d, int64_t sign) {
        const int64_t at = row * tensor.batch + i * tensor.step + (VECTOR ? d : d * tensor.channel);
        return {static_cast<const T *>(tensor.data) + at, sign * tensor.step};
    }
};

// The gradient of the state after a segment: that of the final state, propagated back through the chunk states of the segments
// after it.
template <bool ACCURATE, bool VECTOR>
__device__ __forceinline__ void incoming_grad(const Backward &params, const Segment &segment, const Lane &lane,
                                      const float (&a)[STATE_VEC], float (&g)[STATE_VEC]) {
    const Inputs &p = params.inputs;
    if (segment.ends_sequence() || p.chunk_states) lane.initial(g, params.d_final_state, segment.sequence);
    if (!p.chunk_states || !lane.exists) return;
    [[maybe_unused]] float lost[STATE_VEC] = {};
    // The last first.
    const int64_t last = segment.index + (p.segments.packed ? p.segments.packed[segment.index].segments_after
                                                             : p.segments.per_row - 1 - segment.rank);
#pragma unroll 4
    for (int64_t after = last; after > segment.index; after--) {
        const float sum = p.delta_sums[after * p.d_inner + lane.channel];
        float reached[STATE_VEC];
        lane.read_dense<VECTOR>(reached, p.chunk_states + lane.at(p, after));
#pragma unroll
        for (int n = 0; n < STATE_VEC; n++) {
            const Decay<ACCURATE> decay(sum * a[n]);
            if constexpr (ACCURATE) {
                decay.advance(g[n], lost[n], reached[n]);
            } else {
                g[n] = decay.advance(g[n], reached[n]);
            }
        }
    }
}

}
