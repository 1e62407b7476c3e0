#!/usr/bin/env bash
# Says which toolchain builds here: versions, and hashes of every file that makes or becomes machine
# code. The same on every machine with the same toolchain.
set -euo pipefail
sysroot=$(rustc --print sysroot)
rustc -vV
cargo -V
cd -- "$sysroot"
find bin/rustc bin/cargo lib/librustc_driver* lib/libLLVM* lib/rustlib/x86_64-unknown-linux-gnu/lib -type f 2>/dev/null |
    LC_ALL=C sort | xargs -d '\n' sha256sum
