// The second of two kernels that choose the next token of each row of logits.
//
// A row is divided into chunks of tokens, which blocks of both kernels take, and these into tiles of 512, which their
// warps take, so that one row alone has the bandwidth of several multiprocessors. The grid follows from the shape
// alone; what is done for a row, from its settings.
//
//     sampling_maximum   the highest logit of each chunk, and the first token that has it
//     sampling_choose    the highest of the row: all that a temperature of 0 asks for;
//                        with it the weights of tokens, whole numbers, and their sum for each tile; with top-k or top-p
//                        also how many tokens, and what weight, there are in bins of the distance from the highest,
//                        for the whole row;
//                        then the block of the row that is done last finishes it:
//                          with top-k or top-p it looks for the last token of the order (search.cuh; the row is read once
//                          for each) and sums up the weights of each tile again, of what is kept;
//                          it looks for the tile that the random number falls into, and for the token there.
//
// Where neither is on, a row is read twice, and a tile of it a third time. Sums are of whole numbers, so that neither
// the order in which blocks come, nor how a row is divided, nor the device changes a token.
#include "../common/launch.cuh"
#include "../common/tensor.cuh"
#include "search.cuh"

namespace sampling {

// What filters keep: the tokens up to the last, by `last_key` and `last_token`, of those that weigh `least` or more.
struct Kept {
    Weigh weigh;
    uint64_t least;
    uint32_t last_key;
    int last_token;

    // The weight of a token, and zero of those that are left out; or 1 for those that have the last one's logit.
    __device__ __forceinline__ uint64_t operator()(float y, int token, bool is_tie) const {
        const uint32_t key = key_of(y);
        if (is_tie) return key == last_key;
        const uint64_t own = weigh(y);
        return own >= least && (key > last_key || (key == last_key && token <= last_token)) ? own : 0;
    }
};

// The sums of the tiles of a row, by other blocks or by this one. Those of others lie in the second-level cache.
struct Sums {
    uint64_t *of;
    int tiles;

    __device__ __forceinline__ uint64_t at(int tile) const {
        return tile < tiles ? __ldcg(reinterpret_cast<const unsigned long long *>(of) + tile) : 0;
    }

    __device__ __forceinline__ uint64_t total(Shared &shared) const {
        uint64_t sum = 0;
        for (int i = threadIdx.x; i < tiles; i += THREADS) sum += at(i);
        return sum_of_block(sum, shared.scratch);
    }

    // Sums up each tile anew.
    __device__ __forceinline__ void fill(const Row &row, const Kept &kept, bool is_tie) const {
        // What is there may still be read.
        __syncthreads();
#pragma unroll 1
        for (int tile = threadIdx.x / WARP; tile < tiles; tile += WARPS) {
            uint64_t sum = 0;
            for_each_token(row, tile, [&](float y, int token) { sum += kept(y, token, is_tie); });
            sum = sum_of_warp(sum);
            if (threadIdx.x % WARP == 0) of[tile] = sum;
        }
        __syncthreads();
    }

    // The token at which the sum from the first on passes `target`, which is less than that of all.
    __device__ __forceinline__ int find(Shared &shared, const Row &row, const Kept &kept, bool is_tie,
                                        uint64_t target) const {
        uint64_t before = 0;
#pragma unroll 1
        for (int base = 0; base < tiles; base += THREADS) {
            const int tile = base + threadIdx.x;
            const uint64_t own = at(tile), start = before + sum_before(own, shared.scratch);
            if (start <= target && target - start < own) shared.found = tile, shared.weight_above = start;
            before += sum_of_block(own, shared.scratch);
        }
        // A thread for each token of the tile.
        const int token = static_cast<int>(shared.found) * TILE + threadIdx.x;
        const uint64_t start = shared.weight_above, own = token < row.tokens ? kept(row.at(token), token, is_tie) : 0;
        const uint64_t sum = start + sum_before(own, shared.scratch);
        if (sum <= target && target - sum < own) shared.found = token;
        __syncthreads();
        const int found = static_cast<int>(shared.found);
        __syncthreads();
        return found;
    }
};

// What is known of a row once all of its chunks are.
__device__ __forceinline__ Maximum of_row(const Sample &p, int64_t row, Shared &shared) {
    Maximum all = {0, -INFINITY, 0};
    for (int i = threadIdx.x; i < p.chunks; i += THREADS) {
        const Maximum &chunk = p.workspace.maxima[row * p.chunks + i];
        all.best = chunk.best > all.best ? chunk.best : all.best;
        all.most = fmaxf(all.most, chunk.most);
        all.is_bad |= chunk.is_bad;
    }
    all.best = greatest_of_block(all.best, shared.scratch);
    // The order of keys is that of logits.
    all.most = logit_of(static_cast<uint32_t>(greatest_of_block(key_of(all.most), shared.scratch)));
    all.is_bad = __syncthreads_or(all.is_bad);
    return all;
}

// Adds a chunk's bins to the row's.
__device__ __forceinline__ void add_bins(const Sample &p, int64_t row, const Histogram &histogram) {
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        if (histogram.tokens[i] == 0) continue;
        atomicAdd(p.workspace.bin_counts + row * BINS + i, histogram.tokens[i]);
        auto *sums = reinterpret_cast<unsigned long long *>(p.workspace.bin_sums);
        atomicAdd(sums + row * BINS + i, histogram.weight(i));
    }
}

