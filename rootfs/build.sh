#!/bin/bash
# Builds what a host needs to start capsules: guest kernel, initramfs and a template's image.
#
#     rootfs/build.sh [--output DIR] [--envd FILE] [--cache DIR] [--template NAME] [--refresh]
#
#     --output DIR     where to, laid out as WRENN_DIR is           (builds/guest)
#     --envd FILE      the guest daemon, a static program           (builds/envd)
#     --cache DIR      downloads, checked and kept                  (builds/cache)
#     --template NAME  a directory of rootfs/templates              (minimal)
#     --refresh        take the newest Debian packages, not those of the last build
#
# Only what is out of date is made: nothing, or a new envd put into image and initramfs (seconds, no
# root, no network), or all of it. Each file appears by rename, complete; capsules that run from an
# older one keep it.
set -euo pipefail
here=$(realpath -- "$(dirname -- "${BASH_SOURCE[0]}")")
. "$here/lib.sh"

readonly SUITE=bookworm
# Another build of the same output, at most: a first one on a slow line.
readonly LOCK_WAIT_SEC=1800

repository=$(dirname -- "$here")
output=$repository/builds/guest envd=$repository/builds/envd cache=$repository/builds/cache
template=minimal refresh=
while (($#)); do
    case $1 in
    --refresh) refresh=refresh && shift && continue ;;
    --output | --envd | --cache | --template) (($# > 1)) && [[ $2 ]] || die "$1 needs a value" ;;
    *) die "unknown argument $1; the head of rootfs/build.sh lists them" ;;
    esac
    printf -v "${1#--}" '%s' "$2"
    shift 2
done
[[ $template =~ ^[a-z0-9][a-z0-9_-]{0,63}$ ]] || die "the template name $template is not of a-z, 0-9, - and _"
for file in packages dpkg.cfg customize.sh; do
    [[ -f $here/templates/$template/$file ]] || die "no $file in rootfs/templates/$template: see rootfs/README.md"
done
[[ -f $envd ]] || die "no envd binary at $envd: build it first (make build)"
# A dynamic program asks for a loader that the initramfs does not have.
if LC_ALL=C grep -q -a -F '/ld-linux' <(head -c 4096 -- "$envd"); then
    die "$envd is not a static program: build it with -C target-feature=+crt-static"
fi

kernels=$output/kernels image=$output/images/$template
mkdir -p "$kernels" "$image" "$cache"
exec 9>"$cache/lock"
flock --wait "$LOCK_WAIT_SEC" 9 || die "another build holds $cache/lock"
# What a build that was killed outright left behind; nobody else works here now.
rm -rf -- "$output"/.rootfs.* "$kernels"/.rootfs.* "$image"/.rootfs.* "$cache"/kernel/.rootfs.*

# recipe FILE...: a digest of what decides about a result, beside envd.
recipe() {
    cat -- "$@" | sha256sum | cut -d ' ' -f 1
}
envd_sha256=$(digest "$envd")
kernel_recipe=$(recipe "$here"/{lib,modules,build,fetch-kernel,extract-vmlinux,make-initramfs}.sh)
# All templates, as one may build on another.
image_recipe=$(recipe "$here"/{lib,build,apt-sources,make-image,put-envd}.sh "$here"/templates/*/*)

# is_current DIRECTORY RECIPE FILE...: whether the manifest there speaks of this recipe, and the files
# that it was written with are there.
is_current() {
    local manifest=$1/manifest.json recipe=$2 file
    [[ ! $refresh && $(manifest_value "$manifest" recipe_sha256) == "$recipe" && -f $1/SHA256SUMS ]] || return 1
    for file in "${@:3}"; do
        [[ -s $file ]] || return 1
    done
}

# has_envd DIRECTORY: whether what is there was made with this envd.
has_envd() {
    [[ $(manifest_value "$1/manifest.json" envd_sha256) == "$envd_sha256" ]]
}

# begin DIRECTORY: from here to `finish` its files do not belong together; a crash between the two
# makes the next build start over.
begin() {
    rm -f -- "$1/manifest.json" "$1/SHA256SUMS"
    sync -- "$1"
}

# finish DIRECTORY FILE... <manifest: writes the manifest, and the digests of FILEs and of itself.
finish() {
    cat >"$scratch/manifest.json"
    publish "$scratch/manifest.json" "$1/manifest.json"
    (cd "$1" && sha256sum -- "${@:2}" manifest.json) >"$scratch/SHA256SUMS"
    publish "$scratch/SHA256SUMS" "$1/SHA256SUMS"
}

build_kernel() {
    local package version sha256 file release semver
    read -r package version sha256 file < <("$here/fetch-kernel.sh" "$cache" $refresh) || die "no kernel package"
    release=${package#linux-image-} semver=${version%%-*}
    [[ $semver =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || die "the kernel's version $version has no three numbers"
    say "kernel $semver of $package $version"
    need dpkg-deb
    dpkg-deb --extract "$file" "$scratch/kernel"
    begin "$kernels"
    [[ -f $kernels/vmlinux-$semver && ! $kernel_changed ]] ||
        "$here/extract-vmlinux.sh" "$scratch/kernel/boot/vmlinuz-$release" "$kernels/vmlinux-$semver"
    "$here/make-initramfs.sh" "$scratch/kernel/lib/modules/$release" "$envd" "$kernels/initramfs.img-$semver"
    rm -rf -- "$scratch/kernel"
    finish "$kernels" "vmlinux-$semver" "initramfs.img-$semver" <<END
{
  "version": "$semver",
  "package": "$package",
  "package_version": "$version",
  "package_sha256": "$sha256",
  "envd_sha256": "$envd_sha256",
  "recipe_sha256": "$kernel_recipe"
}
END
}

build_image() {
    local base=$image/rootfs.ext4 packages=$image/packages.txt
    if [[ $image_changed ]]; then
        "$here/apt-sources.sh" "$SUITE" >"$scratch/sources.list"
        "$here/make-image.sh" "$here/templates/$template" "$scratch/sources.list" "$cache" "$scratch"
        base=$scratch/base.ext4 packages=$scratch/packages.txt
    fi
    say "putting envd into $image/rootfs.ext4"
    begin "$image"
    "$here/put-envd.sh" "$base" "$envd" "$image/rootfs.ext4"
    [[ $packages == "$image/packages.txt" ]] || publish "$packages" "$image/packages.txt"
    finish "$image" rootfs.ext4 packages.txt <<END
{
  "template": "$template",
  "debian_suite": "$SUITE",
  "packages": $(wc -l <"$image/packages.txt"),
  "packages_sha256": "$(digest "$image/packages.txt")",
  "image_bytes": $(stat -c %s "$image/rootfs.ext4"),
  "envd_sha256": "$envd_sha256",
  "recipe_sha256": "$image_recipe"
}
END
}

version=$(manifest_value "$kernels/manifest.json" version)
kernel_changed=yes image_changed=yes
if is_current "$kernels" "$kernel_recipe" "$kernels/vmlinux-$version" "$kernels/initramfs.img-$version"; then
    kernel_changed=
fi
if is_current "$image" "$image_recipe" "$image/rootfs.ext4" "$image/packages.txt"; then
    image_changed=
fi
if [[ ! $kernel_changed && ! $image_changed ]] && has_envd "$kernels" && has_envd "$image"; then
    say "$output is up to date"
    exit
fi

scratch_beside "$output"
if [[ $kernel_changed ]] || ! has_envd "$kernels"; then
    build_kernel
fi
if [[ $image_changed ]] || ! has_envd "$image"; then
    build_image
fi
say "$output is ready: kernel $(manifest_value "$kernels/manifest.json" version), image $template" \
    "($(($(stat -c %s "$image/rootfs.ext4") / 1048576)) MiB)"
