#!/bin/bash
# Installs the Debian packages that building, testing and running Wrenn here need and that are missing.
#
#     rootfs/install-prerequisites.sh
#
# Prints what it installs and what for; does nothing, quickly, when all is there.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

# How long to wait for another apt or dpkg to end.
readonly APT_LOCK_WAIT_SEC=300

# What tells that it is there (a command, or a path with wildcards) | package | what needs it
readonly NEEDED='
cc                                   build-essential     linking the programs
make                                 make                the Makefile
objcopy                              binutils            guest modules without symbols; checks of binaries
mmdebstrap                           mmdebstrap          installing Debian into the guest image
gpg                                  gpg                 mmdebstrap, for the signatures of archives
mkfs.ext4                            e2fsprogs           writing, changing and checking the guest image
cpio                                 cpio                the initramfs
lz4                                  lz4                 unpacking the kernel
xz                                   xz-utils            unpacking kernels and modules of other releases
zstd                                 zstd                the same; memory of capsules that hibernate
qemu-system-x86_64                   qemu-system-x86     running capsules
nft                                  nftables            firewall rules of capsules
insmod                               kmod                the test host of the tests
/lib/systemd/systemd                 systemd             the same: the agent by its unit
/usr/lib/postgresql/*/bin/initdb     postgresql          the control plane of tests and of the demo
'

# is_there SIGN: SIGN as above.
is_there() {
    case $1 in
    /*) compgen -G "$1" >/dev/null ;;
    *) command -v "$1" >/dev/null || [[ -x /usr/sbin/$1 || -x /sbin/$1 ]] ;;
    esac
}

packages=()
while read -r sign package reason; do
    [[ $sign ]] || continue
    if ! is_there "$sign"; then
        say "missing: $package ($reason)"
        packages+=("$package")
    fi
done <<<"$NEEDED"

command -v cargo >/dev/null ||
    say "missing: cargo; Debian's is too old: install Rust from rustup.rs, in the version that Cargo.toml names"

((${#packages[@]} > 0)) || exit 0
by_hand="apt-get install --no-install-recommends ${packages[*]}"
command -v apt-get >/dev/null || die "there is no apt-get here: install the equivalents of ${packages[*]}"
((EUID == 0)) || die "not root: run this as root, or: sudo $by_hand"

export DEBIAN_FRONTEND=noninteractive
options=(-o "DPkg::Lock::Timeout=$APT_LOCK_WAIT_SEC" -o DPkg::Use-Pty=0 --quiet=2)
say "apt-get update"
apt-get "${options[@]}" update >&2 || die "apt-get update failed: see above"
options+=(--yes --no-install-recommends)

# install ARGUMENT...: apt-get install, whose pages of output are shown when it fails.
log=$(mktemp)
trap 'rm -f -- "$log"' EXIT
install() {
    apt-get "${options[@]}" --no-remove install "$@" >"$log" 2>&1 || {
        cat -- "$log" >&2
        die "apt-get failed: see above; by hand: $by_hand"
    }
}

# Backports' QEMU is newer, where the machine has that archive.
if [[ " ${packages[*]} " == *" qemu-system-x86 "* ]]; then
    release=$(apt-cache policy | sed -n 's/.*,n=\([a-z]*-backports\),.*/\1/p' | sort -u | tail -n 1)
    # Parts of another version of QEMU do not go together with it: those that it would remove come
    # along in a version that does.
    qemu=(qemu-system-x86)
    while read -r part; do
        qemu+=("$part=$(apt-cache madison "$part" | awk 'NR == 1 { print $3 }')")
    done < <(apt-get --simulate "${options[@]}" ${release:+-t "$release"} install qemu-system-x86 |
        sed -n 's/^Remv \([^ ]*\).*/\1/p')
    say "installing ${qemu[*]}${release:+ of $release}"
    install --allow-downgrades ${release:+-t "$release"} "${qemu[@]}"
fi

say "installing ${packages[*]}"
install "${packages[@]}"
