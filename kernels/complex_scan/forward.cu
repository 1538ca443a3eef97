// The scan with complex states, forward. A thread carries one state of a channel through a sequence.
#include "block.cuh"

namespace complex_scan::forward {

struct Shared {
    Tile tile;
    StateSums y;
};

// Goes through a sequence from its initial state on, and leaves the final one.
template <typename T>
__device__ __forceinline__ void go_through(const Forward &params, Shared &shared, const Block &block, const ThreadMap &map,
                                           const Carried &carried, const Segment &segment) {
    const Inputs &p = params.inputs;
    const bool reverse = p.flags & FLAG_REVERSE;
    Number<double> h = carried.read(p.initial_state, segment.sequence);
    for (int64_t first = 0; first < segment.steps; first += TILE) {
        const int count = static_cast<int>(min(int64_t(TILE), segment.steps - first));
        const Staged staged = Staged::stage<T>(p, block, map, segment, first, shared.tile);
        __syncthreads();
        for (int t = 0; t < count; t++) {
            double y = 0;
            if (carried.exists) {
                const Place at = carried.place(segment, first + t, reverse);
                const Step step = shared.tile.steps[t][map.channel];
                h = step.advance(step.decay(carried.a), h, number_of<T>(p.b, at, carried.n));
                y = real_product(number_of<T>(p.c, at, carried.n), h);
            }
            shared.y.add(map, t, y);
        }
        __syncthreads();
        if (staged.exists) {
            double y = with_skip(shared.y.of(map), p.d, staged.place.channel, staged.read.step.u);
            if (p.z.data) {
                const double z = element<T>(p.z, staged.place);
                y *= z * sigmoid(z);
            }
            static_cast<T *>(params.out)[staged.at(p)] = narrow<T>(static_cast<float>(y));
        }
    }
    if (params.final_state && carried.exists) write(params.final_state + carried.at(p, segment.sequence), h);
}

template <typename T> __device__ __forceinline__ void run(const Forward &params) {
    __shared__ Shared shared;
    const Inputs &p = params.inputs;
    const ThreadMap map(threadIdx.x, p.lane_shift);
    for (int64_t column = blockIdx.x; column < p.columns; column += gridDim.x) {
        const Block block(p, column, 0);
        const Carried carried(p, block, map);
        for (SegmentIndex at(p.segments.per_row); at.index < p.segments.count; at.next(p.segments.per_row)) {
            go_through<T>(params, shared, block, map, carried, segment_at(p.segments, at));
        }
    }
}

#define INSTANCE(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) complex_scan_forward_##SUFFIX(                               \
        const __grid_constant__ Forward params) {                                                                      \
        run<T>(params);                                                                                                \
    }

INSTANCE(f32, float)
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)

}
