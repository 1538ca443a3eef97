// S4D, backward: the slopes that take the states.
#include "backward_states.cuh"

namespace s4d::backward_states {

#define INSTANCE(SUFFIX, T, BLOCKS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        s4d_backward_states_##SUFFIX(const __grid_constant__ Backward params) {                                        \
        run<T>(params);                                                                                                \
    }

INSTANCE(f32, float, 1)
INSTANCE(f16, __half, 1)
// Its matrices take half of the registers.
INSTANCE(bf16, __nv_bfloat16, 2)
// With as little shared memory as f16.
INSTANCE(bf16_in_tf32, Bf16InTf32, 1)

}
