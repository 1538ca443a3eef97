// A block: channels of a group with all their states, and a tile of steps that its threads share.
#pragma once
#include "../common/lane_map.cuh"
#include "../common/segments.cuh"
#include "step.cuh"

namespace complex_scan {

// What a thread works on. With 16 lanes to a channel, and so 16 channels:
//
//   thread                   0  1 … 15  16 … 31  32 …       240 … 255
//   carries   channel        0  0 …  0   1 …  1   2 …        15 …  15
//             state          0  1 … 15   0 … 15   0 …         0 …  15
//   stages and finishes
//             channel        0  1 … 15   0 … 15   0 …         0 …  15     (threads of a step beyond the tile do nothing)
//             step           0  0 …  0   1 …  1   2 …        15 …  15
struct ThreadMap {
    int lanes, channels, channel, state, column, step;

    __host__ __device__ constexpr ThreadMap(int thread, int64_t lane_shift)
        : lanes(1 << lane_shift), channels(THREADS >> lane_shift), channel(thread >> lane_shift), state(thread & (lanes - 1)),
          column(thread & (channels - 1)), step(thread >> (THREADS_SHIFT - lane_shift)) {}
};
// For any number of lanes.
constexpr bool is_bijection_of_threads() {
    for (int shift = LEAST_LANE_SHIFT; shift <= THREADS_SHIFT; shift++) {
        const auto carried = [shift](int thread) {
            const ThreadMap map(thread, shift);
            return map.channel * map.lanes + map.state;
        };
        const auto finished = [shift](int thread) {
            const ThreadMap map(thread, shift);
            return map.step * map.channels + map.column;
        };
        if (!is_bijection<THREADS>(carried) || !is_bijection<THREADS>(finished)) return false;
        // All steps of a tile are somebody's.
        if (TILE << (THREADS_SHIFT - shift) > THREADS) return false;
    }
    return true;
}
static_assert(1 << THREADS_SHIFT == THREADS && 1 << LEAST_LANE_SHIFT == LEAST_LANES && is_bijection_of_threads());

// The channels that a block works on at a time: `width` of them from `first` on.
struct Block {
    int64_t group, part, first;
    int width;

    __device__ __forceinline__ Block(const Inputs &p, int64_t column, int64_t round) {
        group = column / p.group_blocks;
        part = column % p.group_blocks;
        const int channels = THREADS >> p.lane_shift;
        const int64_t in_group = (part * p.rounds + round) * channels;
        first = group * p.group_channels + in_group;
        width = static_cast<int>(max(int64_t(0), min(p.group_channels - in_group, int64_t(channels))));
    }
};

// A tile in shared memory.
struct Tile {
    Step steps[TILE][CHANNELS];
};

// The sums over states of each step and channel, each a few sums over the lanes of a warp.
struct StateSums {
    double sums[TILE][WARP_SUMS];

    // All threads of a warp call this.
    __device__ __forceinline__ void add(const ThreadMap &map, int t, double term) {
        const int lanes = min(map.lanes, 32);
        const double sum = sum_lanes(term, lanes);
        if ((threadIdx.x & (lanes - 1)) == 0) sums[t][threadIdx.x >> __popc(lanes - 1)] = sum;
    }
    // The sum of a step that the thread finishes.
    __device__ __forceinline__ double of(const ThreadMap &map) const {
        const int warps = max(map.lanes / 32, 1);
        double sum = 0;
        for (int i = 0; i < warps; i++) sum += sums[map.step][map.column * warps + i];
        return sum;
    }
};

// The state that a thread carries.
struct Carried {
    int64_t channel, group, n;
    bool exists;
    Number<double> a;

    __device__ __forceinline__ Carried(const Inputs &p, const Block &block, const ThreadMap &map)
        : channel(block.first + map.channel), group(block.group), n(map.state),
          exists(map.channel < block.width && map.state < p.d_state), a{0, 0} {
        if (exists) a = number_of(p.a, channel, n);
    }
    __device__ __forceinline__ Number<double> read(const States &from, int64_t sequence) const {
        return exists ? number_of(from, sequence, channel, n) : Number<double>{0, 0};
    }
    // Where it lies in a dense (…, d_inner, 2 * d_state), in its `index`-th part.
    __device__ __forceinline__ int64_t at(const Inputs &p, int64_t index) const {
        return ((index * p.d_inner + channel) * p.d_state + n) * 2;
    }
    // Where the sequence's `i`-th step lies.
    __device__ __forceinline__ Place place(const Segment &segment, int64_t i, bool reverse) const {
        return {segment.row, segment.step(i, reverse), channel, group};
    }
};

// The step and channel that a thread stages and finishes, of the tile from the sequence's `first`-th step on.
struct Staged {
    bool exists;
    Place place;
    Read read;

    template <typename T>
    static __device__ __forceinline__ Staged stage(const Inputs &p, const Block &block, const ThreadMap &map,
                                                   const Segment &segment, int64_t first, Tile &tile) {
        Staged staged{map.step < TILE && first + map.step < segment.steps && map.column < block.width, {}, {}};
        if (staged.exists) {
            const int64_t step = segment.step(first + map.step, p.flags & FLAG_REVERSE);
            staged.place = {segment.row, step, block.first + map.column, block.group};
            staged.read = Read::of<T>(p, staged.place);
            tile.steps[map.step][map.column] = staged.read.step;
        }
        return staged;
    }
    // Where it lies in a dense activation.
    __device__ __forceinline__ int64_t at(const Inputs &p) const {
        return (place.row * p.segments.len + place.step) * p.d_inner + place.channel;
    }
};

}
