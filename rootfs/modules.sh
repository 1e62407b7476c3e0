# shellcheck shell=bash
# Sourced by what makes an initramfs: puts modules of $modules, a kernel package's lib/modules/<release>,
# into $tree/modules, and their absolute paths in the order in which to load them, one a line, into
# $tree/modules/order. $scratch is for what is between.
#
# Modules lose their symbols, type information and signature. A kernel that takes unsigned modules
# (Debian's does, outside secure boot) else checks a signature and parses types for each one, which
# costs a tenth of the whole start where the guest's instructions are emulated.

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
