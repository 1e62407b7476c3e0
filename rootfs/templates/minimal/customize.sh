#!/bin/bash
# Turns the freshly installed system into the guest's: its account, its configuration, and nothing in
# it that no program reads.
#
#     customize.sh TREE
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/../../lib.sh"

(($# == 1)) && [[ -d $1/etc ]] || die "usage: customize.sh TREE"
tree=$1

# The account that commands run as unless another is named.
chroot "$tree" useradd --create-home --uid 1000 --user-group --shell /bin/bash user
# Without !fqdn sudo looks the host's own name up in DNS at every call and complains about it.
cat >"$tree/etc/sudoers.d/user" <<'END'
Defaults !fqdn
user ALL=(ALL:ALL) NOPASSWD: ALL
END
chmod 0440 "$tree/etc/sudoers.d/user"
chroot "$tree" visudo --check --quiet

# Host name and resolver are set by envd at every start.
printf 'localhost\n' >"$tree/etc/hostname"
: >"$tree/etc/resolv.conf"
cat >"$tree/etc/hosts" <<'END'
127.0.0.1 localhost
::1 localhost ip6-localhost ip6-loopback
END
printf '/dev/vda / ext4 defaults 0 0\n' >"$tree/etc/fstab"

# The host's clock through KVM is the only source of time: no packet leaves the capsule for it.
cat >"$tree/etc/chrony/chrony.conf" <<'END'
refclock PHC /dev/ptp0 poll 2 dpoll -2 offset 0 stratum 2
makestep 0.1 -1
driftfile /var/lib/chrony/chrony.drift
cmdport 0
END

mkdir -p "$tree/usr/local/bin"

# A package added in a capsule brings no more than it needs.
cat >"$tree/etc/apt/apt.conf.d/90minimal" <<'END'
APT::Install-Recommends "false";
Acquire::Languages "none";
END
