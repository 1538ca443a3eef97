// Pools of states that are updated in place, and how kernels find and write their rows.
#pragma once
#include "element.cuh"

// (slots, rows, columns) of any strides.
struct Pool {
    void *data;
    int64_t slot, row, column;
};

// The slot of each batch row: its own number (`kind` 0), or as listed in the launch itself (1) or in a table (2), which
// is for lists that a launch has no room for. Negative for padding.
struct Slots {
    const int64_t *table;
    int64_t kind;
    int32_t few[512];

    __device__ __forceinline__ int64_t of(int64_t row) const {
        return kind == 0 ? row : kind == 1 ? few[row] : table[row];
    }
};
static_assert(sizeof(Slots) == 2064, "as in src/cuda/params.rs");

// Rounds neighbouring elements.
template <typename T, int COUNT> __device__ __forceinline__ Pack<T, COUNT> pack(const float (&value)[COUNT]) {
    Pack<T, COUNT> packed;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) packed.word(i) = __float_as_uint(value[i]);
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) packed.word(i / 2) = narrow_pair(value[i], value[i + 1], T());
    }
    return packed;
}

// Writes the first `count` elements of a pack to `p` and `stride` apart behind it. `WHOLE` as for `load`.
template <typename T, int COUNT, bool WHOLE>
__device__ __forceinline__ void put(T *p, int64_t stride, const Pack<T, COUNT> &pack, int count) {
    if constexpr (WHOLE) {
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

// `COUNT` elements, read and written as a whole where the kernel is made for that (`ALWAYS`) or finds that it can (`whole`).
template <int COUNT, bool ALWAYS, typename E>
__device__ __forceinline__ Pack<E, COUNT> fetch(const E *p, int64_t stride, int count, bool whole) {
    return ALWAYS || whole ? load<E, COUNT, true>(p, stride, count) : load<E, COUNT, false>(p, stride, count);
}
template <int COUNT, bool ALWAYS, typename E>
__device__ __forceinline__ void keep(E *p, int64_t stride, const Pack<E, COUNT> &pack, int count, bool whole) {
    ALWAYS || whole ? put<E, COUNT, true>(p, stride, pack, count) : put<E, COUNT, false>(p, stride, pack, count);
}
