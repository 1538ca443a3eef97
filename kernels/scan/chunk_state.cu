// Chunk states: the state that each segment of a split sequence reaches from a zero state, and its ΣΔ.
#include "forward.cuh"
#include "forward_general.cuh"

namespace scan::chunk_state {

#define INSTANCE(NAME, T, THREADS, BLOCKS, ...)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        scan_chunk_state_##NAME(const __grid_constant__ Forward params) {                                              \
        __VA_ARGS__(params);                                                                                           \
    }

// Sequences that are split have one channel to a lane.
template <typename T, bool MANY_STATES> using One = forward::Recurrence<T, 1, forward::ONE_TILE, MANY_STATES, true>;

#define INSTANCES(SUFFIX, T, ONE_BLOCKS)                                                                               \
    INSTANCE(one_##SUFFIX, T, forward::THREADS, ONE_BLOCKS, forward::run<One<T, false>>)                               \
    INSTANCE(many_states_##SUFFIX, T, forward::THREADS, 4, forward::run<One<T, true>>)                                 \
    INSTANCE(general_##SUFFIX, T, forward_general::THREADS, 2, forward::run<forward_general::Recurrence<T, true>>)

INSTANCES(f32, float, 4)
INSTANCES(f16, __half, 5)
INSTANCES(bf16, __nv_bfloat16, 5)

}
