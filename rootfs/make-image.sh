#!/bin/bash
# Makes a template's root file system: Debian packages, the template's own set-up, one ext4 file.
#
#     make-image.sh TEMPLATE_DIR SOURCES CACHE_DIR OUTPUT_DIR
#
# TEMPLATE_DIR holds `packages`, `dpkg.cfg` and `customize.sh`; SOURCES is a sources.list (see apt-sources.sh);
# CACHE_DIR/debs keeps the packages for the next time. Leaves base.ext4 (without envd, see
# put-envd.sh) and packages.txt in OUTPUT_DIR, which exists. Runs as root, with about 1 GB of memory
# for the tree.
#
# Everything happens in a mount namespace of its own, on a tmpfs: however this ends, the kernel
# removes every mount and every file of it with the last process.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

# Files made during the build, and dates inside them, get the day of Debian 12's release.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1686355200}
readonly SUITE=bookworm
# Made-up constants: the same packages give the same file system.
readonly FILESYSTEM_UUID=c0de5afe-0000-4000-8000-000000000012
readonly HASH_SEED=c0de5afe-0000-4000-8000-000000000021
readonly BLOCK_BYTES=4096
# What the image has free: envd goes in, and a first start writes a little. A capsule's own disk is
# grown when it is created.
readonly FREE_BLOCKS=$((32 * 1024 * 1024 / BLOCK_BYTES))

