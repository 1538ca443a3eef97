// Attention, backward: a block goes with a tile of queries over all keys that these see, to the gradients of the queries. It leaves
// what the kernel over keys reads of each.
#include "backward.cuh"
#include "softmax.cuh"

namespace attention {

// The mean of a row, of f32: that of its output and the gradient of it.
template <typename T>
__device__ __forceinline__ float dot_of_row(const RowsOf<T> &x, const RowsOf<T> &y, const RowPlace &place, int d_head) {
    float sum = 0.0f;
    for (int d = threadIdx.x % 32; d < d_head; d += 32) {
        sum = fmaf(widen(x.row(place)[d * x.column]), widen(y.row(place)[d * y.column]), sum);
    }
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    return sum;
}

template <typename T, int D, int WARPS, int HALVES, int STEPS, int STAGES>
__device__ __forceinline__ void run(const Backward &params) {
    constexpr int ROWS = 16 * WARPS, THREADS = 32 * WARPS * HALVES, PARTS = D / 8 / HALVES, COLUMNS = STEPS / 8;
    const Inputs &p = params.inputs;
    const Work work = work_of(p, blockIdx.x);
    const Sequence sequence(p, work.part, work.kv_head);
    const int tiles = (sequence.rows + ROWS - 1) / ROWS, first = (tiles - 1 - work.tile) * ROWS;
    const int d_head = static_cast<int>(p.d_head), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int of_warp = warp / HALVES * 16, first_of_warp = first + of_warp, of_part = warp % HALVES * PARTS;
    const bool has_rows = first_of_warp < sequence.rows;

    const Memory<T, D, 2, ROWS, STEPS, STAGES> memory;
    const RowsOf<T> queries[2] = {queries_of<T>(p.q, p, work), queries_of<T>(params.d_out, p, work)};
    load_rows<T, D, ROWS, THREADS>(memory.rows, queries, first, sequence.rows, sequence.group, d_head);

    // Of rows g and g + 8; those after the last are as that.
    float lse[2], mean[2] = {};
    int seen[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = min(first_of_warp + 8 * i + lane / 4, sequence.rows - 1);
        seen[i] = sequence.seen(row);
        const RowPlace place(row, sequence.group);
        const int64_t at = work.part.batch * params.lse_batch + (work.part.start + place.step) * params.lse_step;
        lse[i] = params.lse[at + (work.kv_head * p.group + place.head) * params.lse_head] * LOG2_E;
    }
    const int end = sequence.seen(min(first + ROWS, sequence.rows) - 1);
    const int end_of_warp = has_rows ? sequence.seen(min(first_of_warp + 16, sequence.rows) - 1) : 0;
    const int seen_by_all = has_rows ? sequence.seen(first_of_warp) : 0;

    const RowsOf<T> from[2] = {keys_of<T>(p.k, work), keys_of<T>(p.v, work)};
    // Weights and the slopes by them, for each tile that the warp sees.
    const auto sweep = [&](auto use) {
        const auto nothing = [](int, int) {};
        const auto advance = [&](int start, auto k, auto v, int) {
            if (start >= end_of_warp) return;
            Scores<COLUMNS> weights = {}, slopes = {};
            add_scores_of(weights, memory.rows[0], of_warp, k);
            add_scores_of(slopes, memory.rows[1], of_warp, v);
            const bool is_cut = start + STEPS > seen_by_all;
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float &weight = weights[0][column][j];
                    weight = exp2_fast(fmaf(weight, p.exponent, -lse[j / 2]));
                    if (is_cut && start + 8 * column + lane % 4 * 2 + j % 2 >= seen[j / 2]) weight = 0.0f;
                }
            }
            use(weights, slopes, k);
        };
        for_each_tile<STEPS, STAGES, THREADS>(memory.stages, from, sequence.keys, 1, d_head, 0, end, nothing, advance);
    };
    if constexpr (sizeof(T) == 4) {
        const RowsOf<T> out = queries_of<T>(params.out, p, work);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            for (int row = 0; row < 8; row++) {
                const RowPlace place(min(first_of_warp + 8 * i + row, sequence.rows - 1), sequence.group);
                const float dot = dot_of_row(out, queries[1], place, d_head);
                if (row == lane / 4) mean[i] = dot;
            }
        }
    } else {
        // An output of a half type has the mean only to its own rounding, which is more than what is left of slopes whose query has
        // one key that counts.
        sweep([&](const Scores<COLUMNS> &weights, const Scores<COLUMNS> &slopes, const Tile<T, D> &) {
#pragma unroll
            for (int column = 0; column < COLUMNS; column++) {
#pragma unroll
                for (int j = 0; j < 4; j++) mean[j / 2] = fmaf(weights[0][column][j], slopes[0][column][j], mean[j / 2]);
            }
        });
#pragma unroll
        for (int i = 0; i < 2; i++) mean[i] = sum_of_row(mean[i]);
        // The first tile comes again.
        __syncthreads();
    }
    float sums[1][PARTS][4] = {};
    sweep([&](const Scores<COLUMNS> &weights, Scores<COLUMNS> &slopes, const Tile<T, D> &k) {
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
#pragma unroll
            for (int j = 0; j < 4; j++) slopes[0][column][j] = weights[0][column][j] * (slopes[0][column][j] - mean[j / 2]);
        }
        add_weighted<Weights::DIFFERENCES>(sums, slopes, k, 0, of_part);
    });
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = first_of_warp + 8 * i + lane / 4;
        if (row >= sequence.rows) continue;
        const int64_t place = sequence.place(p, row);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const int d = 8 * (of_part + part) + lane % 4 * 2;
            const float (&pair)[4] = sums[0][part];
            if (d < d_head) store_pair<T>(p, params.d_q, place, d, pair[2 * i] * p.scale, pair[2 * i + 1] * p.scale);
        }
        if (lane % 4 == 0 && of_part == 0) write_shared(params.of_rows + 2 * place, {lse[i], mean[i]});
    }
}

#define INSTANCE(SUFFIX, T, D, KIND, SHAPE)                                                                             \
    extern "C" __global__ void BOUNDS_##KIND(backward::SHAPE::THREADS)                                                 \
        attention_backward_queries_##D##_##SUFFIX(const __grid_constant__ Backward params) {                           \
        using namespace backward::SHAPE;                                                                               \
        static_assert(SMEM >= sizeof(T) * D * 2 * (ROWS + STEPS * STAGES), "what a block has");                       \
        run<T, D, WARPS, HALVES, STEPS_OF<T, D, STEPS>, STAGES>(params);                                               \
    }

FOR_ALL_SHAPES(INSTANCE)

}
