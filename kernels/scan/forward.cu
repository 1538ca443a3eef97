// The selective scan, forward, in the form that Mamba uses: B and C that vary, channels and states contiguous.
// forward_general.cu takes the rest.
#include "forward.cuh"

namespace scan::forward {

#define INSTANCE(NAME, T, CHANNELS_PER_LANE, TILE, MANY_STATES, BLOCKS)                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        scan_forward_##NAME(const __grid_constant__ Forward params) {                                                  \
        run<Recurrence<T, CHANNELS_PER_LANE, TILE, MANY_STATES, false>>(params);                                       \
    }

#define INSTANCES(SUFFIX, T, FOUR_BLOCKS, ONE_BLOCKS)                                                                  \
    INSTANCE(four_##SUFFIX, T, 4, FOUR_TILE, false, FOUR_BLOCKS)                                                       \
    INSTANCE(one_##SUFFIX, T, 1, ONE_TILE, false, ONE_BLOCKS)                                                          \
    INSTANCE(many_states_##SUFFIX, T, 1, ONE_TILE, true, 4)

INSTANCES(f32, float, 3, 4)
INSTANCES(f16, __half, 4, 5)
INSTANCES(bf16, __nv_bfloat16, 4, 5)

}
