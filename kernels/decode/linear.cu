// Products of few rows with a matrix, with the norm before and the convolution or the addition after it.
//
// A block gives 16 columns of the product, of up to 64 rows, or goes from 16 to 16 where there are more than the device runs blocks of
// at a time: it stages the rows once. With half types it asks for its part of the matrix before it looks at the rows, where it is
// recorded even before the kernel before has ended, and for the next part before it finishes one, so that memory is busy meanwhile.
#include <type_traits>

#include "../common/launch.cuh"
#include "../common/math.cuh"
#include "products.cuh"
#include "typed.cuh"

namespace decode::linear {

// The rows of the block, as they lie.
template <typename X, int ROWS> struct BlockRows {
    int64_t first;
    int count;
    const X *data;
    // Distances of rows and features, and whether four neighbouring features can be read at once.
    int64_t row, column;
    bool whole;

    __device__ __forceinline__ explicit BlockRows(const Linear &p)
        : first(int64_t(blockIdx.y) * ROWS), count(static_cast<int>(min(p.rows - first, int64_t(ROWS)))), row(p.x.row),
          column(p.x.column) {
        data = static_cast<const X *>(p.x.data) + first * row;
        whole = column == 1 && row % QUAD == 0 && reinterpret_cast<uint64_t>(data) % (QUAD * sizeof(X)) == 0;
    }

    // Four elements of a row from feature `k` on, of which `exist` there are; zeros beyond, and of rows that there are not.
    __device__ __forceinline__ Pack<X, QUAD> read(int i, int64_t k, int exist) const {
        if (i >= count) return {};
        return load_vec_if<QUAD, false>(data + i * row + k * column, column, exist, whole && exist == QUAD);
    }
};

// The squares that each warp has summed up of each row, for the norm.
template <int ROWS> struct Squares {
    float *of;

    // Adds what the lanes have summed up of eight rows (of four, if there are no more), or begins with it. Lane 4i leaves row i.
    template <int COUNT> __device__ __forceinline__ void add(float (&sums)[COUNT], int first_row, bool begins) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int half = COUNT / 2, apart = 16; half > 0; half /= 2, apart /= 2) {
            const bool upper = lane & apart;
#pragma unroll
            for (int i = 0; i < half; i++) {
                const float given = upper ? sums[i] : sums[i + half], kept = upper ? sums[i + half] : sums[i];
                sums[i] = kept + __shfl_xor_sync(0xffffffffu, given, apart);
            }
        }
#pragma unroll
        for (int apart = 16 / COUNT; apart > 0; apart /= 2) sums[0] += __shfl_xor_sync(0xffffffffu, sums[0], apart);
        if (lane % (32 / COUNT) > 0) return;
        float &to = of[(first_row + lane / (32 / COUNT)) * WARPS + threadIdx.x / 32];
        to = begins ? sums[0] : to + sums[0];
    }

    // What a row is multiplied by to norm it.
    __device__ __forceinline__ float scale(const Linear &p, int row) const {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += of[row * WARPS + warp];
        return 1.0f / sqrtf(sum / p.count + p.eps);
    }
};

// Rows are multiplied by the norm's weight when they are staged, and the product by the norm's scale, so that they are read once. What
// is then staged is as large as the residual stream, for which f16 has no room: of it the scale is found first.
template <typename T> constexpr bool SCALES_FIRST = sizeof(T) == 2 && !std::is_same_v<T, __nv_bfloat16>;

// What is done with the rows: with `Step::SQUARES` their squares are summed up, with `Step::STAGE` they are staged.
enum class Step { SQUARES, STAGE, BOTH };

