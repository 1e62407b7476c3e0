#!/bin/bash
# Makes the initramfs: envd as /init, and the modules that a capsule needs before its root is there.
#
#     make-initramfs.sh MODULES_DIR ENVD OUTPUT
#
# MODULES_DIR is lib/modules/<release> of the kernel package. The archive holds /init, /modules/*.ko
# and /modules/order: absolute paths, one a line, in the order in which to load them. It is not
# compressed: that gains nothing at this size. The same input gives the same bytes.
#
# Modules lose their symbols, type information and signature. A kernel that takes unsigned modules
# (Debian's does, outside secure boot) else checks a signature and parses types for each one, which
# costs a tenth of the whole start where the guest's instructions are emulated.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

# What a capsule needs: disk, network, entropy, and the host's clock where KVM offers it.
readonly MODULES=(virtio_pci virtio_blk virtio_net virtio-rng ptp_kvm)

(($# == 3)) || die "usage: make-initramfs.sh MODULES_DIR ENVD OUTPUT"
modules=$1 envd=$2 output=$3
[[ -d $modules/kernel ]] || die "$modules is not a kernel's module directory"
[[ -f $envd ]] || die "no envd binary at $envd: build it first (make build)"
need cpio objcopy

# module_file NAME: its path. Files and names differ in '-' and '_', which the kernel takes as one.
module_file() {
    find "$modules/kernel" -name "${1//[-_]/[-_]}.ko*" -print -quit
}

# unpack_module FILE: its content as the kernel's loader wants it.
unpack_module() {
    case $1 in
    *.ko) cat -- "$1" ;;
    *.ko.xz) xz -d -c -- "$1" ;;
    *.ko.zst) zstd -d -c -q -- "$1" ;;
    *) die "module $1 is compressed in a way that is not known here" ;;
    esac
}

# add_module NAME: what it depends on first (the "depends" of its own .modinfo section, of which
# depmod makes modules.dep), then itself, each once.
add_module() {
    local name=${1//-/_} file dependency
    local -a dependencies
    [[ ! -e $tree/modules/$name.ko ]] || return 0
    file=$(module_file "$name")
    [[ $file ]] || die "the kernel has no module $name under $modules"
    unpack_module "$file" >"$scratch/$name.ko"
    IFS=, read -r -a dependencies < <(tr '\0' '\n' <"$scratch/$name.ko" | sed -n 's/^depends=//p') || true
    for dependency in "${dependencies[@]}"; do
        add_module "$dependency"
    done
    objcopy --strip-unneeded --remove-section=.BTF "$scratch/$name.ko" "$tree/modules/$name.ko"
    rm -f "$scratch/$name.ko"
    printf '/modules/%s.ko\n' "$name" >>"$tree/modules/order"
}

scratch_beside "$(dirname -- "$output")"
tree=$scratch/tree
mkdir -p "$tree/modules"
for module in "${MODULES[@]}"; do
    add_module "$module"
done
chmod 0644 "$tree"/modules/*
install -m 0755 "$envd" "$tree/init"
find "$tree" -exec touch -h -d @0 {} +

(cd "$tree" && find . -mindepth 1 -printf '%P\n' | sort |
    cpio --quiet --create --format=newc --reproducible --owner=0:0) >"$scratch/initramfs"
publish "$scratch/initramfs" "$output"
