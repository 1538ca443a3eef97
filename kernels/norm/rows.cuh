// Rows, and the threads that share them.
#pragma once
#include "../common/lane_map.cuh"
#include "../common/math.cuh"
#include "../common/tensor.cuh"
#include "params.cuh"

namespace rms_norm {

// Which of a group's columns a thread has: in every turn a team's lanes have neighbouring quads. With 4 lanes,
//
//     columns   0-3     4-7     8-11    12-15   16-19   20-23   …
//     turn      0       0       0       0       1       1
//     lane      0       1       2       3       0       1
//
// What a thread sums up, and in which order, follows from the lanes alone, so that kernels which keep a row in registers
// and those which read it twice get the same bits.
struct Team {
    // Threads of the team, and this one's place among them.
    int lanes, lane;
    // The team's place in its block, and how many there are.
    int index, count;

    __device__ __forceinline__ explicit Team(int64_t lane_shift)
        : lanes(1 << lane_shift), lane(threadIdx.x & (lanes - 1)), index(threadIdx.x >> lane_shift),
          count(blockDim.x >> lane_shift) {}

    static constexpr int quad(int turn, int lane, int lanes) { return turn * lanes + lane; }

    // The first column of a turn's quad.
    __device__ __forceinline__ int64_t column(int64_t turn) const { return (turn * lanes + lane) * QUAD; }
    // The turns that a group takes.
    __device__ __forceinline__ int64_t turns(int64_t group_size) const {
        return (group_size + lanes * QUAD - 1) / (lanes * QUAD);
    }
};
static_assert(is_bijection<12>([](int i) { return Team::quad(i / 4, i % 4, 4); }), "every quad has one thread");

// What the warps of a block have summed up, twice: a block sums again while some of its threads still read.
template <int COUNT> struct WarpSums {
    float of[2][MOST_THREADS / 32][COUNT];
};

// Sums over a team, the same in each of its threads. All threads of a block must call it, with `turn` 0, 1, 2, ….
template <int COUNT>
__device__ __forceinline__ void sum_over_team(float (&x)[COUNT], const Team &team, WarpSums<COUNT> &sums, int &turn) {
    for (int offset = min(team.lanes, 32) >> 1; offset > 0; offset >>= 1) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) x[i] += __shfl_xor_sync(0xffffffffu, x[i], offset);
    }
    if (team.lanes <= 32) return;
    float(&of)[MOST_THREADS / 32][COUNT] = sums.of[turn++ % 2];
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) of[threadIdx.x / 32][i] = x[i];
    }
    // One barrier a turn: who writes these sums again has been at the next turn's barrier, to which nobody comes that still
    // reads them.
    __syncthreads();
    const int warps = team.lanes / 32, first = team.index * warps;
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = of[first][i];
    for (int warp = 1; warp < warps; warp++) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) x[i] += of[first + warp][i];
    }
}

// What columns are multiplied by to norm them, from the sum of their squares.
__device__ __forceinline__ float scale(const Inputs &p, float squares) { return 1.0f / sqrtf(squares / p.count + p.eps); }

// The `count` columns of a row from `column` on, zero beyond.
template <typename T, bool VECTOR>
__device__ __forceinline__ Pack<T, QUAD> read(const Rows &from, int64_t row, int64_t column, int count) {
    const T *at = static_cast<const T *>(from.data) + (row * from.row + (VECTOR ? column : column * from.column));
    return load_vec<T, QUAD, VECTOR>(at, from.column, count);
}

// The weights of `count` columns from `column` on; 1 where there is none.
template <bool VECTOR>
__device__ __forceinline__ void read_weight(float (&to)[QUAD], const Vector &weight, int64_t column, int count) {
    const float *at = weight.data + (VECTOR ? column : column * weight.channel);
    const Pack<float, QUAD> pack = load_vec<float, QUAD, VECTOR>(at, weight.channel, weight.data ? count : 0);
#pragma unroll
    for (int i = 0; i < QUAD; i++) to[i] = weight.data ? pack[i] : 1.0f;
}

// Rounds and writes `count` columns of a dense row, if it is wanted.
template <typename T, bool VECTOR>
__device__ __forceinline__ void write(void *to, const Inputs &p, int64_t row, int64_t column, const float (&value)[QUAD],
                                      int count) {
    T *at = static_cast<T *>(to) + (row * p.groups * p.group_size + column);
    store_narrowed<T, VECTOR>(at, value, to ? count : 0);
}

// The columns of a quad that a group has.
__device__ __forceinline__ int columns_left(int64_t left) {
    return static_cast<int>(max(int64_t(0), min(left, int64_t(QUAD))));
}

// What goes over groups and rows: calls `f(row, first column, whether the row exists)` for each row of this team, as many
// times for all teams of a block.
template <typename F> __device__ __forceinline__ void for_each_row(const Inputs &p, const Team &team, const F &f) {
    for (int64_t first = int64_t(blockIdx.y) * team.count; first < p.rows; first += int64_t(gridDim.y) * team.count) {
        f(first + team.index, first + team.index < p.rows);
    }
}

}
