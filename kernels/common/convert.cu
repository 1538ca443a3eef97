// Many tensors brought into another type, or zeroed, in one launch. Bytes are what the time goes to; a thread loads all of its
// quads before it stores.
#include "entries.cuh"

namespace common::convert {

// A block's part of a tensor, of which `count` elements are left. `VECTOR` says that they are aligned quads.
template <typename T, typename F, bool VECTOR>
__device__ __forceinline__ void convert(T *to, const F *from, int count) {
    Pack<F, QUAD> quads[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
        const int i = (k * THREADS + threadIdx.x) * QUAD;
        quads[k] = load_vec<F, QUAD, VECTOR>(from + i, 1, from ? max(0, min(count - i, QUAD)) : 0);
    }
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
        const int i = (k * THREADS + threadIdx.x) * QUAD;
        const float values[QUAD] = {quads[k][0], quads[k][1], quads[k][2], quads[k][3]};
        store_narrowed<T, VECTOR>(to + i, values, max(0, min(count - i, QUAD)));
    }
}

template <typename T, typename F> __device__ __forceinline__ void convert(const Conversion &of) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) - of.first_block) * CHUNK;
    T *const to = static_cast<T *>(of.to) + first;
    const F *const from = of.from ? static_cast<const F *>(of.from) + first : nullptr;
    const int count = static_cast<int>(min(of.count - first, int64_t(CHUNK)));
    const bool is_vector = is_aligned(to) && is_aligned(from) && count % QUAD == 0;
    is_vector ? convert<T, F, true>(to, from, count) : convert<T, F, false>(to, from, count);
}

template <typename T> __device__ __forceinline__ void convert(const Conversion &of) {
    switch (of.from_type) {
    case TYPE_F16: convert<T, __half>(of); break;
    case TYPE_BF16: convert<T, __nv_bfloat16>(of); break;
    default: convert<T, float>(of);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) convert_all(const __grid_constant__ Conversions p) {
    const Conversion &of = entry_of_block(p.conversions, p.count);
    switch (of.to_type) {
    case TYPE_F16: convert<__half>(of); break;
    case TYPE_BF16: convert<__nv_bfloat16>(of); break;
    default: convert<float>(of);
    }
}

}
