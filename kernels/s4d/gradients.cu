// From the slopes by K, G, H and the powers to those by S4D's parameters, in f64. A block has the pairs of a channel.
#include "number.cuh"

namespace s4d::gradients {

// The sum of what each row of blocks has at `at`, in order.
template <typename E> __device__ __forceinline__ double sum_rows(const E *at, int64_t rows, int64_t stride) {
    double sum = 0;
    for (int64_t row = 0; row < rows; row++) sum += at[row * stride];
    return sum;
}

// The slopes by A̅, B̅ and C.
struct Slopes {
    Number<double> power = {0, 0}, enter = {0, 0}, read = {0, 0};

    __device__ __forceinline__ Slopes(const Gradients &params, const Pair &of, const double *of_kernel, int64_t channel, int64_t pair) {
        const Inputs &p = params.sums.inputs;
        const int64_t stride = p.d_inner * p.padded, at = channel * p.padded + pair;
        const auto sum = [&](int i) { return sum_rows(params.sums.of_pairs + at * 8 + i, params.rows, stride * 8); };
        const Number<double> entering = of.weight * of.b, of_chunk = {sum(0), sum(1)};
        power = {sum(2), sum(3)}, enter = {sum(4), sum(5)}, read = {sum(6), sum(7)};
        // A̅^k, and k A̅^{k-1}.
        Number<double> now = {1, 0}, slope = {0, 0};
        for (int k = 0; k < CHUNK; k++) {
            const auto number = [&](const float *sums, int i, double sign) {
                const float *const from = sums + at * 2 * CHUNK + i;
                return Number<double>{sum_rows(from, params.rows, stride * 2 * CHUNK),
                                      sign * sum_rows(from + CHUNK, params.rows, stride * 2 * CHUNK)};
            };
            const Number<double> next = now * of.power, next_slope = now * double(k + 1);
            // G_k = 2 C A̅^{k+1}, of which the imaginary part has the other sign.
            const Number<double> of_read = number(params.sums.of_read, k, -1.0) * 2.0;
            read = multiply_add(of_read, next.conj(), read);
            power = multiply_add(of_read, (of.c * next_slope).conj(), power);
            // H_{15-k} = A̅^k B̅
            const Number<double> of_enter = number(params.sums.of_enter, CHUNK - 1 - k, 1.0);
            enter = multiply_add(of_enter, now.conj(), enter);
            power = multiply_add(of_enter, (slope * entering).conj(), power);
            // K_k = 2 Re(C A̅^k B̅)
            const double twice = 2.0 * of_kernel[k];
            read = read + (now * entering).conj() * twice;
            enter = enter + (now * of.c).conj() * twice;
            power = power + (slope * entering * of.c).conj() * twice;
            now = next, slope = next_slope;
        }
        // `slope` has become 16 A̅^15.
        power = multiply_add(of_chunk, slope.conj(), power);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) s4d_gradients(const __grid_constant__ Gradients params) {
    __shared__ double of_kernel[OF_KERNEL], of_delta[THREADS];
    const Inputs &p = params.sums.inputs;
    for (int64_t channel = blockIdx.x; channel < p.d_inner; channel += gridDim.x) {
        const int64_t pair = threadIdx.x;
        if (threadIdx.x < OF_KERNEL) {
            const float *const from = params.sums.of_kernel + channel * OF_KERNEL + threadIdx.x;
            of_kernel[threadIdx.x] = sum_rows(from, params.rows, p.d_inner * OF_KERNEL);
        }
        __syncthreads();
        if (pair < p.d_state) {
            const Pair of(p, channel, pair);
            const Slopes d(params, of, of_kernel, channel, pair);
            const Number<double> z = of.a * of.delta, one = {1, 0};
            // Of A̅ and of the weight of B: the slopes by A and by Δ.
            Number<double> power_by_a = {of.delta, 0}, power_by_delta = of.a, weight_by_a = {0, 0}, weight_by_delta = one;
            if (p.rule == RULE_HOLD) {
                const Number<double> power = exponential(z);
                power_by_a = power * of.delta, power_by_delta = power * of.a;
                weight_by_a = exp_m1_over_slope(z) * (of.delta * of.delta), weight_by_delta = power;
            } else if (p.rule == RULE_BILINEAR) {
                const Number<double> inverse = one / (one - z * 0.5), square = inverse * inverse;
                power_by_a = square * of.delta, power_by_delta = square * of.a;
                weight_by_a = square * (0.5 * of.delta * of.delta), weight_by_delta = square;
            }
            const Number<double> d_weight = d.enter * of.b.conj();
            const Number<double> d_delta = d.power * power_by_delta.conj() + d_weight * weight_by_delta.conj();
            const Number<double> d_a = d.power * power_by_a.conj() + d_weight * weight_by_a.conj();
            const Number<double> d_b = d.enter * of.weight.conj();
            const int64_t to = (channel * p.d_state + pair) * 2;
            params.d_a[to] = static_cast<float>(d_a.re), params.d_a[to + 1] = static_cast<float>(d_a.im);
            params.d_b[to] = static_cast<float>(d_b.re), params.d_b[to + 1] = static_cast<float>(d_b.im);
            params.d_c[to] = static_cast<float>(d.read.re), params.d_c[to + 1] = static_cast<float>(d.read.im);
            // The slope by the logarithm.
            of_delta[threadIdx.x] = d_delta.re * of.delta;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            double sum = 0;
            for (int64_t i = 0; i < p.d_state; i++) sum += of_delta[i];
            params.d_log_delta[channel] = static_cast<float>(sum);
            if (params.d_d) params.d_d[channel] = static_cast<float>(of_kernel[0] + of_kernel[CHUNK]);
        }
        __syncthreads();
    }
}

}
