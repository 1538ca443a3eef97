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
template <typename T, int D, int ROWS, int THREADS, int COUNT>
__device__ __forceinline__ void load_rows(const Tile<T, D> (&to)[COUNT], const RowsOf<T> (&from)[COUNT], int first, int rows,
                                          int group, int d_head) {
    constexpr int CHUNKS = Tile<T, D>::CHUNKS;
    static_assert(ROWS * CHUNKS % THREADS == 0 || ROWS * CHUNKS < THREADS, "as many chunks for each thread, or one");
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS, d = chunk * PER_CHUNK<T>;
        const bool exists = first + row < rows && d < d_head;
        const RowPlace place(exists ? first + row : 0, group);
#pragma unroll
        for (int one = 0; one < COUNT; one++) {
            const T *at = from[one].row(place) + (exists ? d * from[one].column : 0);
            Chunk<T> &chunk_to = to[one].chunks[Tile<T, D>::place(row, chunk)];
            if (from[one].vector) {
                copy_async(chunk_to, at, exists);
            } else {
                chunk_to = gather(at, from[one].column, exists ? d_head - d : 0);
            }
        }
    }
}

}
