// What the kernels that choose tokens take, and how they are launched.
#pragma once
#include "../common/params.cuh"

namespace sampling {

using namespace common;

// A row is divided into tiles of tokens, each a warp's, whose lanes have QUADS times QUAD neighbouring ones of it; in
// the search of a token in a tile each thread of a block has one. Chunks of tiles are a block's.
constexpr int THREADS = 512, WARPS = THREADS / 32, QUADS = 4, TILE = 32 * QUADS * QUAD;

// Bins of a histogram: 11 bits.
constexpr int BINS = 2048;

// The token of a row that has none. (The greatest number of 32 bits, as `sampling::INVALID`.)
constexpr uint64_t INVALID = 4294967295;

// As `sampling::Settings`.
struct Settings {
    uint64_t seed, position, top_k;
    float temperature, top_p, min_p, repetition_penalty;
};

// What is known of a chunk: its highest penalised logit and the first token that has it, as one number (see `Best`),
// its highest logit, and whether one of them is NaN or positive infinity (1, else 0).
struct Maximum {
    uint64_t best;
    float most;
    int32_t is_bad;
};

// What the kernels leave for one another, for each row; all of it is written before it is read.
struct Workspace {
    // (rows, chunks)
    Maximum *maxima;
    // The weights of each tile, and those by which log-probabilities are had: (rows, tiles).
    uint64_t *sums, *log_sums;
    // The weights and the number of tokens in each bin: (rows, BINS).
    uint64_t *bin_sums;
    uint32_t *bin_counts;
    // The blocks that are done with their chunks: (rows).
    uint32_t *done;
};

struct Sample {
    // (rows, …), `stride` from one row to the next.
    const float *logits;
    int64_t stride;
    // Tokens, tiles and chunks of a row, tiles of a chunk, words of bits of a sequence.
    int64_t tokens, tiles, chunks, chunk_tiles, words;
    // (sequences)
    Settings *settings;
    // (sequences, words); null where not kept.
    uint32_t *occurred;
    // (sequences)
    uint32_t *chosen;
    // (sequences); null where not requested.
    float *log_probs;
    Workspace workspace;
    // 1 if rows start at multiples of 16 bytes, else 0.
    int64_t is_whole;
    Slots slots;
};

}
