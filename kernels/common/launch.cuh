// Kernels whose start overlaps with the end of the kernel before: programmatic dependent launches, from compute capability 9.0 on.
//
// A kernel that calls `begin_next` lets the next one in as soon as there is room for it; one that calls `wait_for_last` in every block
// before it reads what earlier kernels write, or writes what they read, may be let in. What is read or asked for before that no
// kernel of the recording writes, or only this one does. Elsewhere both do nothing, and kernels run one after another.
#pragma once

namespace common {

__device__ __forceinline__ void begin_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until all kernels before have ended, and what they wrote is there.
__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}
