// Cross entropy with a target for each row of logits, and its gradient in place of the logits. A block takes a row: it reads it
// once for the greatest logit and the sum of exponentials beside it, and once more, from the second-level cache, to write the
// gradient. Sums are taken in an order that follows from the vocabulary's size alone.
#include "../common/math.cuh"
#include "params.cuh"
#include <float.h>

namespace loss {

constexpr int WARP = 32;
// Elements in 16 bytes.
template <typename T> constexpr int WIDTH = 16 / sizeof(T);

template <typename T> __device__ __forceinline__ void load(const T *from, float (&x)[WIDTH<T>]) {
    const uint4 raw = *reinterpret_cast<const uint4 *>(from);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (sizeof(T) == 4) {
            x[i] = __uint_as_float(words[i]);
        } else {
            x[2 * i] = low(words[i], T()), x[2 * i + 1] = high(words[i], T());
        }
    }
}

template <typename T> __device__ __forceinline__ void store(T *to, const float (&x)[WIDTH<T>]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (sizeof(T) == 4) {
            words[i] = __float_as_uint(x[i]);
        } else {
            words[i] = narrow_pair(x[2 * i], x[2 * i + 1], T());
        }
    }
    *reinterpret_cast<uint4 *>(to) = {words[0], words[1], words[2], words[3]};
}

// Which thread takes what of a row: vectors that start at multiples of 16 bytes are dealt out in turn, and the elements before
// the first and after the last of them, fewer than a vector on either side, go to the first threads.
//
//     element   0 .. lead | vector 0 | vector 1 | … | vectors - 1 | the rest
//     thread    0 .. lead |    0     |    1     | … |             | lead ..
template <typename T> struct RowMap {
    int lead, vectors, singles;

    __device__ __forceinline__ RowMap(const T *row, int vocab) {
        const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T)) & (WIDTH<T> - 1);
        lead = min((WIDTH<T> - past) & (WIDTH<T> - 1), vocab);
        vectors = (vocab - lead) / WIDTH<T>;
        singles = vocab - vectors * WIDTH<T>;
    }

    // The first element of a vector.
    __device__ __forceinline__ int vector(int i) const { return lead + i * WIDTH<T>; }
    // An element that is in no vector.
    __device__ __forceinline__ int single(int i) const { return i < lead ? i : i + vectors * WIDTH<T>; }
};

__device__ __forceinline__ float exponential(float x) { return exp2_fast(x * LOG2_E); }

// What is known of some of a row's logits.
struct Partial {
    // At least the greatest of them, and finite where they are, so that it can be subtracted from what is infinitely small.
    float most;
    // The sum of their exponentials beside that of `most`.
    float sum;
    // Their own sum.
    float logits;

    template <int COUNT> __device__ __forceinline__ void add(const float (&x)[COUNT]) {
        float greatest = x[0];
#pragma unroll
        for (int i = 1; i < COUNT; i++) greatest = fmaxf(greatest, x[i]);
        if (greatest > most) {
            sum *= exponential(most - greatest);
            most = greatest;
        }
        float part = 0;
#pragma unroll
        for (int i = 0; i < COUNT; i++) part += exponential(x[i] - most);
        sum += part;
    }

    __device__ __forceinline__ void join(const Partial &other) {
        const float greatest = fmaxf(most, other.most);
        sum = sum * exponential(most - greatest) + other.sum * exponential(other.most - greatest);
        logits += other.logits;
        most = greatest;
    }

    // The same of all threads of a warp, in each of them.
    __device__ __forceinline__ void add_warp() {
#pragma unroll
        for (int distance = WARP / 2; distance > 0; distance /= 2) {
            join({__shfl_xor_sync(~0u, most, distance), __shfl_xor_sync(~0u, sum, distance),
                  __shfl_xor_sync(~0u, logits, distance)});
        }
    }
};

// The same of all threads of a block, in each of them.
__device__ __forceinline__ Partial of_block(Partial own, Partial (&partials)[WARP]) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    own.add_warp();
    // What the row before has left here is read by all.
    __syncthreads();
    if (lane == 0) partials[warp] = own;
    __syncthreads();
    Partial all = {-FLT_MAX, 0, 0};
    if (lane < warps) all = partials[lane];
    all.add_warp();
    return all;
}

