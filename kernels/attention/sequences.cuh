// Which sequence, rows and head of keys a block has, and where they lie.
#pragma once
#include "../common/types.cuh"
#include "params.cuh"

namespace attention {

using namespace common;

// The last listed part that begins at a tile of no greater number, found by a warp: 32 parts are looked at at a time.
template <int64_t Part::*FIRST> __device__ __forceinline__ const Part &find(const Parts &parts, int64_t tile) {
    const int lane = threadIdx.x % 32;
    int64_t low = 0, count = parts.count;
    while (count > 1) {
        const int64_t step = (count + 31) / 32, offset = lane * step;
        const bool is_before = offset < count && parts.listed[low + offset].*FIRST <= tile;
        // The first of them always is.
        const int64_t last = (__popc(__ballot_sync(~0u, is_before)) - 1) * step;
        low += last;
        count = count - last < step ? count - last : step;
    }
    return parts.listed[low];
}

// Rows of a sequence: those of one head of keys.
struct Sequence {
    int rows, keys, group;
    // How many keys the queries of the first step see, and whether those of the next see one more.
    int seen_first;
    bool causal;
    // The place of the first row in (batch, length, heads), and of the first key in (rows, steps, kv_heads).
    int64_t first_row_at, first_key_at;

    __device__ __forceinline__ Sequence(const Inputs &p, const Part &part, int64_t kv_head)
        : rows(static_cast<int>(part.length * p.group)), keys(static_cast<int>(part.keys)), group(static_cast<int>(p.group)),
          causal(p.flags & FLAG_CAUSAL) {
        seen_first = causal ? static_cast<int>(part.keys - part.length) + 1 : keys;
        first_row_at = ((part.batch * p.length + part.start) * p.kv_heads + kv_head) * p.group;
        first_key_at = (part.row * p.steps + part.first) * p.kv_heads + kv_head;
    }

    __device__ __forceinline__ int step(int row) const {
        return group == 1 ? row : static_cast<int>(static_cast<unsigned>(row) / static_cast<unsigned>(group));
    }
    // How many keys a row sees.
    __device__ __forceinline__ int seen(int row) const { return causal ? seen_first + step(row) : keys; }
    // The first row that sees a key.
    __device__ __forceinline__ int first_row(int key) const { return causal ? max(key + 1 - seen_first, 0) * group : 0; }
    __device__ __forceinline__ int64_t place(const Inputs &p, int row) const {
        const int of_step = step(row);
        return first_row_at + of_step * (p.kv_heads * p.group) + (row - of_step * group);
    }
    __device__ __forceinline__ int64_t key_place(const Inputs &p, int key) const { return first_key_at + key * p.kv_heads; }
};

// What a block works on: a tile of a sequence, and a head of keys.
struct Work {
    Part part;
    int64_t kv_head;
    int tile;
};

// Of batch rows, all first tiles come first, then all second ones.
template <int64_t Part::*FIRST = &Part::tile> __device__ __forceinline__ Work work_of(const Inputs &p, int64_t block) {
    const int64_t number = block / p.kv_heads, kv_head = block % p.kv_heads;
    if (p.parts.listed) {
        const Part &part = find<FIRST>(p.parts, number);
        return {part, kv_head, static_cast<int>(number - part.*FIRST)};
    }
    const int64_t batch = number % p.parts.count, length = p.parts.length;
    return {{batch, 0, length, batch, 0, length, 0, 0}, kv_head, static_cast<int>(number / p.parts.count)};
}

// A row as a step and a head of its group.
struct RowPlace {
    int step, head;

    __device__ __forceinline__ RowPlace(int row, int group) : step(row), head(0) {
        if (group != 1) {
            step = static_cast<unsigned>(row) / static_cast<unsigned>(group);
            head = row - step * group;
        }
    }
};

// The rows of a sequence in one tensor.
template <typename T> struct RowsOf {
    const T *data;
    int64_t step, head, column;
    bool vector;

    __device__ __forceinline__ const T *row(const RowPlace &place) const { return data + place.step * step + place.head * head; }
};

template <typename T> __device__ __forceinline__ RowsOf<T> queries_of(const Heads &heads, const Inputs &p, const Work &work) {
    const Part &part = work.part;
    const int64_t at = part.batch * heads.batch + part.start * heads.step + work.kv_head * p.group * heads.head;
    return {static_cast<const T *>(heads.data) + at, heads.step, heads.head, heads.column, heads.vector != 0};
}

// Of keys a row is a step.
template <typename T> __device__ __forceinline__ RowsOf<T> keys_of(const Heads &heads, const Work &work) {
    const Part &part = work.part;
    const int64_t at = part.row * heads.batch + part.first * heads.step + work.kv_head * heads.head;
    return {static_cast<const T *>(heads.data) + at, heads.step, 0, heads.column, heads.vector != 0};
}

}
