#!/usr/bin/env bash
# Runs the CPU path's unsafe code under Miri, which checks it for undefined behaviour and data races.
# Takes some minutes.
# Needs: rustup toolchain install nightly --component miri --component rust-src
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# The thread pool lives until the end of the program (ignore-leaks), reads the number of processors (isolation), and its
# queues need the newer aliasing model (tree-borrows).
export MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-ignore-leaks -Zmiri-tree-borrows"
cargo +nightly miri test --locked --features lti --test suite -- interpreted::
