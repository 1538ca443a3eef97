// What the kernels of attention take, and how they are launched.
#pragma once
#include "../common/params.cuh"

namespace attention {

using namespace common;

// (batch, steps, heads, d_head) of the activations' type. `vector`: rows are contiguous and can be read 16 bytes at a time.
struct Heads {
    const void *data;
    int64_t batch, step, head, column, vector;
};

// A sequence: `length` queries from step `start` of a batch row on, and `keys` keys from step `first` of row `row` on.
// Its blocks come after those of `tile` others; where results are joined, after `joined` others.
struct Part {
    int64_t batch, start, length, row, first, keys, tile, joined;
};

// The sequences: those that `listed` has or, where it is null, each of `count` batch rows, of `length` queries and as many keys,
// with `tiles` tiles.
struct Parts {
    const Part *listed;
    int64_t count, length, tiles;
};

// FLAG_NEGATIVE, FLAG_ZERO: what the scale is. FLAG_PAIRS: results can be written in pairs.
constexpr uint64_t FLAG_CAUSAL = 1, FLAG_NEGATIVE = 2, FLAG_ZERO = 4, FLAG_PAIRS = 8;

// What all kernels read. The rows of a sequence are the queries that read one head of keys, `group` heads of a step next to
// each other.
struct Inputs {
    Heads q, k, v;
    Parts parts;
    // Of the queries, and of the keys.
    int64_t length, steps;
    int64_t kv_heads, group, d_head;
    uint64_t flags;
    // What scores are multiplied by, and that times log2(e); forward the latter is positive, see QuerySign.
    float scale, exponent;
};

struct Forward {
    Inputs inputs;
    // (batch, length, heads, d_head) and (batch, length, heads).
    void *out;
    float *lse;
    // Where the keys of a sequence are split: of each block the sums of its first `kept` rows, (blocks, kept, d_head), and the most
    // and the sum of each row's weights, (blocks, kept, 2). No block has more rows.
    float *sums, *weights;
    int64_t kept;
};

struct Backward {
    Inputs inputs;
    // `out` is read of f32 alone.
    Heads out, d_out;
    // (batch, length, heads), by batch, step and head.
    const float *lse;
    int64_t lse_batch, lse_step, lse_head;
    // What the kernel over queries leaves that over keys: lse in units of log2, and the mean, (batch, length, heads, 2).
    float *of_rows;
    void *d_q, *d_k, *d_v;
};

// Tiles for each width that d_head is filled up to, of half types and of f32. ROWS rows of a block are divided among WARPS warps,
// TILES times 16 to each, and meet STEPS others at a time, of which there are STAGES in shared memory. Where the sums of a row are
// too many for a warp, HALVES warps share it. Everything fits in 99 KiB, which the smallest of the devices have.
namespace forward {
namespace half_32 {
constexpr int WARPS = 4, TILES = 2, HALVES = 1, STEPS = 64, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, ROWS = 16 * TILES * WARPS, SMEM = 2 * 32 * (ROWS + 2 * STEPS * STAGES);
}
namespace half_64 {
constexpr int WARPS = 4, TILES = 2, HALVES = 1, STEPS = 64, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, ROWS = 16 * TILES * WARPS, SMEM = 2 * 64 * (ROWS + 2 * STEPS * STAGES);
}
namespace half_128 {
constexpr int WARPS = 4, TILES = 2, HALVES = 1, STEPS = 64, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, ROWS = 16 * TILES * WARPS, SMEM = 2 * 128 * (ROWS + 2 * STEPS * STAGES);
}
namespace half_256 {
constexpr int WARPS = 4, TILES = 1, HALVES = 1, STEPS = 32, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, ROWS = 16 * TILES * WARPS, SMEM = 2 * 256 * (ROWS + 2 * STEPS * STAGES);
}
namespace full_32 {
constexpr int WARPS = 4, TILES = 1, HALVES = 1, STEPS = 64, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, ROWS = 16 * TILES * WARPS, SMEM = 4 * 32 * (ROWS + 2 * STEPS * STAGES);
}
namespace full_64 {
constexpr int WARPS = 4, TILES = 1, HALVES = 1, STEPS = 32, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, ROWS = 16 * TILES * WARPS, SMEM = 4 * 64 * (ROWS + 2 * STEPS * STAGES);
}
namespace full_128 {
constexpr int WARPS = 4, TILES = 1, HALVES = 1, STEPS = 32, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, ROWS = 16 * TILES * WARPS, SMEM = 4 * 128 * (ROWS + 2 * STEPS * STAGES);
}
namespace full_256 {
constexpr int WARPS = 4, TILES = 1, HALVES = 2, STEPS = 16, STAGES = 1;
constexpr int THREADS = 32 * WARPS * HALVES, ROWS = 16 * TILES * WARPS, SMEM = 4 * 256 * (ROWS + 2 * STEPS * STAGES);
}
}

// Few rows over many keys: the warps of a block share ROWS rows, and each has a part of every tile's keys. Keys are split into
// pieces of so many; the sums of several are joined by a kernel of its own, a block for each row.
namespace split {
constexpr int ROWS = 16, PIECE = 256, JOIN_THREADS = 128;
namespace half_32 {
constexpr int WARPS = 4, HALVES = 1, STEPS = 64, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, SMEM = 2 * 32 * (ROWS + 2 * STEPS * STAGES);
}
namespace half_64 {
constexpr int WARPS = 4, HALVES = 1, STEPS = 64, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, SMEM = 2 * 64 * (ROWS + 2 * STEPS * STAGES);
}
namespace half_128 {
constexpr int WARPS = 4, HALVES = 1, STEPS = 64, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, SMEM = 2 * 128 * (ROWS + 2 * STEPS * STAGES);
}
namespace half_256 {
constexpr int WARPS = 4, HALVES = 1, STEPS = 64, STAGES = 1;
constexpr int THREADS = 32 * WARPS * HALVES, SMEM = 2 * 256 * (ROWS + 2 * STEPS * STAGES);
}
namespace full_32 {
constexpr int WARPS = 4, HALVES = 1, STEPS = 64, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, SMEM = 4 * 32 * (ROWS + 2 * STEPS * STAGES);
}
namespace full_64 {
constexpr int WARPS = 4, HALVES = 1, STEPS = 64, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, SMEM = 4 * 64 * (ROWS + 2 * STEPS * STAGES);
}
namespace full_128 {
constexpr int WARPS = 4, HALVES = 1, STEPS = 64, STAGES = 1;
constexpr int THREADS = 32 * WARPS * HALVES, SMEM = 4 * 128 * (ROWS + 2 * STEPS * STAGES);
}
namespace full_256 {
constexpr int WARPS = 2, HALVES = 2, STEPS = 32, STAGES = 1;
constexpr int THREADS = 32 * WARPS * HALVES, SMEM = 4 * 256 * (ROWS + 2 * STEPS * STAGES);
}
}

// Both kernels of the backward pass; rows are queries of one and keys of the other, which has two sums for each and KEY_HALVES in
// place of HALVES. The widest rows of f16, whose weights take more registers (products.cuh), meet half of the STEPS
// at a time.
namespace backward {
namespace half_32 {
constexpr int WARPS = 4, HALVES = 1, KEY_HALVES = 1, STEPS = 64, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, KEY_THREADS = 32 * WARPS * KEY_HALVES, ROWS = 16 * WARPS, SMEM = 2 * 32 * 2 * (ROWS + STEPS * STAGES) + 8 * STEPS * STAGES;
}
namespace half_64 {
constexpr int WARPS = 4, HALVES = 1, KEY_HALVES = 1, STEPS = 64, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, KEY_THREADS = 32 * WARPS * KEY_HALVES, ROWS = 16 * WARPS, SMEM = 2 * 64 * 2 * (ROWS + STEPS * STAGES) + 8 * STEPS * STAGES;
}
namespace half_128 {
constexpr int WARPS = 4, HALVES = 1, KEY_HALVES = 1, STEPS = 32, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, KEY_THREADS = 32 * WARPS * KEY_HALVES, ROWS = 16 * WARPS, SMEM = 2 * 128 * 2 * (ROWS + STEPS * STAGES) + 8 * STEPS * STAGES;
}
namespace half_256 {
constexpr int WARPS = 4, HALVES = 1, KEY_HALVES = 2, STEPS = 32, STAGES = 1;
constexpr int THREADS = 32 * WARPS * HALVES, KEY_THREADS = 32 * WARPS * KEY_HALVES, ROWS = 16 * WARPS, SMEM = 2 * 256 * 2 * (ROWS + STEPS * STAGES) + 8 * STEPS * STAGES;
}
namespace full_32 {
constexpr int WARPS = 4, HALVES = 1, KEY_HALVES = 1, STEPS = 32, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, KEY_THREADS = 32 * WARPS * KEY_HALVES, ROWS = 16 * WARPS, SMEM = 4 * 32 * 2 * (ROWS + STEPS * STAGES) + 8 * STEPS * STAGES;
}
namespace full_64 {
constexpr int WARPS = 4, HALVES = 1, KEY_HALVES = 1, STEPS = 32, STAGES = 2;
constexpr int THREADS = 32 * WARPS * HALVES, KEY_THREADS = 32 * WARPS * KEY_HALVES, ROWS = 16 * WARPS, SMEM = 4 * 64 * 2 * (ROWS + STEPS * STAGES) + 8 * STEPS * STAGES;
}
namespace full_128 {
constexpr int WARPS = 4, HALVES = 1, KEY_HALVES = 2, STEPS = 32, STAGES = 1;
constexpr int THREADS = 32 * WARPS * HALVES, KEY_THREADS = 32 * WARPS * KEY_HALVES, ROWS = 16 * WARPS, SMEM = 4 * 128 * 2 * (ROWS + STEPS * STAGES) + 8 * STEPS * STAGES;
}
namespace full_256 {
constexpr int WARPS = 2, HALVES = 2, KEY_HALVES = 4, STEPS = 16, STAGES = 1;
constexpr int THREADS = 32 * WARPS * HALVES, KEY_THREADS = 32 * WARPS * KEY_HALVES, ROWS = 16 * WARPS, SMEM = 4 * 256 * 2 * (ROWS + STEPS * STAGES) + 8 * STEPS * STAGES;
}
}

}
