#!/bin/bash
# Prints this machine's own Debian sources of one release as a sources.list: the mirrors that its
# administrator chose, whichever form they are written in.
#
#     apt-sources.sh RELEASE
#
# Only archives that apt trusts (signed, and checked) and that Debian itself makes are taken: the
# release, its updates and its security fixes.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

(($# == 1)) || die "usage: apt-sources.sh RELEASE"
release=$1
need apt-get

sources=$(apt-get indextargets --format '$(ORIGIN) $(TRUSTED) $(CODENAME) $(REPO_URI) $(RELEASE) $(COMPONENT)' \
    'Created-By: Packages' 'Architecture: amd64' |
    awk -v release="$release" '
        $1 == "Debian" && $2 == "yes" &&
            ($3 == release || $3 == release "-updates" || $3 == release "-security") &&
            $6 ~ /^main$/ { print "deb", $4, $5, $6 }' | sort -u)
grep -q " $release " <<<"$sources" ||
    die "apt has no signed Debian source for $release: add one under /etc/apt/sources.list.d, then apt-get update"
printf '%s\n' "$sources"
