#!/bin/bash
# Checks what build.sh made, without a virtual machine, and that it makes nothing twice.
#
#     rootfs/test.sh [OUTPUT_DIR [ENVD [CACHE_DIR]]]     (as built: builds/guest builds/envd builds/cache)
#
# Prints one line a check; exits 1 when one failed. The output is only read, provided that it is up to
# date.
set -euo pipefail
here=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")")
. "$here/lib.sh"
repository=$(dirname -- "$here")
output=$(realpath -- "${1:-$repository/builds/guest}") envd=$(realpath -- "${2:-$repository/builds/envd}")
cache=$(realpath -- "${3:-$repository/builds/cache}")
template=minimal
image=$output/images/$template/rootfs.ext4
version=$(manifest_value "$output/kernels/manifest.json" version)
kernel=$output/kernels/vmlinux-$version initramfs=$output/kernels/initramfs.img-$version
[[ -f $image && -f $kernel && -f $initramfs ]] || die "nothing to test in $output: run make rootfs first"
need debugfs e2fsck dumpe2fs cpio resize2fs

readonly NOTHING_TO_DO_MS=1000 NEW_ENVD_MS=15000
# Programs that change who they run as: those of Debian's minimal system, and sudo.
readonly PRIVILEGED='/usr/bin/chage /usr/bin/chfn /usr/bin/chsh /usr/bin/expiry /usr/bin/gpasswd
/usr/bin/mount /usr/bin/newgrp /usr/bin/passwd /usr/bin/su /usr/bin/sudo /usr/bin/umount
/usr/sbin/unix_chkpwd'

scratch_beside "$cache"
failed=0

# check NAME COMMAND...
check() {
    local name=$1
    shift
    if "$@" >"$scratch/log" 2>&1; then
        printf 'ok   %s\n' "$name"
    else
        printf 'FAIL %s\n' "$name"
        sed 's/^/     /' "$scratch/log"
        failed=1
    fi
}

# in_image COMMAND: debugfs on the image, read-only.
in_image() {
    debugfs -R "$1" "$image" 2>/dev/null
}

# mode PATH: type and permissions in octal, owner and group, empty when it does not exist. Follows no
# links.
mode() {
    in_image "stat $1" | sed -n -e 's/^Inode:.*Type: \([a-z]*\).*Mode: *\(0[0-7]*\).*/\1 \2/p' \
        -e 's/^User: *\([0-9]*\) *Group: *\([0-9]*\).*/\1 \2/p' | paste -s -d ' '
}

has_mode() {
    [[ $(mode "$1") == "$2" ]] || { echo "$1: '$(mode "$1")' instead of '$2'"; return 1; }
}

sums_are_right() {
    (cd "$output/kernels" && sha256sum --check --quiet SHA256SUMS) &&
        (cd "$output/images/$template" && sha256sum --check --quiet SHA256SUMS)
}