// Whether this block is the last of its row. What the others have written is there then.
__device__ __forceinline__ bool is_last(const Sample &p, int64_t row, Shared &shared) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.found = atomicAdd(p.workspace.done + row, 1u) == p.chunks - 1;
    __syncthreads();
    const bool last = shared.found;
    __syncthreads();
    __threadfence();
    return last;
}

// Leaves out what top-k and top-p do not keep. Gives how many tokens with the logit of the last one are kept, the first
// of them, or 0 if all are.
__device__ __forceinline__ uint64_t filter(const Sample &p, int64_t row, Shared &shared, const Settings &settings,
                                           const Row &logits, const Sums &sums, Kept &kept) {
    const uint64_t *bin_sums = p.workspace.bin_sums + row * BINS;
    const uint32_t *bin_counts = p.workspace.bin_counts + row * BINS;
    uint64_t total = sums.total(shared), ties = 0;
#pragma unroll 1
    for (int by_weight = 0; by_weight < 2; by_weight++) {
        const bool is_on = by_weight ? settings.top_p < 1.0f : settings.top_k > 0 && settings.top_k < logits.tokens;
        if (!is_on) continue;
        const uint64_t least = by_weight ? nucleus(settings.top_p, total) : settings.top_k;
        const Place place = search(shared, logits, sums.tiles, kept.weigh, bin_sums, bin_counts, by_weight, least);
        // Fewer tokens have a weight.
        if (place.tokens_there == 0) continue;
        const uint64_t each = kept.weigh(logit_of(place.bits));
        ties = by_weight ? (least - place.weight_above + each - 1) / each : least - place.tokens_above;
        total = place.weight_above + ties * each;
        kept.last_key = place.bits;
        if (ties == place.tokens_there) ties = 0;
    }
    return ties;
}

__device__ __forceinline__ void write(const Sample &p, int64_t slot, uint32_t token, float log_prob) {
    p.chosen[slot] = token;
    if (p.log_probs) p.log_probs[slot] = log_prob;
    if (token == INVALID) return;
    p.settings[slot].position += 1;
    if (p.occurred) p.occurred[slot * p.words + token / 32] |= 1u << (token % 32);
}

// What is done for a row.
struct Task {
    Row row;
    Settings settings;
    // By the highest logit, before and after penalties.
    Weigh plain;
    Kept kept;
    // Whether there is a temperature, and whether top-k or top-p are on.
    bool is_random, is_filtered;

    __device__ __forceinline__ Task(const Sample &p, int64_t index, int64_t slot, const Settings &settings,
                                    const Maximum &all)
        : row(p, index, slot, settings.repetition_penalty), settings(settings) {
        plain = {all.most, 1.44269504088896340736f};
        const Weigh weigh = {Best{all.best}.logit(), scale_of(settings.temperature)};
        kept = {weigh, least_weight(settings.min_p), 0, static_cast<int>(p.tokens)};
        is_random = settings.temperature > 0;
        is_filtered = is_random && (settings.top_k > 0 || settings.top_p < 1.0f);
    }
};