(($# == 4)) || die "usage: make-image.sh TEMPLATE_DIR SOURCES CACHE_DIR OUTPUT_DIR"
((EUID == 0)) || die "making an image needs root (to own the files in it): run this as root"
if [[ ${MAKE_IMAGE_NAMESPACE:-} != private ]]; then
    MAKE_IMAGE_NAMESPACE=private exec unshare --mount --propagation private -- "$0" "$@"
fi
template=$(realpath -- "$1") sources=$(realpath -- "$2") cache=$(realpath -- "$3")/debs output=$(realpath -- "$4")
need mmdebstrap mkfs.ext4 e2fsck dumpe2fs debugfs

# package_names: the template's list without comments, comma-separated.
package_names() {
    sed -e 's/#.*//' -e '/^[[:space:]]*$/d' "$template/packages" | paste -s -d ,
}

# drop_damaged_packages: what no longer has the digest that it was stored with is downloaded again.
drop_damaged_packages() {
    local file
    [[ -f $cache/SHA256SUMS ]] || { rm -f -- "$cache"/*.deb; return; }
    while IFS= read -r file; do
        say "cached package $file is damaged: downloading it again"
        rm -f -- "$cache/$file"
    done < <(cd "$cache" && sha256sum --check --quiet SHA256SUMS 2>/dev/null | sed -n 's/: FAILED.*//p')
    for file in "$cache"/*.deb; do
        grep -q -F "  ${file##*/}" "$cache/SHA256SUMS" || rm -f -- "$file"
    done
}

# install_packages: mmdebstrap into $tree, packages from and to the cache.
install_packages() {
    # The machine's proxies and relaxed date checks hold for the build, and do not go into the image.
    apt-config dump | grep -E '^Acquire::(https?::(Proxy|Ca)|Check-|Retries)' >"$work/apt.conf" || true
    local names
    names=$(package_names)
    mmdebstrap --quiet --mode=root --variant=minbase --format=directory --architectures=amd64 \
        --include="$names" --skip=essential/unlink \
        --aptopt="$work/apt.conf" --aptopt='Acquire::Languages "none"' \
        --dpkgopt="$template/dpkg.cfg" \
        --setup-hook='mkdir -p "$1/var/cache/apt/archives" && mount --bind '"'$cache'"' "$1/var/cache/apt/archives"' \
        --essential-hook='APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get --yes --quiet=2 --download-only install '"${names//,/ }" \
        --customize-hook='umount "$1/var/cache/apt/archives"' \
        --customize-hook="'$template/customize.sh' \"\$1\"" \
        "$SUITE" "$tree" "$sources" >&2 || die "mmdebstrap failed: see above; can this machine reach its Debian mirror?"
}

# tidy_tree: what packages and their scripts left that differs from build to build or is never read.
tidy_tree() {
    mv -- "$tree/etc/dpkg/dpkg.cfg.d/99mmdebstrap" "$tree/etc/dpkg/dpkg.cfg.d/minimal"
    rm -f -- "$tree"/etc/apt/apt.conf.d/99mmdebstrap
    rm -f -- "$tree"/var/lib/dpkg/*-old "$tree"/var/cache/debconf/*-old "$tree"/etc/{passwd,shadow,group,gshadow,subuid,subgid}-
    rm -rf -- "$tree"/var/lib/apt/lists/* "$tree"/var/cache/apt/*
    find "$tree/var/log" -type f -delete
    find "$tree/dev" -mindepth 1 -delete
    find "$tree" -newer "$work/started" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
}

# write_package_list: name, version, architecture and the SHA-256 that apt checked, one package a line;
# the cache keeps these packages only.
write_package_list() {
    local name version architecture file
    (cd "$cache" && sha256sum -- *.deb) >"$work/sums"
    chroot "$tree" dpkg-query -W -f '${Package} ${Version} ${Architecture}\n' | sort >"$work/installed"
    while read -r name version architecture; do
        file=${name}_${version//:/%3a}_$architecture.deb
        grep -F "  $file" "$work/sums" >>"$work/kept" || die "package $file is not in $cache"
        printf '%s %s %s %s\n' "$name" "$version" "$architecture" "$(tail -n 1 "$work/kept" | cut -d ' ' -f 1)"
    done <"$work/installed" >"$work/packages.txt"
    cut -d ' ' -f 3- "$work/kept" | sort | comm -13 - <(cd "$cache" && ls -- *.deb) |
        (cd "$cache" && xargs -r rm -f --)
    publish "$work/kept" "$cache/SHA256SUMS"
}

# make_filesystem FILE BLOCKS. Inode tables and journal are zeroed now rather than by every guest's
# kernel in the background; the resize inode lets the file system grow a thousandfold, mounted or not.
make_filesystem() {
    truncate -s "$(($2 * BLOCK_BYTES))" "$1"
    E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mkfs.ext4 -q -F -b $BLOCK_BYTES -I 256 -i 16384 -m 0 -J size=16 \
        -O 64bit,metadata_csum,resize_inode,flex_bg,huge_file,dir_nlink,extra_isize,^orphan_file,^metadata_csum_seed \
        -E "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0,nodiscard,hash_seed=$HASH_SEED" \
        -U $FILESYSTEM_UUID -L root -d "$tree" "$1" "$2"
}

# settle_times FILE: mke2fs copies access and change times of the build; they become the build's date.
settle_times() {
    local count
    count=$(superblock "$1" 'Inode count')
    dumpe2fs "$1" 2>/dev/null | sed -n 's/^ *Free inodes: *//p' | tr -s ', ' '\n' |
        awk -v count="$count" -v date="@$SOURCE_DATE_EPOCH" -F - '
            NF { for (i = $1; i <= (NF > 1 ? $2 : $1); i++) free[i] = 1 }
            END {
                print "set_current_time " date
                # 2 is the root directory, 11 the first that is not reserved (EXT4_GOOD_OLD_FIRST_INO).
                for (i = 2; i <= count; i = (i == 2 ? 11 : i + 1))
                    if (!(i in free)) {
                        print "set_inode_field <" i "> atime " date
                        print "set_inode_field <" i "> ctime " date
                    }
            }' >"$work/times"
    debugfs -w -f "$work/times" "$1" >"$work/debugfs.log" 2>&1 || die "debugfs failed on the new file system"
}

# superblock FILE FIELD: a number of dumpe2fs' header.
superblock() {
    dumpe2fs -h "$1" 2>/dev/null | sed -n "s/^$2: *//p"
}

work=$output/work
tree=$work/tree
mkdir -p "$cache" "$work"
mount -t tmpfs -o mode=0755,size=75% tmpfs "$work"
mkdir "$tree"
touch "$work/started"

drop_damaged_packages
say "installing Debian $SUITE and $(package_names)"
install_packages
write_package_list
tidy_tree

say "writing the file system"
# The first pass is roomy and tells how much the second one needs.
content=$(du --summarize --block-size=$BLOCK_BYTES "$tree" | cut -f 1)
make_filesystem "$work/first.ext4" $((content * 5 / 4 + FREE_BLOCKS))
used=$(($(superblock "$work/first.ext4" 'Block count') - $(superblock "$work/first.ext4" 'Free blocks')))
rm -f "$work/first.ext4"
make_filesystem "$work/base.ext4" $((used + FREE_BLOCKS))
settle_times "$work/base.ext4"
e2fsck -f -n "$work/base.ext4" >"$work/fsck" 2>&1 || die "the new file system is damaged: $(cat "$work/fsck")"

cp --sparse=always "$work/base.ext4" "$output/base.ext4"
cp "$work/packages.txt" "$output/packages.txt"
