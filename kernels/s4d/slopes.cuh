// What both kernels of the backward pass have in common.
//
// With `dy` the slope by an output, X the state before a chunk and Λ the slope by the state after it, the slopes of a chunk are
//
//   dX  = conj(A̅^16) Λ + W, W = Σ_t G_t dy_t      which is Λ of the chunk before
//   du_j = Σ_{t>=j} K_{t-j} dy_t + H_j · Λ
//   dG_t = dy_t X     dH_j = u_j Λ     dK_k = Σ_t dy_t u_{t-k}     d(A̅^16) = Λ conj(X)
//
// and those by parameters are summed up over all chunks. One kernel goes through segments back in time and has Λ. What takes X is
// found by one that goes through them forward in time (backward_states.cuh). Neither needs what the other finds, so that no states
// are kept, and each has half of the sums, for which there is room in the registers of 16 warps a processor.
#pragma once
#include "../common/tensor_copy.cuh"
#include "halves.cuh"
#include "tile.cuh"
#include <stddef.h>
#include <type_traits>

namespace s4d::backward {

// Operands of a warp in shared memory, by lane.
template <int COUNT> using Operands = halves::Operand[COUNT][32];

// Which segment of which channels a warp is at: in shared memory, from where it is read where it is needed, as it takes 26 registers.
struct Place {
    SegmentIndex index;
    Segment segment;
    Block block;
};
static_assert(sizeof(Place) == 8 * PLACE, "as backward's kernels are launched");

// (All lanes write the same.)
struct KeptPlace {
    uint64_t words[PLACE];

    __device__ __forceinline__ void put(const Place &place) {
        __syncwarp();
        *reinterpret_cast<Place *>(words) = place;
    }
    __device__ __forceinline__ Place get() const {
        __syncwarp();
        return *reinterpret_cast<const Place *>(words);
    }
    __device__ __forceinline__ Warp warp(const Inputs &p) const { return Warp(p, get().block, reload_tid()); }
};

// Where the box of a warp's steps is, the first of which is `i`.
struct BoxAt {
    int channel, step, row;

