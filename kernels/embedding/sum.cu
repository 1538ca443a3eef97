// The gradient of an embedding matrix: the sum of the rows that each token has, in ascending order of their positions.
//
// `embedding_sum` writes every row of the matrix whose token has few positions, zeros where it has none; what it moves is
// bound by memory: 154 MB written and 50 read with 50,280 tokens, 768 columns and 16,384 rows of f32, 61 µs at 3.35 TB/s.
// A token that is half of all ids would keep one warp for a millisecond. So the positions in order are cut into parts, and
// what a part has of a token with more positions than a part is summed by itself; such a token is never wholly inside a
// part, so that a part has two of them at most, which it begins and ends with. `embedding_finish` sums over the parts.
//
// Which additions there are, and their order, follows from the ids alone.
#include "../common/vector_io.cuh"
#include "params.cuh"

namespace embedding::sum {

// Rows that are summed before the sum is added to others: a sum of many equal terms is off by the roundings of 64 of them
// and of the sums, and not of all.
constexpr int SUMMED = 64;
// Rows, and sums of parts, whose loads are in flight together: of the latter few threads take many.
constexpr int ROWS_AHEAD = 4, PARTS_AHEAD = 16;

// Threads that share a row, and this one's quad of columns.
struct Team {
    int64_t index;
    int64_t first_quad, quads;
    bool vector;
    int64_t width;

    // The teams of `columns` blocks share the rows of one block.
    __device__ __forceinline__ Team(const Sum &p, uint32_t block, uint32_t columns)
        : index(int64_t(block / columns) * (THREADS >> p.lane_shift) + (threadIdx.x >> p.lane_shift)),
          first_quad((int64_t(block % columns) << p.lane_shift) + (threadIdx.x & ((1 << p.lane_shift) - 1))),
          quads(int64_t(columns) << p.lane_shift), vector(p.flags & FLAG_VECTOR), width(p.width) {}

    // Calls `f(column, how many from there on)` for this thread's quads.
    template <typename F> __device__ __forceinline__ void for_each_quad(const F &f) const {
        for (int64_t column = first_quad * QUAD; column < width; column += quads * QUAD) {
            f(column, static_cast<int>(min(width - column, int64_t(QUAD))));
        }
    }
};

// Adds `count` columns of what `read(i)` gives for i from `first` to `end`.
template <typename E, int AHEAD, typename F>
__device__ __forceinline__ void add_all(float (&total)[QUAD], int64_t first, int64_t end, const F &read) {
    for (int64_t top = first; top < end; top += SUMMED) {
        const int64_t stop = min(end, top + SUMMED);
        float sum[QUAD] = {};
        for (int64_t i = top; i < stop; i += AHEAD) {
            Pack<E, QUAD> next[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) next[k] = read(min(i + k, stop - 1), i + k < stop);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
#pragma unroll
                for (int c = 0; c < QUAD; c++) sum[c] += next[k][c];
            }
        }
#pragma unroll
        for (int c = 0; c < QUAD; c++) total[c] += sum[c];
    }
}

// Sums the rows of the positions from `first` to `end` in order.
template <typename T>
__device__ __forceinline__ void sum_rows(float (&total)[QUAD], const Sum &p, const Team &team, int64_t first, int64_t end,
                                         int64_t column, int count) {
    const T *from = static_cast<const T *>(p.d_out) + column * p.column;
    add_all<T, ROWS_AHEAD>(total, first, end, [&](int64_t i, bool there) {
        return load_vec_if<QUAD, false>(from + p.order[i] * p.row, p.column, there ? count : 0, team.vector);
    });
}

__device__ __forceinline__ void write(float *to, const Team &team, const float (&total)[QUAD], int count) {
    store_vec_if<QUAD, false>(to, 1, narrow_pack<float>(total), count, team.vector);
}

// A part of the positions in order, and what it begins and ends with.
struct Part {
    int64_t first, end;
    // The tokens, and where the positions of each begin and end.
    int64_t tokens[2], starts[2], ends[2];

    __device__ __forceinline__ Part(const Sum &p, int64_t index) : first(index * p.part) {
        end = min(p.starts[p.vocab], first + p.part);
        if (first >= end) return;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            tokens[i] = p.ids[p.order[i == 0 ? first : end - 1]];
            starts[i] = p.starts[tokens[i]], ends[i] = p.starts[tokens[i] + 1];
        }
    }
    __device__ __forceinline__ bool exists() const { return first < end; }
    // Whether the first or the last token has a sum of its own in this part.
    __device__ __forceinline__ bool has(const Sum &p, int i) const {
        return ends[i] - starts[i] > p.part && (i == 0 || tokens[1] != tokens[0]);
    }
};

template <typename T> __device__ __forceinline__ void sum(const Sum &p) {
    if (blockIdx.x < p.part_blocks) {
        const Team team(p, blockIdx.x, static_cast<uint32_t>(p.columns));
        if (team.index >= p.parts) return;
        const Part part(p, team.index);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (!part.exists() || !part.has(p, i)) continue;
            float *to = p.partials + (team.index * 2 + i) * p.stride;
            const int64_t first = max(part.first, part.starts[i]), end = min(part.end, part.ends[i]);
            team.for_each_quad([&](int64_t column, int count) {
                float total[QUAD] = {};
                sum_rows<T>(total, p, team, first, end, column, count);
                write(to + column, team, total, count);
            });
        }
        return;
    }
    // All columns of a token: where it begins is read once.
    const Team team(p, blockIdx.x - static_cast<uint32_t>(p.part_blocks), 1);
    if (team.index >= p.vocab) return;
    const int64_t first = p.starts[team.index], end = p.starts[team.index + 1];
    if (end - first > p.part) return;
    team.for_each_quad([&](int64_t column, int count) {
        float total[QUAD] = {};
        sum_rows<T>(total, p, team, first, end, column, count);
        write(p.d_table + (team.index * p.width + column), team, total, count);
    });
}

// Sums a token over its parts, by the part that it begins in. That is one token to a part: if a part's first token begins
// with it, it is longer than the part and its last one too.
__device__ __forceinline__ void finish(const Sum &p) {
    const Team team(p, blockIdx.x, static_cast<uint32_t>(p.columns));
    if (team.index >= p.parts) return;
    const Part part(p, team.index);
    if (!part.exists()) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!part.has(p, i) || part.starts[i] < part.first) continue;
        const int64_t last = (part.ends[i] - 1) / p.part;
        team.for_each_quad([&](int64_t column, int count) {
            const float *from = p.partials + column;
            float total[QUAD] = {};
            add_all<float, PARTS_AHEAD>(total, team.index, last + 1, [&](int64_t k, bool there) {
                // The parts after its first begin with it.
                const float *at = from + (k * 2 + (k == team.index ? i : 0)) * p.stride;
                return load_vec_if<QUAD, false>(at, 1, there ? count : 0, team.vector);
            });
            write(p.d_table + (part.tokens[i] * p.width + column), team, total, count);
        });
    }
}

#define INSTANCE(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) embedding_sum_##SUFFIX(const __grid_constant__ Sum params) {  \
        sum<T>(params);                                                                                                \
    }

INSTANCE(f32, float)
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)

extern "C" __global__ void __launch_bounds__(THREADS) embedding_finish(const __grid_constant__ Sum params) { finish(params); }

}
