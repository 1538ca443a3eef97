// How threads are dealt out over channels, states and steps: kernels have a struct for each such map, with a drawn table; and
// sums over neighbours.
#pragma once
#include <stdint.h>

namespace common {

// Whether `f` maps 0, …, N - 1 onto the same numbers, so that a map leaves nothing out and takes nothing twice.
template <int N, typename F> constexpr bool is_bijection(F f) {
    bool seen[N] = {};
    for (int i = 0; i < N; i++) {
        const int x = f(i);
        if (x < 0 || x >= N || seen[x]) return false;
        seen[x] = true;
    }
    return true;
}

// The threads of a block in rows of `lanes` neighbours, a power of two that the host chooses. Of 2^2 lanes:
//
//   thread   0  1  2  3  4  5  6  7  8 …
//   lane     0  1  2  3  0  1  2  3  0 …
//   row      0  0  0  0  1  1  1  1  2 …
struct RowMap {
    int lanes, lane, row;

    __host__ __device__ constexpr RowMap(unsigned thread, int64_t lane_shift)
        : lanes(1 << lane_shift), lane(thread & (lanes - 1)), row(thread >> lane_shift) {}
};
// For any number of lanes.
template <int THREADS> constexpr bool is_bijection_in_rows() {
    for (int shift = 0; 1 << shift <= THREADS; shift++) {
        const auto place = [shift](int thread) {
            const RowMap map(thread, shift);
            return map.row * map.lanes + map.lane;
        };
        if (!is_bijection<THREADS>(place)) return false;
    }
    return true;
}

// The sum over neighbouring lanes, the same in each of them.
template <typename R> __device__ __forceinline__ R sum_lanes(R x, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

}
