// Writes a small table that travels in the launch itself: unlike a copy from host memory this needs no buffer that has to
// outlive the call, and it can be captured in a graph.
#include "params.cuh"

namespace common {

extern "C" __global__ void upload(const __grid_constant__ Upload p) {
    for (uint64_t i = threadIdx.x; i < p.count; i += blockDim.x) p.to[i] = p.values[i];
}

}
