# shellcheck shell=bash
# Sourced by the scripts of this directory: messages, digests, and files that appear whole or not at
# all. Every script works in one scratch directory, removed however the script ends.

# Reproducible output wants the same sort order and the same messages from every tool, everywhere.
export LC_ALL=C.UTF-8
umask 022

say() { printf 'rootfs: %s\n' "$*" >&2; }

die() {
    printf 'rootfs: error: %s\n' "$*" >&2
    exit 1
}

# need COMMAND...: ends with a clear message when a program is missing.
need() {
    local command missing=()
    for command in "$@"; do
        command -v "$command" >/dev/null || missing+=("$command")
    done
    ((${#missing[@]} == 0)) ||
        die "not installed: ${missing[*]}; run rootfs/install-prerequisites.sh as root"
}

# scratch_beside DIRECTORY: makes $scratch, a directory on DIRECTORY's file system (so that a rename
# out of it is atomic), and has it removed at exit, by a signal's exit too.
scratch_beside() {
    mkdir -p "$1"
    scratch=$(mktemp -d "$1/.rootfs.XXXXXXXX")
    trap 'rm -rf -- "$scratch"' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
}

# publish FILE TARGET: puts a finished file of the scratch directory in place. Readers of an older
# TARGET keep the file they opened: its content is never touched.
publish() {
    sync -- "$1"
    mv -f -- "$1" "$2"
    sync -- "$(dirname -- "$2")"
}

# digest FILE: its SHA-256 in hex.
digest() {
    local sum
    sum=$(sha256sum <"$1") || die "cannot read $1"
    printf '%s\n' "${sum%% *}"
}

# manifest_value FILE KEY: the string or number at KEY of a manifest.json written here, which has one
# key a line; empty when the file or the key is missing.
manifest_value() {
    [[ -f $1 ]] || return 0
    sed -n "s/^ *\"$2\": *\"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$1" | head -n 1
}
