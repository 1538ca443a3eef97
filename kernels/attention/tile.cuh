// Tiles of rows in shared memory, and how they are filled.
#pragma once
#include "../common/async.cuh"
#include "../common/vector_io.cuh"
#include "sequences.cuh"

namespace attention {

// 16 bytes of a row, which are moved together.
template <typename T> constexpr int PER_CHUNK = 16 / sizeof(T);
template <typename T> using Chunk = Pack<T, PER_CHUNK<T>>;

// Rows of `D` elements. The chunks of a row are exchanged by its number, so that of eight neighbouring rows the same chunk, and of
// eight that are two apart two neighbouring chunks, lie in different banks:
//
//   chunk        0  1  2  3  4  5  6  7
//   row 0 at     0  1  2  3  4  5  6  7
//   row 1 at     1  0  3  2  5  4  7  6
//   row 2 at     2  3  0  1  6  7  4  5   …
template <typename T, int D> struct Tile {
    static constexpr int CHUNKS = D / PER_CHUNK<T>;
    static_assert(CHUNKS >= 4, "eight rows of fewer would meet in a bank");

    Chunk<T> *chunks;

    __device__ __forceinline__ static int place(int row, int chunk) {
        // Two rows of four chunks fill the banks together.
        const int exchange = CHUNKS >= 8 ? row & 7 : row >> 1 & 3;
        return row * CHUNKS + (chunk ^ exchange);
    }
    __device__ __forceinline__ const Chunk<T> *at(int row, int chunk) const { return chunks + place(row, chunk); }
    __device__ __forceinline__ Tile stage(int number, int rows) const { return {chunks + number * rows * CHUNKS}; }

    __device__ __forceinline__ uint32_t word(int row, int d) const {
        static_assert(sizeof(T) == 4, "an element to a word");
        return reinterpret_cast<const uint32_t *>(at(row, d / PER_CHUNK<T>))[d % PER_CHUNK<T>];
    }
};

// The first `count` elements at `from`, zeros beyond.
template <typename T> __device__ __forceinline__ Chunk<T> gather(const T *from, int64_t column, int count) {
    Chunk<T> chunk;
    if constexpr (sizeof(T) == 4) {
        chunk = load_vec<T, 4, false>(from, column, count);
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) chunk.halves[i] = load_vec<T, 4, false>(from + 4 * i * column, column, count - 4 * i);
    }
    return chunk;
}

// Begins to fill tiles with the rows from `first` on of as many tensors: zeros after the last of `rows`, and beyond `d_head`. What
// cannot be copied asynchronously is there when the next barrier has been passed.
template <typename T, int D, int ROWS, int THREADS, int COUNT> struct Loader {
    static constexpr int CHUNKS = Tile<T, D>::CHUNKS;
    // A thread has the same chunk of rows that are so many apart.
    static constexpr int APART = THREADS / CHUNKS, TIMES = (ROWS + APART - 1) / APART;
    static_assert(THREADS % CHUNKS == 0, "whole rows");

    const Tile<T, D> (&to)[COUNT];
    const RowsOf<T> (&from)[COUNT];
    int first, rows, group, d_head, chunk, row;

    __device__ __forceinline__ Loader(const Tile<T, D> (&to)[COUNT], const RowsOf<T> (&from)[COUNT], int first, int rows, int group,
                                      int d_head)
        : to(to), from(from), first(first), rows(rows), group(group), d_head(d_head), chunk(threadIdx.x % CHUNKS),
          row(threadIdx.x / CHUNKS) {}

    __device__ __forceinline__ bool is_in_tile(int row) const { return ROWS % APART == 0 || row < ROWS; }
    __device__ __forceinline__ Chunk<T> &place(int one, int row) const { return to[one].chunks[Tile<T, D>::place(row, chunk)]; }

    // Rows that are as far apart as steps, which is what keys are; nothing is read where there is no row.
    __device__ __forceinline__ void copy_steps() const {
        const bool within = chunk * PER_CHUNK<T> < d_head;
#pragma unroll
        for (int one = 0; one < COUNT; one++) {
            const T *at = from[one].data + (first + row) * from[one].step + chunk * PER_CHUNK<T>;
            const int64_t leap = APART * from[one].step;
#pragma unroll
            for (int i = 0; i < TIMES; i++, at += leap) {
                const int other = row + i * APART;
                if (is_in_tile(other)) copy_async(place(one, other), at, within && first + other < rows);
            }
        }
    }

    template <bool VECTOR> __device__ __forceinline__ void copy_rows() const {
        const int d = chunk * PER_CHUNK<T>;
#pragma unroll(VECTOR ? TIMES : 1)
        for (int i = 0; i < TIMES; i++) {
            const int other = row + i * APART;
            if (!is_in_tile(other)) break;
            const bool exists = first + other < rows && d < d_head;
            const RowPlace of(exists ? first + other : 0, group);
#pragma unroll
            for (int one = 0; one < COUNT; one++) {
                const T *at = from[one].row(of) + (exists ? d * from[one].column : 0);
                if constexpr (VECTOR) {
                    copy_async(place(one, other), at, exists);
                } else {
                    place(one, other) = gather(at, from[one].column, exists ? d_head - d : 0);
                }
            }
        }
    }

    __device__ __forceinline__ void operator()() const {
        bool vector = true;
#pragma unroll
        for (int one = 0; one < COUNT; one++) vector = vector && from[one].vector;
        if (!vector) {
            copy_rows<false>();
        } else if (group == 1) {
            copy_steps();
        } else {
            copy_rows<true>();
        }
    }
};
template <typename T, int D, int ROWS, int THREADS, int COUNT>
__device__ __forceinline__ void load_rows(const Tile<T, D> (&to)[COUNT], const RowsOf<T> (&from)[COUNT], int first, int rows,
                                          int group, int d_head) {
    Loader<T, D, ROWS, THREADS, COUNT>(to, from, first, rows, group, d_head)();
}

}
