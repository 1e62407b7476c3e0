#!/usr/bin/env bash
# Builds every program once more by `make build-offline`, in a directory whose path differs in name and
# length and where nothing is built yet, and compares what comes out with builds/, the embedded lists included.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly programs=(wrenn-cp wrenn-agent envd vendor-check)
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
tree=$work/a/much/longer/way/to-the-second/wrenn
mkdir -p -- "$tree"
# What a release tarball has: no build products, no repository.
tar -c --exclude=./target --exclude=./builds --exclude=./.git --exclude=./.wrenn . | tar -x -C "$tree"
echo "building in $tree"
env -u CARGO_TARGET_DIR -u CARGO_HOME -u MAKEFLAGS -u MAKELEVEL \
    make --no-print-directory -C "$tree" reproducible-build >"$work/log" 2>&1 || {
    tail -n 40 "$work/log" >&2
    exit 1
}
status=0
for program in "${programs[@]}"; do
    if cmp -- "builds/$program" "$tree/builds/$program"; then
        echo "identical: $(sha256sum <"builds/$program" | cut -d ' ' -f 1)  $program"
    else
        echo "$program differs between the two directories" >&2
        status=1
    fi
done
exit "$status"
