#!/bin/bash
# Makes a "test host": kernel, initramfs and root disk of a virtual machine that has what a real host has
# and the machine of a developer often lacks (device-mapper, loop devices, TAP, KVM), and runs one program.
#
#     tests/testhost/build.sh [--cache DIR] [--output DIR]
#
#     --cache DIR   downloads of rootfs/build.sh      (builds/cache)
#     --output DIR  where to                          (builds/testhost)
#
# The kernel is the one that guests boot, with more of its modules; the programs are this machine's own,
# with the libraries that they are linked with, so a test built here runs there: first alone, then under
# systemd, where the agent runs by its unit. Only what is out of date is made.
set -euo pipefail
here=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")")
repository=$(dirname -- "$(dirname -- "$here")")
. "$repository/rootfs/lib.sh"
. "$repository/rootfs/modules.sh"

# virtio for the test host's own devices, then what hosts of capsules need.
readonly MODULES=(virtio_pci virtio_blk virtio_net virtio_console virtio-rng
    dm-mod dm-snapshot loop tun veth kvm-amd kvm-intel
    nf_tables nft_chain_nat nft_connlimit nft_ct nft_fib_inet nft_hash nft_limit nft_log nft_masq nft_nat nft_numgen
    nft_objref nft_quota nft_redir nft_reject_inet nft_reject_ipv4 nft_reject_ipv6)
# What `init` needs before there is a root.
readonly BOOT_PROGRAMS=(bash chroot insmod mount sleep)
# What the tests and the agent run.
readonly PROGRAMS=(bash cat chgrp chmod fallocate ip mkdir mkfs.ext4 mount nft qemu-system-x86_64 sync systemctl umount zstd)
# systemd, as the first process of the second half, with as few of its units as it can be without.
readonly SYSTEMD=/lib/systemd/systemd
readonly SYSTEMD_UNITS=(basic.target shutdown.target sysinit.target)
# Firmware and the like; QEMU looks for it relative to where it lies itself.
readonly QEMU_FILES=(/usr/share/seabios/bios-256k.bin /usr/share/qemu/{qboot.rom,kvmvapic.bin,linuxboot_dma.bin,pvh.bin})
readonly ROOT_BYTES=$((256 * 1048576))
# Rust's unwinder, which bash is not linked with.
readonly LIBRARIES=(libgcc_s.so.1 libm.so.6)

