#!/usr/bin/env bash
# Checks `src/nn` as a crate of its own, which has this one without `nn` beneath it: that it uses nothing that is not public.
# So a model crate of somebody else's can do what it does, and it could become one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=${CARGO_TARGET_DIR:-$PWD/target}
crate=$target/nn-alone
mkdir -p "$crate/src"
{
  echo '[package]
name = "nn-alone"
version = "0.0.0"
edition = "2024"

[workspace]

[dependencies]'
  echo "selective-scan = { path = \"$PWD\", features = [\"candle\", \"lti\"] }"
  # What it may use, in the same versions, and the profiles, so that what is built serves both.
  sed -n '/^\[dependencies\]/,/^\[dev-dependencies\]/p' Cargo.toml |
    grep -E '^(bytemuck|candle-core|candle-nn|half|rand|rayon|safetensors|serde|serde_json|zip) =' | sed 's/ optional = true,\{0,1\}//; s/, *}/ }/'
  sed -n '/^\[profile/,/^\[lints/p' Cargo.toml | grep -v '^\[lints'
} >"$crate/Cargo.toml"
cat >"$crate/src/lib.rs" <<RUST
pub use selective_scan::*;

#[path = "$PWD/src/nn/mod.rs"]
pub mod nn;
RUST
cp Cargo.lock "$crate/Cargo.lock"
CARGO_TARGET_DIR=$target cargo check --quiet --profile test --manifest-path "$crate/Cargo.toml"
