// Segments: the parts of sequences that a row of blocks takes one after the other.
#pragma once
#include "params.cuh"

namespace common {

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

__device__ __forceinline__ Segment segment_at(const Segments &segments, const SegmentIndex &at) {
    Segment s;
    const int64_t index = at.index;
    s.index = index;
    if (segments.packed) {
        const PackedSegment part = segments.packed[index];
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
        s.len = segments.len;
        s.rank = at.rank;
        s.first = s.rank * segments.steps;
        s.steps = min(segments.steps, segments.len - s.first);
    }
    return s;
}

}
