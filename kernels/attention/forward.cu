// Attention, forward: a block goes with a tile of rows over all keys that these see.
#include "forward.cuh"

namespace attention {

template <typename T, int D, int WARPS, int TILES, int HALVES, int STEPS, int STAGES>
__device__ __forceinline__ void run(const Forward &params) {
    constexpr int OF_WARP = 16 * TILES, ROWS = OF_WARP * WARPS, THREADS = 32 * WARPS * HALVES, PARTS = D / 8 / HALVES;
    // Fragments of queries that stay in registers where there is room.
    constexpr bool KEEPS_QUERIES = sizeof(T) == 2 && D <= 64;
    const Inputs &p = params.inputs;
    const Work work = work_of(p, blockIdx.x);
    const Sequence sequence(p, work.part, work.kv_head);
    // The rows that see most come first.
    const int tiles = (sequence.rows + ROWS - 1) / ROWS, first = (tiles - 1 - work.tile) * ROWS;
    const int d_head = static_cast<int>(p.d_head), lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32, of_warp = warp / HALVES * OF_WARP, first_of_warp = first + of_warp;
    const int of_part = warp % HALVES * PARTS;

    const Memory<T, D, 1, ROWS, STEPS, STAGES> memory;
    const RowsOf<T> queries[1] = {queries_of<T>(p.q, p, work)};
    load_rows<T, D, ROWS, THREADS>(memory.rows, queries, first, sequence.rows, sequence.group, d_head);

    const QuerySign<T> sign(p.flags);
    Softmax<TILES> softmax;
    float out[TILES][PARTS][4] = {};
    // Rows after the last see what that does.
    int seen[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            seen[tile][i] = sequence.seen(min(first_of_warp + 16 * tile + 8 * i + lane / 4, sequence.rows - 1));
        }
    }
    const int end = sequence.seen(min(first + ROWS, sequence.rows) - 1);
    const bool has_rows = first_of_warp < sequence.rows;
    const int end_of_warp = has_rows ? sequence.seen(min(first_of_warp + OF_WARP, sequence.rows) - 1) : 0;
    const int seen_by_all = has_rows ? sequence.seen(first_of_warp) : 0;

    RowFragment<T> kept[KEEPS_QUERIES ? TILES : 1][KEEPS_QUERIES ? DEPTH<T, D> : 1] = {};
    const auto rows = [&](int tile, int step) {
        if constexpr (KEEPS_QUERIES) {
            return kept[tile][step];
        } else {
            return sign.load(memory.rows[0], of_warp + 16 * tile, step);
        }
    };
    const RowsOf<T> from[2] = {keys_of<T>(p.k, work), keys_of<T>(p.v, work)};
    const auto nothing = [](int, int) {};
    for_each_tile<STEPS, STAGES, THREADS>(memory.stages, from, sequence.keys, 1, d_head, 0, end, nothing, [&](int start, auto k, auto v, int) {
        if (KEEPS_QUERIES && start == 0) {
#pragma unroll
            for (int tile = 0; tile < (KEEPS_QUERIES ? TILES : 0); tile++) {
#pragma unroll
                for (int step = 0; step < DEPTH<T, D>; step++) kept[tile][step] = sign.load(memory.rows[0], of_warp + 16 * tile, step);
            }
        }
        if (start >= end_of_warp) return;
        float scores[TILES][STEPS / 8][4] = {};
        add_scores(scores, rows, k, 0);
        int limits[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 2; i++) limits[tile][i] = seen[tile][i] - start;
        }
        if (start + STEPS > seen_by_all) {
            softmax.template advance<true>(scores, out, limits, p.exponent);
        } else {
            softmax.template advance<false>(scores, out, limits, p.exponent);
        }
        add_weighted<Weights::SHARES>(out, scores, v, 0, of_part);
    });

#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = first_of_warp + 16 * tile + 8 * i + lane / 4;
            const float sum = sum_of_row(softmax.sum[tile][i]);
            if (row >= sequence.rows) continue;
            const int64_t place = sequence.place(p, row);
            const float share = 1.0f / sum;
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                const int d = 8 * (of_part + part) + lane % 4 * 2;
                const float (&pair)[4] = out[tile][part];
                if (d < d_head) store_pair<T>(p, params.out, place, d, pair[2 * i] * share, pair[2 * i + 1] * share);
            }
            if (lane % 4 == 0 && of_part == 0) params.lse[place] = log_of_sum(softmax.most[tile][i], sum);
        }
    }
}

#define INSTANCE(SUFFIX, T, D, KIND, SHAPE)                                                                             \
    extern "C" __global__ void BOUNDS_##KIND(forward::SHAPE::THREADS)                                                  \
        attention_forward_##D##_##SUFFIX(const __grid_constant__ Forward params) {                                     \
        using namespace forward::SHAPE;                                                                                \
        static_assert(SMEM == sizeof(T) * D * (ROWS + 2 * STEPS * STAGES), "what a block has");                       \
        run<T, D, WARPS, TILES, HALVES, STEPS, STAGES>(params);                                                        \
    }

FOR_ALL_SHAPES(INSTANCE)

}
