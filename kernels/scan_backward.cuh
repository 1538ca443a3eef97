// What the kernels of the backward scan share: their arguments, and sums over channels on the tensor cores.
#pragma once
#include "scan.cuh"

struct ScanBackward {
    ScanInputs in;
    Activation d_out;
    States d_final_state;
    // The states that forward kept, (slots, d_inner, d_state).
    const float *checkpoints;
    // Dense gradients of the activations, and of the initial state; null where the input is absent.
    void *d_u, *d_delta, *d_z;
    float *d_initial_state;
    // Gradients of parameters, summed by each of gridDim.y rows of blocks: (rows, d_inner, d_state) and (rows, d_inner).
    float *d_a, *d_b, *d_c, *d_d, *d_bias;
    // Gradients of B and of C that vary, summed by each block over its channels: (2, blocks of a group, batch·length,
    // groups, d_state).
    float *projections;
    // With more than 16 states, what the turns before have found of ∂/∂Δ, ∂/∂(Δu) and y: of each quad of channels in a
    // dense activation the first of these, then the second and the third.
    float *carried;
    int64_t groups, steps;
    // The first of the 16 states whose turn it is: each 16 are a launch.
    int64_t first_state;

    __device__ __forceinline__ bool is_last_turn() const { return first_state + TURN >= in.d_state; }
};
static_assert(sizeof(ScanBackward) == 576, "as in src/cuda/params.rs");

// Adds to what a quad's channels get of the sums over their states that of the turns before, and hands it on if there is a
// turn to come. `at` is the quad's place in a dense activation, of which `count` channels exist.
template <bool WHOLE>
__device__ __forceinline__ void carry(const ScanBackward &params, int64_t at, int count, float (&d_delta)[QUAD],
                                      float (&d_input)[QUAD], float (&y)[QUAD]) {
    float *const carried = params.carried + 3 * at;
    const auto sum = [&](int which, float (&sums)[QUAD]) {
        float *const of_quad = carried + which * (WHOLE ? QUAD : count);
        if (params.first_state > 0) {
            const Pack<float, QUAD> before = load<float, QUAD, WHOLE>(of_quad, 1, count);
#pragma unroll
            for (int c = 0; c < QUAD; c++) sums[c] += before[c];
        }
        if (!params.is_last_turn()) store<float, WHOLE>(of_quad, sums, count);
    };
    sum(0, d_delta);
    sum(1, d_input);
    if (params.in.z.data) sum(2, y);
}

// Has what `carry` will read for the quad of channels at `at` brought nearer.
__device__ __forceinline__ void prefetch_carried(const ScanBackward &params, int64_t at) {
    if (params.first_state == 0) return;
    const float *const carried = params.carried + 3 * at;
    prefetch(carried);
    prefetch(carried + 2 * QUAD);
}

// Adds x y to a sum if it is `wanted`, without a branch. (Steps beyond the end of a sequence add zero times the state behind
// it, which is NaN if that is infinite.)
__device__ __forceinline__ void add_if(bool wanted, float &sum, float x, float y) {
    asm("{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %3, 0;\n@wanted fma.rn.f32 %0, %1, %2, %0;\n}"
        : "+f"(sum)
        : "f"(x), "f"(y), "r"(static_cast<int>(wanted)));
}

// Has the next segment of the block's in shared memory, for all of its threads.
template <typename Shared> __device__ __forceinline__ void take_segment(Shared &shared, const Segments &segments) {
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.segment = segments.get(shared.next);
        shared.next.next(segments.per_row);
    }
    __syncthreads();
}

// Whether terms are summed in two parts, see sum_channels.
template <typename T> constexpr bool TWO_PARTS = true;
template <> constexpr bool TWO_PARTS<__nv_bfloat16> = false;

// D += A B on the tensor cores, with 8-bit exponents and 10-bit mantissas. A holds what is to be summed: the lanes that
// differ in the lowest two bits hold columns of it, and a row of D gets their sum. B chooses D's column: `first` that of
// the first two of `terms`, `second` that of the other two; 1 in the lanes that hold the column, else 0.
__device__ __forceinline__ void add_selected(float (&d)[4], const float (&terms)[4], float first, float second) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(terms[0])), "r"(__float_as_uint(terms[1])), "r"(__float_as_uint(terms[2])),
          "r"(__float_as_uint(terms[3])), "r"(__float_as_uint(first)), "r"(__float_as_uint(second)));
}

// add_selected, exact enough for the type that the result is rounded to: a truncated term is off by less than 2^-10, which
// rounding to bf16 hides; for f16 and f32 the rest of each term is summed as well.
template <typename T>
__device__ __forceinline__ void sum_channels(float (&d)[4], const float (&terms)[4], float first, float second) {
    if constexpr (TWO_PARTS<T>) {
        float upper[4], lower[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            upper[i] = __uint_as_float(__float_as_uint(terms[i]) & 0xffffe000u);
            lower[i] = terms[i] - upper[i];
        }
        add_selected(d, upper, first, second);
        add_selected(d, lower, first, second);
    } else {
        add_selected(d, terms, first, second);
    }
}

// The gradient of the state behind a segment: that of the final state, carried back through what the segments behind are
// summed up by.
template <bool ACCURATE, bool WHOLE>
__device__ __forceinline__ void leave(const ScanBackward &params, const Segment &segment, const Lane &lane,
                                      const float (&a)[STATES], float (&g)[STATES]) {
    const ScanInputs &p = params.in;
    if (segment.ends_sequence() || p.reached) lane.initial(g, params.d_final_state, segment.sequence);
    if (!p.reached || !lane.exists) return;
    [[maybe_unused]] float lost[STATES] = {};
    // The last first.
    const int64_t last = segment.index + (p.segments.packed ? p.segments.packed[segment.index].behind
                                                             : p.segments.per_row - 1 - segment.rank);
#pragma unroll 4
    for (int64_t after = last; after > segment.index; after--) {
        const float sum = p.sums[after * p.d_inner + lane.channel];
        float reached[STATES];
        lane.read_dense<WHOLE>(reached, p.reached + lane.at(p, after));
#pragma unroll
        for (int n = 0; n < STATES; n++) {
            const Decay<ACCURATE> decay(sum * a[n]);
            if constexpr (ACCURATE) {
                decay.advance(g[n], lost[n], reached[n]);
            } else {
                g[n] = decay.advance(g[n], reached[n]);
            }
        }
    }
}