// Reads what a thread has of a row. The target is left out of the exponentials: what it has beside the others decides a loss
// near zero, and would be lost in a sum with it.
template <typename T>
__device__ __forceinline__ Partial read_row(const T *row, const RowMap<T> &map, uint32_t target, float right, bool with_sum) {
    Partial partial = {fmaxf(right, -FLT_MAX), 0, 0};
    if (threadIdx.x < map.singles) {
        const int at = map.single(threadIdx.x);
        float x[1] = {widen(row[at])};
        partial.logits = x[0];
        if (at == target) x[0] = -INFINITY;
        partial.add(x);
    }
    for (int i = threadIdx.x; i < map.vectors; i += blockDim.x) {
        const int first = map.vector(i);
        float x[WIDTH<T>];
        load(row + first, x);
        if (with_sum) {
            float part = 0;
#pragma unroll
            for (int k = 0; k < WIDTH<T>; k++) part += x[k];
            partial.logits += part;
        }
        if (const uint32_t at = target - first; at < WIDTH<T>) {
#pragma unroll
            for (int k = 0; k < WIDTH<T>; k++) {
                if (k == at) x[k] = -INFINITY;
            }
        }
        partial.add(x);
    }
    return partial;
}

// d/dx_v = factor e^(x_v - most) - offset, and `of_target` for the target.
struct Gradient {
    float most, factor, offset, of_target;

    __device__ __forceinline__ float of(float x) const { return fmaf(exponential(x - most), factor, -offset); }
};

template <typename T>
__device__ __forceinline__ void write_gradient(T *row, const RowMap<T> &map, uint32_t target, const Gradient &gradient) {
    if (threadIdx.x < map.singles) {
        const int at = map.single(threadIdx.x);
        row[at] = narrow<T>(at == target ? gradient.of_target : gradient.of(widen(row[at])));
    }
    for (int i = threadIdx.x; i < map.vectors; i += blockDim.x) {
        const int first = map.vector(i);
        float x[WIDTH<T>];
        load(row + first, x);
#pragma unroll
        for (int k = 0; k < WIDTH<T>; k++) x[k] = gradient.of(x[k]);
        if (const uint32_t at = target - first; at < WIDTH<T>) {
#pragma unroll
            for (int k = 0; k < WIDTH<T>; k++) {
                if (k == at) x[k] = gradient.of_target;
            }
        }
        store(row + first, x);
    }
}

// A row whose target is none of the vocabulary: it is left out, or its loss is not a number.
template <typename T>
__device__ __forceinline__ void fill_row(const CrossEntropy &p, T *row, const RowMap<T> &map, int64_t index, float value) {
    if (threadIdx.x == 0) p.losses[index] = value;
    if (!p.with_gradient) return;
    if (threadIdx.x < map.singles) row[map.single(threadIdx.x)] = narrow<T>(value);
    float x[WIDTH<T>];
#pragma unroll
    for (int k = 0; k < WIDTH<T>; k++) x[k] = value;
    for (int i = threadIdx.x; i < map.vectors; i += blockDim.x) store(row + map.vector(i), x);
}

template <typename T> __device__ __forceinline__ void cross_entropy(const CrossEntropy &p) {
    __shared__ Partial partials[WARP];
    const int vocab = static_cast<int>(p.vocab);
    const float smoothing = p.label_smoothing, each = smoothing / vocab;
    for (int64_t index = blockIdx.x; index < p.rows; index += gridDim.x) {
        T *row = static_cast<T *>(p.logits) + index * p.stride;
        const RowMap<T> map(row, vocab);
        const uint32_t target = p.targets[index];
        if (target >= vocab) {
            fill_row(p, row, map, index, target == IGNORED ? 0.0f : NAN);
            continue;
        }
        // All threads have read it before any writes a gradient, for `of_block` waits for all.
        const float right = widen(row[target]);
        const Partial all = of_block(read_row(row, map, target, right, smoothing != 0), partials);

        const float of_target = exponential(right - all.most), total = all.sum + of_target;
        const float log_total = logf(total), log_sum = all.most + log_total;
        if (threadIdx.x == 0) {
            // log(total) of a total near 1 would lose what it is above 1.
            const float likelihood = right == all.most ? log1pf(all.sum) : log_total + (all.most - right);
            float loss = (1 - smoothing) * likelihood;
            if (smoothing != 0) loss += smoothing * (log_sum - all.logits / vocab);
            if (p.z_loss != 0) loss += p.z_loss * log_sum * log_sum;
            p.losses[index] = loss;
        }
        if (!p.with_gradient) continue;
        const float pull = 2 * p.z_loss * log_sum, inverse = 1 / total;
        Gradient gradient;
        gradient.most = all.most;
        gradient.factor = p.scale * (1 + pull) * inverse;
        gradient.offset = p.scale * each;
        // Where the target has most of the softmax, softmax - 1 is what all others have together.
        const float share = of_target * inverse;
        const float rest = share > 0.5f ? fmaf(-all.sum, inverse, smoothing) : share - (1 - smoothing);
        gradient.of_target = p.scale * fmaf(share, pull, rest - each);
        write_gradient(row, map, target, gradient);
    }
}

#define INSTANCE(SUFFIX, T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        loss_cross_entropy_##SUFFIX(const __grid_constant__ CrossEntropy params) {                                     \
        cross_entropy<T>(params);                                                                                      \
    }

INSTANCE(f32, float)
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)

}
