// What the kernels of the forward pass have in common.
#pragma once
#include "products.cuh"
#include "softmax.cuh"
#include "stages.cuh"

namespace attention {

// What is done to queries as they are read, so that scores are multiplied by a positive number: their sign is exchanged where the
// scale is negative, and where it is zero they are too.
template <typename T> struct QuerySign {
    uint32_t kept, exchanged;

    __device__ __forceinline__ explicit QuerySign(uint64_t flags)
        : kept(flags & FLAG_ZERO ? 0 : ~0u), exchanged(flags & FLAG_NEGATIVE ? (sizeof(T) == 4 ? 0x80000000u : 0x80008000u) : 0) {}

    template <int D> __device__ __forceinline__ RowFragment<T> load(const Tile<T, D> &tile, int first, int step) const {
        const int lane = threadIdx.x % 32;
        uint32_t raw[4];
        load_matrices<false>(raw, tile.at(first + lane % 16, 2 * step + lane / 16));
#pragma unroll
        for (int i = 0; i < 4; i++) raw[i] = (raw[i] & kept) ^ exchanged;
        return RowFragment<T>(raw);
    }
};

}
