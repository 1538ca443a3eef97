// Products of few rows with a matrix, with the norm before and the convolution or the addition after it.
//
// A block gives 16 columns of the product, of up to 64 rows, or 16 for each of its warps where there are enough columns for all of the
// device's; it goes on to further ones where there are more than blocks run at a time, over rows that are staged once. With half types
// it asks for its part of the matrix before it looks at the rows, where it is recorded even before the kernel before has ended, and
// for the next part before it finishes one, so that memory is busy meanwhile.
#include "../common/compiler.cuh"
#include "../common/launch.cuh"
#include "finish.cuh"
#include "products_f32.cuh"

namespace decode::linear {

// Keeps what the convolution of a tile of few rows takes beside the products.
template <typename Rows> __device__ __forceinline__ void keep_taps(const Linear &p, const Slots &slots, const Rows &rows, int first_output, float *kept) {
    const int i = threadIdx.x, channel = first_output + i % OUTPUTS;
    if (i >= OUTPUTS * rows.count || channel >= p.d_inner) return;
    const ConvPlace place(p, slot_of(slots, rows.first + i / OUTPUTS), channel);
    if (!place.exists) return;
    with_state_type(p, [&](auto *type) {
        using St = std::remove_pointer_t<decltype(type)>;
        KeptTaps::keep(kept + i, Taps<St>(p, place, channel), static_cast<int>(p.width) - 1);
    });
}

// Asks for what the convolution of a tile reads beside the products; `NEAR`, into the first-level cache.
template <bool NEAR, typename Rows> __device__ __forceinline__ void prefetch_conv(const Linear &p, const Slots &slots, const Rows &rows, int first_output) {
    for (int i = threadIdx.x; i < OUTPUTS * rows.count; i += THREADS) {
        const int channel = first_output + i % OUTPUTS;
        if (channel >= p.d_inner) continue;
        const ConvPlace place(p, slot_of(slots, rows.first + i / OUTPUTS), channel);
        const int64_t bytes = p.state_type == TYPE_F32 ? 4 : 2;
        for (int k = 0; k + 1 < p.width && place.exists; k++) {
            prefetch<NEAR>(static_cast<const char *>(p.conv_state.data) + (place.state + k * p.conv_state.row) * bytes);
        }
        if (i >= OUTPUTS) continue;
        prefetch<NEAR>(p.conv_weight.data + channel * p.conv_weight.channel);
        if (p.conv_bias.data) prefetch<NEAR>(p.conv_bias.data + channel * p.conv_bias.channel);
    }
}

// Whether a product is multiplied by the scales of its rows.
template <typename T, typename Rows> __device__ __forceinline__ bool is_scaled(const Rows &rows) { return !SCALES_FIRST<T> && rows.norms; }

// Finishes an element. `taps`: where what its convolution takes is kept, or null.
template <typename T>
__device__ __forceinline__ void finish(const Linear &p, const Slots &slots, int64_t row, int64_t out, float sum, const float *taps,
                                       float before) {
    const auto conv = [&](float newest) { return convolve_as(p, slots, row, out, newest, taps); };
    write_as(p.out, row * p.out_features + out, p.out_type, finished<T>(p, out, sum, before, conv));
}

// Adds the sums that warps have left of a tile, one or all of them, and finishes its columns from `first_output` on, by these threads of
// as many. The rows' scales have been kept, if the product is multiplied by them.
template <typename T, int ROWS, typename Rows>
__device__ __forceinline__ void finish_tile(const Linear &p, const Slots &slots, const float *partials, bool is_one, const Squares<ROWS> &squares,
                                            const Rows &rows, int first_output, int thread, int threads) {
#pragma unroll 1
    for (int i = thread; i < OUTPUTS * rows.count; i += threads) {
        const int row = i / OUTPUTS, output = i % OUTPUTS, out = first_output + output;
        if (out >= static_cast<int>(p.out_features)) continue;
        const float *of = partials + row * PARTIAL_STRIDE + output;
        float sum = is_one ? *of : sum_of_warps(of, ROWS);
        if (is_scaled<T>(rows)) sum *= squares.kept_scale(row);
        const int64_t at = rows.first + row;
        finish<T>(p, slots, at, out, sum, nullptr, p.flags & FLAG_ACCUMULATE ? read_as(p.out, at * p.out_features + out, p.out_type) : 0.0f);
    }
}

// How a block's warps divide its work.
struct Division {
    int warp;
    // Each warp has columns of its own.
    bool is_own;