cache=$repository/builds/cache output=$repository/builds/testhost
while (($#)); do
    case $1 in
    --cache | --output) (($# > 1)) && [[ $2 ]] || die "$1 needs a value" ;;
    *) die "unknown argument $1; the head of tests/testhost/build.sh lists them" ;;
    esac
    printf -v "${1#--}" '%s' "$2"
    shift 2
done
PATH=$PATH:/usr/sbin:/sbin
need cpio objcopy dpkg-deb ldd "$SYSTEMD" "${BOOT_PROGRAMS[@]}" "${PROGRAMS[@]}"
mkdir -p "$cache" "$output"
exec 9>"$output/lock"
flock --wait 600 9 || die "another build holds $output/lock"

read -r package version sha256 file < <("$repository/rootfs/fetch-kernel.sh" "$cache") || die "no kernel package"
# library_path NAME: where the dynamic linker finds it.
library_path() {
    ldconfig -p | sed -n "s/^[[:space:]]*$1 (libc6,x86-64.*=> //p" | head -n 1
}
copied=()
for program in "$SYSTEMD" "${BOOT_PROGRAMS[@]}" "${PROGRAMS[@]}"; do
    copied+=("$(realpath -- "$(command -v "$program")")")
done
for library in "${LIBRARIES[@]}"; do
    path=$(library_path "$library")
    [[ $path ]] || die "this machine has no $library"
    copied+=("$path")
done
recipe=$(cat -- "$here"/{build.sh,init,run,tests.service} "$repository"/rootfs/{lib,modules}.sh "${copied[@]}" | sha256sum | cut -d ' ' -f 1)
if [[ $(manifest_value "$output/manifest.json" recipe_sha256) == "$recipe" &&
    $(manifest_value "$output/manifest.json" package_sha256) == "$sha256" &&
    -s $output/vmlinuz && -s $output/initramfs.img && -s $output/root.ext4 ]]; then
    exit
fi

say "test host: kernel $version"
scratch_beside "$output"
rm -f -- "$output/manifest.json"
dpkg-deb --extract "$file" "$scratch/kernel"
release=${package#linux-image-}
modules=$scratch/kernel/lib/modules/$release tree=$scratch/tree
mkdir -p "$tree"/{bin,dev,modules,proc,root,sys}
for module in "${MODULES[@]}"; do
    add_module "$module"
done

# copy_with_libraries FILE ROOT PLACE: a program or library, and at their own paths what it is linked with.
copy_with_libraries() {
    local library
    install -D -m 0755 -- "$1" "$2/$3"
    while read -r library; do
        [[ -e $2/$library ]] || install -D -m 0755 -- "$library" "$2/$library"
    done < <(ldd "$1" | sed -n 's/^.*[[:space:]]\(\/[^ ]*\) (0x.*$/\1/p')
}
for program in "${BOOT_PROGRAMS[@]}"; do
    copy_with_libraries "$(command -v "$program")" "$tree" "bin/$program"
done
install -m 0755 "$here/init" "$tree/init"
(cd "$tree" && find . -mindepth 1 -printf '%P\n' | sort |
    cpio --quiet --create --format=newc --owner=0:0) | gzip -1 >"$scratch/initramfs.img"

root=$scratch/root
mkdir -p "$root"/{bin,dev,etc,proc,run,sys,tmp,usr/bin,usr/sbin,var/tmp,testhost}
for program in "${PROGRAMS[@]}"; do
    copy_with_libraries "$(command -v "$program")" "$root" "usr/bin/$program"
    ln -sf "/usr/bin/$program" "$root/bin/$program"
done
for library in "${LIBRARIES[@]}"; do
    path=$(library_path "$library")
    copy_with_libraries "$path" "$root" "$path"
done
for file in "${QEMU_FILES[@]}"; do
    [[ ! -f $file ]] || install -D -m 0644 -- "$file" "$root/usr/share/qemu/${file##*/}"
done
printf 'root:x:0:0::/root:/bin/bash\n' >"$root/etc/passwd"
printf 'root:x:0:\nkvm:x:104:\n' >"$root/etc/group"
install -m 0755 "$here/run" "$root/run-tests"
copy_with_libraries "$(realpath -- "$SYSTEMD")" "$root" "$SYSTEMD"
# systemd 255 and later start what they start by this.
[[ ! -e ${SYSTEMD}-executor ]] || copy_with_libraries "$(realpath -- "$SYSTEMD-executor")" "$root" "$SYSTEMD-executor"
units=$root/etc/systemd/system
mkdir -p "$units" "$root"/{etc/wrenn,usr/local/bin,var/lib/wrenn}
for unit in "${SYSTEMD_UNITS[@]}"; do
    install -m 0644 -- "/lib/systemd/system/$unit" "$units/$unit"
done
install -m 0644 "$here/tests.service" "$units/tests.service"
truncate -s "$ROOT_BYTES" "$scratch/root.ext4"
mkfs.ext4 -q -F -m 0 -d "$root" "$scratch/root.ext4"
publish "$scratch/root.ext4" "$output/root.ext4"
publish "$scratch/initramfs.img" "$output/initramfs.img"
publish "$scratch/kernel/boot/vmlinuz-$release" "$output/vmlinuz"
cat >"$scratch/manifest.json" <<END
{
  "package_sha256": "$sha256",
  "recipe_sha256": "$recipe"
}
END
publish "$scratch/manifest.json" "$output/manifest.json"
say "test host: $output is ready ($(($(stat -c %s "$output/initramfs.img") / 1048576)) MiB)"
