// What the kernels of an embedding and of its gradient take, and how they are launched.
#pragma once
#include "../common/params.cuh"

namespace embedding {

using namespace common;

// Threads of a block that sorts, and the tokens of the vocabulary that it takes.
constexpr int SORT_THREADS = 512, TILE = 256;
// Threads of a block that sums.
constexpr int THREADS = 256;

struct Lookup {
    // By slots.
    const uint32_t *ids;
    // (vocab, width)
    const void *table;
    int64_t row, column;
    // (count, width)
    void *out;
    int64_t count, vocab, width;
    Slots slots;
};

struct Sort {
    // (count)
    const uint32_t *ids;
    // (count): the positions of the ids that are in the vocabulary, by token, those of one in ascending order.
    int64_t *order;
    // (vocab + 1): where the positions of each token begin there, and where the last one's end.
    int64_t *starts;
    int64_t count, vocab;
};

// FLAG_VECTOR: the rows can be read and written in vectors of 4.
constexpr uint64_t FLAG_VECTOR = 1;

struct Sum {
    const uint32_t *ids;
    const int64_t *order, *starts;
    // (count, width)
    const void *d_out;
    int64_t row, column;
    // (vocab, width)
    float *d_table;
    // (parts, 2, stride): what each part of the positions in order adds to the token that it begins with and to the one
    // that it ends with, where these have more than `part` positions.
    float *partials;
    int64_t stride;
    // Positions of a part, and how many parts there are.
    int64_t part, parts;
    int64_t vocab, width;
    // Threads that share a row's columns, a power of two up to 32, as a shift.
    int64_t lane_shift;
    // Blocks that take parts, before those that take tokens; `columns` of them share a part.
    int64_t part_blocks, columns;
    uint64_t flags;
};

}
