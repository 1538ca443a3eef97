// A block's part of a product of few rows with a matrix, of half types: 16 columns of it for all warps or for each, of up to 64 rows.
//
// The matrix is read once, straight into registers, and every row of the block is multiplied with it on the tensor cores: rows are
// the left operand, the matrix is the right one. Where the warps share 16 columns, they divide the features, and what each has summed
// up goes through shared memory at the end.
#pragma once
#include "../common/async.cuh"
#include "../common/mma.cuh"
#include "rows.cuh"

namespace decode::linear {

// A lane holds, of every chunk of 32 features, eight neighbouring ones of two columns. Where a tile of the tensor cores has features
// 2t, 2t+1, 2t+8 and 2t+9 in lane t of four, these stand for features 8t, …, 8t+3 in the first tile and 8t+4, …, 8t+7 in the second,
// on both sides alike.
//
//   lane          0     1     2     3     4     5    …   31
//   column        0,8   0,8   0,8   0,8   1,9   1,9  …   7,15
//   rows          0,8   0,8   0,8   0,8   1,9   1,9  …   7,15    (of each 16)
//   features      0-7   8-15  16-23 24-31 0-7   8-15 …   24-31
//
// Rows are staged as lanes hold them, the eight features of all lanes of a chunk together, so that no two meet in a bank.
template <typename T, int TILES, bool WHOLE> struct Products {
    static constexpr int ROWS = TILES * TILE_ROWS, FEATURES = CHUNK;
    // Tiles of 16 rows; of one with 8, the other half is zeros, which are not staged.
    static constexpr int GROUPS = (TILES + 1) / 2;
    static constexpr bool IS_FULL = TILES > 1;
    // Rows of a lane in a group, and words of a chunk of it.
    static constexpr int HALVES = IS_FULL ? 2 : 1, WORDS = 4 * HALVES;
    // Chunks of the matrix that are on their way: each is asked for as many turns before it is used.
    static constexpr int AHEAD = !WHOLE ? 2 : TILES == 1 ? 6 : TILES == 4 ? 3 : 4;

    // A lane's part of 16 columns of the matrix, and what of it is on its way.
    struct Part {
        // Where the lane's part of two columns begins, and how many features there are from there on, to the end of the warp's share.
        const T *at[2];
        int left[2];
        uint4 ahead[AHEAD][2];
    };

    uint32_t *staged;
    int lane, part;
    float sums[GROUPS][2][4];

    __device__ __forceinline__ explicit Products(unsigned char *memory)
        : staged(reinterpret_cast<uint32_t *>(memory)), lane(threadIdx.x % 32), part(lane % 4) {}

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < GROUPS * 8; i++) sums[i / 8][i / 4 % 2][i % 4] = 0.0f;
    }

    // Eight features of a column from `k` on, if there are any: else what is there stays, which meets nothing but zeros. `WHOLE`: rows of
    // the matrix are contiguous, aligned, and have a multiple of 8 features.
    __device__ __forceinline__ static void load(uint4 &to, const Linear &p, const Part &from, int column, int k) {
        if (k >= from.left[column]) return;
        if constexpr (WHOLE) {
            to = __ldg(reinterpret_cast<const uint4 *>(from.at[column] + k));
        } else {
            T *elements = reinterpret_cast<T *>(&to);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                elements[i] = k + i < from.left[column] ? from.at[column][(k + i) * p.weight.column] : T(0.0f);
            }
        }
    }

    // Asks for the beginning of the warp's share of the slice from `begin` on, of the 16 columns from `first` on.
    __device__ __forceinline__ void ask(Part &of, const Linear &p, int first, int begin, int features, const Share &share) const {
        const int from = share.first * CHUNK + part * 8, left = min(features, share.last * CHUNK) - from;
        const T *data = static_cast<const T *>(p.weight.data) + (begin + from) * p.weight.column;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int out = first + lane / 4 + 8 * j;
            of.at[j] = data + out * p.weight.row, of.left[j] = out < static_cast<int>(p.out_features) ? left : 0;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) of.ahead[i][j] = {}, load(of.ahead[i][j], p, of, j, i * CHUNK);
        }
    }

    // Has the second-level cache ask for the rest of the share.
    __device__ __forceinline__ void prefetch_rest(const Part &of) const {
        constexpr int LINE = 128 / sizeof(T);
#pragma unroll
        for (int j = 0; j < (WHOLE ? 2 : 0); j++) {
            for (int k = AHEAD * CHUNK; part == 0 && k < of.left[j]; k += LINE) prefetch(of.at[j] + k);
        }
    }

    // Goes through chunks `first`, `first + step`, … of the slice from `begin` on: stages them, rounded to T, sums up the rows' squares, or
    // both. Four lanes take a row.
    template <Step STEP, typename X>
    __device__ __forceinline__ void go_through(const BlockRows<X, ROWS, WHOLE> &rows, const Squares<ROWS> &squares,
                                               const Linear &p, int begin, int features, int first, int step, int last) const {
        const int chunks = (features + CHUNK - 1) / CHUNK;
        if constexpr (WHOLE && std::is_same_v<X, T>) {
            if (!rows.norms) return copy(rows, begin, features, chunks, first, step, last);
        }
#pragma unroll 1
        for (int group = 0; group * 16 < rows.count; group++) {
            float sums[HALVES] = {}, scale[HALVES];
            int row[HALVES];
#pragma unroll
            for (int i = 0; i < HALVES; i++) {
                row[i] = group * 16 + i * 8 + lane / 4;
                if (STEP == Step::STAGE && rows.norms) scale[i] = row[i] < rows.count ? squares.scale(p, row[i]) : 0.0f;
            }
            uint32_t *to = staged + group * chunks * (WORDS * 32);
            // Where a lane has one row, four chunks of it on their way take no more registers than two of two.
            constexpr int TOGETHER = 4 / HALVES;
#pragma unroll TOGETHER
            for (int chunk = first; chunk < last; chunk += step) {
                const int k = chunk * CHUNK + part * 8, exist = features - k;
                float by[8];
                if (STEP != Step::SQUARES) rows.read_weights(by, begin + k, exist);
                uint32_t words[HALVES][4];
#pragma unroll
                for (int i = 0; i < HALVES; i++) {
                    float x[8];
                    rows.read(x, row[i], begin + k, exist);
#pragma unroll
                    for (int j = 0; j < 8; j++) {
                        if (STEP != Step::STAGE) sums[i] = fmaf(x[j], x[j], sums[i]);
                        if (STEP == Step::STAGE && rows.norms) x[j] *= scale[i];
                        if (STEP != Step::SQUARES && rows.norms) x[j] *= by[j];
                    }
#pragma unroll
                    for (int j = 0; j < 4; j++) words[i][j] = narrow_pair(x[2 * j], x[2 * j + 1], T());
                }
                if constexpr (STEP != Step::SQUARES) {
#pragma unroll
                    for (int i = 0; i < HALVES; i++) *place(to, chunk, i) = {words[i][0], words[i][1], words[i][2], words[i][3]};
                }
            }
#pragma unroll
            for (int i = 0; i < HALVES; i++) {
                if (STEP == Step::STAGE || !rows.norms) break;
                sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 1);
                sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 2);
                if (part == 0) squares.leave(sums[i], row[i], begin == 0);
            }
        }
    }

    // Stages chunks of rows as they are. All are on their way before the first is waited for.
    __device__ __forceinline__ void copy(const BlockRows<T, ROWS, WHOLE> &rows, int begin, int features, int chunks, int first, int step,
                                         int last) const {
#pragma unroll 1
        for (int group = 0; group * 16 < rows.count; group++) {
            uint32_t *to = staged + group * chunks * (WORDS * 32);
#pragma unroll
            for (int i = 0; i < HALVES; i++) {
                const int row = group * 16 + i * 8 + lane / 4, exist = row < rows.count ? features - part * 8 : 0;
                const T *from = rows.data + row * rows.row + begin + part * 8;
#pragma unroll 2
                for (int chunk = first; chunk < last; chunk += step) {
                    Pack<T, 8> &eight = reinterpret_cast<Pack<T, 8> &>(*place(to, chunk, i));
                    copy_async(eight, from + chunk * CHUNK, chunk * CHUNK < exist);
                }
            }
        }
        commit_copies();
        wait_for_copies<0>();
    }

    // Where the lane's features of a chunk of a group are staged: of a row, or of one 8 further on.
    __device__ __forceinline__ uint4 *place(uint32_t *group, int chunk, int half) const {
        return reinterpret_cast<uint4 *>(group + chunk * (WORDS * 32)) + half * 32 + lane;
    }

    // The left operand of a chunk's two tiles.
    __device__ __forceinline__ void fetch(uint32_t (&first)[4], uint32_t (&second)[4], const uint32_t *from) const {
        const uint4 *rows = reinterpret_cast<const uint4 *>(from) + lane;
        uint4 a = rows[0], b = {};
        if constexpr (IS_FULL) b = rows[32];
        first[0] = a.x, first[1] = b.x, first[2] = a.y, first[3] = b.y;
        second[0] = a.z, second[1] = b.z, second[2] = a.w, second[3] = b.w;
    }

    // Multiplies the warp's share of the slice.
    __device__ __forceinline__ void add(Part &of, const Linear &p, int features, const Share &share) {
        const int group_words = (features + CHUNK - 1) / CHUNK * (WORDS * 32);
        const uint32_t *x = staged + share.first * (WORDS * 32);
#pragma unroll 1
        for (int chunk = share.first; chunk < share.last; chunk += AHEAD) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (chunk + i >= share.last) break;
                uint4(&w)[2] = of.ahead[i];
#pragma unroll
                for (int group = 0; group < GROUPS; group++) {
                    uint32_t first[4], second[4];
                    fetch(first, second, x + group * group_words + i * (WORDS * 32));
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        mma(sums[group][j], first, w[j].x, w[j].y, T());
                        mma(sums[group][j], second, w[j].z, w[j].w, T());
                    }
                }
