// Attention, backward: a block goes with a tile of keys over all queries that see one of these, to the gradients of keys and values.
// The heads of a group follow each other step by step, so that their sum has one order.
#include "backward.cuh"

namespace attention {

template <typename T, int D, int WARPS, int HALVES, int STEPS, int STAGES>
__device__ __forceinline__ void run(const Backward &params) {
    constexpr int ROWS = 16 * WARPS, THREADS = 32 * WARPS * HALVES, PARTS = D / 8 / HALVES, COLUMNS = STEPS / 8;
    const Inputs &p = params.inputs;
    const Work work = work_of(p, blockIdx.x);
    const Sequence sequence(p, work.part, work.kv_head);
    // The keys that most queries see come first.
    const int first = work.tile * ROWS;
    const int d_head = static_cast<int>(p.d_head), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int of_warp = warp / HALVES * 16, first_of_warp = first + of_warp, of_part = warp % HALVES * PARTS;
    const bool has_keys = first_of_warp < sequence.keys;

    const Memory<T, D, 2, ROWS, STEPS, STAGES> memory;
    const RowsOf<T> keys[2] = {keys_of<T>(p.k, work), keys_of<T>(p.v, work)};
    load_rows<T, D, ROWS, THREADS>(memory.rows, keys, first, sequence.keys, 1, d_head);

    // The first queries that see keys g and g + 8, the first that sees any of the warp's, and that which sees all of them.
    int begins[2];
#pragma unroll
    for (int i = 0; i < 2; i++) begins[i] = sequence.first_row(first_of_warp + 8 * i + lane / 4);
    const int begin_of_warp = sequence.first_row(first_of_warp), seen_from = sequence.first_row(first_of_warp + 15);

    const RowsOf<T> from[2] = {queries_of<T>(p.q, p, work), queries_of<T>(params.d_out, p, work)};
    const auto load_more = [&](int start, int stage) {
        if (threadIdx.x >= STEPS) return;
        const int row = start + threadIdx.x;
        const bool exists = row < sequence.rows;
        auto &to = reinterpret_cast<Pack<float, 2> &>(memory.numbers()[2 * (stage * STEPS + threadIdx.x)]);
        copy_async(to, params.of_rows + 2 * (exists ? sequence.place(p, row) : 0), exists);
    };
    float d_k[1][PARTS][4] = {}, d_v[1][PARTS][4] = {};
    const auto advance = [&](int start, auto q, auto d_out, int stage) {
        if (!has_keys || start + STEPS <= begin_of_warp) return;
        Scores<COLUMNS> weights = {}, slopes = {};
        add_scores_of(weights, memory.rows[0], of_warp, q);
        // Rows after the last are zeros, and so is what they add.
        const bool is_cut = start < seen_from;
        const float *of_rows = memory.numbers() + 2 * stage * STEPS;
        // lse and mean of two neighbouring queries.
        const auto read_pair = [&](float (&pair)[4], int column) { read_shared(pair, of_rows + 2 * (8 * column + lane % 4 * 2)); };
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
            float pair[4];
            read_pair(pair, column);
            const int row = start + 8 * column + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float &weight = weights[0][column][j];
                weight = exp2_fast(fmaf(weight, p.exponent, -pair[j % 2 * 2]));
                if (is_cut && row + j % 2 < begins[j / 2]) weight = 0.0f;
            }
        }
        add_weighted<Weights::ANY>(d_v, weights, d_out, 0, of_part);
        add_scores_of(slopes, memory.rows[1], of_warp, d_out);
#pragma unroll
        for (int column = 0; column < COLUMNS; column++) {
            float pair[4];
            read_pair(pair, column);
#pragma unroll
            for (int j = 0; j < 4; j++) slopes[0][column][j] = weights[0][column][j] * (slopes[0][column][j] - pair[j % 2 * 2 + 1]);
        }
        add_weighted<Weights::DIFFERENCES>(d_k, slopes, q, 0, of_part);
    };
    for_each_tile<STEPS, STAGES, THREADS>(memory.stages, from, sequence.rows, sequence.group, d_head, sequence.first_row(first),
                                          sequence.rows, load_more, advance);
    // Keys that no query sees copy nothing but themselves.
    wait_for_copies<0>();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int key = first_of_warp + 8 * i + lane / 4;
        if (key >= sequence.keys) continue;
        const int64_t place = sequence.key_place(p, key);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            const int d = 8 * (of_part + part) + lane % 4 * 2;
            if (d >= d_head) continue;
            store_pair<T>(p, params.d_k, place, d, d_k[0][part][2 * i] * p.scale, d_k[0][part][2 * i + 1] * p.scale);
            store_pair<T>(p, params.d_v, place, d, d_v[0][part][2 * i], d_v[0][part][2 * i + 1]);
        }
    }
}

#define INSTANCE(SUFFIX, T, D, KIND, SHAPE)                                                                             \
    extern "C" __global__ void BOUNDS_##KIND(backward::SHAPE::KEY_THREADS)                                             \
        attention_backward_keys_##D##_##SUFFIX(const __grid_constant__ Backward params) {                              \
        using namespace backward::SHAPE;                                                                               \
        static_assert(SMEM == sizeof(T) * D * 2 * (ROWS + STEPS * STAGES) + 8 * STEPS * STAGES, "what a block has");  \
        run<T, D, WARPS, KEY_HALVES, STEPS_OF<T, D, STEPS>, STAGES>(params);                                           \
    }

FOR_ALL_SHAPES(INSTANCE)

}