    __device__ __forceinline__ explicit Division(const Linear &p) : warp(threadIdx.x / 32), is_own(p.flags & FLAG_OWN_COLUMNS) {}

    __device__ __forceinline__ int outputs() const { return is_own ? WARPS * OUTPUTS : OUTPUTS; }
    __device__ __forceinline__ int first_output() const { return is_own ? warp * OUTPUTS : 0; }
    // Waits for the warps whose rows this one multiplies or overwrites: of several slices shares are not the same.
    __device__ __forceinline__ void wait(bool has_slices) const {
        if (is_own || has_slices) {
            __syncthreads();
        } else {
            __syncwarp();
        }
    }
};

// Has the warps go through the rows of a slice: each takes what it multiplies or, where all multiply all, a part.
template <Step STEP, typename Products, typename Rows, int ROWS>
__device__ __forceinline__ void go_through(const Products &products, const Rows &rows, const Squares<ROWS> &squares, const Linear &p,
                                           const Division &division, int begin, int features, const Share &share) {
    const int first = division.is_own ? division.warp : share.first, step = division.is_own ? WARPS : 1;
    products.template go_through<STEP>(rows, squares, p, begin, features, first, step, share.last);
}

template <typename T, typename X, int TILES, bool WHOLE>
__device__ __forceinline__ void run_on(const LinearCall &call, unsigned char *memory) {
    const Linear &p = call.linear;
    const Slots &slots = call.slots;
    using Products = Products<T, TILES, WHOLE>;
    constexpr int ROWS = Products::ROWS, FEATURES = Products::FEATURES;
    const Division division(p);
    const BlockRows<X, ROWS, WHOLE> rows(p);
    const Squares<ROWS> squares = {reinterpret_cast<float *>(memory + p.squares)};
    float *partials = reinterpret_cast<float *>(memory + p.partials), *own = partials + division.warp * (ROWS * PARTIAL_STRIDE);
    const int all = static_cast<int>(p.features), slice = static_cast<int>(p.slice), step = gridDim.x * division.outputs();
    const auto share_of = [&](int begin) { return Share(min(all - begin, slice), FEATURES, division.warp, division.is_own); };
    const Share first_share = share_of(0);
    Products products(memory);
    int block = blockIdx.x * division.outputs(), output = block + division.first_output();
    // The block's rows are multiplied once, and each thread finishes one element at most.
    constexpr bool CAN_BE_DIRECT = TILES == 1 && WHOLE && sizeof(T) < sizeof(float);
    const bool is_direct = CAN_BE_DIRECT && p.flags & FLAG_DIRECT && (std::is_same_v<X, T> ? !rows.norms : !(SCALES_FIRST<T> && rows.norms));
    // After the squares: what the convolution takes and, of rows that are wider than the matrix, the norm's weights.
    float *const taps = squares.of + ROWS * WARPS, *const weights = taps + (p.flags & FLAG_CONV ? 2 * p.width * KeptTaps::APART : 0);
    // The matrix is read before other kernels have ended, the norm's weights, and what the convolution takes.
    typename Products::Part part;
    products.ask(part, p, output, 0, min(all, slice), first_share);
    products.prefetch_rest(part);
    if constexpr (CAN_BE_DIRECT && !std::is_same_v<X, T>) {
        if (is_direct) rows.keep_weights(weights, all, first_share);
    }
    if (p.flags & FLAG_CONV) {
        if (is_direct) {
            keep_taps(p, slots, rows, block, taps);
        } else {
            prefetch_conv<false>(p, slots, rows, block);
        }
    }
    wait_for_last();
    if constexpr (CAN_BE_DIRECT) {
        if (is_direct) {
            const auto finishes = [&](int thread) {
                return thread / OUTPUTS < rows.count && output + thread % OUTPUTS < static_cast<int>(p.out_features);
            };
            // What is added to is asked for before the products.
            float before = 0.0f;
            if (p.flags & FLAG_ACCUMULATE && finishes(threadIdx.x)) {
                const int64_t row = rows.first + threadIdx.x / OUTPUTS;
                before = read_as(p.out, row * p.out_features + output + threadIdx.x % OUTPUTS, p.out_type);
            }
            products.clear();
            products.template add_directly<true>(part, rows, squares, p, all, first_share, weights);
            products.leave(own);
            __syncthreads();
            const int thread = reload_tid();
            if (!finishes(thread)) return;
            const int row = thread / OUTPUTS, column = thread % OUTPUTS;
            float sum = sum_of_warps(partials + row * PARTIAL_STRIDE + column, ROWS);
            if (is_scaled<T>(rows)) sum *= squares.scale(p, row);
            finish<T>(p, slots, rows.first + row, output + column, sum, taps + thread, before);
            return;
        }
    }
    if (SCALES_FIRST<T> && rows.norms) {
        for (int begin = 0; begin < all; begin += slice) {
            go_through<Step::SQUARES>(products, rows, squares, p, division, begin, min(all - begin, slice), share_of(begin));
        }
        __syncthreads();
    }
    bool is_staged = false, are_scales_kept = !is_scaled<T>(rows);
    // Of all rows, once all warps have left their sums.
    const auto keep_scales = [&] {
        if (!are_scales_kept && threadIdx.x < rows.count) squares.keep_scale(p, threadIdx.x);
        are_scales_kept = true;
    };
#pragma unroll 1
    for (; block < static_cast<int>(p.out_features); block += step, output += step) {
        products.clear();
        if (p.flags & FLAG_CONV && block < p.d_inner) prefetch_conv<true>(p, slots, rows, block);
#pragma unroll 1
        for (int begin = 0; begin < all; begin += slice) {
            const int features = min(all - begin, slice);
            const Share share = share_of(begin);
            if (begin > 0) products.ask(part, p, output, begin, features, share);
            // Rows of one slice stay where they are for all tiles.
            if (!is_staged || slice < all) {
                constexpr Step STEP = SCALES_FIRST<T> ? Step::STAGE : Step::BOTH;
                division.wait(slice < all);
                go_through<STEP>(products, rows, squares, p, division, begin, features, share);
                division.wait(slice < all);
                is_staged = true;
                // Sums of squares are where the scales have been, if these have been kept.
                are_scales_kept = !is_scaled<T>(rows);
            }
            if constexpr (sizeof(T) < sizeof(float)) {
                products.add(part, p, features, share);
            } else {
                products.add(part, rows, p, share);
            }
        }
        if (block + step < static_cast<int>(p.out_features)) products.ask(part, p, output + step, 0, min(all, slice), first_share);
        if (division.is_own) {
            if (!are_scales_kept) {
                keep_scales();
                __syncthreads();
            }
            products.leave(own);
            __syncwarp();
            finish_tile<T>(p, slots, own, true, squares, rows, output, threadIdx.x % 32, 32);
            __syncwarp();
            continue;
        }
        // The sums may lie where the rows do, which then are read no more, and those of the tile before have been read.
        __syncthreads();
        keep_scales();
        products.leave(own);
        __syncthreads();
        finish_tile<T>(p, slots, partials, false, squares, rows, output, threadIdx.x, THREADS);
    }
}

template <typename T, int TILES, bool WHOLE> __device__ __forceinline__ void run(const LinearCall &call) {
    extern __shared__ __align__(16) unsigned char memory[];
    begin_next();
    if (sizeof(T) < sizeof(float) && call.linear.x_type != TYPE_F32) {
        run_on<T, T, TILES, WHOLE>(call, memory);
    } else {
        run_on<T, float, TILES, WHOLE>(call, memory);
    }
}

// Blocks to a processor, as the host divides the columns: two of few rows, by their registers.
#define INSTANCE(NAME, T, TILES, WHOLE, BLOCKS)                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) decode_linear_##NAME(const __grid_constant__ LinearCall params) { \
        run<T, TILES, WHOLE>(params);                                                                                  \
    }

#define INSTANCES(NAME, T)                                                                                             \
    INSTANCE(general_##NAME, T, 1, false, 1)                                                                           \
    INSTANCE(rows8_##NAME, T, 1, true, 2)                                                                              \
    INSTANCE(rows16_##NAME, T, 2, true, 2)                                                                             \
    INSTANCE(rows32_##NAME, T, 4, true, 2)                                                                             \
    INSTANCE(rows64_##NAME, T, 8, true, 1)

INSTANCE(general_f32, float, 1, false, 1)
INSTANCE(rows4_f32, float, 1, true, 1)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)

}
