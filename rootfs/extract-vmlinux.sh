#!/bin/bash
# Takes the uncompressed kernel (an ELF file) out of a bzImage.
#
#     extract-vmlinux.sh BZIMAGE VMLINUX
#
# The offsets are those of the x86 boot protocol (Documentation/arch/x86/boot.rst of the kernel):
# setup_sects, the "HdrS" magic, the protocol version, payload_offset and payload_length. The payload
# is one compressed stream, then the uncompressed size as a little-endian u32.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

readonly OFFSET_SETUP_SECTS=$((0x1f1)) OFFSET_MAGIC=$((0x202)) OFFSET_VERSION=$((0x206))
readonly OFFSET_PAYLOAD_OFFSET=$((0x248)) OFFSET_PAYLOAD_LENGTH=$((0x24c))
readonly MAGIC_HDRS=$((0x53726448)) VERSION_WITH_PAYLOAD=$((0x0208)) SECTOR_BYTES=512

(($# == 2)) || die "usage: extract-vmlinux.sh BZIMAGE VMLINUX"
image=$1 output=$2
[[ -r $image ]] || die "cannot read the kernel image $image"

# unsigned OFFSET WIDTH: the little-endian number there.
unsigned() {
    local value
    value=$(od -A n -t "u$2" --endian=little -j "$1" -N "$2" -- "$image")
    printf '%s\n' "${value//[[:space:]]/}"
}

[[ $(unsigned $OFFSET_MAGIC 4) == "$MAGIC_HDRS" ]] || die "$image is not an x86 bzImage"
(($(unsigned $OFFSET_VERSION 2) >= VERSION_WITH_PAYLOAD)) ||
    die "$image has a boot protocol older than 2.08: it does not say where its payload is"

setup_sectors=$(unsigned $OFFSET_SETUP_SECTS 1)
((setup_sectors > 0)) || setup_sectors=4 # boot.rst: 0 means 4
start=$(((setup_sectors + 1) * SECTOR_BYTES + $(unsigned $OFFSET_PAYLOAD_OFFSET 4)))
length=$(unsigned $OFFSET_PAYLOAD_LENGTH 4)
size=$(unsigned $((start + length - 4)) 4)

case $(od -A n -t x1 -j "$start" -N 4 -- "$image") in
" 02 21 4c 18") tool=lz4 ;;
" 28 b5 2f fd") tool=zstd ;;
" fd 37 7a 58") tool=xz ;;
" 1f 8b "*) tool=gzip ;;
*) die "$image is compressed in a way that is not known here (lz4, zstd, xz and gzip are)" ;;
esac
need "$tool"

scratch_beside "$(dirname -- "$output")"
dd if="$image" bs=1M iflag=skip_bytes,count_bytes skip="$start" count="$((length - 4))" status=none |
    "$tool" -d -c >"$scratch/vmlinux" || die "$tool cannot unpack the payload of $image"
[[ $(stat -c %s "$scratch/vmlinux") == "$size" ]] ||
    die "$image unpacked to $(stat -c %s "$scratch/vmlinux") bytes instead of $size"
[[ $(head -c 4 "$scratch/vmlinux") == $'\x7fELF' ]] || die "the payload of $image is not an ELF file"
publish "$scratch/vmlinux" "$output"
