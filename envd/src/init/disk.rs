//! The root file system grows to its disk: a template's image is small, a capsule's disk is not.

use super::{BootError, During, say};
use crate::cmdline::CommandLine;
use crate::sys::{boot, file};
use alloc::ffi::CString;
use alloc::format;

/// Block size of the images' file systems, in bytes; EXT4_IOC_RESIZE_FS counts in it.
const BLOCK_BYTES: u64 = 4096;

/// Grows an ext4 root file system to the size of its disk, in a process of its own at the lowest priority:
/// it takes tens of milliseconds, and a capsule can be used meanwhile. PID 1 reaps the process.
pub fn grow_root(line: &CommandLine) -> Result<(), BootError> {
    if line.root_type != "ext4" || !line.root_writable || line.root.is_empty() {
        return Ok(());
    }
    let Ok(device) = CString::new(line.root.as_str()) else { return Ok(()) };
    boot::in_background(|| {
        let grown = file::open(file::CURRENT, &device, libc::O_RDONLY, 0).and_then(|disk| {
            let blocks = boot::device_bytes(&disk)? / BLOCK_BYTES;
            let root = file::open(file::CURRENT, c"/", libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
            if blocks > file::total_blocks(&root, BLOCK_BYTES)? {
                boot::resize_ext4(&root, blocks)
            } else {
                Ok(())
            }
        });
        if let Err(e) = grown {
            say(&format!("grow the root file system: {e}"));
        }
    })
    .during("start a process to grow the root file system")
}
