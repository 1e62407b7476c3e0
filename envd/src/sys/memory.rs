//! Pages from the kernel.

use super::syscall::syscall;
use core::ptr::null_mut;

/// Maps fresh zero pages. Null when there is no memory.
pub fn map(length: usize) -> *mut u8 {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, at an address of the kernel's choice, touches no other memory.
    match unsafe { syscall!(libc::SYS_mmap, 0usize, length, access, kind, -1i32, 0usize) } {
        Ok(address) => address as *mut u8,
        Err(_) => null_mut(),
    }
}

/// Gives pages back.
///
/// # Safety
/// They were mapped with [`map`], with this length, and nothing uses them any more.
pub unsafe fn unmap(start: *mut u8, length: usize) {
    // SAFETY: the caller's. It cannot fail for a whole mapping.
    let _ = unsafe { syscall!(libc::SYS_munmap, start, length) };
}

/// Makes a mapping longer or shorter, perhaps elsewhere. Null when there is no memory; it then stays.
///
/// # Safety
/// It was mapped with [`map`], with the old length, and is used through the result only.
pub unsafe fn remap(start: *mut u8, old_length: usize, new_length: usize) -> *mut u8 {
    // SAFETY: the caller's.
    match unsafe { syscall!(libc::SYS_mremap, start, old_length, new_length, libc::MREMAP_MAYMOVE) } {
        Ok(address) => address as *mut u8,
        Err(_) => null_mut(),
    }
}
