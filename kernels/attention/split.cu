// Attention of few queries over many keys, forward: a block goes with 16 rows over a piece of the keys, of which each of its warps
// has a part; then the sums of all pieces are joined, in their order. Keys are split by their number alone, so that a sequence gets
// the same bits whatever it is batched with.
#include "forward.cuh"

namespace attention {

// What the warps of a block have come to, where their tiles were. A row's numbers lie a few apart from the next one's.
template <int D, int WARPS> struct Shares {
    static constexpr int STRIDE = D + 4;
    float *sums, *weights;

    __device__ __forceinline__ Shares()
        : sums(reinterpret_cast<float *>(shared_memory)), weights(sums + WARPS * split::ROWS * STRIDE) {}
    __device__ __forceinline__ float *sums_of(int warp, int row) const { return sums + (warp * split::ROWS + row) * STRIDE; }
    __device__ __forceinline__ float *weights_of(int warp, int row) const { return weights + 2 * (warp * split::ROWS + row); }
};

template <typename T, int D, int WARPS, int HALVES, int STEPS, int STAGES> __device__ __forceinline__ void run(const Forward &params) {
    constexpr int ROWS = split::ROWS, THREADS = 32 * WARPS * HALVES, OF_WARP = STEPS / WARPS, PARTS = D / 8 / HALVES;
    const Inputs &p = params.inputs;
    const Work work = work_of(p, blockIdx.x);
    const Sequence sequence(p, work.part, work.kv_head);
    const int pieces = (sequence.keys + split::PIECE - 1) / split::PIECE;
    const int first = work.tile / pieces * ROWS, begin = work.tile % pieces * split::PIECE;
    const int d_head = static_cast<int>(p.d_head), lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 / HALVES, of_part = threadIdx.x / 32 % HALVES * PARTS;

    const Memory<T, D, 1, ROWS, STEPS, STAGES> memory;
    const RowsOf<T> queries[1] = {queries_of<T>(p.q, p, work)};
    load_rows<T, D, ROWS, THREADS>(memory.rows, queries, first, sequence.rows, sequence.group, d_head);

    const QuerySign<T> sign(p.flags);
    Softmax<1> softmax;
    float out[1][PARTS][4] = {};
    int seen[2];
#pragma unroll
    for (int i = 0; i < 2; i++) seen[i] = sequence.seen(min(first + 8 * i + lane / 4, sequence.rows - 1));
    const int seen_by_any = sequence.seen(min(first + ROWS, sequence.rows) - 1), end = min(begin + split::PIECE, seen_by_any);
    const int seen_by_all = sequence.seen(first);

    const auto rows = [&](int, int step) { return sign.load(memory.rows[0], 0, step); };
    const RowsOf<T> from[2] = {keys_of<T>(p.k, work), keys_of<T>(p.v, work)};
    const auto nothing = [](int, int) {};
    for_each_tile<STEPS, STAGES, THREADS>(memory.stages, from, sequence.keys, 1, d_head, begin, end, nothing, [&](int start, auto k, auto v, int) {
        const int own = start + warp * OF_WARP;
        if (own >= end) return;
        float scores[1][OF_WARP / 8][4] = {};
        add_scores(scores, rows, k, warp * OF_WARP);
        const int limits[1][2] = {{seen[0] - own, seen[1] - own}};
        if (own + OF_WARP > seen_by_all) {
            softmax.template advance<true>(scores, out, limits, p.exponent);
        } else {
            softmax.template advance<false>(scores, out, limits, p.exponent);
        }
        add_weighted<Weights::SHARES>(out, scores, v, warp * OF_WARP, of_part);
    });
    // A piece of which no row sees a key copies nothing but the queries.
    commit_copies(), wait_for_copies<0>();
    __syncthreads();

    const Shares<D, WARPS> shares;
    static_assert(4 * (WARPS * ROWS * (D + 4 + 2)) <= sizeof(T) * D * (ROWS + 2 * STEPS * STAGES), "there is room");
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = 8 * i + lane / 4;
        const float sum = sum_of_row(softmax.sum[0][i]);
        if (lane % 4 == 0 && of_part == 0) write_shared(shares.weights_of(warp, row), {softmax.most[0][i], sum});
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            write_shared(shares.sums_of(warp, row) + 8 * (of_part + part) + lane % 4 * 2, {out[0][part][2 * i], out[0][part][2 * i + 1]});
        }
    }
    __syncthreads();
    // Pairs of neighbours of a row.
    for (int i = threadIdx.x; i < ROWS * D / 2; i += THREADS) {
        const int row = i / (D / 2), d = i % (D / 2) * 2;
        if (first + row >= sequence.rows || d >= d_head) continue;
        float most = -INFINITY;
#pragma unroll
        for (int other = 0; other < WARPS; other++) most = fmaxf(most, shares.weights_of(other, row)[0]);
        const float from = most == -INFINITY ? 0.0f : most;
        float sum = 0.0f, pair[2] = {};
#pragma unroll
        for (int other = 0; other < WARPS; other++) {
            const float share = exp2_fast(shares.weights_of(other, row)[0] - from);
            sum = fmaf(shares.weights_of(other, row)[1], share, sum);
#pragma unroll
            for (int j = 0; j < 2; j++) pair[j] = fmaf(shares.sums_of(other, row)[d + j], share, pair[j]);
        }
        if (pieces > 1) {
            const int64_t at = blockIdx.x * params.kept + row;
            store_vec<float, 2, false>(params.sums + at * d_head + d, 1, narrow_pack<float>(pair), d_head - d);
            if (d == 0) params.weights[2 * at] = most, params.weights[2 * at + 1] = sum;
        } else {
            const int64_t place = sequence.place(p, first + row);
            store_pair<T>(p, params.out, place, d, pair[0] / sum, pair[1] / sum);
            if (d == 0) params.lse[place] = log_of_sum(most, sum);
        }
    }
}

