// S4D, forward; and the chunk states of split sequences, which each segment reaches from zero.
#include "forward.cuh"

namespace s4d::forward {

#define INSTANCE(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        s4d_forward_##SUFFIX(const __grid_constant__ Forward params) {                                                 \
        run<T, true>(params);                                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        s4d_chunk_state_##SUFFIX(const __grid_constant__ Forward params) {                                             \
        run<T, false>(params);                                                                                         \
    }

INSTANCE(f32, float)
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)

}
