"""Builds the CUDA extensions of mamba-ssm and causal-conv1d from their source distributions, for the GPU at hand alone.

    python benches/peers/build.py --sources FOLDER --into FOLDER [--pack FILE.tar.xz]

FOLDER of sources holds what `pip download --no-binary :all:` leaves: mamba_ssm-*.tar.gz and causal_conv1d-*.tar.gz. Their
own setup.py compiles for nine kinds of GPU and takes many times as long; the files and flags here are those it gives nvcc
for one, and each kernel is a job of its own. Objects that are done are not made again. `--pack` writes what the peers need
of it, the modules without their symbols and the distributions' Python, to a file that another machine of the same kind, with
the same PyTorch, unpacks in place of building.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path

FLAGS = [
    "-O3", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_BFLOAT162_OPERATORS__",
    "-U__CUDA_NO_BFLOAT162_CONVERSIONS__", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math",
    "-lineinfo",
]  # fmt: skip

# The C++ standard is PyTorch's choice, as its headers want it.

# Module, distribution, folder, and sources but for those that match a word.
EXTENSIONS = {
    "selective_scan_cuda": ("mamba_ssm", "csrc/selective_scan", "_bwd_*_complex"),
    "causal_conv1d_cuda": ("causal_conv1d", "csrc", None),
}

# The backward kernels for a complex A take longer to compile than all the rest, and nothing here runs them.
ABSENT = """
#include <torch/python.h>
#include <c10/cuda/CUDAStream.h>
#include "selective_scan.h"

template <typename input_t, typename weight_t>
void selective_scan_bwd_cuda(SSMParamsBwd &params, cudaStream_t stream);

#define ABSENT(T)                                                                              \\
    template <>                                                                                \\
    void selective_scan_bwd_cuda<T, c10::complex<float>>(SSMParamsBwd &, cudaStream_t) {       \\
        TORCH_CHECK(false, "not built: the backward pass for a complex A");                    \\
    }
ABSENT(float)
ABSENT(at::Half)
ABSENT(at::BFloat16)
"""


def unpack(sources, distribution, into):
    """The folder of a distribution, taken out of its archive if need be."""
    archives = sorted(Path(sources).glob(f"{distribution}-*.tar.gz"))
    if not archives:
        raise FileNotFoundError(f"no {distribution}-*.tar.gz in {sources}")
    name = archives[-1].name.removesuffix(".tar.gz")
    if not (Path(into) / name / "setup.py").exists():
        with tarfile.open(archives[-1]) as archive:
            archive.extractall(into, filter="data")
    return Path(into) / name


def split(source, into):
    """A source for each of those kernels that the end of `source` instantiates: so they compile side by side."""
    lines = source.read_text().splitlines(keepends=True)
    first = next((i for i, line in enumerate(lines) if line.startswith("template void ")), None)
    if first is None:
        return [source]
    files = []
    for line in lines[first:]:
        if line.startswith("template void "):
            files.append(write(into / f"{source.stem}_{len(files)}.cu", "".join(lines[:first]) + line))
    return files


def write(path, text):
    """Leaves a file that is the same alone, so that what was made of it is too."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path


def build(module, sources, into):
    """Compiles a module and gives its path."""
    distribution, folder, without = EXTENSIONS[module]
    folder = unpack(sources, distribution, into) / folder
    objects = Path(into) / module
    objects.mkdir(parents=True, exist_ok=True)
    kernels = sorted(folder.glob("*.cu"))
    files = sorted(folder.glob("*.cpp"))
    if without:
        kernels = [file for file in kernels if not file.match(f"*{without}.cu")]
        files.append(write(objects / "absent.cpp", ABSENT))
    files += [file for kernel in kernels for file in split(kernel, objects)]

    import torch
    from torch.utils import cpp_extension

    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = ".".join(map(str, torch.cuda.get_device_capability()))
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count()))
    # What a build that was stopped has left would be waited for.
    (objects / "lock").unlink(missing_ok=True)
    cpp_extension.load(
        name=module,
        sources=[str(file) for file in files],
        extra_cflags=["-O3"],
        extra_cuda_cflags=FLAGS,
        extra_include_paths=[str(folder)],
        build_directory=str(objects),
        verbose=bool(os.environ.get("VERBOSE")),
    )
    return objects / f"{module}.so"


def pack(into, file):
    """Modules and packages, in the folders that build() leaves them in."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:xz") as archive, tempfile.TemporaryDirectory() as stripped:
        for module, (distribution, *_) in EXTENSIONS.items():
            small = Path(stripped) / f"{module}.so"
            subprocess.run(["strip", "-o", small, into / module / small.name], check=True)
            archive.add(small, f"{module}/{small.name}")
            for package in sorted(into.glob(f"{distribution}-*/{distribution}")):
                for source in sorted(package.rglob("*.py")):
                    archive.add(source, source.relative_to(into))
    print(f"{file}: {file.stat().st_size / (1 << 20):.1f} MiB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--pack", type=Path, help="writes what the peers need of it to this file too")
    arguments = parser.parse_args()
    arguments.into.mkdir(parents=True, exist_ok=True)
    failed = False
    for module in EXTENSIONS:
        start = time.monotonic()
        try:
            path = build(module, arguments.sources, arguments.into.resolve())
            print(f"{path}: built in {time.monotonic() - start:.0f} s", flush=True)
        except Exception:
            failed = True
            traceback.print_exc()
            print(f"{module}: not built", flush=True)
    if arguments.pack and not failed:
        pack(arguments.into.resolve(), arguments.pack)
    sys.exit(failed)


if __name__ == "__main__":
    main()
