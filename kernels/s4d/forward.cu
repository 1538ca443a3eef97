// S4D, forward; and the chunk states of split sequences, which each segment reaches from zero.
#include "forward.cuh"

namespace s4d::forward {

#define INSTANCE(SUFFIX, T, BLOCKS)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                           \
        s4d_forward_##SUFFIX(const __grid_constant__ Forward params) {                                                 \
        run<T, true>(params);                                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                           \
        s4d_chunk_state_##SUFFIX(const __grid_constant__ Forward params) {                                             \
        run<T, false>(params);                                                                                         \
    }

INSTANCE(f32, float, 1)
INSTANCE(f16, __half, 1)
// Its matrices take half of the registers.
INSTANCE(bf16, __nv_bfloat16, 2)

}
