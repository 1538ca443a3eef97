// Elements whose type a kernel learns when it runs: few are touched, so that asking costs nothing and saves instances.
#pragma once
#include "../common/types.cuh"
#include "params.cuh"

namespace decode {

__device__ __forceinline__ float read_as(const void *data, int64_t at, int64_t type) {
    if (type == TYPE_F32) return static_cast<const float *>(data)[at];
    if (type == TYPE_F16) return widen(static_cast<const __half *>(data)[at]);
    return widen(static_cast<const __nv_bfloat16 *>(data)[at]);
}

__device__ __forceinline__ void write_as(void *data, int64_t at, int64_t type, float value) {
    if (type == TYPE_F32) {
        static_cast<float *>(data)[at] = value;
    } else if (type == TYPE_F16) {
        static_cast<__half *>(data)[at] = narrow<__half>(value);
    } else {
        static_cast<__nv_bfloat16 *>(data)[at] = narrow<__nv_bfloat16>(value);
    }
}

// As it is once it has been stored.
template <typename T> __device__ __forceinline__ float rounded(float value) { return widen(narrow<T>(value)); }

}