// Sums up the weights of a chunk's tiles.
__device__ __forceinline__ void weigh_chunk(const Sample &p, const Chunk &chunk, const Task &task, Shared &shared) {
    if (task.is_filtered) shared.histogram.clear();
#pragma unroll 1
    for (int tile = chunk.first_of_warp(); tile < chunk.end; tile += WARPS) {
        uint64_t log_sum = 0, sum = 0;
        for_each_quad(task.row, tile, [&](int first, float (&x)[QUAD]) {
            if (p.log_probs) {
#pragma unroll
                for (int i = 0; i < QUAD; i++) log_sum += task.plain(x[i]);
            }
            if (!task.is_random) return;
            task.row.penalise(first, x);
            if (task.is_filtered) {
                // What top-p is a part of has all tokens, those too that min-p leaves out.
                for_each_of(x, [&](float y, int) {
                    const float power = task.kept.weigh.power(y);
                    const uint64_t own = weight(power);
                    sum += own;
                    // What has no weight has no bin, -infinity beyond the last token among it.
                    if (const uint32_t bin = Weigh::bin(power); bin > 0) shared.histogram.add(bin, own);
                });
                return;
            }
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                const uint64_t own = task.kept.weigh(x[i]);
                sum += own >= task.kept.least ? own : 0;
            }
        });
        sum = sum_of_warp(sum), log_sum = sum_of_warp(log_sum);
        if (threadIdx.x % WARP > 0) continue;
        const int64_t at = chunk.row * p.tiles + tile;
        if (p.log_probs) p.workspace.log_sums[at] = log_sum;
        if (task.is_random) p.workspace.sums[at] = sum;
    }
    if (task.is_filtered) add_bins(p, chunk.row, shared.histogram);
}

// What the last block of a row does. (All that is known of the row is read again, so that no register holds it before.)
__device__ __forceinline__ void finish(const Sample &p, int64_t row, Shared &shared) {
    const int64_t slot = slot_of(p.slots, row);
    const Task task(p, row, slot, p.settings[slot], shared.all);
    const int tiles = static_cast<int>(p.tiles);
    int token = Best{shared.all.best}.token();
    if (task.is_random) {
        const Sums sums = {p.workspace.sums + row * p.tiles, tiles};
        Kept kept = task.kept;
        uint64_t ties = 0;
        if (task.is_filtered) ties = filter(p, row, shared, task.settings, task.row, sums, kept);
        // Of several tokens with the logit of the last one the last that is kept, then the one that is chosen.
#pragma unroll 1
        for (int is_tie = ties > 0; is_tie >= 0; is_tie--) {
            if (task.is_filtered) sums.fill(task.row, kept, is_tie);
            const uint64_t random = is_tie ? 0 : uniform(task.settings.seed, task.settings.position);
            const uint64_t target = is_tie ? ties - 1 : __umul64hi(random, sums.total(shared));
            token = sums.find(shared, task.row, kept, is_tie, target);
            if (is_tie) kept.last_token = token;
        }
    }
    float log_prob = 0;
    if (p.log_probs) {
        const Sums sums = {p.workspace.log_sums + row * p.tiles, tiles};
        // What all others have beside the likeliest, which has 1: a token that is sure keeps its digits.
        const uint64_t others = sums.total(shared) - (uint64_t(1) << WEIGHT_BITS);
        log_prob = task.row.logits[token] - shared.all.most - log1pf(static_cast<float>(others) * 0x1p-40f);
    }
    if (threadIdx.x == 0) write(p, slot, static_cast<uint32_t>(token), log_prob);
}

__device__ __forceinline__ void choose(const Sample &p) {
    __shared__ Shared shared;
    const Chunk chunk(p);
    const int64_t slot = slot_of(p.slots, chunk.row);
    const Settings settings = settings_of(p, slot);
    wait_for_last();
    if (slot < 0) return;
    const Maximum all = of_row(p, chunk.row, shared);
    if (all.is_bad || all.most == -INFINITY || !is_valid(settings)) {
        if (chunk.index == 0 && threadIdx.x == 0) write(p, slot, INVALID, NAN);
        return;
    }
    const Task task(p, chunk.row, slot, settings, all);
    if (!task.is_random && !p.log_probs) {
        // All blocks of the row know the token. (The position, which this one changes, none of the others reads.)
        if (chunk.index == 0 && threadIdx.x == 0) write(p, slot, static_cast<uint32_t>(Best{all.best}.token()), 0.0f);
        return;
    }
    weigh_chunk(p, chunk, task, shared);
    if (threadIdx.x == 0) shared.all = all;
    if (is_last(p, chunk.row, shared)) finish(p, chunk.row, shared);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) sampling_choose(const __grid_constant__ Sample params) {
    begin_next();
    choose(params);
}

}
