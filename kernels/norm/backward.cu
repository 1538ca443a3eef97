// The RMS norm, backward. With v what is normed, r = 1/sqrt(mean(v²) + eps), n = v r and g the gradient of n,
//
//     d_v = r (g - n mean(g n))         d_weight = Σ d_out n        over rows
//
// Bound by memory as the forward pass is, and divided in the same way. A block goes through many rows and keeps its part of
// the gradient of the weight in registers (the general kernel, in memory that is its own), for a second kernel to sum over
// blocks in order.
#include "rows.cuh"

namespace rms_norm::backward {

// Four columns of a row as the gradients need them.
template <typename X, typename S, typename O, bool GATED, bool VECTOR> struct Quad {
    Pack<S, QUAD> s, d_residual_out;
    Pack<O, QUAD> d_out;
    Pack<X, QUAD> z;

    __device__ __forceinline__ void load(const Backward &p, int64_t row, int64_t column, int count) {
        s = read<S, VECTOR>(p.s, row, column, count);
        d_out = read<O, VECTOR>(p.d_out, row, column, count);
        if constexpr (GATED) z = read<X, VECTOR>(p.inputs.z, row, column, p.inputs.z.data ? count : 0);
    }
    // Apart, so that it need not be there before the sums are.
    __device__ __forceinline__ void load_rest(const Backward &p, int64_t row, int64_t column, int count) {
        d_residual_out = read<S, VECTOR>(p.d_residual_out, row, column, p.d_residual_out.data ? count : 0);
    }

    // What column `i` is multiplied by before the norm and after it.
    __device__ __forceinline__ float before(int i, bool gated, bool norm_first) const {
        if constexpr (!GATED) return 1.0f;
        return gated && !norm_first ? silu(z[i]) : 1.0f;
    }
    __device__ __forceinline__ float after(int i, bool gated, bool norm_first) const {
        if constexpr (!GATED) return 1.0f;
        return gated && norm_first ? silu(z[i]) : 1.0f;
    }
};

// Columns after the sums: writes the gradients, and adds to that of the weight. `by` is r, `along` is r mean(g v).
template <typename X, typename S, typename O, bool GATED, bool VECTOR>
__device__ __forceinline__ void finish(const Quad<X, S, O, GATED, VECTOR> &quad, const Backward &p, int64_t row,
                                       int64_t column, int count, const float (&weight)[QUAD], float by, float along,
                                       float (&d_weight)[QUAD]) {
    const Inputs &in = p.inputs;
    const bool norm_first = in.flags & FLAG_NORM_FIRST, gated = GATED && in.z.data;
    float d_s[QUAD], d_z[QUAD];
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const float before = quad.before(i, gated, norm_first);
        const float normed = quad.s[i] * before * by, d_out = quad.d_out[i] * quad.after(i, gated, norm_first);
        d_weight[i] = fmaf(d_out, normed, d_weight[i]);
        const float d_v = by * (d_out * weight[i] - normed * along);
        d_s[i] = d_v * before;
        if constexpr (GATED) {
            const float d_gate = norm_first ? quad.d_out[i] * weight[i] * normed : d_v * quad.s[i];
            d_z[i] = d_gate * silu_slope(quad.z[i], sigmoid(quad.z[i]));
        }
        d_s[i] = p.d_residual_out.data ? d_s[i] + quad.d_residual_out[i] : d_s[i];
    }
    write<X, VECTOR>(p.d_x, in, row, column, d_s, count);
    write<S, VECTOR>(p.d_residual, in, row, column, d_s, count);
    if constexpr (GATED) write<X, VECTOR>(p.d_z, in, row, column, d_z, count);
}

// Adds the terms of Σ v² and Σ g v.
template <typename X, typename S, typename O, bool GATED, bool VECTOR>
__device__ __forceinline__ void add_terms(float (&sums)[2], const Quad<X, S, O, GATED, VECTOR> &quad, const Inputs &in,
                                          const float (&weight)[QUAD]) {
    const bool norm_first = in.flags & FLAG_NORM_FIRST, gated = GATED && in.z.data;
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const float v = quad.s[i] * quad.before(i, gated, norm_first);
        const float g = quad.d_out[i] * quad.after(i, gated, norm_first) * weight[i];
        sums[0] = fmaf(v, v, sums[0]);
        sums[1] = fmaf(g, v, sums[1]);
    }
}