// Joins the pieces of a row: a warp takes every fourth, and the warps' sums are added up in their order.
template <typename T> __device__ __forceinline__ void join(const Forward &params) {
    constexpr int WARPS = split::JOIN_THREADS / 32, LANES = 256 / 32;
    __shared__ float sums[WARPS][256], weights[WARPS];
    const Inputs &p = params.inputs;
    const Work work = work_of<&Part::joined>(p, blockIdx.x / split::ROWS);
    const Sequence sequence(p, work.part, work.kv_head);
    const int row_of_tile = blockIdx.x % split::ROWS, row = work.tile * split::ROWS + row_of_tile;
    if (row >= sequence.rows) return;
    const int d_head = static_cast<int>(p.d_head), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int pieces = (sequence.keys + split::PIECE - 1) / split::PIECE;
    const auto place_of = [&](int piece) {
        const int64_t block = (work.part.tile + int64_t(work.tile) * pieces + piece) * p.kv_heads + work.kv_head;
        return block * params.kept + row_of_tile;
    };
    float most = -INFINITY;
    for (int piece = lane; piece < pieces; piece += 32) most = fmaxf(most, params.weights[2 * place_of(piece)]);
    for (int distance = 16; distance > 0; distance /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
    const float from = most == -INFINITY ? 0.0f : most;
    float sum = 0.0f, values[LANES] = {};
#pragma unroll 4
    for (int piece = warp; piece < pieces; piece += WARPS) {
        const int64_t place = place_of(piece);
        const float share = exp2_fast(params.weights[2 * place] - from);
        sum = fmaf(params.weights[2 * place + 1], share, sum);
        const float *at = params.sums + place * d_head;
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            const int d = lane + 32 * i;
            if (d < d_head) values[i] = fmaf(at[d], share, values[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < LANES; i++) sums[warp][lane + 32 * i] = values[i];
    if (lane == 0) weights[warp] = sum;
    __syncthreads();
    const int64_t to = sequence.place(p, row);
    float whole = 0.0f;
    for (int other = 0; other < WARPS; other++) whole += weights[other];
    for (int d = threadIdx.x; d < d_head; d += split::JOIN_THREADS) {
        float value = 0.0f;
        for (int other = 0; other < WARPS; other++) value += sums[other][d];
        static_cast<T *>(params.out)[to * d_head + d] = narrow<T>(value / whole);
    }
    if (threadIdx.x == 0) params.lse[to] = log_of_sum(most, whole);
}

#define INSTANCE(SUFFIX, T, D, KIND, SHAPE)                                                                             \
    extern "C" __global__ void BOUNDS_##KIND(split::SHAPE::THREADS)                                                    \
        attention_split_##D##_##SUFFIX(const __grid_constant__ Forward params) {                                       \
        using namespace split::SHAPE;                                                                                  \
        static_assert(SMEM == sizeof(T) * D * (split::ROWS + 2 * STEPS * STAGES), "what a block has");                \
        run<T, D, WARPS, HALVES, STEPS, STAGES>(params);                                                               \
    }
#define JOIN_INSTANCE(SUFFIX, T)                                                                                       \
    extern "C" __global__ void __launch_bounds__(split::JOIN_THREADS)                                                  \
        attention_join_##SUFFIX(const __grid_constant__ Forward params) {                                              \
        join<T>(params);                                                                                               \
    }

FOR_ALL_SHAPES(INSTANCE)
JOIN_INSTANCE(f32, float)
JOIN_INSTANCE(f16, __half)
JOIN_INSTANCE(bf16, __nv_bfloat16)

}