// Goes through `features` features from `begin` on of the block's rows. They are staged rounded to T, with zeros up to whole chunks
// and for rows that there are not. A thread takes the same features of all rows, whatever their number.
template <Step STEP, typename T, typename X, int ROWS, int FEATURES>
__device__ __forceinline__ void go_through(T *staged, const Squares<ROWS> &squares, const Linear &p, int64_t begin, int features,
                                           const BlockRows<X, ROWS> &rows) {
    constexpr int TOGETHER = ROWS < TILE_ROWS ? ROWS : TILE_ROWS;
    const int end = (features + FEATURES - 1) / FEATURES * FEATURES, stride = static_cast<int>(p.stride);
    const Vector &weight = p.norm_weight;
    const bool norms = p.flags & FLAG_NORM, weighs = norms && weight.data;
    const bool whole = weight.channel == 1 && reinterpret_cast<uint64_t>(weight.data) % sizeof(float4) == 0;
#pragma unroll 1
    for (int first = 0; first < (STEP == Step::SQUARES ? rows.count : ROWS); first += TOGETHER) {
        float sums[TOGETHER] = {}, scale[TOGETHER];
        if (STEP == Step::STAGE && norms) {
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) scale[i] = squares.scale(p, first + i);
        }
#pragma unroll 1
        for (int k = threadIdx.x * QUAD; k < end; k += THREADS * QUAD) {
            const int exist = max(0, min(features - k, QUAD));
            Pack<float, QUAD> by = {};
            if (weighs) {
                const float *at = weight.data + (begin + k) * weight.channel;
                by = load_vec_if<QUAD, false>(at, weight.channel, exist, whole && exist == QUAD);
            }
            Pack<X, QUAD> x[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) x[i] = rows.read(first + i, begin + k, exist);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                float value[QUAD];
#pragma unroll
                for (int j = 0; j < QUAD; j++) {
                    value[j] = x[i][j];
                    if (STEP != Step::STAGE) sums[i] = fmaf(value[j], value[j], sums[i]);
                    // What does not exist is zero, and not what a norm of nothing makes of it.
                    if (STEP == Step::STAGE && norms) value[j] = first + i < rows.count && j < exist ? value[j] * scale[i] : 0.0f;
                    if (weighs) value[j] *= by[j];
                }
                if (STEP != Step::SQUARES) store_narrowed<T, true>(staged + (first + i) * stride + k, value, QUAD);
            }
        }
        if (STEP != Step::STAGE && norms) squares.add(sums, first, begin == 0);
    }
}

// Where a row's states of a channel of the convolution begin; null for padding.
struct ConvPlace {
    int64_t state;
    bool exists;
    __device__ __forceinline__ ConvPlace(const Linear &p, int64_t row, int64_t channel) {
        const int64_t slot = slot_of(p.slots, row);
        exists = slot >= 0;
        state = slot * p.conv_state.slot + channel * p.conv_state.column;
    }
};

// A step of the convolution of one channel of one row, in place.
template <typename T> __device__ __forceinline__ float convolve(const Linear &p, int64_t row, int64_t channel, float newest) {
    const ConvPlace place(p, row, channel);
    if (!place.exists) return 0.0f;
    const int before = static_cast<int>(p.width) - 1;
    const float *weight = p.conv_weight.data + channel * p.conv_weight.channel;
    // All are asked for before the first is used or overwritten.
    float x[MAX_WIDTH - 1], w[MAX_WIDTH - 1];
#pragma unroll
    for (int k = 0; k < MAX_WIDTH - 1; k++) {
        if (k >= before) break;
        x[k] = read_as(p.conv_state.data, place.state + k * p.conv_state.row, p.state_type);
        w[k] = weight[k * p.conv_weight.state];
    }
    const float last = weight[before * p.conv_weight.state];
    float sum = element_or(p.conv_bias, channel, 0.0f);
#pragma unroll
    for (int k = 0; k < MAX_WIDTH - 1; k++) {
        if (k >= before) break;
        sum = fmaf(w[k], x[k], sum);
        if (k > 0) write_as(p.conv_state.data, place.state + (k - 1) * p.conv_state.row, p.state_type, x[k]);
    }
    write_as(p.conv_state.data, place.state + (before - 1) * p.conv_state.row, p.state_type, newest);
    return silu(fmaf(last, newest, sum));
}

