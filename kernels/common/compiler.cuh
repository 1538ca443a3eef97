// What speaks to the compiler: choices that are made when a kernel is compiled, and limits on what is kept in registers.
#pragma once
#include <stdint.h>

namespace common {

// A choice that is made when a kernel is compiled, as an argument of a lambda.
template <bool VALUE> struct BoolConstant {
    static constexpr bool value = VALUE;
    __host__ __device__ constexpr operator bool() const { return VALUE; }
};

// A number that is known when a kernel is compiled, as an argument of a lambda.
template <int VALUE> struct IntConstant {
    static constexpr int value = VALUE;
};

// Hides where `x` comes from, so that the compiler keeps it instead of computing it again in every turn of a loop.
__device__ __forceinline__ void opaque(int64_t &x) { asm("" : "+l"(x)); }
__device__ __forceinline__ void opaque(int &x) { asm("" : "+r"(x)); }

// Reads the thread's index again, so that values derived from it are computed again and not kept in registers.
__device__ __forceinline__ int reload_tid() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

}
