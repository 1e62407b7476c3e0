//! The second stage: the file systems and services that programs expect.

use super::{BootError, During, say};
use crate::sys::syscall::Errno;
use crate::sys::{boot, fd, file, spawn};
use alloc::ffi::CString;
use alloc::format;
use alloc::vec::Vec;
use core::ffi::CStr;

const SAFE: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;

struct Mount {
    kind: &'static CStr,
    target: &'static CStr,
    flags: libc::c_ulong,
    options: &'static CStr,
}

/// What the first stage needs too, and moves along.
const KERNEL_INTERFACES: [Mount; 3] = [
    Mount { kind: c"proc", target: c"/proc", flags: SAFE, options: c"" },
    Mount { kind: c"sysfs", target: c"/sys", flags: SAFE, options: c"" },
    Mount { kind: c"devtmpfs", target: c"/dev", flags: libc::MS_NOSUID, options: c"mode=0755" },
];

const REST: [Mount; 4] = [
    Mount {
        kind: c"devpts",
        target: c"/dev/pts",
        flags: libc::MS_NOSUID | libc::MS_NOEXEC,
        options: c"gid=5,mode=620,ptmxmode=666",
    },
    Mount {
        kind: c"tmpfs",
        target: c"/dev/shm",
        flags: libc::MS_NOSUID | libc::MS_NODEV,
        options: c"mode=1777",
    },
    Mount { kind: c"tmpfs", target: c"/run", flags: libc::MS_NOSUID | libc::MS_NODEV, options: c"mode=0755" },
    Mount { kind: c"cgroup2", target: c"/sys/fs/cgroup", flags: SAFE, options: c"nsdelegate" },
];

/// Directories that programs take for granted, with their permissions.
const DIRECTORIES: [(&CStr, u32); 3] = [(c"/run/lock", 0o1777), (c"/run/wrenn", 0o755), (c"/tmp", 0o1777)];

const LINKS: [(&CStr, &CStr); 4] = [
    (c"/proc/self/fd", c"/dev/fd"),
    (c"/proc/self/fd/0", c"/dev/stdin"),
    (c"/proc/self/fd/1", c"/dev/stdout"),
    (c"/proc/self/fd/2", c"/dev/stderr"),
];

fn mount(mount: &Mount) -> Result<(), Errno> {
    match file::make_directory(file::CURRENT, mount.target, 0o755) {
        Ok(()) | Err(Errno(libc::EEXIST | libc::EROFS)) => {}
        Err(e) => return Err(e),
    }
    match boot::mount(mount.kind, mount.target, mount.kind, mount.flags, mount.options) {
        // The kernel or an initramfs mounted it already.
        Ok(()) | Err(Errno(libc::EBUSY)) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Mounts `/proc`, `/sys` and `/dev`, and makes the console the standard streams when the kernel found
/// none.
pub fn mount_kernel_interfaces() -> Result<(), BootError> {
    for each in &KERNEL_INTERFACES {
        mount(each).during(&format!("mount {}", each.target.to_string_lossy()))?;
    }
    if let Ok(console) = file::open(file::CURRENT, c"/dev/console", libc::O_RDWR | libc::O_NOCTTY, 0) {
        boot::use_as_standard_streams(&console).during("use the console")?;
    }
    fd::sanitize_inherited().during("open /dev/null")
}

/// Mounts and makes the rest. Failures are told and passed over: most programs run without.
pub fn prepare() {
    for each in &REST {
        if let Err(e) = mount(each) {
            say(&format!("mount {}: {e}", each.target.to_string_lossy()));
        }
    }
    for (path, mode) in DIRECTORIES {
        let made = file::make_directory(file::CURRENT, path, mode);
        // The caller's umask does not count for the sticky bit and the rest.
        let result = match made {
            Ok(()) => file::set_mode_at(path, mode),
            Err(Errno(libc::EEXIST)) => Ok(()),
            Err(e) => Err(e),
        };
        if let Err(e) = result {
            say(&format!("make {}: {e}", path.to_string_lossy()));
        }
    }
    for (target, path) in LINKS {
        match file::symlink(target, path) {
            Ok(()) | Err(Errno(libc::EEXIST)) => {}
            Err(e) => say(&format!("link {}: {e}", path.to_string_lossy())),
        }
    }
}

/// Name of KVM's clock, drivers/ptp/ptp_kvm_common.c.
const KVM_CLOCK_NAME: &[u8] = b"KVM virtual PTP";
const CHRONYD: &CStr = c"/usr/sbin/chronyd";

/// Keeps the clock by the host's where KVM offers it. chronyd stays a child of PID 1.
pub fn start_time_service() -> Result<(), BootError> {
    let name = file::read_file(c"/sys/class/ptp/ptp0/clock_name", 64).unwrap_or_default();
    if name.trim_ascii_end() != KVM_CLOCK_NAME || file::metadata_at(file::CURRENT, c"/dev/ptp0", 0).is_err() {
        return Ok(());
    }
    let null = file::open(file::CURRENT, c"/dev/null", libc::O_RDWR, 0).during("open /dev/null")?;
    let strings = |list: &[&CStr]| -> Vec<CString> { list.iter().map(|s| (*s).into()).collect() };
    let plan = spawn::Plan {
        candidates: strings(&[CHRONYD]),
        // In the foreground, so that it is one process; its configuration as arguments, so that no file
        // has to fit. After a resume the clock is wrong by any amount, so it may always be stepped.
        argv: strings(&[
            CHRONYD,
            c"-n",
            c"refclock PHC /dev/ptp0 poll 3 dpoll -2 offset 0 trust prefer",
            c"makestep 0.1 -1",
            c"driftfile /var/lib/chrony/chrony.drift",
            c"cmdport 0",
        ]),
        environment: strings(&[c"PATH=/usr/sbin:/usr/bin:/sbin:/bin"]),
        cwd: c"/".into(),
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        terminal: false,
        switch_user: false,
    };
    // A missing chronyd ends the child; the guest then keeps its own time.
    spawn::spawn(&plan, [&null, &null, &null], None).during("start chronyd")?;
    Ok(())
}
