// What the kernels of the forward scan share: their arguments.
#pragma once
#include "scan.cuh"

struct ScanForward {
    ScanInputs in;
    void *out;
    // Null where not asked for.
    float *final_state, *checkpoints;
};
static_assert(sizeof(ScanForward) == 416, "as in src/cuda/params.rs");