has_packages() {
    local package missing=0
    while IFS= read -r package; do
        in_image "cat /var/lib/dpkg/status" | grep -A 1 -x -F "Package: $package" | grep -q 'ok installed$' ||
            { echo "not installed: $package" && missing=1; }
        grep -q "^$package [^ ]* [^ ]* [0-9a-f]\{64\}$" "$output/images/$template/packages.txt" ||
            { echo "not in packages.txt: $package" && missing=1; }
    done < <(sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$here/templates/$template/packages")
    return $missing
}

# privileged_programs: every program with the set-user or set-group bit, sorted.
privileged_programs() {
    local directory
    for directory in /usr/bin /usr/sbin /usr/lib /usr/libexec /usr/local/bin /usr/local/sbin /opt /home; do
        # ls -l: inode, mode in octal (10 is a regular file, 2, 4 and 6 the two bits), ..., name.
        in_image "ls -l $directory" | awk -v directory="$directory" '$2 ~ /^10[246]...$/ { print directory "/" $NF }'
    done | sort
}

only_expected_privileges() {
    local found expected
    found=$(privileged_programs | paste -s -d ' ') expected=$(tr '\n' ' ' <<<"$PRIVILEGED" | sed 's/ *$//')
    [[ $found == "$expected" ]] || { printf 'found:    %s\nexpected: %s\n' "$found" "$expected"; return 1; }
}

nothing_superfluous() {
    local directory
    for directory in /var/lib/apt/lists /usr/share/man /usr/share/locale /var/cache/apt; do
        [[ -z $(in_image "ls -p $directory" | awk -F / '$6 != "." && $6 != ".." && $6 != "" && $6 != "locale.alias"') ]] ||
            { echo "$directory is not empty"; return 1; }
    done
    [[ -z $(in_image "stat /etc/apt/apt.conf.d/99mmdebstrap") ]] || { echo "the build's apt settings are in it"; return 1; }
}

holds_envd() {
    in_image "cat /usr/local/bin/envd" | cmp - "$1" &&
        cpio --quiet --to-stdout --extract init <"$initramfs" 2>/dev/null | cmp - "$1"
}

is_static() {
    ! head -c 4096 -- "$envd" | LC_ALL=C grep -q -a -F /ld-linux
}

modules_in_order() {
    local path
    cpio --quiet --list <"$initramfs" >"$scratch/names"
    cpio --quiet --to-stdout --extract modules/order <"$initramfs" 2>/dev/null >"$scratch/order"
    while IFS= read -r path; do
        grep -q -x -F "${path#/}" "$scratch/names" || { echo "listed but not there: $path"; return 1; }
    done <"$scratch/order"
    [[ $(grep -c '\.ko$' "$scratch/names") == "$(wc -l <"$scratch/order")" ]] || { echo "not all are listed"; return 1; }
    # Each after those that it needs, as the kernel does not load them by itself here.
    for path in virtio_ring virtio virtio_pci virtio_blk; do
        grep -n "/$path.ko" "$scratch/order" || { echo "no $path"; return 1; }
    done | cut -d : -f 1 | sort -c -n
}

grows() {
    cp --sparse=always -- "$image" "$scratch/grown.ext4"
    truncate -s 20G "$scratch/grown.ext4"
    resize2fs "$scratch/grown.ext4" && e2fsck -f -n "$scratch/grown.ext4"
}

elapsed_ms() {
    local start
    start=$(date +%s%N)
    "$@" || return 1
    elapsed=$((($(date +%s%N) - start) / 1000000))
}

nothing_twice() {
    local before
    before=$(stat -c '%i %Y %n' "$image" "$initramfs" "$kernel")
    elapsed_ms "$here/build.sh" --output "$output" --envd "$envd" --cache "$cache" || return 1
    [[ $(stat -c '%i %Y %n' "$image" "$initramfs" "$kernel") == "$before" ]] || { echo "files were replaced"; return 1; }
    ((elapsed < NOTHING_TO_DO_MS)) || { echo "took $elapsed ms"; return 1; }
}

# A copy of the output and another envd: quickly in both places, and the old image as it was.
new_envd() {
    local old
    mkdir -p "$scratch/copy/images/$template"
    cp -r "$output/kernels" "$scratch/copy/kernels"
    cp --sparse=always "$output/images/$template"/* "$scratch/copy/images/$template/"
    ln "$scratch/copy/images/$template/rootfs.ext4" "$scratch/old.ext4"
    old=$(digest "$scratch/old.ext4")
    { cat -- "$envd" && printf 'changed'; } >"$scratch/envd"
    elapsed_ms "$here/build.sh" --output "$scratch/copy" --envd "$scratch/envd" --cache "$cache" || return 1
    ((elapsed < NEW_ENVD_MS)) || { echo "took $elapsed ms"; return 1; }
    [[ $(digest "$scratch/old.ext4") == "$old" ]] || { echo "the old image was written to"; return 1; }
    image=$scratch/copy/images/$template/rootfs.ext4 initramfs=$scratch/copy/kernels/initramfs.img-$version
    holds_envd "$scratch/envd" && has_mode /usr/local/bin/envd 'regular 0755 0 0' && e2fsck -f -n "$image"
}

leaves_nothing() {
    ! grep -F "$output" /proc/mounts && [[ -z $(find "$output" -name '.rootfs.*') ]]
}

check 'digests are those of SHA256SUMS' sums_are_right
check 'the file system is clean' e2fsck -f -n "$image"
check 'every package of the template is installed and listed' has_packages
check 'PID 1 is there' has_mode /usr/bin/tini 'regular 0755 0 0'
check 'envd is static' is_static
check 'envd is there, for root and executable' has_mode /usr/local/bin/envd 'regular 0755 0 0'
check 'image and initramfs hold this envd' holds_envd "$envd"
check 'the account has its home' has_mode /home/user 'directory 0755 1000 1000'
check 'sudo is set up' has_mode /etc/sudoers.d/user 'regular 0440 0 0'
check 'no program has privileges beyond the expected' only_expected_privileges
check 'nothing superfluous is in it' nothing_superfluous
check 'the initramfs lists its modules in order' modules_in_order
check 'the image can be grown to 20 GiB' grows
check 'a second build does nothing' nothing_twice
check 'a changed envd goes in, in seconds, into a new file' new_envd
check 'no mount and no scratch file is left' leaves_nothing
exit $failed
