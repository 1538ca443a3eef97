// The rows of an embedding matrix that tokens name; what is not a number for one that it does not have.
#include "../common/launch.cuh"
#include "../common/tensor.cuh"
#include "params.cuh"

namespace embedding {

template <typename T, typename O> __device__ __forceinline__ void look_up(const Lookup &p) {
    begin_next();
    for (int64_t i = blockIdx.y; i < p.count; i += gridDim.y) {
        const int64_t slot = slot_of(p.slots, i), id = slot < 0 ? p.vocab : p.ids[slot];
        const T *row = static_cast<const T *>(p.table) + id * p.row;
        for (int64_t j = int64_t(blockIdx.x) * THREADS + threadIdx.x; j < p.width; j += int64_t(gridDim.x) * THREADS) {
            const float value = slot < 0 ? 0.0f : id < p.vocab ? widen(row[j * p.column]) : NAN;
            static_cast<O *>(p.out)[i * p.width + j] = narrow<O>(value);
        }
    }
}

#define INSTANCE(NAME, T, O)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS) embedding_lookup_##NAME(const __grid_constant__ Lookup params) { \
        look_up<T, O>(params);                                                                                         \
    }

INSTANCE(f32_f32, float, float)
INSTANCE(f16_f32, __half, float)
INSTANCE(f16_f16, __half, __half)
INSTANCE(bf16_f32, __nv_bfloat16, float)
INSTANCE(bf16_bf16, __nv_bfloat16, __nv_bfloat16)

}
