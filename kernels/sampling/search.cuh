// Where the order of the likeliest tokens ends, by their number or by the sum of their weights, without sorting them.
//
// A histogram over the distances from the highest logit, of all tokens that have a weight, says in which bin the last
// token is that counts: it is a sum over the blocks of the row. What follows is one block's: it goes through the row
// for the tokens of that bin, lists their keys (`key_of`), and narrows these down by 11, 11 and 10 of their 32 bits,
// from the highest on, in three more histograms: of the list or, where it has no room for all, of the row again. Sums
// are of whole numbers, and so the same in any order.
#pragma once
#include "rows.cuh"

namespace sampling {

// Tokens of a bin that are listed.
constexpr int MOST_MEMBERS = 4096;

struct Histogram {
    // The number of tokens in each bin, and the sum of their weights in two halves.
    uint32_t tokens[BINS], low[BINS], high[BINS];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = threadIdx.x; i < BINS; i += THREADS) tokens[i] = 0, low[i] = 0, high[i] = 0;
        __syncthreads();
    }

    __device__ __forceinline__ void add(uint32_t bin, uint64_t weight) {
        atomicAdd(&tokens[bin], 1);
        const uint32_t part = static_cast<uint32_t>(weight);
        // There are no atomics of 64 bits on shared memory in hardware: a sum that is less than what was added has
        // overflowed.
        const uint32_t sum = part ? atomicAdd(&low[bin], part) + part : 0;
        const uint32_t above = static_cast<uint32_t>(weight >> 32) + (sum < part);
        if (above) atomicAdd(&high[bin], above);
    }

    __device__ __forceinline__ uint64_t weight(int bin) const { return uint64_t(high[bin]) << 32 | low[bin]; }
};

// What the threads of a block share.
struct Shared {
    uint64_t scratch[WARPS];
    Histogram histogram;
    // The keys of tokens of a bin, as many as there is room for, and the number of all.
    uint32_t members[MOST_MEMBERS];
    int member_count;
    // What is known of the row.
    Maximum all;
    // What one thread has found.
    uint64_t tokens_above, weight_above;
    uint32_t found, tokens_there;
};

// No bin.
constexpr uint32_t NONE = ~0u;

// The part of the order that has been found to hold the last token: its keys have these highest bits.
struct Place {
    uint32_t bits;
    // The tokens above it, their weights, and the tokens in it; of these there are none if nothing was found.
    uint64_t tokens_above, weight_above;
    uint32_t tokens_there;

    // Goes on to a bin, of which `width` bits more are known: that in which the number of tokens, or the sum of
    // weights, from the highest on, comes to `least`.
    __device__ __forceinline__ void narrow(Shared &shared, bool by_weight, int width, uint64_t least) {
        if (threadIdx.x == 0) shared.found = NONE;
        __syncthreads();
        const Histogram &histogram = shared.histogram;
        constexpr int BINS_EACH = BINS / THREADS;
        uint64_t tokens = 0, weight = 0;
#pragma unroll
        for (int i = 0; i < BINS_EACH; i++) {
            const int bin = BINS - 1 - (BINS_EACH * threadIdx.x + i);
            tokens += histogram.tokens[bin], weight += histogram.weight(bin);
        }
        tokens = tokens_above + sum_before(tokens, shared.scratch);
        weight = weight_above + sum_before(weight, shared.scratch);
#pragma unroll
        for (int i = 0; i < BINS_EACH; i++) {
            const int bin = BINS - 1 - (BINS_EACH * threadIdx.x + i);
            const uint32_t own_tokens = histogram.tokens[bin];
            const uint64_t own_weight = histogram.weight(bin);
            const uint64_t before = by_weight ? weight : tokens, own = by_weight ? own_weight : own_tokens;
            if (before < least && least - before <= own) {
                shared.found = bin, shared.tokens_there = own_tokens;
                shared.tokens_above = tokens, shared.weight_above = weight;
            }
            tokens += own_tokens, weight += own_weight;
        }
        __syncthreads();
        tokens_there = 0;
        if (shared.found != NONE) {
            bits = bits << width | shared.found;
            tokens_above = shared.tokens_above, weight_above = shared.weight_above, tokens_there = shared.tokens_there;
        }
        __syncthreads();
    }
};

// The weight of a token by its logit alone, and its bin in the row's histogram.
struct Weigh {
    float most, scale;

    // The distance from the highest in powers of two, 0 or less.
    __device__ __forceinline__ float power(float y) const { return (y - most) * scale; }
    __device__ __forceinline__ uint64_t operator()(float y) const { return weight(power(y)); }

    // Bins are 0.02 powers wide, the likeliest in the last one. Those below 2^-41, which have no weight, are in none
    // (0). No step of this changes the order of logits.
    __device__ __forceinline__ static uint32_t bin(float power) {
        const float distance = power * -49.9f;
        return distance < BINS - 1 ? BINS - 1 - static_cast<uint32_t>(distance) : 0;
    }
};

// The place of the token at which the number of tokens, or the sum of their weights, from the highest on, comes to
// `least`: all bits of its key. By weight it must come to that; by number there is no such place if it does not among
// those that have a weight. `bin_sums` and `bin_counts` are the row's histogram.
__device__ __forceinline__ Place search(Shared &shared, const Row &row, int tiles, const Weigh &weigh,
                                        const uint64_t *bin_sums, const uint32_t *bin_counts, bool by_weight,
                                        uint64_t least) {
    Histogram &histogram = shared.histogram;
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        // What other blocks have added lies in the second-level cache.
        const uint64_t sum = __ldcg(reinterpret_cast<const unsigned long long *>(bin_sums) + i);
        histogram.tokens[i] = __ldcg(bin_counts + i);
        histogram.low[i] = static_cast<uint32_t>(sum), histogram.high[i] = static_cast<uint32_t>(sum >> 32);
    }
    if (threadIdx.x == 0) shared.member_count = 0;
    Place place = {0, 0, 0, 0};
    place.narrow(shared, by_weight, 11, least);
    if (place.tokens_there == 0) return place;
    const uint32_t bin = place.bits;
    place.bits = 0;
#pragma unroll 1
    for (int rest = 21; rest >= 0; rest = rest == 21 ? 10 : rest - 10) {
        const int width = rest > 0 ? 11 : 10, members = shared.member_count;
        const bool is_first = rest == 21;
        histogram.clear();
        const auto add = [&](uint32_t key, uint64_t weight) {
            // Shifted as 64 bits, since at first no bit is known.
            if (uint64_t(key) >> (width + rest) == place.bits) histogram.add(key >> rest & ((1 << width) - 1), weight);
        };
        if (!is_first && members <= MOST_MEMBERS) {
            for (int i = threadIdx.x; i < members; i += THREADS) {
                const uint32_t key = shared.members[i];
                add(key, weigh(logit_of(key)));
            }
        } else {
#pragma unroll 1
            for (int tile = threadIdx.x / WARP; tile < tiles; tile += WARPS) {
                for_each_token(row, tile, [&](float y, int) {
                    const float power = weigh.power(y);
                    if (Weigh::bin(power) != bin) return;
                    const uint32_t key = key_of(y);
                    add(key, weight(power));
                    if (!is_first) return;
                    const int at = atomicAdd(&shared.member_count, 1);
                    if (at < MOST_MEMBERS) shared.members[at] = key;
                });
            }
        }
        place.narrow(shared, by_weight, width, least);
    }
    return place;
}

}
