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
// Rows are staged as lanes hold them, a tile's part of all lanes after the other, so that no two meet in a bank.
template <typename T, int TILES, bool WHOLE> struct Products {
    static constexpr int ROWS = TILES * TILE_ROWS, FEATURES = CHUNK;
    // Tiles of 16 rows; of one with 8, the other half is zeros, which are not staged.
    static constexpr int GROUPS = (TILES + 1) / 2;
    static constexpr bool IS_FULL = TILES > 1;
    // Words of a chunk of a group.
    static constexpr int WORDS = IS_FULL ? 8 : 4;
    // Chunks of the matrix that are on their way: each is asked for as many turns before it is used.
    static constexpr int AHEAD = !WHOLE ? 2 : TILES == 1 ? 5 : TILES == 4 ? 3 : 4;

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
        constexpr int HALVES = IS_FULL ? 2 : 1;
        const int chunks = (features + CHUNK - 1) / CHUNK;
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
#pragma unroll 2
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
                if (STEP != Step::SQUARES) store(to + chunk * (WORDS * 32), words);
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

    // Eight features of one row or two, where the lane finds them again.
    template <int HALVES> __device__ __forceinline__ void store(uint32_t *to, const uint32_t (&words)[HALVES][4]) const {
        if constexpr (IS_FULL) {
            uint4 *tiles = reinterpret_cast<uint4 *>(to) + lane;
            tiles[0] = {words[0][0], words[1][0], words[0][1], words[1][1]};
            tiles[32] = {words[0][2], words[1][2], words[0][3], words[1][3]};
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++) to[j * 32 + lane] = words[0][j];
        }
    }

    // The left operand of a chunk's two tiles.
    __device__ __forceinline__ void fetch(uint32_t (&first)[4], uint32_t (&second)[4], const uint32_t *from) const {
        if constexpr (IS_FULL) {
            const uint4 *tiles = reinterpret_cast<const uint4 *>(from) + lane;
            const uint4 a = tiles[0], b = tiles[32];
            first[0] = a.x, first[1] = a.y, first[2] = a.z, first[3] = a.w;
            second[0] = b.x, second[1] = b.y, second[2] = b.z, second[3] = b.w;
        } else {
            first[0] = from[lane], first[2] = from[32 + lane], second[0] = from[64 + lane], second[2] = from[96 + lane];
            first[1] = first[3] = second[1] = second[3] = 0;
        }
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
#pragma unroll
            for (int j = 0; j < 2; j++) of.at[j] += AHEAD * CHUNK * (WHOLE ? 1 : p.weight.column), of.left[j] -= AHEAD * CHUNK;
        }
    }

    // The same of rows that are not staged, as the block multiplies them once: up to 8, each by four lanes, and their squares. They are
    // normed, or of T.
    template <typename X>
    __device__ __forceinline__ void add_directly(Part &of, const BlockRows<X, ROWS, WHOLE> &rows, const Squares<ROWS> &squares,
                                                 const Linear &p, int features, const Share &share) {
        constexpr bool IS_RAW = std::is_same_v<X, T>;
        const int row = lane / 4;
        float sum = 0.0f;
#pragma unroll 1
        for (int chunk = share.first; chunk < share.last; chunk += AHEAD) {
            uint32_t words[AHEAD][4];
            float x[IS_RAW ? 1 : AHEAD][8];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (chunk + i >= share.last) break;
                const int k = (chunk + i) * CHUNK + part * 8;
                if constexpr (IS_RAW) {
                    rows.read_words(words[i], row, k, features - k);
                } else {
                    rows.read(x[i], row, k, features - k);
                }
            }
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (chunk + i >= share.last) break;
                if constexpr (!IS_RAW) {
                    const int k = (chunk + i) * CHUNK + part * 8;
                    float by[8];
                    rows.read_weights(by, k, features - k);
#pragma unroll
                    for (int j = 0; j < 8; j++) sum = fmaf(x[i][j], x[i][j], sum);
#pragma unroll
                    for (int j = 0; j < 4; j++) words[i][j] = narrow_pair(x[i][2 * j] * by[2 * j], x[i][2 * j + 1] * by[2 * j + 1], T());
                }
                uint4(&w)[2] = of.ahead[i];
                const uint32_t first[4] = {words[i][0], 0, words[i][1], 0}, second[4] = {words[i][2], 0, words[i][3], 0};
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    mma(sums[0][j], first, w[j].x, w[j].y, T());
                    mma(sums[0][j], second, w[j].z, w[j].w, T());
                    load(w[j], p, of, j, (AHEAD + i) * CHUNK);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; j++) of.at[j] += AHEAD * CHUNK * (WHOLE ? 1 : p.weight.column), of.left[j] -= AHEAD * CHUNK;
        }
        if (!rows.norms) return;
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (part == 0) squares.leave(sum, row, true);
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
