// How tensors reach a kernel. All distances are in elements and 64 bits wide. The same structs, field by field, are in
// src/cuda/params.rs.
#pragma once
#include <stdint.h>

// (batch, length, d_inner); `data` is null where the tensor is absent.
struct Activation {
    const void *data;
    int64_t batch, step, channel;
};

// B or C: (batch, length, groups, d_state) of the activations' type or, where `constant` is set, (d_inner, d_state) f32.
struct Projection {
    const void *data;
    int64_t batch, step, group, channel, state;
    int64_t constant;
};

// (d_inner, d_state) f32.
struct Matrix {
    const float *data;
    int64_t channel, state;

    // Whether four states of a channel lie in one aligned piece.
    __device__ __forceinline__ bool by_fours() const {
        return state == 1 && channel % 4 == 0 && reinterpret_cast<uint64_t>(data) % sizeof(float4) == 0;
    }
};

// (d_inner) f32; null where absent.
struct Vector {
    const float *data;
    int64_t channel;

    __device__ __forceinline__ float at(int64_t d, float otherwise) const {
        return data ? data[d * channel] : otherwise;
    }
};

// (sequences, d_inner, d_state) f32; null where absent.
struct States {
    const float *data;
    int64_t sequence, channel, state;
};

// A sequence or a part of one: `steps` steps from the `first`-th in the direction of the scan on.
struct Segment {
    int64_t sequence;
    // The batch row, where the sequence starts in it, and the sequence's length.
    int64_t row, start, len;
    int64_t first, steps;
    // Its place among all segments, and among those of its sequence.
    int64_t index, rank;

    __device__ __forceinline__ bool ends_sequence() const { return first + steps == len; }

    // The step of the batch row that is the sequence's `i`-th in the direction of the scan.
    __device__ __forceinline__ int64_t step(int64_t i, bool reverse) const {
        return reverse ? start + len - 1 - i : start + i;
    }
};

// A part of a packed sequence, as the host lists them; see Segment. `behind` counts its sequence's segments behind it.
struct PackedSegment {
    int64_t sequence, start, len, first, steps, rank, behind;
};

// Counts through the segments that a row of blocks takes, and where they lie if each batch row has `per_row`. Divides by
// 32 bits only: 64 would be a call, around which everything is spilled.
struct SegmentIndex {
    int64_t index, row, rank;

    __device__ __forceinline__ explicit SegmentIndex(int64_t per_row) : index(blockIdx.y), row(0), rank(0) {
        move(blockIdx.y, per_row);
    }
    __device__ __forceinline__ void next(int64_t per_row) {
        index += gridDim.y;
        move(gridDim.y, per_row);
    }

  private:
    __device__ __forceinline__ void move(uint32_t by, int64_t per_row) {
        const uint32_t divisor = per_row > INT32_MAX ? INT32_MAX : static_cast<uint32_t>(per_row);
        row += by / divisor;
        rank += by % divisor;
        if (rank >= per_row) rank -= per_row, row++;
    }
};

// How the steps are divided into segments: those that `packed` lists or, where it is null, each batch row into
// `per_row` parts.
struct Segments {
    const PackedSegment *packed;
    int64_t count, len, per_row, steps;

    __device__ __forceinline__ Segment get(const SegmentIndex &at) const {
        Segment s;
        const int64_t index = at.index;
        s.index = index;
        if (packed) {
            const PackedSegment part = packed[index];
            s.sequence = part.sequence;
            s.row = 0;
            s.start = part.start;
            s.len = part.len;
            s.first = part.first;
            s.steps = part.steps;
            s.rank = part.rank;
        } else {
            s.sequence = s.row = at.row;
            s.start = 0;
            s.len = len;
            s.rank = at.rank;
            s.first = s.rank * steps;
            s.steps = min(steps, len - s.first);
        }
        return s;
    }
};

// Has the pack at `from` copied to shared memory, or zeros if it is not `wanted`, without waiting for it.
template <typename T, int COUNT>
__device__ __forceinline__ void copy_ahead(Pack<T, COUNT> &to, const T *from, bool wanted) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(&to));
    constexpr int BYTES = sizeof(T) * COUNT;
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(BYTES), "r"(wanted ? BYTES : 0)
                 : "memory");
}

// What this thread has had copied since the last call is a group; waits until all groups but the last `AFTER` are there.
__device__ __forceinline__ void end_group_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int AFTER> __device__ __forceinline__ void wait_for_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(AFTER) : "memory");
}

// Has the line at `at` brought into the second-level cache.
__device__ __forceinline__ void prefetch(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
