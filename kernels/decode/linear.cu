// Products of few rows with a matrix, with the norm before and the convolution or the addition after it.
//
// A block gives 16 columns of the product, of up to 64 rows. With half types it asks for its part of the matrix before it looks at the rows, so that
// memory is busy while these are normed and staged.
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

// Four elements of a row of x from feature `k` on, of which `count` exist.
template <typename X>
__device__ __forceinline__ Pack<X, QUAD> read_x(const Linear &p, int64_t row, int64_t k, int count, bool whole) {
    const X *at = static_cast<const X *>(p.x.data) + row * p.x.row + k * p.x.column;
    return load_vec_if<QUAD, false>(at, p.x.column, count, whole && count == QUAD);
}

__device__ __forceinline__ int features_left(int64_t left) {
    return static_cast<int>(max(int64_t(0), min(left, int64_t(QUAD))));
}

// What the rows of a warp are multiplied by to norm them: rows `warp`, `warp` + 8, …. A warp sums up each row by itself, in one
// order whatever the others are.
template <typename X, int TILES>
__device__ __forceinline__ void norm_scales(float (&scale)[TILES], const Linear &p, int64_t first, int count, bool whole) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < TILES; i++) scale[i] = 0.0f;
#pragma unroll(TILES > 2 ? 1 : 4)
    for (int64_t k = lane * QUAD; k < p.features; k += 32 * QUAD) {
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const int row = warp + i * WARPS;
            const Pack<X, QUAD> x = read_x<X>(p, first + row, k, row < count ? features_left(p.features - k) : 0, whole);
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
                                      int64_t first, int count, bool whole) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int end = (features + FEATURES - 1) / FEATURES * FEATURES;
#pragma unroll(TILES > 1 ? 1 : 4)
    for (int k = lane * QUAD; k < end; k += 32 * QUAD) {
        const int exist = features_left(features - k);
        float weight[QUAD];
#pragma unroll
        for (int j = 0; j < QUAD; j++) weight[j] = j < exist ? element_or(p.norm_weight, begin + k + j, 1.0f) : 0.0f;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            const int row = warp + i * WARPS;
            if (row >= ROWS) break;
            const Pack<X, QUAD> x = read_x<X>(p, first + row, begin + k, row < count ? exist : 0, whole);
            float value[QUAD];
#pragma unroll
            for (int j = 0; j < QUAD; j++) {
                value[j] = x[j];
                if (p.flags & FLAG_NORM) value[j] = row < count && j < exist ? x[j] * scale[i] * weight[j] : 0.0f;
            }
            store_narrowed<T, true>(staged + row * p.stride + k, value, QUAD);
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

template <typename T, typename X, int TILES, bool WHOLE>
__device__ __forceinline__ void multiply(Products<T, TILES, WHOLE> &products, T *staged, const Linear &p) {
    using Products = Products<T, TILES, WHOLE>;
    const BlockRows<Products::ROWS> rows(p);
    const int warp = threadIdx.x / 32;
    const bool whole = p.x.column == 1 && p.x.row % QUAD == 0 && reinterpret_cast<uint64_t>(p.x.data) % (QUAD * sizeof(X)) == 0;
    float scale[TILES];
    for (int64_t begin = 0; begin < p.features; begin += p.slice) {
        const int features = static_cast<int>(min(p.features - begin, p.slice));
        const Share share(features, Products::FEATURES, warp);
        typename Products::Group group = products.load(p, begin, features, share.first, share.last);
        if (begin == 0 && p.flags & FLAG_NORM) norm_scales<X>(scale, p, rows.first, rows.count, whole);
        if (begin > 0) __syncthreads();
        stage<T, X, Products::ROWS, Products::FEATURES>(staged, p, scale, begin, features, rows.first, rows.count, whole);
        __syncthreads();
#pragma unroll 1
        for (int chunk = share.first; chunk < share.last; chunk += Products::AHEAD) {
            const typename Products::Group next =
                products.load(p, begin, features, chunk + Products::AHEAD, share.last);
            products.add(group, staged, p, begin, features, chunk, share.last);
            group = next;
        }
    }
}

template <typename T, int TILES, bool WHOLE> __device__ __forceinline__ void run(const Linear &p) {
    extern __shared__ __align__(16) unsigned char memory[];
    using Products = Products<T, TILES, WHOLE>;
    T *staged = reinterpret_cast<T *>(memory);
    Products products;
    if (p.x_type == TYPE_F32) {
        multiply<T, float, TILES, WHOLE>(products, staged, p);
    } else {
        multiply<T, T, TILES, WHOLE>(products, staged, p);
    }
    // Once no warp reads the rows any more, their room is for the sums.
    __syncthreads();
    float *partials = reinterpret_cast<float *>(memory);
    constexpr int PARTIALS = Products::ROWS * PARTIAL_STRIDE;
    products.leave(partials + threadIdx.x / 32 * PARTIALS);
    __syncthreads();
    const BlockRows<Products::ROWS> rows(p);
    for (int i = threadIdx.x; i < OUTPUTS * rows.count; i += THREADS) {
        const int row = i / OUTPUTS, output = i % OUTPUTS;
        const int64_t out = int64_t(blockIdx.x) * OUTPUTS + output;
        if (out >= p.out_features) continue;
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += partials[warp * PARTIALS + row * PARTIAL_STRIDE + output];
        finish<T>(p, rows.first + row, out, sum);
    }
}

#define INSTANCE(NAME, T, TILES, WHOLE)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) decode_linear_##NAME(const __grid_constant__ Linear params) { \
        run<T, TILES, WHOLE>(params);                                                                                  \
    }

#define INSTANCES(NAME, T)                                                                                             \
    INSTANCE(general_##NAME, T, 1, false)                                                                              \
    INSTANCE(rows8_##NAME, T, 1, true)                                                                                 \
    INSTANCE(rows16_##NAME, T, 2, true)                                                                                \
    INSTANCE(rows32_##NAME, T, 4, true)                                                                                \
    INSTANCE(rows64_##NAME, T, 8, true)

INSTANCE(general_f32, float, 1, false)
INSTANCE(rows4_f32, float, 1, true)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)

}