template <typename X, typename S, typename O, bool GATED> __device__ __forceinline__ void fast(const Backward &p) {
    __shared__ WarpSums<2> shared;
    __shared__ float of_teams[THREADS * QUADS * QUAD];
    const Inputs &in = p.inputs;
    const Team team(in.lane_shift);
    int turn = 0;
    for (int64_t group = blockIdx.x; group < in.groups; group += gridDim.x) {
        const int64_t first = group * in.group_size;
        float weight[QUADS][QUAD], d_weight[QUADS][QUAD] = {};
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            read_weight<true>(weight[q], in.weight, first + team.column(q), team.column(q) < in.group_size ? QUAD : 0);
        }
        for_each_row(in, team, [&](int64_t row, bool exists) {
            const auto count = [&](int q) { return exists && team.column(q) < in.group_size ? QUAD : 0; };
            Quad<X, S, O, GATED, true> quads[QUADS];
            float sums[2] = {};
#pragma unroll
            for (int q = 0; q < QUADS; q++) quads[q].load(p, row, first + team.column(q), count(q));
            // With a gate there are no registers for these yet.
            if constexpr (!GATED) {
#pragma unroll
                for (int q = 0; q < QUADS; q++) quads[q].load_rest(p, row, first + team.column(q), count(q));
            }
#pragma unroll
            for (int q = 0; q < QUADS; q++) add_terms(sums, quads[q], in, weight[q]);
            sum_over_team(sums, team, shared, turn);
            // A row that does not exist adds zeros, where an eps of 0 would make NaN of it.
            const float by = exists ? scale(in, sums[0]) : 0.0f, along = sums[1] * by / in.count;
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                if constexpr (GATED) quads[q].load_rest(p, row, first + team.column(q), count(q));
                finish(quads[q], p, row, first + team.column(q), count(q), weight[q], by, along, d_weight[q]);
            }
        });
        if (!p.partials) continue;
        float *to = p.partials + (blockIdx.y * in.groups * in.group_size + first);
        if (team.count == 1) {
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                store_vec<float, QUAD, true>(to + team.column(q), 1, narrow_pack<float>(d_weight[q]),
                                             team.column(q) < in.group_size ? QUAD : 0);
            }
            continue;
        }
        const int team_columns = team.lanes * QUADS * QUAD;
#pragma unroll
        for (int q = 0; q < QUADS; q++) write_shared(of_teams + (team.index * team_columns + team.column(q)), d_weight[q]);
        __syncthreads();
        for (int column = threadIdx.x; column < in.group_size; column += blockDim.x) {
            float sum = of_teams[column];
            for (int i = 1; i < team.count; i++) sum += of_teams[i * team_columns + column];
            to[column] = sum;
        }
        // The next group writes there again.
        __syncthreads();
    }
}

template <typename X, typename S, typename O> __device__ __forceinline__ void general(const Backward &p) {
    __shared__ WarpSums<2> shared;
    const Inputs &in = p.inputs;
    const Team team(in.lane_shift);
    const int64_t turns = team.turns(in.group_size), width = in.groups * in.group_size;
    int turn = 0;
    for (int64_t group = blockIdx.x; group < in.groups; group += gridDim.x) {
        const int64_t first = group * in.group_size;
        const auto columns = [&](int64_t q) { return columns_left(in.group_size - team.column(q)); };
        // This block's parts of the gradient of the weight, one of each team; the block's own is the first.
        float *parts = p.partials + (int64_t(blockIdx.y) * team.count * width + first);
        const auto own = [&](int64_t q) { return parts + (team.index * width + team.column(q)); };
        for (int64_t q = 0; q < turns && p.partials; q++) {
            store_vec<float, QUAD, false>(own(q), 1, Pack<float, QUAD>{}, columns(q));
        }
        for_each_row(in, team, [&](int64_t row, bool exists) {
            const auto count = [&](int64_t q) { return exists ? columns(q) : 0; };
            Quad<X, S, O, true, false> quad;
            float weight[QUAD], sums[2] = {};
            for (int64_t q = 0; q < turns; q++) {
                quad.load(p, row, first + team.column(q), count(q));
                read_weight<false>(weight, in.weight, first + team.column(q), count(q));
                add_terms(sums, quad, in, weight);
            }
            sum_over_team(sums, team, shared, turn);
            const float by = exists ? scale(in, sums[0]) : 0.0f, along = sums[1] * by / in.count;
            for (int64_t q = 0; q < turns; q++) {
                const int64_t column = first + team.column(q);
                float d_weight[QUAD];
                const Pack<float, QUAD> before = load_vec<float, QUAD, false>(own(q), 1, p.partials ? columns(q) : 0);
#pragma unroll
                for (int i = 0; i < QUAD; i++) d_weight[i] = before[i];
                quad.load(p, row, column, count(q));
                quad.load_rest(p, row, column, count(q));
                read_weight<false>(weight, in.weight, column, count(q));
                finish(quad, p, row, column, count(q), weight, by, along, d_weight);
                store_vec<float, QUAD, false>(own(q), 1, narrow_pack<float>(d_weight), p.partials ? columns(q) : 0);
            }
        });
        if (!p.partials || team.count == 1) continue;
        __syncthreads();
        for (int64_t column = threadIdx.x; column < in.group_size; column += blockDim.x) {
            float sum = parts[column];
            for (int i = 1; i < team.count; i++) sum += parts[i * width + column];
            parts[column] = sum;
        }
    }
}

#define INSTANCE(NAME, ...)                                                                                            \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS) rms_norm_backward_##NAME(const __grid_constant__ Backward params) { \
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
