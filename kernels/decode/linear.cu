// Products of few rows with a matrix, with the norm before and the convolution or the addition after it.
//
// A block gives 16 columns of the product, of up to 64 rows, or goes from 16 to 16 where there are more than the device runs blocks of
// at a time: it stages the rows once. With half types it asks for its part of the matrix before it looks at the rows, and for the next
// part before it finishes one, so that memory is busy meanwhile.
#include "../common/math.cuh"
#include "products.cuh"
#include "typed.cuh"

namespace decode::linear {

// The first row of the block, and how many it has.
template <int ROWS> struct BlockRows {
    int64_t first;
    int count;
    __device__ __forceinline__ explicit BlockRows(const Linear &p)
        : first(int64_t(blockIdx.y) * ROWS), count(static_cast<int>(min(p.rows - first, int64_t(ROWS)))) {}
};

// Rows `warp`, `warp` + 8, … of the block, which a warp norms and stages: where they lie, null for those that do not exist.
template <typename X, int TILES> struct WarpRows {
    const X *at[TILES];
    // Distance of features, and whether four neighbouring ones can be read at once.
    int64_t column;
    bool whole;

    __device__ __forceinline__ WarpRows(const Linear &p, int64_t first, int count) : column(p.x.column) {
        const X *data = static_cast<const X *>(p.x.data);
        whole = column == 1 && p.x.row % QUAD == 0 && reinterpret_cast<uint64_t>(data) % (QUAD * sizeof(X)) == 0;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const int row = threadIdx.x / 32 + i * WARPS;
            at[i] = row < count ? data + (first + row) * p.x.row : nullptr;
        }
    }

    // Four elements of a row from feature `k` on, of which `count` exist; zeros beyond, and of rows that do not exist.
    __device__ __forceinline__ Pack<X, QUAD> read(int i, int64_t k, int count) const {
        if (!at[i]) return {};
        return load_vec_if<QUAD, false>(at[i] + k * column, column, count, whole && count == QUAD);
    }
};

__device__ __forceinline__ int features_left(int64_t left) {
    return static_cast<int>(max(int64_t(0), min(left, int64_t(QUAD))));
}

