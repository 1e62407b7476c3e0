//! Pseudoterminals (pty(7), ioctl_tty(2)).

use super::fd::Fd;
use super::syscall::{Errno, syscall};

/// Group of terminals in Debian's base-passwd, so that write(1) and wall(1) work.
pub const TTY_GROUP: u32 = 5;

/// Opens a pseudoterminal: master and slave. The slave belongs to `owner`.
pub fn open(owner: u32, columns: u16, rows: u16) -> Result<(Fd, Fd), Errno> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the path is NUL-terminated; the integers and the termios struct live for the calls.
    unsafe {
        let master = Fd::new(syscall!(libc::SYS_open, c"/dev/ptmx".as_ptr(), flags | libc::O_NONBLOCK, 0)?);
        let unlock = 0i32;
        syscall!(libc::SYS_ioctl, master.raw(), libc::TIOCSPTLCK, &raw const unlock)?;
        // Opens the slave without its path, which a mount namespace could have changed.
        let slave = Fd::new(syscall!(libc::SYS_ioctl, master.raw(), libc::TIOCGPTPEER, flags)?);
        let mut modes: KernelTermios = core::mem::zeroed();
        syscall!(libc::SYS_ioctl, slave.raw(), libc::TCGETS, &raw mut modes)?;
        modes.c_iflag |= libc::IUTF8;
        syscall!(libc::SYS_ioctl, slave.raw(), libc::TCSETS, &raw const modes)?;
        // A terminal that the user does not own still works for this one process.
        let _ = syscall!(libc::SYS_fchown, slave.raw(), owner, TTY_GROUP);
        resize(&master, columns, rows)?;
        Ok((master, slave))
    }
}

/// `struct termios` as the kernel has it (include/uapi/asm-generic/termbits.h).
#[repr(C)]
struct KernelTermios {
    c_iflag: u32,
    c_oflag: u32,
    c_cflag: u32,
    c_lflag: u32,
    c_line: u8,
    c_cc: [u8; 19],
}

/// Sets the size; the foreground process group gets SIGWINCH.
pub fn resize(master: &Fd, columns: u16, rows: u16) -> Result<(), Errno> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the struct lives for the call.
    unsafe { syscall!(libc::SYS_ioctl, master.raw(), libc::TIOCSWINSZ, &raw const size) }?;
    Ok(())
}
