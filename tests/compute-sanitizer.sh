#!/usr/bin/env bash
# Runs a part of the suite on a GPU under the four tools of NVIDIA's compute-sanitizer: accesses outside of memory, races in
# shared memory, reads of what nothing has written, and barriers that not all threads reach.
#
#   tests/compute-sanitizer.sh PROGRAM [ARGUMENT...]
#
# PROGRAM is the suite's, as `cargo test --features cuda --test suite --no-run` names it, or whatever runs it. A tool slows
# kernels down a hundredfold, so that what runs is a choice: every kernel and every layout, at small sizes. TOOLS and TESTS
# choose others, LIMIT is the seconds that one tool may take (600). For synccheck the program has to be built with
# NVCC_APPEND_FLAGS=-DSYNCCHECK: see kernels/scan/forward_few_channels.cu.
set -uo pipefail
[ $# -gt 0 ] || { sed -n '5,10p' "$0"; exit 2; }

read -ra tools <<<"${TOOLS:-memcheck racecheck initcheck synccheck}"
read -rd "" -a tests <<<"${TESTS:-gpu::nothing_to_do gpu::layouts_do_not_matter gpu::a_sequence_does_not_see_its_neighbours
  gpu::parts_equal_the_whole gpu::bits_do_not_depend_on_the_kernel gpu::streams_do_not_meet
  conv::gpu::a_packed_sequence conv::gpu::any_layout conv::gpu::updates_are conv::gpu::large_batches
  state_update::gpu::many_tokens state_update::gpu::any_place state_update::gpu::large_batches
  gpu::model_widths gpu::all_flags}"
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
[ -x "$sanitizer" ] || { echo "no compute-sanitizer on the PATH or in CUDA_HOME"; exit 2; }

log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
for tool in "${tools[@]}"; do
  echo "== $tool"
  options=(--tool "$tool" --target-processes all --error-exitcode 9 --print-limit 20)
  # Errors that the driver returns are what some tests ask for.
  [ "$tool" = memcheck ] && options+=(--report-api-errors no)
  # One thread, so that what is reported belongs to the test that is named before it.
  timeout "${LIMIT:-600}" "$sanitizer" "${options[@]}" "$@" "${tests[@]}" --test-threads 1 2>&1 | tee "$log" | grep -vE '^$|^running'
  status=${PIPESTATUS[0]}
  if [ "$status" = 124 ]; then
    done=$(grep -cE '^test .* ok$' "$log")
    echo "$tool: stopped after ${LIMIT:-600} s, when $done tests were done"
    # What was reported until then counts.
    if [ "$done" = 0 ] || grep -E '^=========' "$log" | grep -qviE 'COMPUTE-SANITIZER|SUMMARY'; then
      echo "$tool: FAILED"
      failed=1
    fi
  elif [ "$status" != 0 ]; then
    echo "$tool: FAILED with status $status"
    failed=1
  elif ! grep -qE '^test .* ok$' "$log" || grep -q "are skipped" "$log"; then
    echo "$tool: FAILED, no test ran on a GPU"
    failed=1
  else
    echo "$tool: clean"
  fi
done
exit "$failed"
