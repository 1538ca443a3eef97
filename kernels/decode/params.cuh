// What the kernels of a decoding step take, and how they are launched.
#pragma once
#include "../common/params.cuh"

namespace decode {

using namespace common;

namespace linear {
constexpr int WARPS = 8, THREADS = 256;
// Columns of the product that a block gives, and the rows of a tile of it.
constexpr int OUTPUTS = 16, TILE_ROWS = 8, F32_ROWS = 4;
// Features that a warp multiplies at a time: with tensor cores, and with f32.
constexpr int CHUNK = 32, CHUNK_F32 = 128;
// Bytes of each row that are staged at a time, at most. It decides, with the number of features, in which order these are
// summed, so that the number of rows does not: eight rows of it fit the shared memory of any device.
constexpr int SLICE_BYTES = 12288;
// The widest filter of a convolution.
constexpr int MAX_WIDTH = 8;
// What the columns of a warp's part of the product lie apart for each row: lanes that write at the same time meet no bank twice.
constexpr int PARTIAL_STRIDE = 20;
}

// FLAG_NORM: x is normed first. FLAG_ACCUMULATE: the product is added to `out`. FLAG_CONV: there is a convolution. FLAG_OWN_COLUMNS: each
// warp has columns of its own, and takes all features of them. FLAG_DIRECT: a block multiplies its rows, all features at once, with 16
// columns and no more, so that they need not be staged.
constexpr uint64_t FLAG_NORM = 1, FLAG_ACCUMULATE = 2, FLAG_CONV = 4, FLAG_OWN_COLUMNS = 8, FLAG_DIRECT = 16;

struct Linear {
    // (rows, features), of type `x_type`.
    Rows x;
    // (out_features, features) of the kernel's type.
    Rows weight;
    // (out_features)
    Vector bias;
    // (features)
    Vector norm_weight;
    // (rows, out_features) of type `out_type`.
    void *out;
    int64_t rows, features, out_features, x_type, out_type;
    // Features that are staged at a time.
    int64_t slice;
    // Where in shared memory, in bytes, the warps' sums lie: after the rows, or where these were if a block has one tile.
    int64_t partials;
    // Where the squares of the rows lie, after the rest; of few rows, what the convolution takes and the norm's weights lie after them.
    int64_t squares;
    uint64_t flags;
    // `count` is the number of features.
    float eps, count;
    // (d_inner, width) and (d_inner)
    Matrix conv_weight;
    Vector conv_bias;
    int64_t d_inner, width;
    // (slots, width - 1, d_inner) of type `state_type`.
    Pool conv_state;
    int64_t state_type;
};

// A launch of a product: the slots are those of the convolution's states.
struct LinearCall {
    Linear linear;
    Slots slots;
};

namespace update {
constexpr int THREADS = 128;
// FLAG_VECTOR: all that has states or ranks as its last dimension can be read and written in vectors of 4. FLAG_NORMS: the
// columns are normed. FLAG_PARTS: a lane has PARTS parts of a channel, all of a slot's states lie together, and the states of a channel
// are as many as its lanes have in PARTS parts.
constexpr uint64_t FLAG_VECTOR = 1, FLAG_NORMS = 2, FLAG_PARTS = 4;
constexpr int PARTS = 4, PARTS_SHIFT = 2;
// With FLAG_PARTS, the rows that a warp carries on together, and how many times as many have their states in shared memory, where a
// row's lie STAGED_PADDING bytes apart.
constexpr int ROWS = 2, STAGES = 2, STAGED_PADDING = 128;
}

struct Update {
    // (rows, d_inner)
    Rows u, z;
    // (rows, dt_rank + 2 d_state)
    Rows columns;
    // (d_inner, dt_rank)
    Rows dt_weight;
    // Of the norms of the step sizes' ranks, of B and of C.
    Vector dt_norm, b_norm, c_norm;
    Matrix a;
    Vector d, delta_bias;
    Pool state;
    // (rows, d_inner)
    void *out;
    int64_t rows, d_inner, d_state, dt_rank;
    // Parts that a channel's states and ranks are divided into, a power of two up to 32, as a shift. A lane has one of them or PARTS.
    int64_t part_shift;
    // With FLAG_PARTS, where in shared memory projections and states are staged, in bytes: after the columns.
    int64_t weights, states;
    uint64_t flags;
    // Of the norm of the ranks, and of those of B and C.
    float dt_eps, state_eps;
};

struct UpdateCall {
    Update update;
    Slots slots;
};

namespace projected {
// Blocks of a cluster, which share the projection of their rows, and the most rows of a cluster.
constexpr int CLUSTER = 8, THREADS = 256, ROWS = 8;
}

// x_proj and the update of what it gives. `project` has no norm, bias or convolution, and takes all features at once.
struct ProjectedCall {
    Linear project;
    Update update;
    Slots slots;
};

namespace layers {
// The warps of a block that multiply, which share a tile of a product. One more brings the matrices.
constexpr int WARPS = linear::WARPS, WORKERS = 32 * WARPS, THREADS = WORKERS + 32;
// Rows are 1, 2 or 4, and a block has an element for each worker at most of a product.
constexpr int MOST_ROWS = 4;
// The matrices of a layer: in_proj, x_proj and out_proj.
constexpr int MATRICES = 3, IN_PROJ = 0, X_PROJ = 1, OUT_PROJ = 2;
// Bytes of a chunk of a matrix, 16 rows of 64, and the chunks that are asked for at a time.
constexpr int CHUNK_BYTES = 1024, BATCH = 16;
// Batches of a block that are on their way at most: 32 KiB keep memory busy, and of more what blocks leave to each other comes late.
constexpr int PACE = 2;
// What blocks leave to each other in a layer: the rows, the update's input and gate, its columns, and its output.
constexpr int PARTS = 5, OF_ROWS = 0, OF_U = 1, OF_Z = 2, OF_COLUMNS = 3, OF_Y = 4;
}

// Products and updates of a layer of Mamba, one after another.
struct Layer {
    Linear in_proj, project, out_proj;
    Update update;
};

// All layers, which are of one shape.
struct LayersCall {
    const Layer *layers;
    // Of each layer's matrices.
    const TensorMap *maps;
    int64_t count;
    // Of each of a layer's matrices, the tiles of 16 columns, and the chunks of 32 features.
    int64_t tiles[3], chunks[3];
    // What blocks leave to each other, in each layer `of_layer` words of 64 bits; where each part of them begins. (That of a layer's rows is
    // what the layer before has left.)
    uint64_t *words;
    int64_t of_layer, part_at[5];
    // The number of launches before this one, which this one counts.
    uint32_t *launches;
    // How many batches of chunks a block has room for.
    int64_t batches;
    // Where in shared memory, in bytes, things lie, after the batches.
    int64_t rows, norm_weights, squares, partials, columns, described, arrivals;
    // What a row of a warp's share takes there, the most tiles of a product that a block has, and the rows as a shift.
    int64_t row_bytes, most_tiles, row_shift;
    Slots slots;
};

}
