// How threads are dealt out over channels, states and steps: kernels have a struct for each such map, with a drawn table.
#pragma once

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

}
