// What becomes of an element of a product: its bias, its step of a convolution, and what it is added to.
#pragma once
#include "../common/async.cuh"
#include "../common/math.cuh"
#include "../common/tensor.cuh"
#include "typed.cuh"

namespace decode::linear {

// Where a row's states of a channel of the convolution begin; there are none of padding.
struct ConvPlace {
    int64_t state = 0;
    bool exists = false;
    ConvPlace() = default;
    __device__ __forceinline__ ConvPlace(const Linear &p, int64_t slot, int64_t channel) {
        exists = slot >= 0;
        state = slot * p.conv_state.slot + channel * p.conv_state.column;
    }
};

// What the convolution of an element takes beside the newest input, where it lies.
template <typename St> struct Taps {
    const Linear &p;
    const float *weights;
    int64_t channel;
    St *states;

    __device__ __forceinline__ Taps(const Linear &p, const ConvPlace &place, int64_t channel)
        : p(p), weights(p.conv_weight.data + channel * p.conv_weight.channel), channel(channel),
          states(static_cast<St *>(p.conv_state.data) + place.state) {}
    __device__ __forceinline__ float state(int k) const { return widen(states[k * p.conv_state.row]); }
    __device__ __forceinline__ float weight(int k) const { return __ldg(weights + k * p.conv_weight.state); }
    __device__ __forceinline__ float bias() const { return element_or(p.conv_bias, channel, 0.0f); }
};

// The same once it has been kept in shared memory.
struct KeptTaps {
    // Elements lie apart by as many as are kept at a time.
    static constexpr int APART = OUTPUTS * TILE_ROWS;
    const float *at;
    int before;

    __device__ __forceinline__ float state(int k) const { return at[k * APART]; }
    __device__ __forceinline__ float weight(int k) const { return at[(before + k) * APART]; }
    __device__ __forceinline__ float bias() const { return at[(2 * before + 1) * APART]; }

    template <typename From> __device__ __forceinline__ static void keep(float *to, const From &from, int before) {
        // All are asked for before the first is waited for.
        float states[MAX_WIDTH - 1], weights[MAX_WIDTH];
        const float bias = from.bias();
#pragma unroll
        for (int k = 0; k < MAX_WIDTH; k++) {
            if (k < before) states[k < MAX_WIDTH - 1 ? k : 0] = from.state(k);
            if (k <= before) weights[k] = from.weight(k);
        }
#pragma unroll
        for (int k = 0; k < MAX_WIDTH; k++) {
            if (k < before) to[k * APART] = states[k < MAX_WIDTH - 1 ? k : 0];
            if (k <= before) to[(before + k) * APART] = weights[k];
        }
        to[(2 * before + 1) * APART] = bias;
    }
};

// A step of the convolution of one channel of one row, in place, of states of type St.
template <typename St, typename From>
__device__ __forceinline__ float convolve(const Linear &p, const ConvPlace &place, const From &taps, float newest) {
    const int before = static_cast<int>(p.width) - 1;
    St *state = static_cast<St *>(p.conv_state.data) + place.state;
    // All are asked for before the first is overwritten.
    float x[MAX_WIDTH - 1];
#pragma unroll
    for (int k = 0; k < MAX_WIDTH - 1; k++) {
        if (k >= before) break;
        x[k] = taps.state(k);
    }
    float sum = taps.bias();
#pragma unroll
    for (int k = 0; k < MAX_WIDTH - 1; k++) {
        if (k >= before) break;
        sum = fmaf(taps.weight(k), x[k], sum);
        if (k > 0) state[(k - 1) * p.conv_state.row] = narrow<St>(x[k]);
    }
    state[(before - 1) * p.conv_state.row] = narrow<St>(newest);
    return silu(fmaf(taps.weight(before), newest, sum));
}

// Calls `visit` with a null pointer to the type of the convolution's states.
template <typename Visit> __device__ __forceinline__ void with_state_type(const Linear &p, const Visit &visit) {
    if (p.state_type == TYPE_F32) {
        visit(static_cast<float *>(nullptr));
    } else if (p.state_type == TYPE_F16) {
        visit(static_cast<__half *>(nullptr));
    } else {
        visit(static_cast<__nv_bfloat16 *>(nullptr));
    }
}

// The same of an element of the product. `kept`: where what it takes is kept, or null.
__device__ __forceinline__ float convolve_as(const Linear &p, const Slots &slots, int64_t row, int64_t channel, float newest,
                                             const float *kept) {
    const ConvPlace place(p, slot_of(slots, row), channel);
    float out = 0.0f;
    if (!place.exists) return out;
    with_state_type(p, [&](auto *type) {
        using St = std::remove_pointer_t<decltype(type)>;
        const int before = static_cast<int>(p.width) - 1;
        out = kept ? convolve<St>(p, place, KeptTaps{kept, before}, newest)
                   : convolve<St>(p, place, Taps<St>(p, place, channel), newest);
    });
    return out;
}

// What becomes of an element of the product. `before`: what it is added to, if it is; `conv` makes of the newest input the convolution's
// output.
template <typename T, typename Conv>
__device__ __forceinline__ float finished(const Linear &p, int64_t out, float sum, float before, const Conv &conv) {
    sum += element_or(p.bias, out, 0.0f);
    if (p.flags & FLAG_CONV) {
        sum = rounded<T>(sum);
        if (out < p.d_inner) sum = conv(sum);
    }
    return p.flags & FLAG_ACCUMULATE ? sum + before : sum;
}

}
