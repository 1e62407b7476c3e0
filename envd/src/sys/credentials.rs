//! Acting on files for a user: the file system ids of the one thread.

use super::syscall::{Errno, syscall};

/// While this lives, file accesses are those of another user: owner, groups and, since the kernel drops
/// the file capabilities with them, permissions. Dropping it makes the thread root again.
#[derive(Debug)]
pub struct ActingAs {
    switched: bool,
}

impl ActingAs {
    /// Switches. `is_root` is whether envd itself runs as root; without that it can act as itself only.
    pub fn user(uid: u32, gid: u32, groups: &[u32], is_root: bool) -> Result<ActingAs, Errno> {
        let acting = ActingAs { switched: is_root };
        if is_root {
            // SAFETY: the list is readable for its length; integer arguments otherwise. setfsuid reports
            // no error, so the second call of each pair reads back what holds.
            unsafe {
                syscall!(libc::SYS_setgroups, groups.len(), groups.as_ptr())?;
                let _ = syscall!(libc::SYS_setfsgid, gid);
                let _ = syscall!(libc::SYS_setfsuid, uid);
                if syscall!(libc::SYS_setfsgid, -1i32) != Ok(gid as usize)
                    || syscall!(libc::SYS_setfsuid, -1i32) != Ok(uid as usize)
                {
                    return Err(Errno(libc::EPERM));
                }
            }
        }
        Ok(acting)
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        if self.switched {
            // SAFETY: integer arguments and an empty list.
            unsafe {
                let _ = syscall!(libc::SYS_setfsuid, 0);
                let _ = syscall!(libc::SYS_setfsgid, 0);
                let _ = syscall!(libc::SYS_setgroups, 0, 0usize);
            }
        }
    }
}

/// The effective user id of this process.
pub fn effective_uid() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { syscall!(libc::SYS_geteuid) }.map_or(u32::MAX, |uid| uid as u32)
}
