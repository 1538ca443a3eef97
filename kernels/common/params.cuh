// What kernels of all operators take: how tensors, segments and state pools are described to them. Distances are in elements
// and 64 bits wide; a null `data` or pointer stands for what is absent.
//
// Files of this name have data only: build.rs reads them and writes the same structs and constants for Rust.
#pragma once
#include <stdint.h>

namespace common {

// Neighbouring elements that a thread loads and stores at a time.
constexpr int QUAD = 4;

// The types of elements of what a kernel is not made for one type of.
constexpr int64_t TYPE_F32 = 0, TYPE_F16 = 1, TYPE_BF16 = 2;

// (batch, length, d_inner) of the activations' type.
struct Activation {
    const void *data;
    int64_t batch, step, channel;
};

// How the copy engine finds boxes of a tensor, as the driver writes it (CUtensorMap).
struct alignas(128) TensorMap {
    uint64_t words[16];
};

// B or C: (batch, length, groups, d_state) of the activations' type or, where `constant` is set, (d_inner, d_state) f32.
struct Projection {
    const void *data;
    int64_t batch, step, group, channel, state;
    int64_t constant;
};

// (rows, columns) of any type.
struct Rows {
    const void *data;
    int64_t row, column;
};

// (d_inner, d_state) f32.
struct Matrix {
    const float *data;
    int64_t channel, state;
};

// (d_inner) f32.
struct Vector {
    const float *data;
    int64_t channel;
};

// (sequences, d_inner, d_state) f32.
struct States {
    const float *data;
    int64_t sequence, channel, state;
};

// A segment of a packed sequence: `steps` steps from the sequence's `first`-th on, in the direction of the scan. The sequence
// has `len` steps from step `start` of the batch row on; `rank` of its segments come before this one, `segments_after` after.
struct PackedSegment {
    int64_t sequence, start, len, first, steps, rank, segments_after;
};

// How the steps are divided into segments: those that `packed` lists or, where it is null, each batch row of `len` steps into
// `per_row` segments of `steps` steps.
struct Segments {
    const PackedSegment *packed;
    int64_t count, len, per_row, steps;
};

// A pool of states that are updated in place, (slots, rows, columns).
struct Pool {
    void *data;
    int64_t slot, row, column;
};

// Slots that travel in the launch itself.
constexpr int SLOTS_IN_LAUNCH = 512;

constexpr int64_t SLOTS_IDENTITY = 0, SLOTS_LISTED = 1, SLOTS_TABLE = 2;

// The slot of each batch row: its own number (SLOTS_IDENTITY), or as listed in the launch itself (SLOTS_LISTED) or in a table
// (SLOTS_TABLE), for lists that a launch has no room for and for those that the caller has on the device. Negative for padding,
// and so are those in a table that a pool of `count` slots does not have: nobody may have checked them.
struct Slots {
    const int32_t *table;
    int64_t kind, count;
    int32_t few[SLOTS_IN_LAUNCH];
};

// A state that a rollback restores: that after token `token` of batch row `row`, in slot `slot`.
struct Restored {
    int64_t row, slot, token;
};

struct Rollback {
    Pool state;
    // (batch, tokens, rows, columns)
    const void *token_states;
    int64_t batch, token, row, column;
    const Restored *restored;
    int64_t count, rows, columns;
    // The slot of each batch row in place of those in `restored`, if not null; one that a pool of `pool_slots` does not have is
    // padding.
    const int32_t *slots;
    int64_t pool_slots;
};

// A sum over the first dimension of (parts, m) f32.
struct Sum {
    const float *from;
    void *to;
    // `stride` lies between the parts.
    int64_t parts, m, stride;
    // Threads of a block that share a column's parts, a power of two up to the block's threads, as a shift.
    int64_t row_shift;
    // The blocks of a launch before this sum's, and its own.
    int64_t first_block, blocks;
    uint64_t flags;
};
// FLAG_VECTOR: everything can be read and written in vectors of 4. FLAG_F32: the sums are f32, not of the kernel's type.
namespace reduce_partials {
constexpr uint64_t FLAG_VECTOR = 1, FLAG_F32 = 2;
constexpr int THREADS = 256;
// Loads of a thread that are in flight together.
constexpr int AHEAD = 4;
}

// Sums of one launch: what a pass leaves to be summed is small.
constexpr int MAX_SUMS = 5;
struct Sums {
    Sum sums[MAX_SUMS];
    int64_t count;
};

// Values that travel in one launch: with the fields before them they fill the 4 KiB that a launch takes.
constexpr int UPLOAD_VALUES = 496;
struct Upload {
    uint64_t *to;
    uint64_t count;
    uint64_t values[UPLOAD_VALUES];
};

// Elements of one tensor that become another's, of any type: contiguous ones, or zeros if `from` is null. `first_block` is the
// first block of the launch that works on them.
struct Conversion {
    void *to;
    const void *from;
    int64_t count, to_type, from_type, first_block;
};
namespace convert {
constexpr int THREADS = 256;
// Elements that a block converts: a thread has four quads in flight.
constexpr int AHEAD = 4;
constexpr int CHUNK = AHEAD * QUAD * THREADS;
}

// As many as a launch of 4 KiB has room for.
constexpr int MOST_CONVERSIONS = 84;
struct Conversions {
    int64_t count;
    Conversion conversions[MOST_CONVERSIONS];
};

}