// What the rows of a warp are multiplied by to norm them. A warp sums up each row by itself, in one order whatever the others are.
template <typename X, int TILES>
__device__ __forceinline__ void norm_scales(float (&scale)[TILES], const Linear &p, const WarpRows<X, TILES> &rows) {
#pragma unroll
    for (int i = 0; i < TILES; i++) scale[i] = 0.0f;
#pragma unroll(TILES > 2 ? 1 : 4)
    for (int k = threadIdx.x % 32 * QUAD; k < p.features; k += 32 * QUAD) {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const Pack<X, QUAD> x = rows.read(i, k, features_left(p.features - k));
#pragma unroll
            for (int j = 0; j < QUAD; j++) scale[i] = fmaf(x[j], x[j], scale[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        for (int offset = 16; offset > 0; offset >>= 1) scale[i] += __shfl_xor_sync(0xffffffffu, scale[i], offset);
        scale[i] = 1.0f / sqrtf(scale[i] / p.count + p.eps);
    }
}

// Stages `features` features from `begin` on of the block's rows, normed and rounded to T, and zeros up to whole chunks and for
// rows that do not exist.
template <typename T, typename X, int ROWS, int FEATURES, int TILES>
__device__ __forceinline__ void stage(T *staged, const Linear &p, const float (&scale)[TILES], int64_t begin, int features,
                                      const WarpRows<X, TILES> &rows) {
    const int end = (features + FEATURES - 1) / FEATURES * FEATURES, stride = static_cast<int>(p.stride);
    const Vector &weight = p.norm_weight;
    const bool norms = p.flags & FLAG_NORM;
    const bool whole = weight.channel == 1 && reinterpret_cast<uint64_t>(weight.data) % sizeof(float4) == 0;
#pragma unroll(TILES > 1 ? 1 : 4)
    for (int k = threadIdx.x % 32 * QUAD; k < end; k += 32 * QUAD) {
        const int exist = features_left(features - k);
        Pack<float, QUAD> by = {};
        if (norms && weight.data) {
            const float *at = weight.data + (begin + k) * weight.channel;
            by = load_vec_if<QUAD, false>(at, weight.channel, exist, whole && exist == QUAD);
        }
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const int row = threadIdx.x / 32 + i * WARPS;
            if (row >= ROWS) break;
            const Pack<X, QUAD> x = rows.read(i, begin + k, exist);
            float value[QUAD];
#pragma unroll
            for (int j = 0; j < QUAD; j++) {
                value[j] = x[j];
                // What does not exist is zero, and not what a norm of nothing makes of it.
                if (norms) value[j] = rows.at[i] && j < exist ? x[j] * scale[i] * (weight.data ? by[j] : 1.0f) : 0.0f;
            }
            store_narrowed<T, true>(staged + row * stride + k, value, QUAD);
        }
    }
}

// A step of the convolution of one channel of one row, in place.
template <typename T> __device__ __forceinline__ float convolve(const Linear &p, int64_t row, int64_t channel, float newest) {
    const int64_t slot = slot_of(p.slots, row);
    if (slot < 0) return 0.0f;
    const int before = static_cast<int>(p.width) - 1;
    const int64_t state = slot * p.conv_state.slot + channel * p.conv_state.column;
    const float *weight = p.conv_weight.data + channel * p.conv_weight.channel;
    float sum = element_or(p.conv_bias, channel, 0.0f);
    for (int k = 0; k < before; k++) {
        const float x = read_as(p.conv_state.data, state + k * p.conv_state.row, p.state_type);
        sum = fmaf(weight[k * p.conv_weight.state], x, sum);
        if (k > 0) write_as(p.conv_state.data, state + (k - 1) * p.conv_state.row, p.state_type, x);
    }
    write_as(p.conv_state.data, state + (before - 1) * p.conv_state.row, p.state_type, newest);
    return silu(fmaf(weight[before * p.conv_weight.state], newest, sum));
}

// What becomes of an element of the product.
template <typename T> __device__ __forceinline__ void finish(const Linear &p, int64_t row, int64_t out, float sum) {
    const int64_t at = row * p.out_features + out;
    sum += element_or(p.bias, out, 0.0f);
    if (p.flags & FLAG_CONV) {
        sum = rounded<T>(sum);
        if (out < p.d_inner) sum = convolve<T>(p, row, out, sum);
    }
    if (p.flags & FLAG_ACCUMULATE) sum += read_as(p.out, at, p.out_type);
    write_as(p.out, at, p.out_type, sum);
}

// Adds the warps' sums of a tile, and finishes its columns from `first_output` on.
template <typename T, int ROWS>
__device__ __forceinline__ void finish_tile(const Linear &p, const float *partials, const BlockRows<ROWS> &rows,
                                            int64_t first_output) {
    constexpr int PARTIALS = ROWS * PARTIAL_STRIDE;
    for (int i = threadIdx.x; i < OUTPUTS * rows.count; i += THREADS) {
        const int row = i / OUTPUTS, output = i % OUTPUTS;
        if (first_output + output >= p.out_features) continue;
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += partials[warp * PARTIALS + row * PARTIAL_STRIDE + output];
        finish<T>(p, rows.first + row, first_output + output, sum);
    }
}

template <typename T, typename X, int TILES, bool WHOLE>
__device__ __forceinline__ void run_on(const Linear &p, T *staged, float *partials) {
    using Products = Products<T, TILES, WHOLE>;
    Products products;
    const BlockRows<Products::ROWS> rows(p);
    const WarpRows<X, TILES> warp_rows(p, rows.first, rows.count);
    const int warp = threadIdx.x / 32;
    const int64_t step = int64_t(gridDim.x) * OUTPUTS;
    const int first_features = static_cast<int>(min(p.features, p.slice));
    const Share first_share(first_features, Products::FEATURES, warp);
    int64_t output = int64_t(blockIdx.x) * OUTPUTS;
    typename Products::Group group = products.load(p, output, 0, first_features, first_share.first, first_share.last);
    float scale[TILES];
    if (p.flags & FLAG_NORM) norm_scales(scale, p, warp_rows);
    bool is_staged = false;
#pragma unroll 1
    for (; output < p.out_features; output += step) {
        products.clear();
#pragma unroll 1
        for (int64_t begin = 0; begin < p.features; begin += p.slice) {
            const int features = static_cast<int>(min(p.features - begin, p.slice));
            const Share share(features, Products::FEATURES, warp);
            if (begin > 0) group = products.load(p, output, begin, features, share.first, share.last);
            // Rows of one slice stay where they are for all tiles.
            if (!is_staged || p.slice < p.features) {
                __syncthreads();
                stage<T, X, Products::ROWS, Products::FEATURES>(staged, p, scale, begin, features, warp_rows);
                __syncthreads();
                is_staged = true;
            }
#pragma unroll 1
            for (int chunk = share.first; chunk < share.last; chunk += Products::AHEAD) {
                const typename Products::Group next =
                    products.load(p, output, begin, features, chunk + Products::AHEAD, share.last);
                products.add(group, staged, p, output, begin, features, chunk, share.last);
                group = next;
            }
        }
        if (output + step < p.out_features) {
            group = products.load(p, output + step, 0, first_features, first_share.first, first_share.last);
        }
        // The sums may lie where the rows do, which then are read no more, and those of the tile before have been read.
        __syncthreads();
        products.leave(partials + warp * (Products::ROWS * PARTIAL_STRIDE));
        __syncthreads();
        finish_tile<T>(p, partials, rows, output);
    }
}

template <typename T, int TILES, bool WHOLE> __device__ __forceinline__ void run(const Linear &p) {
    extern __shared__ __align__(16) unsigned char memory[];
    T *staged = reinterpret_cast<T *>(memory);
    float *partials = reinterpret_cast<float *>(memory + p.partials);
    if (sizeof(T) < sizeof(float) && p.x_type != TYPE_F32) {
        run_on<T, T, TILES, WHOLE>(p, staged, partials);
    } else {
        run_on<T, float, TILES, WHOLE>(p, staged, partials);
    }
}

// Blocks to a processor, as the host divides the columns: two of few rows, by their registers.
#define INSTANCE(NAME, T, TILES, WHOLE, BLOCKS)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) decode_linear_##NAME(const __grid_constant__ Linear params) { \
        run<T, TILES, WHOLE>(params);                                                                                  \
    }

#define INSTANCES(NAME, T)                                                                                             \
    INSTANCE(general_##NAME, T, 1, false, 1)                                                                           \
    INSTANCE(rows8_##NAME, T, 1, true, 2)                                                                              \
    INSTANCE(rows16_##NAME, T, 2, true, 1)                                                                             \
    INSTANCE(rows32_##NAME, T, 4, true, 1)                                                                             \
    INSTANCE(rows64_##NAME, T, 8, true, 1)

INSTANCE(general_f32, float, 1, false, 1)
INSTANCE(rows4_f32, float, 1, true, 1)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)

}
