#!/usr/bin/env bash
# `make bench`: every figure of the project, each beside its floor. Needs root and `make rootfs`.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo run --quiet --release --locked -j"${JOBS:-2}" -p wrenn-tests --bin bench
cargo run --quiet --release --locked -j"${JOBS:-2}" -p wrenn-tests --bin bench-envd
# Where there is a Firecracker and this machine cannot run it.
tests/testhost/build.sh
cargo run --quiet --release --locked -j"${JOBS:-2}" -p wrenn-tests --bin bench-lifecycle
# The wire protocol beside a bare echo, ttrpc and a bare copy; a crate outside the workspace.
(cd tests/peers/ttrpc-bench && cargo run --quiet --release --locked -j"${JOBS:-2}")
