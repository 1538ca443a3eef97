// What the kernel of the cross entropy takes, and how it is launched.
#pragma once
#include "../common/params.cuh"

namespace loss {

using namespace common;

// The most threads of a block. Two such blocks fill a multiprocessor, and what they read (two rows of 50,280 bf16 on each of 132)
// is still in the second-level cache when they read it again.
constexpr int THREADS = 1024;
// Vectors of 16 bytes to a thread, where there are as many.
constexpr int VECTORS = 4;

// The target of a row that is left out. (The greatest number of 32 bits, as `loss::IGNORED`.)
constexpr uint64_t IGNORED = 4294967295;

struct CrossEntropy {
    // (rows, vocab), `stride` from one row to the next.
    void *logits;
    const uint32_t *targets;
    // (rows)
    float *losses;
    int64_t rows, vocab, stride;
    float label_smoothing, z_loss;
    // What the gradient is multiplied by.
    float scale;
    // 1 if the gradient takes the place of the logits, else 0.
    int32_t with_gradient;
};

}
