// Launches over many tensors: which of them a block works on.
#pragma once
#include "vector_io.cuh"
#include "params.cuh"

namespace common {

// The entry whose blocks this one is among: the last that begins at this block or before.
template <typename Entry> __device__ __forceinline__ const Entry &entry_of_block(const Entry *entries, int64_t count) {
    int low = 0, high = static_cast<int>(count);
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (entries[middle].first_block <= static_cast<int>(blockIdx.x)) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return entries[low];
}

// Whether four elements at `p` can be accessed together.
template <typename T> __device__ __forceinline__ bool is_aligned(const T *p) {
    return reinterpret_cast<uint64_t>(p) % (QUAD * sizeof(T)) == 0;
}

}
