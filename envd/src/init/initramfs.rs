//! The first stage: from the initramfs to the root file system.

use super::{BootError, During, say};
use crate::cmdline::CommandLine;
use crate::sys::syscall::Errno;
use crate::sys::{Fd, boot, clock, file};
use alloc::ffi::CString;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ffi::CStr;

/// The modules to load, one path a line, in their order.
const MODULE_ORDER: &CStr = c"/modules/order";
/// Bytes of the module list that are read.
const MAX_ORDER: usize = 64 * 1024;
/// Where the root file system is mounted before it becomes `/`.
const NEW_ROOT: &CStr = c"/sysroot";
/// How long the root device may take to appear.
const DEVICE_WAIT_MS: u64 = 10_000;
/// Between two looks at it: it is nearly always there at the first.
const DEVICE_POLL_US: u64 = 500;
/// How deep the initramfs may nest for it to be emptied in full.
const MAX_DEPTH: usize = 16;

/// Whether this is the initramfs: only it has the module list.
pub fn is_here() -> bool {
    file::metadata_at(file::CURRENT, MODULE_ORDER, 0).is_ok()
}

/// Loads the modules, mounts the root file system and makes it `/`.
pub fn leave(line: &CommandLine) -> Result<(), BootError> {
    load_modules()?;
    let device =
        CString::new(line.root.as_str()).map_err(|_| BootError::new("read root=", Errno(libc::EINVAL)))?;
    if line.root.is_empty() {
        return Err(BootError::new("find root= on the kernel command line", Errno(libc::ENOENT)));
    }
    wait_for(&device).during(&format!("wait for root device {}", line.root))?;
    let kind = CString::new(line.root_type.as_str())
        .map_err(|_| BootError::new("read rootfstype=", Errno(libc::EINVAL)))?;
    let read_only = if line.root_writable { 0 } else { libc::MS_RDONLY };
    match file::make_directory(file::CURRENT, NEW_ROOT, 0o755) {
        Ok(()) | Err(Errno(libc::EEXIST)) => {}
        Err(e) => return Err(BootError::new("make /sysroot", e)),
    }
    // What a fresh disk has behind the image reads as zeros already: nothing is to be written there.
    let options = if line.root_type == "ext4" { c"noinit_itable" } else { c"" };
    boot::mount(&device, NEW_ROOT, &kind, read_only | libc::MS_NOATIME, options)
        .during(&format!("mount {} as {}", line.root, line.root_type))?;
    for (from, to) in [(c"/dev", c"/sysroot/dev"), (c"/proc", c"/sysroot/proc"), (c"/sys", c"/sysroot/sys")] {
        boot::mount(from, to, c"", libc::MS_MOVE, c"").during("move /dev, /proc and /sys to the new root")?;
    }
    let old_root = file::open(file::CURRENT, c"/", libc::O_RDONLY | libc::O_DIRECTORY, 0).during("open /")?;
    boot::change_directory(NEW_ROOT).during("enter /sysroot")?;
    boot::mount(c".", c"/", c"", libc::MS_MOVE, c"").during("move the new root to /")?;
    boot::change_root_here().during("change root")?;
    // Its memory is the guest's to use. Nothing of it is needed any more: this program is in memory
    // already, and it has no other files open.
    if let Ok(old) = file::metadata(&old_root) {
        empty(&old_root, old.device, 0);
    }
    Ok(())
}

fn load_modules() -> Result<(), BootError> {
    let order = file::read_file(MODULE_ORDER, MAX_ORDER).during("read /modules/order")?;
    for path in order.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
        let result = CString::new(path).map_err(|_| Errno(libc::EINVAL)).and_then(|path| {
            let module = file::open(file::CURRENT, &path, libc::O_RDONLY, 0)?;
            boot::load_module(&module)
        });
        match result {
            // Built in, or loaded already; or hardware that is not there, such as KVM's clock.
            Ok(()) | Err(Errno(libc::EEXIST | libc::ENODEV | libc::EOPNOTSUPP)) => {}
            // If it was needed, what needs it says so.
            Err(e) => say(&format!("module {}: {e}", String::from_utf8_lossy(path))),
        }
    }
    Ok(())
}

fn wait_for(device: &CStr) -> Result<(), Errno> {
    let deadline = clock::monotonic_ms() + DEVICE_WAIT_MS;
    loop {
        match file::metadata_at(file::CURRENT, device, 0) {
            Ok(_) => return Ok(()),
            Err(e) if clock::monotonic_ms() >= deadline => return Err(e),
            Err(_) => clock::sleep_us(DEVICE_POLL_US),
        }
    }
}

/// Removes what a directory holds, on its own device only.
fn empty(directory: &Fd, device: u64, depth: usize) {
    let mut names: Vec<CString> = Vec::new();
    // What cannot be read or removed stays, and costs its memory.
    let _ = file::read_directory(directory, |name| {
        names.push(name.into());
        true
    });
    for name in names {
        let Ok(entry) = file::metadata_at(directory.raw(), &name, libc::AT_SYMLINK_NOFOLLOW) else {
            continue;
        };
        if entry.device != device {
            continue;
        }
        if entry.is_directory() {
            let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
            if depth < MAX_DEPTH
                && let Ok(inner) = file::open(directory.raw(), &name, flags, 0)
            {
                empty(&inner, device, depth + 1);
            }
            let _ = file::unlink(directory.raw(), &name, libc::AT_REMOVEDIR);
        } else {
            let _ = file::unlink(directory.raw(), &name, 0);
        }
    }
}
