#!/usr/bin/env bash
# Runs the processor's part of the suite on AArch64 with NEON, on a machine of another kind under qemu-user. What is long and
# the same for every instruction set is left out.
# Needs: rustup target add aarch64-unknown-linux-gnu, and Debian's packages qemu-user, gcc-aarch64-linux-gnu and
# libc6-dev-arm64-cross
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Linked statically, so that the emulator needs no libraries of the other architecture.
export RUSTFLAGS="-C target-feature=+crt-static"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64
# Compiling takes longer than the tests.
export CARGO_PROFILE_TEST_OPT_LEVEL=1
cargo test --locked --target aarch64-unknown-linux-gnu --target-dir target/neon --test suite -- \
  accuracy::all_flags accuracy::every_narrow_width conv:: extremes:: interpreted:: state_update:: vectors:: \
  --skip million --skip in_segments --skip wild::