    __device__ __forceinline__ BoxAt(const Inputs &p, const Place &place, int64_t i) {
        // Of steps that go back in memory the last is the box's first.
        const bool reverse = p.flags & FLAG_REVERSE;
        const int64_t first = i + (reverse ? BOX_STEPS - 1 : 0);
        channel = static_cast<int>(place.block.first);
        step = static_cast<int>(place.segment.step(place.segment.first + first, reverse));
        row = static_cast<int>(place.segment.row);
    }
    __device__ __forceinline__ void load(void *to, const TensorMap &from, Arrival &arrival) const {
        load_box(to, from, arrival, channel, step, row);
    }
    __device__ __forceinline__ void store(const TensorMap &to, const void *from) const { store_box(to, from, channel, step, row); }
};

// A warp's steps of the next tile, where activations are read in rows (FLAG_ROW): asked for while this one is gone through, they
// arrive in a part of the warp's exchange that is free from then on, as there are no registers to wait in.
template <typename T> struct Ahead {
    // Whether there is code for boxes. (Of other types there is one block to a processor, whose way through the first-level cache is not
    // what it waits for.)
    static constexpr bool BY_BOXES = COPIES_BOXES && std::is_same<T, __nv_bfloat16>::value;
    Pack<T, WARPS> inputs[BOX_STEPS], d_out[BOX_STEPS];
    // What has been found and is being written.
    uint4 d_u[BY_BOXES ? BOX_STEPS : 1];

    template <typename Shared> static __device__ __forceinline__ Ahead &of(Shared &shared) {
        static_assert(sizeof(Ahead) <= sizeof(float) * (CHUNKS * EXCHANGE - TILE), "there is room after what is finished of this tile");
        static_assert(sizeof(inputs) % 128 == 0 && offsetof(Shared, slopes) % 128 == 0 && sizeof(float) * EXCHANGE * CHUNKS % 128 == 0,
                      "as the copy engine wants its boxes");
        return *reinterpret_cast<Ahead *>(shared.slopes[reload_tid() / 32] + TILE);
    }
    static __device__ __forceinline__ bool are_boxes(const Inputs &p) { return BY_BOXES && p.flags & FLAG_BOXES; }
    // Where the lane's step is.
    static __device__ __forceinline__ int row(const Inputs &p, int lane) {
        return are_boxes(p) && p.flags & FLAG_REVERSE ? BOX_STEPS - 1 - lane : lane;
    }
    // `first` is the tile's first step.
    __device__ __forceinline__ void ask(const Backward &params, const Place &place, Arrival *arrivals, int64_t first) {
        const Inputs &p = params.inputs;
        const int thread = reload_tid();
        if (are_boxes(p)) {
            fence_boxes();
            __syncwarp();
            if (thread % 32 == 0) {
                Arrival &arrival = arrivals[thread / 32];
                const BoxAt at(p, place, first + thread);
                arrival.expect(sizeof(inputs) + sizeof(d_out));
                at.load(inputs, params.u_boxes, arrival), at.load(d_out, params.d_out_boxes, arrival);
            }
            return;
        }
        const bool is_there = first + thread < place.segment.steps;
        const auto copy = [&](Pack<T, WARPS> &to, const Activation &from) {
            const T *const at = Staged<T>::at(from, p, place.segment, place.block, first + thread);
            if constexpr (sizeof(T) == 2) {
                copy_async(to, at, is_there);
            } else {
                copy_async(to.halves[0], at, is_there), copy_async(to.halves[1], at + QUAD, is_there);
            }
        };
        copy(inputs[thread % 32], p.u), copy(d_out[thread % 32], params.d_out);
        commit_copies();
    }
    // Waits for what has been asked for.
    __device__ __forceinline__ void wait(const Inputs &p, Arrival *arrivals) const {
        if (are_boxes(p)) {
            // And until the engine has read `d_u` of the tile before, over which this tile's exchange goes.
            wait_for_boxes();
            arrivals[threadIdx.x / 32].wait();
            return;
        }
        wait_for_copies<0>();
    }
};

template <typename T> __device__ __forceinline__ void init_arrivals(Arrival *arrivals) {
    if (!Ahead<T>::BY_BOXES) return;
    if (threadIdx.x < WARPS) arrivals[threadIdx.x].init();
    __syncthreads();
}

// Stages a tile's inputs and slopes by outputs, which in rows have been asked for, and has the block meet.
template <typename T, typename Shared>
__device__ __forceinline__ void stage(const Backward &params, const KeptPlace &place, Shared &shared, int64_t first) {
    const Inputs &p = params.inputs;
    Staged<T> u = {}, d_y = {};
    if (p.flags & FLAG_ROW) {
        const Ahead<T> &ahead = Ahead<T>::of(shared);
        ahead.wait(p, shared.arrivals);
        // (Boxes have what follows the segment too, where `cp.async` has put zeros.)
        if (!Ahead<T>::BY_BOXES || first + threadIdx.x < place.get().segment.steps) {
            const int row = Ahead<T>::row(p, threadIdx.x % 32);
            u.take(ahead.inputs[row]), d_y.take(ahead.d_out[row]);
        }
    } else {
        const Place now = place.get();
        u.load(p.u, p, now.segment, now.block, first + threadIdx.x);
        d_y.load(params.d_out, p, now.segment, now.block, first + threadIdx.x);
    }
    u.write(shared.inputs[0]), d_y.write(shared.d_out[0]);
    __syncthreads();
}

// Steps of the chunks from `from` to `to`, of all of which the product with a tile's states is the sum over the chunks: as A, a row
// is a step (g is step 2g, g + 8 the one after it) and a column a chunk.
template <bool EXACT> struct OverChunks {
    Parts<4, EXACT> tiles[2];

    __device__ __forceinline__ OverChunks(const float *row, Lane lane, int from, int to) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float values[2][2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int chunk = 8 * i + 4 * half + lane.t;
                read_shared(values[half], row + chunk * CHUNK + 2 * lane.g);
                if (chunk < from || chunk >= to) values[half][0] = values[half][1] = 0.0f;
            }
            tiles[i] = Parts<4, EXACT>({values[0][0], values[0][1], values[1][0], values[1][1]});
        }
    }
    // Adds the products with a pair's numbers, of chunks t, t + 4, t + 8 and t + 12, the pair g of a tile of eight.
    __device__ __forceinline__ void add_states(Sum &re, Sum &im, const Number<float> (&x)[4]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            re.add(tiles[i], Parts<2>({x[2 * i].re, x[2 * i + 1].re}));
            im.add(tiles[i], Parts<2>({x[2 * i].im, x[2 * i + 1].im}));
        }
    }
    // And with steps, which as B are what they are as A: column g of sum n is step 2g + n.
    __device__ __forceinline__ void add_steps(Sum (&sums)[STEP_TILES], const OverChunks &steps) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const auto &other = steps.tiles[i];
#pragma unroll
            for (int n = 0; n < STEP_TILES; n++) {
                if constexpr (!EXACT) {
                    mma_tf32(sums[n].values, tiles[i].upper, other.lower[n], other.lower[2 + n]);
                    mma_tf32(sums[n].values, tiles[i].lower, other.upper[n], other.upper[2 + n]);
                }
                mma_tf32(sums[n].values, tiles[i].upper, other.upper[n], other.upper[2 + n]);
            }
        }
    }
};