#pragma unroll
                for (int j = 0; j < 2; j++) load(w[j], p, of, j, (AHEAD + i) * CHUNK);
            }
            x += AHEAD * (WORDS * 32);
            advance(of, p);
        }
    }

    // The same of rows that are not staged, as the block multiplies them once: up to 8, each by four lanes, and their squares. They are
    // normed, or of T. `IS_LONG`: chunks of rows of T are asked for as soon as there is room, which takes registers and is of use where a
    // share has more than AHEAD of them.
    // `weights`: where those of the norm are kept.
    template <bool IS_LONG, typename X>
    __device__ __forceinline__ void add_directly(Part &of, const BlockRows<X, ROWS, WHOLE> &rows, const Squares<ROWS> &squares,
                                                 const Linear &p, int features, const Share &share, const float *weights = nullptr) {
        const int row = lane / 4;
        // Multiplies the chunk that is `i` after the one where the part begins, and asks for another one.
        const auto multiply = [&](int i, const uint32_t (&x)[4]) {
            uint4(&w)[2] = of.ahead[i];
            const uint32_t first[4] = {x[0], 0, x[1], 0}, second[4] = {x[2], 0, x[3], 0};
#pragma unroll
            for (int j = 0; j < 2; j++) {
                mma(sums[0][j], first, w[j].x, w[j].y, T());
                mma(sums[0][j], second, w[j].z, w[j].w, T());
                load(w[j], p, of, j, (AHEAD + i) * CHUNK);
            }
        };
        if constexpr (std::is_same_v<X, T>) {
            uint32_t words[AHEAD][4];
            const auto read = [&](int i, int chunk) {
                const int k = chunk * CHUNK + part * 8;
                rows.read_words(words[i], row, k, features - k);
            };
            const auto read_all = [&](int chunk) {
#pragma unroll
                for (int i = 0; i < AHEAD; i++) {
                    if (chunk + i >= share.last) break;
                    read(i, chunk + i);
                }
            };
            if (IS_LONG) read_all(share.first);
#pragma unroll 1
            for (int chunk = share.first; chunk < share.last; chunk += AHEAD) {
                if (!IS_LONG) read_all(chunk);
#pragma unroll
                for (int i = 0; i < AHEAD; i++) {
                    if (chunk + i >= share.last) break;
                    multiply(i, words[i]);
                    if (IS_LONG && chunk + AHEAD + i < share.last) read(i, chunk + AHEAD + i);
                }
                advance(of, p);
            }
            return;
        }
        // Chunks that are on their way together: numbers of f32 take twice the registers.
        constexpr int TOGETHER = AHEAD / 2;
        static_assert(AHEAD % TOGETHER == 0, "each chunk of the matrix has its place");
        float sum = 0.0f;
        wait_for_copies<0>();
        __syncwarp();
#pragma unroll 1
        for (int chunk = share.first; chunk < share.last; chunk += AHEAD) {
#pragma unroll
            for (int from = 0; from < AHEAD; from += TOGETHER) {
                float x[TOGETHER][8];
#pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    const int k = (chunk + from + i) * CHUNK + part * 8;
                    if (chunk + from + i < share.last) rows.read(x[i], row, k, features - k);
                }
#pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    if (chunk + from + i >= share.last) break;
                    const int k = (chunk + from + i) * CHUNK + part * 8;
                    const float4 *const eight = reinterpret_cast<const float4 *>(weights + k);
                    const float by[8] = {eight[0].x, eight[0].y, eight[0].z, eight[0].w, eight[1].x, eight[1].y, eight[1].z, eight[1].w};
                    uint32_t words[4];
#pragma unroll
                    for (int j = 0; j < 8; j++) sum = fmaf(x[i][j], x[i][j], sum);
#pragma unroll
                    for (int j = 0; j < 4; j++) words[j] = narrow_pair(x[i][2 * j] * by[2 * j], x[i][2 * j + 1] * by[2 * j + 1], T());
                    multiply(from + i, words);
                }
            }
            advance(of, p);
        }
        if (!rows.norms) return;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (part == 0) squares.leave(sum, row, true);
    }

    // Goes on to the chunks that have been asked for.
    __device__ __forceinline__ static void advance(Part &of, const Linear &p) {
#pragma unroll
        for (int j = 0; j < 2; j++) of.at[j] += AHEAD * CHUNK * (WHOLE ? 1 : p.weight.column), of.left[j] -= AHEAD * CHUNK;
    }

    // Leaves the warp's sums at `to`, PARTIAL_STRIDE apart for each row.
    __device__ __forceinline__ void leave(float *to) const {
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
#pragma unroll
            for (int i = 0; i < (IS_FULL ? 4 : 2); i += 2) {
                float *row = to + (group * 16 + i * 4 + lane / 4) * PARTIAL_STRIDE + 2 * part;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    *reinterpret_cast<float2 *>(row + 8 * j) = {sums[group][j][i], sums[group][j][i + 1]};
                }
            }
        }
    }
};

}
