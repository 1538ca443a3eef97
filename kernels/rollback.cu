// Puts states of a pool back to what they were behind a token. Elements are copied as they are stored.
#include "pool.cuh"

struct Rollback {
    Pool state;
    // (batch, tokens, rows, columns)
    const void *token_states;
    int64_t batch, token, row, column;
    // For each of `count` states its batch row, its slot, and the token.
    const int64_t *restored;
    int64_t count, rows, columns;
};
static_assert(sizeof(Rollback) == 104, "as in src/cuda/params.rs");

template <typename Bits> __device__ __forceinline__ void rollback(const Rollback &p) {
    for (int64_t i = blockIdx.y; i < p.count; i += gridDim.y) {
        const int64_t row = p.restored[3 * i], slot = p.restored[3 * i + 1], token = p.restored[3 * i + 2];
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
