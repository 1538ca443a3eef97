// A step of AdamW on many parameters. Every element is read and written once, and that is what the time goes to; a thread
// loads all of its quads before it computes.
#include "../common/entries.cuh"
#include "params.cuh"

namespace optimizer::update {

// Four elements as they are before a step.
template <typename G> struct Quad {
    Pack<float, QUAD> value, mean, mean_square;
    Pack<G, QUAD> gradient;
};

// The places of a block's part of a parameter. `value` is the master, or the parameter itself if that is f32.
template <typename T, typename G> struct Part {
    T *rounded;
    const G *gradient;
    float *value, *mean, *mean_square;
    int count;

    __device__ __forceinline__ Part(const Update &p, const Parameter &of) {
        const int64_t first = int64_t(static_cast<int>(blockIdx.x) - of.first_block) * UPDATE_CHUNK;
        rounded = static_cast<T *>(of.data) + first;
        gradient = static_cast<const G *>(of.gradient) + first;
        if constexpr (sizeof(T) == sizeof(float)) {
            value = rounded;
        } else {
            value = p.master + of.master + first;
        }
        mean = p.mean + of.moments + first;
        mean_square = p.mean_square + of.moments + first;
        count = static_cast<int>(min(of.count - first, int64_t(UPDATE_CHUNK)));
    }

    __device__ __forceinline__ bool is_vector() const {
        return count % QUAD == 0 && is_aligned(rounded) && is_aligned(gradient) && is_aligned(value) && is_aligned(mean) &&
               is_aligned(mean_square);
    }

    template <bool VECTOR> __device__ __forceinline__ Quad<G> load(int i) const {
        const int here = min(count - i, QUAD);
        return {load_vec<float, QUAD, VECTOR>(value + i, 1, here), load_vec<float, QUAD, VECTOR>(mean + i, 1, here),
                load_vec<float, QUAD, VECTOR>(mean_square + i, 1, here), load_vec<G, QUAD, VECTOR>(gradient + i, 1, here)};
    }

    template <bool VECTOR>
    __device__ __forceinline__ void store(int i, const float (&v)[QUAD], const float (&m)[QUAD], const float (&s)[QUAD]) {
        const int here = min(count - i, QUAD);
        store_vec<float, QUAD, VECTOR>(value + i, 1, narrow_pack<float>(v), here);
        store_vec<float, QUAD, VECTOR>(mean + i, 1, narrow_pack<float>(m), here);
        store_vec<float, QUAD, VECTOR>(mean_square + i, 1, narrow_pack<float>(s), here);
        if constexpr (sizeof(T) != sizeof(float)) store_vec<T, QUAD, VECTOR>(rounded + i, 1, narrow_pack<T>(v), here);
    }
};

template <bool VECTOR, typename T, typename G>
__device__ __forceinline__ void advance(const Update &p, const Parameter &of, const Factors &factors, Part<T, G> &part) {
    Quad<G> before[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) before[k] = part.template load<VECTOR>((k * THREADS + threadIdx.x) * QUAD);
    const float rate = static_cast<float>(of.learning_rate / factors.correction);
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
        const Quad<G> &quad = before[k];
        float value[QUAD], mean[QUAD], mean_square[QUAD];
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            const float gradient = quad.gradient[i] * factors.gradient;
            mean[i] = quad.mean[i] * p.beta1 + gradient * p.rest1;
            mean_square[i] = quad.mean_square[i] * p.beta2 + gradient * gradient * p.rest2;
            const float change = mean[i] / (sqrtf(mean_square[i]) * factors.root + p.eps) * rate;
            value[i] = quad.value[i] * of.kept - change;
        }
        part.template store<VECTOR>((k * THREADS + threadIdx.x) * QUAD, value, mean, mean_square);
    }
}

template <typename T, typename G>
__device__ __forceinline__ void advance(const Update &p, const Parameter &of, const Factors &factors) {
    Part<T, G> part(p, of);
    part.is_vector() ? advance<true>(p, of, factors, part) : advance<false>(p, of, factors, part);
}

template <typename T> __device__ __forceinline__ void advance(const Update &p, const Parameter &of, const Factors &factors) {
    of.gradient_dtype == TYPE_F32 ? advance<T, float>(p, of, factors) : advance<T, T>(p, of, factors);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) optimizer_update(const __grid_constant__ Update p) {
    const Factors factors = *p.factors;
    if (!factors.is_taken) return;
    const Parameter &of = entry_of_block(p.parameters, p.count);
    switch (of.dtype) {
    case TYPE_F16: advance<__half>(p, of, factors); break;
    case TYPE_BF16: advance<__nv_bfloat16>(p, of, factors); break;
    default: advance<float, float>(p, of, factors);
    }
}

}
