// The positions of ids, sorted by token, those of one token in ascending order.
//
// A block takes a tile of the vocabulary and reads all ids twice: its warps, each over a run of positions, count what they
// find of each token, and then put it where these counts say. With 50,280 tokens and 16,384 ids that is 197 blocks, whose
// warps find one of their tokens in one of six reads of 32 ids; else a read is six instructions, 12,000 for a block of 16
// warps, which two blocks on a processor issue in some 6 µs.
//
// Counts are whole numbers that a warp alone adds to, so that nothing depends on which warp is first.
#include "params.cuh"

namespace embedding::sort {

constexpr int WARPS = SORT_THREADS / 32, AHEAD = 4;
static_assert(TILE <= SORT_THREADS && TILE % 32 == 0, "a thread to a token");

// Calls `f(the tile's token or TILE, position, id)` for the positions of this warp's run, 32 at a time, in order.
template <typename F> __device__ __forceinline__ void for_each_id(const Sort &p, uint32_t first, const F &f) {
    const int64_t run = (p.count + WARPS * 32 - 1) / (WARPS * 32) * 32;
    const int64_t begin = (threadIdx.x / 32) * run, end = min(p.count, begin + run);
    for (int64_t top = begin; top < end; top += 32 * AHEAD) {
        uint32_t ids[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int64_t at = top + k * 32 + threadIdx.x % 32;
            ids[k] = at < end ? p.ids[at] : UINT32_MAX;
        }
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            const int64_t at = top + k * 32 + threadIdx.x % 32;
            const bool in_tile = at < end && ids[k] < p.vocab && ids[k] >= first && ids[k] - first < TILE;
            f(in_tile ? static_cast<int>(ids[k] - first) : TILE, at, at < end && ids[k] < first);
        }
    }
}

__device__ __forceinline__ void run(const Sort &p) {
    // By warp and token: how many the warp has found; then where its next one goes, in the tile.
    __shared__ uint32_t places[WARPS][TILE];
    __shared__ int64_t before[WARPS];
    __shared__ uint32_t of_warps[TILE / 32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t first = blockIdx.x * TILE;
    for (int i = threadIdx.x; i < WARPS * TILE; i += SORT_THREADS) places[i / TILE][i % TILE] = 0;
    __syncthreads();

    // The lanes that have the same token, of which the lowest adds for all.
    const auto peers_of = [&](int token) { return __match_any_sync(0xffffffffu, token); };
    int64_t less = 0;
    for_each_id(p, first, [&](int token, int64_t, bool is_less) {
        less += is_less;
        if (!__any_sync(0xffffffffu, token < TILE)) return;
        const uint32_t peers = peers_of(token);
        if (token < TILE && lane == __ffs(peers) - 1) places[warp][token] += __popc(peers);
        __syncwarp();
    });
    for (int offset = 16; offset > 0; offset >>= 1) less += __shfl_xor_sync(0xffffffffu, less, offset);
    if (lane == 0) before[warp] = less;
    __syncthreads();

    // A thread to a token: the tokens before it in the tile, then the warps before each.
    const int token = threadIdx.x;
    uint32_t total = 0, through = 0;
    if (token < TILE) {
        for (int i = 0; i < WARPS; i++) total += places[i][token];
        through = total;
#pragma unroll
        for (int offset = 1; offset < 32; offset <<= 1) {
            const uint32_t other = __shfl_up_sync(0xffffffffu, through, offset);
            through += lane >= offset ? other : 0;
        }
        if (lane == 31) of_warps[warp] = through;
    }
    __syncthreads();
    int64_t base = 0;
    for (int i = 0; i < WARPS; i++) base += before[i];
    if (token < TILE) {
        for (int i = 0; i < warp; i++) through += of_warps[i];
        uint32_t place = through - total;
        if (first + int64_t(token) < p.vocab) p.starts[first + token] = base + place;
        if (first + int64_t(token) == p.vocab - 1) p.starts[p.vocab] = base + through;
        for (int i = 0; i < WARPS; i++) {
            const uint32_t count = places[i][token];
            places[i][token] = place;
            place += count;
        }
    }
    __syncthreads();

    for_each_id(p, first, [&](int token, int64_t at, bool) {
        if (!__any_sync(0xffffffffu, token < TILE)) return;
        const uint32_t peers = peers_of(token);
        if (token < TILE) {
            p.order[base + places[warp][token] + __popc(peers & ((1u << lane) - 1))] = at;
        }
        __syncwarp();
        if (token < TILE && lane == __ffs(peers) - 1) places[warp][token] += __popc(peers);
        __syncwarp();
    });
}

extern "C" __global__ void __launch_bounds__(SORT_THREADS) embedding_sort(const __grid_constant__ Sort params) {
    run(params);
}

}
