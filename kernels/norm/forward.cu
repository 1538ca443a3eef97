// The RMS norm, forward.
//
// Bound by memory: each operand is read once and each result written once. A team of threads holds a group of a row in
// registers; all its loads are in flight before it sums. Rows that are too wide for that, or not aligned, go to the general
// kernel, which reads them a second time (from a cache, mostly) and gives the same bits.
#include "rows.cuh"

namespace rms_norm::forward {

// Four columns of s, rounded to its type.
template <typename X, typename S, bool VECTOR>
__device__ __forceinline__ void read_s(float (&s)[QUAD], const Forward &p, int64_t row, int64_t column, int count) {
    const Pack<X, QUAD> x = read<X, VECTOR>(p.x, row, column, count);
    const bool adds = p.residual.data;
    const Pack<S, QUAD> residual = read<S, VECTOR>(p.residual, row, column, adds ? count : 0);
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const float sum = x[i] + residual[i];
        s[i] = adds ? sum : x[i];
    }
    if constexpr (sizeof(S) < 4) {
        const Pack<S, QUAD> rounded = narrow_pack<S>(s);
#pragma unroll
        for (int i = 0; i < QUAD; i++) s[i] = rounded[i];
    }
}

// Multiplies columns by their gate.
template <typename X, bool VECTOR>
__device__ __forceinline__ void apply_gate(float (&x)[QUAD], const Inputs &p, int64_t row, int64_t column, int count) {
    const Pack<X, QUAD> z = read<X, VECTOR>(p.z, row, column, count);
#pragma unroll
    for (int i = 0; i < QUAD; i++) x[i] *= silu(z[i]);
}

template <typename X, typename S, typename O, bool GATED> __device__ __forceinline__ void fast(const Forward &p) {
    __shared__ WarpSums<1> shared;
    const Inputs &in = p.inputs;
    const Team team(in.lane_shift);
    const bool norm_first = in.flags & FLAG_NORM_FIRST;
    int turn = 0;
    for (int64_t group = blockIdx.x; group < in.groups; group += gridDim.x) {
        const int64_t first = group * in.group_size;
        for_each_row(in, team, [&](int64_t row, bool exists) {
            const auto count = [&](int q) { return exists && team.column(q) < in.group_size ? QUAD : 0; };
            float v[QUADS][QUAD], sums[1] = {};
#pragma unroll
            for (int q = 0; q < QUADS; q++) read_s<X, S, true>(v[q], p, row, first + team.column(q), count(q));
            if (p.residual_out) {
#pragma unroll
                for (int q = 0; q < QUADS; q++) write<S, true>(p.residual_out, in, row, first + team.column(q), v[q], count(q));
            }
            if (GATED && !norm_first) {
#pragma unroll
                for (int q = 0; q < QUADS; q++) apply_gate<X, true>(v[q], in, row, first + team.column(q), count(q));
            }
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
#pragma unroll
                for (int i = 0; i < QUAD; i++) sums[0] = fmaf(v[q][i], v[q][i], sums[0]);
            }
            sum_over_team(sums, team, shared, turn);
            const float by = scale(in, sums[0]);
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                const int64_t column = first + team.column(q);
                float weight[QUAD];
                read_weight<true>(weight, in.weight, column, count(q));
#pragma unroll
                for (int i = 0; i < QUAD; i++) v[q][i] = v[q][i] * by * weight[i];
                if (GATED && norm_first) apply_gate<X, true>(v[q], in, row, column, count(q));
                write<O, true>(p.out, in, row, column, v[q], count(q));
            }
        });
    }
}

template <typename X, typename S, typename O> __device__ __forceinline__ void general(const Forward &p) {
    __shared__ WarpSums<1> shared;
    const Inputs &in = p.inputs;
    const Team team(in.lane_shift);
    const bool norm_first = in.flags & FLAG_NORM_FIRST, gated = in.z.data;
    const int64_t turns = team.turns(in.group_size);
    int turn = 0;
    for (int64_t group = blockIdx.x; group < in.groups; group += gridDim.x) {
        const int64_t first = group * in.group_size;
        for_each_row(in, team, [&](int64_t row, bool exists) {
            const auto count = [&](int64_t q) { return exists ? columns_left(in.group_size - team.column(q)) : 0; };
            const auto read_v = [&](float(&v)[QUAD], int64_t q, bool writes) {
                const int64_t column = first + team.column(q);
                read_s<X, S, false>(v, p, row, column, count(q));
                if (writes) write<S, false>(p.residual_out, in, row, column, v, count(q));
                if (gated && !norm_first) apply_gate<X, false>(v, in, row, column, count(q));
            };
            float v[QUAD], sums[1] = {};
            for (int64_t q = 0; q < turns; q++) {
                read_v(v, q, true);
#pragma unroll
                for (int i = 0; i < QUAD; i++) sums[0] = fmaf(v[i], v[i], sums[0]);
            }
            sum_over_team(sums, team, shared, turn);
            const float by = scale(in, sums[0]);
            for (int64_t q = 0; q < turns; q++) {
                const int64_t column = first + team.column(q);
                float weight[QUAD];
                read_v(v, q, false);
                read_weight<false>(weight, in.weight, column, count(q));
#pragma unroll
                for (int i = 0; i < QUAD; i++) v[i] = v[i] * by * weight[i];
                if (gated && norm_first) apply_gate<X, false>(v, in, row, column, count(q));
                write<O, false>(p.out, in, row, column, v, count(q));
            }
        });
    }
}

#define INSTANCE(NAME, ...)                                                                                            \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS, 2)                                                    \
        rms_norm_forward_##NAME(const __grid_constant__ Forward params) {                                              \
        __VA_ARGS__(params);                                                                                           \
    }

// Of the types of x, of the residual and of the output.
#define INSTANCES(SUFFIX, X, S, O)                                                                                     \
    INSTANCE(fast_##SUFFIX, fast<X, S, O, false>)                                                                      \
    INSTANCE(gated_##SUFFIX, fast<X, S, O, true>)                                                                      \
    INSTANCE(general_##SUFFIX, general<X, S, O>)

INSTANCES(f32_f32_f32, float, float, float)
INSTANCES(f32_f32_f16, float, float, __half)
INSTANCES(f32_f32_bf16, float, float, __nv_bfloat16)
INSTANCES(f16_f16_f16, __half, __half, __half)
INSTANCES(bf16_bf16_bf16, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16)
INSTANCES(f16_f32_f16, __half, float, __half)
INSTANCES(bf16_f32_bf16, __nv_bfloat16, float, __nv_bfloat16)

}
