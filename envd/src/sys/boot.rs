//! What only an init does: mounts, kernel modules, the host name, the power.

use super::fd::Fd;
use super::syscall::{Errno, syscall};
use core::ffi::CStr;

/// Mounts a file system, mount(2). `data` are its own options.
pub fn mount(
    source: &CStr,
    target: &CStr,
    kind: &CStr,
    flags: libc::c_ulong,
    data: &CStr,
) -> Result<(), Errno> {
    // SAFETY: all strings are NUL-terminated.
    unsafe {
        syscall!(libc::SYS_mount, source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr())
    }?;
    Ok(())
}

/// Changes the working directory.
pub fn change_directory(path: &CStr) -> Result<(), Errno> {
    // SAFETY: the path is NUL-terminated.
    unsafe { syscall!(libc::SYS_chdir, path.as_ptr()) }?;
    Ok(())
}

/// Makes the working directory the root directory.
pub fn change_root_here() -> Result<(), Errno> {
    // SAFETY: the path is NUL-terminated.
    unsafe { syscall!(libc::SYS_chroot, c".".as_ptr()) }?;
    Ok(())
}

/// Loads a kernel module from an open file, without options.
pub fn load_module(module: &Fd) -> Result<(), Errno> {
    // SAFETY: the options are NUL-terminated.
    unsafe { syscall!(libc::SYS_finit_module, module.raw(), c"".as_ptr(), 0) }?;
    Ok(())
}

/// Sets the host name, 1 to 64 bytes.
pub fn set_host_name(name: &[u8]) -> Result<(), Errno> {
    // SAFETY: the bytes are readable for their length.
    unsafe { syscall!(libc::SYS_sethostname, name.as_ptr(), name.len()) }?;
    Ok(())
}

/// Copies descriptor `from` to 0, 1 and 2.
pub fn use_as_standard_streams(from: &Fd) -> Result<(), Errno> {
    for target in 0..3 {
        // SAFETY: integer arguments. Nothing in this process owns 0 to 2.
        unsafe { syscall!(libc::SYS_dup2, from.raw(), target) }?;
    }
    Ok(())
}

/// This process's id.
pub fn process_id() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { syscall!(libc::SYS_getpid) }.map_or(0, |pid| pid as u32)
}

/// The lowest priority, setpriority(2).
const LOWEST_PRIORITY: i32 = 19;

/// Runs something in a process of its own, a copy of this one, which then ends. It gets what processor
/// time the rest leaves.
pub fn in_background(work: impl FnOnce()) -> Result<(), Errno> {
    fork(|| {
        // SAFETY: takes numbers only. Should it fail, the work is done at the usual priority.
        let _ = unsafe { syscall!(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, LOWEST_PRIORITY) };
        work();
        0
    })?;
    Ok(())
}

/// Runs something in a process of its own, a copy of this one, which then ends with the status that it
/// gives. Its process id.
pub fn fork(work: impl FnOnce() -> i32) -> Result<u32, Errno> {
    // SAFETY: fork without a new stack: the child runs on a copy of this one. This process has one thread,
    // so the copy is whole.
    let pid = unsafe { syscall!(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) }?;
    if pid == 0 {
        exit(work());
    }
    Ok(pid as u32)
}

/// Sets the name that this process is listed by, of which the kernel takes 15 bytes.
pub fn set_process_name(name: &CStr) {
    // SAFETY: the name is NUL-terminated. It cannot fail.
    let _ = unsafe { syscall!(libc::SYS_prctl, libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0) };
}

/// `BLKGETSIZE64`, linux/fs.h: `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: u64 = 0x8008_1272;
/// `EXT4_IOC_RESIZE_FS`, uapi/linux/ext4.h: `_IOW('f', 16, __u64)`.
const EXT4_IOC_RESIZE_FS: u64 = 0x4008_6610;

/// Size of a block device, in bytes.
pub fn device_bytes(device: &Fd) -> Result<u64, Errno> {
    let mut bytes = 0u64;
    // SAFETY: the kernel writes a u64 to a u64.
    unsafe { syscall!(libc::SYS_ioctl, device.raw(), BLKGETSIZE64, &raw mut bytes) }?;
    Ok(bytes)
}

/// Grows the mounted ext4 file system of an open file to so many of its blocks.
pub fn resize_ext4(inside: &Fd, blocks: u64) -> Result<(), Errno> {
    // SAFETY: the kernel reads a u64 from a u64.
    unsafe { syscall!(libc::SYS_ioctl, inside.raw(), EXT4_IOC_RESIZE_FS, &raw const blocks) }?;
    Ok(())
}

/// Ends this process.
pub fn exit(status: i32) -> ! {
    loop {
        // SAFETY: integer argument. It does not return.
        let _ = unsafe { syscall!(libc::SYS_exit_group, status) };
    }
}

/// Writes everything to disk.
pub fn sync_all() {
    // SAFETY: takes nothing and cannot fail.
    let _ = unsafe { syscall!(libc::SYS_sync) };
}

/// Makes the caller undying for the kernel's memory pressure, so that a guest stays reachable.
pub fn set_oom_score(score: &[u8]) {
    if let Ok(fd) = super::file::open(super::file::CURRENT, c"/proc/self/oom_score_adj", libc::O_WRONLY, 0) {
        // Without the right to it, the score stays as it is.
        let _ = fd.write(score);
    }
}

/// Ends the virtual machine. Returns only when the caller may not do that.
///
/// It asks for a restart, not for power off: without ACPI the latter only halts the processor, while
/// every VMM that Wrenn drives is told to exit when its guest restarts.
pub fn end_machine() {
    sync_all();
    // SAFETY: the magic numbers of reboot(2).
    let _ = unsafe {
        syscall!(
            libc::SYS_reboot,
            libc::LINUX_REBOOT_MAGIC1 as u32,
            libc::LINUX_REBOOT_MAGIC2,
            libc::LINUX_REBOOT_CMD_RESTART as u32,
            0usize
        )
    };
}
