// The selective scan, forward, whatever its inputs: any stride and width, constant B and C, zero-order hold, compensated sums.
#include "forward_general.cuh"

namespace scan::forward_general {

#define INSTANCE(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        scan_forward_general_##SUFFIX(const __grid_constant__ Forward params) {                                        \
        forward::run<Recurrence<T, false>>(params);                                                                    \
    }

INSTANCE(f32, float)
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)

}
