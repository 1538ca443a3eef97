// Loads and stores of neighbouring elements: of global memory as vectors or element by element, of shared memory as vectors.
#pragma once
#include "types.cuh"

namespace common {

// The first `count` of the elements at `p` and `stride` apart after it, zero beyond. `VECTOR` says that there are all or
// none of them, contiguous and aligned.
template <typename T, int COUNT, bool VECTOR>
__device__ __forceinline__ Pack<T, COUNT> load_vec(const T *p, int64_t stride, int count) {
    Pack<T, COUNT> pack = {};
    if constexpr (VECTOR) {
        if (count > 0) pack.raw = *reinterpret_cast<const decltype(pack.raw) *>(p);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (i >= count) break;
            if constexpr (sizeof(T) == 4) {
                pack.word(i) = __float_as_uint(p[i * stride]);
            } else {
                const uint32_t bits = *reinterpret_cast<const uint16_t *>(p + i * stride);
                pack.word(i / 2) |= i % 2 ? bits << 16 : bits;
            }
        }
    }
    return pack;
}

// Writes the first `count` elements of a pack to `p` and `stride` apart after it. `VECTOR` as for `load_vec`.
template <typename T, int COUNT, bool VECTOR>
__device__ __forceinline__ void store_vec(T *p, int64_t stride, const Pack<T, COUNT> &pack, int count) {
    if constexpr (VECTOR) {
        if (count > 0) *reinterpret_cast<decltype(Pack<T, COUNT>::raw) *>(p) = pack.raw;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (i >= count) break;
            if constexpr (sizeof(T) == 4) {
                *reinterpret_cast<uint32_t *>(p + i * stride) = pack.word(i);
            } else {
                *reinterpret_cast<uint16_t *>(p + i * stride) =
                    static_cast<uint16_t>(i % 2 ? pack.word(i / 2) >> 16 : pack.word(i / 2));
            }
        }
    }
}

// Rounds and writes the first `count` of `COUNT` neighbouring elements, 2 or 4.
template <typename T, bool VECTOR, int COUNT>
__device__ __forceinline__ void store_narrowed(T *p, const float (&value)[COUNT], int count) {
    if constexpr (VECTOR) {
        if (count > 0) *reinterpret_cast<decltype(Pack<T, COUNT>::raw) *>(p) = narrow_pack<T>(value).raw;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (i < count) p[i] = narrow<T>(value[i]);
        }
    }
}

// Rounds and writes four neighbouring elements if they are `wanted`, else `p` may be anything. Of `store_narrowed` the
// compiler makes a branch, and what follows a branch is not scheduled among what comes before it.
template <typename T> __device__ __forceinline__ void store_narrowed_if(bool wanted, T *p, const float (&value)[4]) {
    const Pack<T, 4> pack = narrow_pack<T>(value);
    if constexpr (sizeof(T) == 4) {
        asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v4.b32 [%1], {%2, %3, %4, %5};}" ::"r"(int(wanted)),
                     "l"(p), "r"(pack.word(0)), "r"(pack.word(1)), "r"(pack.word(2)), "r"(pack.word(3))
                     : "memory");
    } else {
        asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v2.b32 [%1], {%2, %3};}" ::"r"(int(wanted)), "l"(p),
                     "r"(pack.word(0)), "r"(pack.word(1))
                     : "memory");
    }
}

// The same of two.
template <typename T> __device__ __forceinline__ void store_narrowed_if(bool wanted, T *p, const float (&value)[2]) {
    const Pack<T, 2> pack = narrow_pack<T>(value);
    if constexpr (sizeof(T) == 4) {
        asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.v2.b32 [%1], {%2, %3};}" ::"r"(int(wanted)), "l"(p),
                     "r"(pack.word(0)), "r"(pack.word(1))
                     : "memory");
    } else {
        asm volatile("{.reg .pred p; setp.ne.s32 p, %0, 0; @p st.global.b32 [%1], %2;}" ::"r"(int(wanted)), "l"(p),
                     "r"(pack.word(0))
                     : "memory");
    }
}

// `COUNT` elements, read and written as vectors where the kernel is made for that (`ALWAYS`) or finds that it can (`vector`).
template <int COUNT, bool ALWAYS, typename E>
__device__ __forceinline__ Pack<E, COUNT> load_vec_if(const E *p, int64_t stride, int count, bool vector) {
    return ALWAYS || vector ? load_vec<E, COUNT, true>(p, stride, count) : load_vec<E, COUNT, false>(p, stride, count);
}
template <int COUNT, bool ALWAYS, typename E>
__device__ __forceinline__ void store_vec_if(E *p, int64_t stride, const Pack<E, COUNT> &pack, int count, bool vector) {
    ALWAYS || vector ? store_vec<E, COUNT, true>(p, stride, pack, count) : store_vec<E, COUNT, false>(p, stride, pack, count);
}

// `COUNT` contiguous values in shared memory, aligned to as many as are moved at once.
template <int COUNT> __device__ __forceinline__ void read_shared(float (&to)[COUNT], const float *from) {
    static_assert(COUNT == 1 || COUNT == 2 || COUNT % 4 == 0, "whole words");
    if constexpr (COUNT == 1) {
        to[0] = *from;
    } else if constexpr (COUNT == 2) {
        const float2 two = *reinterpret_cast<const float2 *>(from);
        to[0] = two.x, to[1] = two.y;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 four = *reinterpret_cast<const float4 *>(from + i);
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        }
    }
}
template <int COUNT> __device__ __forceinline__ void write_shared(float *to, const float (&from)[COUNT]) {
    static_assert(COUNT == 1 || COUNT == 2 || COUNT % 4 == 0, "whole words");
    if constexpr (COUNT == 1) {
        *to = from[0];
    } else if constexpr (COUNT == 2) {
        *reinterpret_cast<float2 *>(to) = {from[0], from[1]};
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            *reinterpret_cast<float4 *>(to + i) = {from[i], from[i + 1], from[i + 2], from[i + 3]};
        }
    }
}

}