// Asks for what the convolution of the first tile reads beside the products.
template <typename X, int ROWS>
__device__ __forceinline__ void prefetch_conv(const Linear &p, const BlockRows<X, ROWS> &rows, int64_t first_output) {
    for (int i = threadIdx.x; i < OUTPUTS * rows.count; i += THREADS) {
        const int64_t channel = first_output + i % OUTPUTS;
        if (channel >= p.d_inner) continue;
        const ConvPlace place(p, rows.first + i / OUTPUTS, channel);
        const int64_t bytes = p.state_type == TYPE_F32 ? 4 : 2;
        for (int k = 0; k + 1 < p.width && place.exists; k++) {
            prefetch(static_cast<const char *>(p.conv_state.data) + (place.state + k * p.conv_state.row) * bytes);
        }
        if (i >= OUTPUTS) continue;
        prefetch(p.conv_weight.data + channel * p.conv_weight.channel);
        if (p.conv_bias.data) prefetch(p.conv_bias.data + channel * p.conv_bias.channel);
    }
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
template <typename T, typename X, int ROWS>
__device__ __forceinline__ void finish_tile(const Linear &p, const float *partials, const Squares<ROWS> &squares,
                                            const BlockRows<X, ROWS> &rows, int64_t first_output) {
    constexpr int PARTIALS = ROWS * PARTIAL_STRIDE;
    for (int i = threadIdx.x; i < OUTPUTS * rows.count; i += THREADS) {
        const int row = i / OUTPUTS, output = i % OUTPUTS;
        if (first_output + output >= p.out_features) continue;
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += partials[warp * PARTIALS + row * PARTIAL_STRIDE + output];
        if (!SCALES_FIRST<T> && p.flags & FLAG_NORM) sum *= squares.scale(p, row);
        finish<T>(p, rows.first + row, first_output + output, sum);
    }
}

// Sums up the squares of all of the block's rows.
template <typename T, typename X, int ROWS, int FEATURES>
__device__ __forceinline__ void sum_squares(const Squares<ROWS> &squares, const Linear &p, const BlockRows<X, ROWS> &rows) {
    for (int64_t begin = 0; begin < p.features; begin += p.slice) {
        const int features = static_cast<int>(min(p.features - begin, p.slice));
        go_through<Step::SQUARES, T, X, ROWS, FEATURES>(nullptr, squares, p, begin, features, rows);
    }
    __syncthreads();
}

template <typename T, typename X, int TILES, bool WHOLE>
__device__ __forceinline__ void run_on(const Linear &p, T *staged, float *partials, float *of_squares) {
    using Products = Products<T, TILES, WHOLE>;
    constexpr int ROWS = Products::ROWS, FEATURES = Products::FEATURES;
    begin_next();
    Products products;
    const BlockRows<X, ROWS> rows(p);
    const Squares<ROWS> squares = {of_squares};
    const int warp = threadIdx.x / 32;
    const int64_t step = int64_t(gridDim.x) * OUTPUTS;
    const int first_features = static_cast<int>(min(p.features, p.slice));
    const Share first_share(first_features, FEATURES, warp);
    int64_t output = int64_t(blockIdx.x) * OUTPUTS;
    // The matrix is all that is read before other kernels have ended.
    typename Products::Part part;
    products.ask(part, p, output, 0, first_features, first_share);
    if (p.flags & FLAG_CONV) prefetch_conv(p, rows, output);
    wait_for_last();
    if (SCALES_FIRST<T> && p.flags & FLAG_NORM) sum_squares<T, X, ROWS, FEATURES>(squares, p, rows);
    bool is_staged = false;
#pragma unroll 1
    for (; output < p.out_features; output += step) {
        products.clear();
#pragma unroll 1
        for (int64_t begin = 0; begin < p.features; begin += p.slice) {
            const int features = static_cast<int>(min(p.features - begin, p.slice));
            const Share share(features, FEATURES, warp);
            if (begin > 0) products.ask(part, p, output, begin, features, share);
            // Rows of one slice stay where they are for all tiles.
            if (!is_staged || p.slice < p.features) {
                constexpr Step STEP = SCALES_FIRST<T> ? Step::STAGE : Step::BOTH;
                __syncthreads();
                go_through<STEP, T, X, ROWS, FEATURES>(staged, squares, p, begin, features, rows);
                __syncthreads();
                is_staged = true;
            }
            products.add(part, staged, p, share);
        }
        if (output + step < p.out_features) products.ask(part, p, output + step, 0, first_features, first_share);
        // The sums may lie where the rows do, which then are read no more, and those of the tile before have been read.
        __syncthreads();
        products.leave(partials + warp * (ROWS * PARTIAL_STRIDE));
        __syncthreads();
        finish_tile<T>(p, partials, squares, rows, output);
    }
}

template <typename T, int TILES, bool WHOLE> __device__ __forceinline__ void run(const Linear &p) {
    extern __shared__ __align__(16) unsigned char memory[];
    T *staged = reinterpret_cast<T *>(memory);
    float *partials = reinterpret_cast<float *>(memory + p.partials), *squares = reinterpret_cast<float *>(memory + p.squares);
    if (sizeof(T) < sizeof(float) && p.x_type != TYPE_F32) {
        run_on<T, T, TILES, WHOLE>(p, staged, partials, squares);
    } else {
        run_on<T, float, TILES, WHOLE>(p, staged, partials, squares);
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
