"""Times S4D as it is written in PyTorch, a kernel of the sequence's length and a convolution by Fourier transforms.

    python benches/peers/s4d.py [--pairs 32] [B,L,D ...]

Milliseconds on the GPU by CUDA events, medians of 10: the kernel alone, the convolution of activations of bf16 in f32 (cuFFT has
no bf16), both, and both with the way back. Beside it `cargo bench --features lti,cuda --bench cuda -- --filter s4d`.
"""

import argparse
import statistics

import torch

SHAPES = ["64,1024,768", "64,4096,768", "16,16384,768", "8,32768,768"]


def kernel(log_step, log_real, imaginary, c, length):
    """(D, L): K_k = 2 Re(sum of C (exp(step A) - 1) / A exp(step A k)), by zero-order hold."""
    a = torch.complex(-log_real.exp(), imaginary)
    exponent = a * log_step.exp()[:, None]
    powers = (exponent[..., None] * torch.arange(length, device=a.device)).exp()
    return 2 * torch.einsum("dn,dnl->dl", c * exponent.expm1() / a, powers).real


def convolve(u, k):
    """(B, L, D) and (D, L) to (B, L, D)."""
    length = k.shape[-1]
    u = u.transpose(1, 2).float()
    y = torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(k, n=2 * length), n=2 * length)[..., :length]
    return y.transpose(1, 2).to(torch.bfloat16)


def milliseconds(run, repeats=10):
    run(), run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(batch, length, channels, pairs):
    torch.manual_seed(0)
    real = {"device": "cuda", "requires_grad": True}
    log_step = torch.empty(channels, device="cuda").uniform_(-6.9, -2.3).requires_grad_()
    log_real = torch.full((channels, pairs), 0.5, device="cuda").log().requires_grad_()
    imaginary = (torch.pi * torch.arange(pairs, device="cuda")).repeat(channels, 1).requires_grad_()
    c = torch.randn(channels, pairs, dtype=torch.complex64, **real)
    u = torch.randn(batch, length, channels, dtype=torch.bfloat16, **real)
    system = (log_step, log_real, imaginary, c)
    with torch.no_grad():
        k = kernel(*system, length)
        alone = milliseconds(lambda: kernel(*system, length))
        convolution = milliseconds(lambda: convolve(u, k))
        both = milliseconds(lambda: convolve(u, kernel(*system, length)))
    d_y = torch.randn_like(u)

    def there_and_back():
        torch.autograd.grad(convolve(u, kernel(*system, length)), (u, *system), d_y)

    return alone, convolution, both, milliseconds(there_and_back)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=32, help="conjugate pairs of each channel")
    parser.add_argument("shapes", nargs="*", default=SHAPES, help="batch, length and channels, between commas")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {arguments.pairs} pairs")
    print("B,L,D            kernel  convolution     both  and back")
    for shape in arguments.shapes:
        try:
            times = measure(*map(int, shape.split(",")), arguments.pairs)
            print(f"{shape:15} {times[0]:7.3f} {times[1]:12.3f} {times[2]:8.3f} {times[3]:9.3f}", flush=True)
        except torch.OutOfMemoryError:
            print(f"{shape:15} out of memory", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
