#!/bin/bash
# Makes a copy of an image that has the given envd, without mounting anything.
#
#     put-envd.sh IMAGE ENVD OUTPUT
#
# OUTPUT may be IMAGE. The copy is a new file that is renamed into place once it is complete and
# checked: running capsules keep the old image as the backing file of their disks, and its content
# must never change under them.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

readonly TARGET=/usr/local/bin/envd

(($# == 3)) || die "usage: put-envd.sh IMAGE ENVD OUTPUT"
image=$1 envd=$2 output=$3
[[ -f $image ]] || die "no image at $image"
[[ -f $envd ]] || die "no envd binary at $envd: build it first (make build)"
need debugfs e2fsck

scratch_beside "$(dirname -- "$output")"
cp --sparse=always -- "$image" "$scratch/image"
# debugfs reads its commands as words: a path of ours has no spaces.
install -m 0755 -- "$envd" "$scratch/envd"
time="@${SOURCE_DATE_EPOCH:-1686355200}"
cat >"$scratch/commands" <<END
set_current_time $time
rm $TARGET
write envd $TARGET
set_inode_field $TARGET mode 0100755
set_inode_field $TARGET uid 0
set_inode_field $TARGET gid 0
set_inode_field $TARGET atime $time
set_inode_field $TARGET mtime $time
set_inode_field $TARGET ctime $time
set_inode_field $TARGET crtime $time
END
# debugfs reports failures on its output only, so what it wrote is read back.
(cd "$scratch" && debugfs -w -f commands image) >"$scratch/debugfs.log" 2>&1 ||
    die "debugfs cannot write to a copy of $image: $(cat "$scratch/debugfs.log")"
debugfs -R "cat $TARGET" "$scratch/image" 2>/dev/null | cmp -s - "$scratch/envd" ||
    die "envd did not fit into a copy of $image: $(cat "$scratch/debugfs.log")"
e2fsck -f -n "$scratch/image" >"$scratch/fsck.log" 2>&1 ||
    die "the copy of $image is damaged: $(cat "$scratch/fsck.log")"
publish "$scratch/image" "$output"
