#!/usr/bin/env bash
# Runs tests under the sanitizers of the nightly compiler. Unlike Miri they watch the machine's own instructions, AVX-512
# and all, and are fast enough for whole sequences: `address` sees accesses outside an allocation, `thread` sees
# races.
# Needs: rustup toolchain install nightly --component rust-src
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Little optimisation, because a build takes longer than the tests. A directory for each, because nothing that is built
# for one links with what is built for another.
sanitized() {
  local sanitizer=$1
  shift
  RUSTFLAGS="-Zsanitizer=$sanitizer" CARGO_TARGET_DIR="target/sanitizer-$sanitizer" CARGO_PROFILE_TEST_OPT_LEVEL=1 \
    cargo +nightly test --locked --features lti --target x86_64-unknown-linux-gnu --test suite "$@"
}

# Leaks are not looked for: the thread pool lives until the end of the program. Wild arguments ask for allocations that
# nothing can satisfy, and must be told so rather than be stopped.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
# `memory` counts what the allocator gives out, and the sanitizer puts an allocator of its own in its place; `accuracy`,
# `extremes` and `vectors` are many numbers through the code that the rest runs too.
sanitized address -- --skip memory:: --skip accuracy:: --skip extremes:: --skip vectors::

# The standard library is built along: it would otherwise pass memory between threads in ways that the sanitizer does not
# see, which look like races.
sanitized thread -Zbuild-std -- interpreted:: threads
