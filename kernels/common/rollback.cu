// Puts states of a pool back to what they were after a token. Elements are copied as they are stored.
#include "tensor.cuh"

namespace common {

template <typename Bits> __device__ __forceinline__ void rollback(const Rollback &p) {
    for (int64_t i = blockIdx.y; i < p.count; i += gridDim.y) {
        const auto [row, listed, token] = p.restored[i];
        const int64_t slot = p.slots ? slot_in(p.slots, row, p.pool_slots) : listed;
        if (slot < 0) continue;
        const Bits *from = static_cast<const Bits *>(p.token_states) + (row * p.batch + token * p.token);
        Bits *to = static_cast<Bits *>(p.state.data) + slot * p.state.slot;
        for (int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; k < p.rows * p.columns;
             k += int64_t(gridDim.x) * blockDim.x) {
            const int64_t r = k / p.columns, c = k - r * p.columns;
            to[r * p.state.row + c * p.state.column] = from[r * p.row + c * p.column];
        }
    }
}

extern "C" __global__ void rollback_16(const __grid_constant__ Rollback params) { rollback<uint16_t>(params); }
extern "C" __global__ void rollback_32(const __grid_constant__ Rollback params) { rollback<uint32_t>(params); }

}
