// Copies to shared memory and to the second-level cache that no thread waits for.
#pragma once
#include "address.cuh"
#include "types.cuh"

namespace common {

// Starts copying the pack at `from` to shared memory, or zeros if it is not in range.
template <typename T, int COUNT>
__device__ __forceinline__ void copy_async(Pack<T, COUNT> &to, const T *from, bool in_range) {
    const uint32_t at = shared_address(&to);
    constexpr int BYTES = sizeof(T) * COUNT;
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(BYTES), "r"(in_range ? BYTES : 0)
                 : "memory");
}

// Makes a group of the copies that this thread has started since the last call.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all of this thread's groups but the last `PENDING` have arrived.
template <int PENDING> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Prefetches the cache line at `at` into the second-level cache; `NEAR`, into the processor's first-level cache.
template <bool NEAR = false> __device__ __forceinline__ void prefetch(const void *at) {
    if constexpr (NEAR) {
        asm volatile("prefetch.global.L1 [%0];" ::"l"(at));
    } else {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
    }
}

}
