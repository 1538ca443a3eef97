// Reading tensors by their descriptions.
#pragma once
#include "params.cuh"
#include "vector_io.cuh"

namespace common {

// Whether four states of a channel lie in one aligned vector.
__device__ __forceinline__ bool is_vectorizable(const Matrix &matrix) {
    return matrix.state == 1 && matrix.channel % 4 == 0 && reinterpret_cast<uint64_t>(matrix.data) % sizeof(float4) == 0;
}

// The vector's element of channel `d`, or `otherwise` if the vector is absent.
__device__ __forceinline__ float element_or(const Vector &vector, int64_t d, float otherwise) {
    return vector.data ? vector.data[d * vector.channel] : otherwise;
}

// A slot as a table on the device has it; negative, for padding, if the pool does not have it.
__device__ __forceinline__ int64_t slot_in(const int32_t *table, int64_t row, int64_t count) {
    const int64_t slot = table[row];
    return slot < count ? slot : -1;
}

// The slot of a batch row; negative for padding.
__device__ __forceinline__ int64_t slot_of(const Slots &slots, int64_t row) {
    if (slots.kind == SLOTS_IDENTITY) return row;
    return slots.kind == SLOTS_LISTED ? slots.few[row] : slot_in(slots.table, row, slots.count);
}

}
