#!/bin/bash
# Downloads Debian's cloud kernel, unless the cache has it, and prints one line about it:
#
#     fetch-kernel.sh CACHE_DIR [refresh]
#
#     PACKAGE VERSION SHA256 FILE
#
# The SHA-256 is the one of apt's own metadata, whose signature apt has checked; the file is checked
# against it each time. With "refresh", apt is asked for the newest version.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

readonly METAPACKAGE=linux-image-cloud-amd64
# apt's sandbox user cannot write to a private build directory, and apt warns of it each time.
readonly APT_OPTIONS=(-o APT::Get::AllowUnauthenticated=false -o Acquire::AllowInsecureRepositories=false
    -o APT::Sandbox::User=root)

(($# == 1)) || [[ $# == 2 && $2 == refresh ]] || die "usage: fetch-kernel.sh CACHE_DIR [refresh]"
directory=$1/kernel refresh=${2:-}
record=$directory/record

if [[ ! $refresh && -f $record ]]; then
    read -r package version sha256 file <"$record"
    if [[ -f $directory/$file && $(digest "$directory/$file") == "$sha256" ]]; then
        printf '%s %s %s %s\n' "$package" "$version" "$sha256" "$directory/$file"
        exit
    fi
    say "the cached kernel package is damaged or gone: downloading it again"
fi
need apt-get apt-cache

# field PACKAGE FIELD: of the candidate version, empty when apt does not know it.
field() {
    apt-cache show --no-all-versions "$1" 2>/dev/null | sed -n "s/^$2: //p"
}

# download: the newest kernel that apt knows, into the scratch directory.
download() {
    package=$(field "$METAPACKAGE" Depends | tr ',' '\n' | sed -n 's/^ *\(linux-image-[^ ]*-cloud-amd64\).*/\1/p')
    [[ $package ]] || return 1
    version=$(field "$package" Version) sha256=$(field "$package" SHA256)
    [[ $version && $sha256 ]] || return 1
    say "downloading $package $version"
    (cd "$scratch" && apt-get "${APT_OPTIONS[@]}" -qq download "$package=$version") >&2
}

scratch_beside "$directory"
# Package lists that are missing or older than the archive are the usual reason of a first failure.
if [[ $refresh ]] || ! download; then
    say "updating apt's package lists"
    apt-get -qq update >&2 || die "apt-get update failed: see above"
    download || die "apt cannot download $METAPACKAGE: does it have a Debian source (see apt-sources.sh)?"
fi
files=("$scratch"/*.deb)
file=${files[0]}
[[ -f $file ]] || die "apt downloaded no package file"
[[ $(digest "$file") == "$sha256" ]] || die "$package $version does not have the SHA-256 that apt's metadata names"

publish "$file" "$directory/${file##*/}"
printf '%s %s %s %s\n' "$package" "$version" "$sha256" "${file##*/}" >"$scratch/record"
publish "$scratch/record" "$record"
find "$directory" -maxdepth 1 -name '*.deb' ! -name "${file##*/}" -delete
printf '%s %s %s %s\n' "$package" "$version" "$sha256" "$directory/${file##*/}"