// That for the products of a type of activations.
template <typename T> struct OverChunksOf { using Type = OverChunks<Precision<T>::EXACT>; };
template <> struct OverChunksOf<__nv_bfloat16> { using Type = halves::OverChunks; };

// The slopes by G or H as results of such products: of eight pairs, their real and their imaginary parts. A row is a step as above, a
// column a pair.
struct MatrixSlopes {
    float sums[PAIRS / 8][2][4] = {};

    // Adds the products of steps with what is in the exchange, a `Kept` for each number.
    template <typename Kept, typename Steps>
    __device__ __forceinline__ void add(Lane lane, const Steps &steps, const float *exchange) {
#pragma unroll
        for (int n = 0; n < PAIRS / 8; n++) {
            Kept numbers[4];
#pragma unroll
            for (int i = 0; i < 4; i++) read_number(numbers[i], exchange + (4 * i + lane.t) * EXCHANGE + 2 * (8 * n + lane.g));
            Sum of_tile[2];
            steps.add_states(of_tile[0], of_tile[1], numbers);
            // The tensor cores round towards zero, which would add up.
#pragma unroll
            for (int part = 0; part < 2; part++) {
#pragma unroll
                for (int k = 0; k < 4; k++) sums[n][part][k] += of_tile[part][k];
            }
        }
    }
    // Writes those of a warp for the row of blocks to a table.
    __device__ __forceinline__ void write(float *to, const Inputs &p, const Warp &warp, Lane lane) const {
        to += int64_t(blockIdx.y) * p.d_inner * p.padded * 2 * CHUNK + warp.table(p);
#pragma unroll
        for (int n = 0; n < PAIRS / 8; n++) {
#pragma unroll
            for (int part = 0; part < 2; part++) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int number = 2 * (8 * n + 2 * lane.t + k) + part;
                    write_shared(to + number * CHUNK + 2 * lane.g, {sums[n][part][k], sums[n][part][2 + k]});
                }
            }
        }
    }
};

// The slopes by the numbers of a lane's pair, where the row of blocks has them: by A̅^16 of whole chunks, and by A̅, B̅ and C, and D, of
// steps that are gone through one by one. These are too few to hold their sums in registers.
struct PairSlopes {
    double *of_pair;
    float *of_skip;

    __device__ __forceinline__ PairSlopes(const Backward &params, const Warp &warp) {
        const Inputs &p = params.inputs;
        const int64_t channel = blockIdx.y * p.d_inner + warp.channel;
        of_pair = params.of_pairs + (channel * p.padded + warp.pair) * 8;
        of_skip = warp.is_first && threadIdx.x % 32 == 0 ? params.of_kernel + channel * OF_KERNEL + CHUNK : nullptr;
    }
    __device__ __forceinline__ void clear(int i) const { of_pair[2 * i] = of_pair[2 * i + 1] = 0.0; }
    template <typename R> __device__ __forceinline__ void add(int i, Number<R> x) const {
        of_pair[2 * i] += x.re, of_pair[2 * i + 1] += x.im;
    }
};

// The slope by the state after a segment: that by the final state, carried back through the segments in between.
template <typename R>
__device__ __forceinline__ Number<R> incoming_slope(const Backward &params, const Segment &segment, const Warp &warp) {
    const Inputs &p = params.inputs;
    Number<R> x = read_state<R>(params.d_final_state, warp, segment.sequence);
    if (segment.ends_sequence() || !warp.has_pair) return x;
    const int64_t last = segment.index + (p.segments.packed ? p.segments.packed[segment.index].segments_after
                                                             : p.segments.per_row - 1 - segment.rank);
    // The last, which may be shorter, has gone back to where it begins by itself; what enters it is carried through it here.
    const int64_t steps_of_last = segment.len - (segment.first + (last - segment.index) * segment.steps);
    const Number<double> step = {warp.powers(p)[0], warp.powers(p)[1]};
    const auto pass = [&](int64_t index, const Power<R> &by) {
        const float *const reached = params.d_chunk_states + warp.state_at(p, index);
        x = by.conj().advance(x, Number<float>{reached[0], reached[1]});
    };
    pass(last, Power<R>(power(step, static_cast<uint64_t>(steps_of_last))));
    const Power<R> whole = segment_power<R>(warp.powers(p), segment.steps);
#pragma unroll 1
    for (int64_t after = last - 1; after > segment.index; after--) pass(after, whole);
    return x;
}

}
