// The first of two kernels that choose the next token of each row of logits: what the highest of each chunk is.
// (`choose.cu` is the second, and says how both work.) A block takes a chunk of a row, and its warps the tiles of it.
#include "../common/launch.cuh"
#include "../common/tensor.cuh"
#include "rows.cuh"

namespace sampling {

// Clears what the second kernel adds to.
__device__ __forceinline__ void clear(const Sample &p, const Chunk &chunk, const Settings &settings) {
    const Workspace &workspace = p.workspace;
    if (chunk.index == 0 && threadIdx.x == 0) workspace.done[chunk.row] = 0;
    if (settings.top_k == 0 && settings.top_p >= 1.0f) return;
    const int chunks = static_cast<int>(p.chunks);
    for (int i = chunk.index * THREADS + threadIdx.x; i < BINS; i += chunks * THREADS) {
        workspace.bin_sums[chunk.row * BINS + i] = 0;
        workspace.bin_counts[chunk.row * BINS + i] = 0;
    }
}

__device__ __forceinline__ void maximum(const Sample &p) {
    __shared__ uint64_t best_of[WARPS];
    __shared__ float most_of[WARPS];
    const Chunk chunk(p);
    const int64_t slot = slot_of(p.slots, chunk.row);
    const Settings settings = settings_of(p, slot);
    wait_for_last();
    if (slot < 0) return;
    clear(p, chunk, settings);

    const Row row(p, chunk.row, slot, settings.repetition_penalty);
    float most = -INFINITY;
    int is_bad = 0;
    uint64_t best = 0;
    for (int tile = chunk.first_of_warp(); tile < chunk.end; tile += WARPS) {
        for_each_quad(row, tile, [&](int first, float (&x)[QUAD]) {
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                most = fmaxf(most, x[i]);
                // NaN or positive infinity.
                is_bad |= !(x[i] < INFINITY);
            }
            row.penalise(first, x);
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                const uint64_t own = first + i < row.tokens ? Best::of(x[i], first + i) : 0;
                best = own > best ? own : best;
            }
        });
    }
    best = greatest_of_block(best, best_of);
    most = of_block(most, most_of, [](float a, float b) { return fmaxf(a, b); });
    is_bad = __syncthreads_or(is_bad);
    if (threadIdx.x == 0) p.workspace.maxima[chunk.row * p.chunks + chunk.index] = {best, most, is_bad};
}

extern "C" __global__ void __launch_bounds__(THREADS) sampling_maximum(const __grid_constant__ Sample params) {
    begin_next();
    maximum(params);
}

}
