#!/bin/bash
# Makes the initramfs: envd as /init, and the modules that a capsule needs before its root is there.
#
#     make-initramfs.sh MODULES_DIR ENVD OUTPUT
#
# MODULES_DIR is lib/modules/<release> of the kernel package. The archive holds /init and what
# modules.sh says of /modules. It is not compressed: that gains nothing at this size. The same input
# gives the same bytes.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
. "$(dirname -- "${BASH_SOURCE[0]}")/modules.sh"

# What a capsule needs: disk, network, entropy, and the host's clock where KVM offers it.
readonly MODULES=(virtio_pci virtio_blk virtio_net virtio-rng ptp_kvm)

(($# == 3)) || die "usage: make-initramfs.sh MODULES_DIR ENVD OUTPUT"
modules=$1 envd=$2 output=$3
[[ -d $modules/kernel ]] || die "$modules is not a kernel's module directory"
[[ -f $envd ]] || die "no envd binary at $envd: build it first (make build)"
need cpio objcopy

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
