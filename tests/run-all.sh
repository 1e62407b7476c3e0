#!/usr/bin/env bash
# `make test`: every test there is, then one closing line. Needs root (VMs, networks) and `make rootfs`.
set -uo pipefail
cd "$(dirname "$0")/.."
jobs=${JOBS:-2}
failed=()
run() { # NAME COMMAND...
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed+=("$name")
}
export WRENN_TEST_DIR=$PWD/builds/guest WRENN_TEST_HOST=$PWD/builds/testhost
run 'test host' tests/testhost/build.sh
# With crash points, so that the sweep can end the agent at every entry of a journal; what is shipped has none.
run 'unit and integration tests' cargo test --workspace --locked -j"$jobs" --no-fail-fast \
    --features wrenn-agent/crash-points
run 'guest image' rootfs/test.sh
if ((${#failed[@]})); then
    printf '\nFAILED: %s\n' "${failed[*]}" >&2
    exit 1
fi
printf '\nall tests passed\n'
