// S4D, backward; and the slopes by the states before the segments of split sequences, as far as each segment causes them.
#include "backward.cuh"

namespace s4d::backward {

#define INSTANCE(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        s4d_backward_##SUFFIX(const __grid_constant__ Backward params) {                                               \
        run<T>(params);                                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        s4d_backward_chunk_state_##SUFFIX(const __grid_constant__ Backward params) {                                   \
        run_chunk_state<T>(params);                                                                                    \
    }

INSTANCE(f32, float)
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)

}
