// S4D, backward: the slopes by the inputs and by the states, and what takes the latter; and the slopes by the states before the segments of
// split sequences, as far as each segment causes them.
#include "backward.cuh"

namespace s4d::backward {

#define INSTANCE(SUFFIX, T, BLOCKS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        s4d_backward_##SUFFIX(const __grid_constant__ Backward params) {                                               \
        run<T>(params);                                                                                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        s4d_backward_chunk_state_##SUFFIX(const __grid_constant__ Backward params) {                                   \
        run_chunk_state<T>(params);                                                                                    \
    }

INSTANCE(f32, float, 1)
INSTANCE(f16, __half, 1)
// Its matrices take half of the registers.
INSTANCE(bf16, __nv_bfloat16, 2)
// With as little shared memory as f16.
INSTANCE(bf16_in_tf32, Bf16InTf32, 1)

}
