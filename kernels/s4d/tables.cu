// What the kernels of S4D need of the parameters, in f64 until it is rounded:
//
//   K_k = 2 Re Σ_n C A̅^k B̅, and D in K_0;   G_t = 2 C A̅^{t+1};   H_j = A̅^{15-j} B̅;   A̅ and A̅^16
//
// G reads a state's real and imaginary part as two numbers, so that of the latter has the other sign. A block has the pairs of a
// channel; those that pad them are zero.
#include "number.cuh"

namespace s4d::tables {

extern "C" __global__ void __launch_bounds__(THREADS) s4d_tables(const __grid_constant__ Inputs p) {
    __shared__ double parts[CHUNK][THREADS];
    for (int64_t channel = blockIdx.x; channel < p.d_inner; channel += gridDim.x) {
        const int64_t pair = threadIdx.x;
        const bool exists = pair < p.d_state;
        Number<double> power = {0, 0}, entering = {0, 0}, reading = {0, 0};
        if (exists) {
            const Pair of(p, channel, pair);
            power = of.power, entering = of.weight * of.b, reading = of.c * 2.0;
        }
        float *const read = p.read + (channel * p.padded + pair) * 2 * CHUNK;
        float *const enter = p.enter + (channel * p.padded + pair) * 2 * CHUNK;
        Number<double> now = {1, 0};
        for (int k = 0; k < CHUNK; k++) {
            const Number<double> entered = entering * now;
            parts[k][threadIdx.x] = (reading * entered).re;
            now = now * power;
            const Number<double> to_read = reading * now;
            if (pair >= p.padded) continue;
            read[k] = static_cast<float>(to_read.re), read[CHUNK + k] = static_cast<float>(-to_read.im);
            enter[CHUNK - 1 - k] = static_cast<float>(entered.re), enter[2 * CHUNK - 1 - k] = static_cast<float>(entered.im);
        }
        if (pair < p.padded) {
            double *const powers = p.powers + (channel * p.padded + pair) * 4;
            powers[0] = power.re, powers[1] = power.im, powers[2] = now.re, powers[3] = now.im;
        }
        __syncthreads();
        if (threadIdx.x < CHUNK) {
            double sum = threadIdx.x == 0 && p.d.data ? p.d.data[channel * p.d.channel] : 0.0;
            for (int64_t i = 0; i < p.d_state; i++) sum += parts[threadIdx.x][i];
            p.kernel[channel * CHUNK + threadIdx.x] = static_cast<float>(sum);
        }
        __syncthreads();
    }
}

}
