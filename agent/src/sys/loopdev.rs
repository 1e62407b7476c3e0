//! Loop devices: block devices whose content is a file, linux/loop.h.
//!
//! All that are made here detach themselves when the last user closes them (`LO_FLAGS_AUTOCLEAR`): as long
//! as a device-mapper table uses one it stays, so the kernel counts the users, and what a crash of the
//! agent leaves goes with the table.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

const CONTROL_DEVICE: &str = "/dev/loop-control";
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;
const LOOP_CONFIGURE: libc::Ioctl = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4c82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// `sizeof(struct loop_info64)`.
const INFO_BYTES: usize = 232;
const INFO_OFFSET: usize = 24;
const INFO_SIZE_LIMIT: usize = 32;
const INFO_FLAGS: usize = 52;
const INFO_FILE_NAME: usize = 56;
const FILE_NAME_BYTES: usize = 64;
/// `sizeof(struct loop_config)`: `{u32 fd, u32 block_size, loop_info64, u64[8]}`.
const CONFIG_BYTES: usize = 8 + INFO_BYTES + 64;
/// Others take loop devices too: how often a free one may be gone before it is taken.
const ATTEMPTS: u32 = 64;

/// An open loop device. It stays attached until this and every other user of it is closed.
#[derive(Debug)]
pub struct LoopDevice {
    file: File,
    number: u32,
}

/// What a loop device shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backing {
    /// The file system's device number.
    pub device: u64,
    /// The file's inode number.
    pub inode: u64,
    /// Whether it is one as [`LoopDevice::attach`] makes them: detaches itself, shows the whole file.
    pub own_kind: bool,
    /// Whether it is read-only.
    pub read_only: bool,
}

impl LoopDevice {
    /// Attaches a file to a free device. `label` is what `losetup` shows, cut to 63 bytes.
    pub fn attach(backing: &File, read_only: bool, label: &str) -> io::Result<LoopDevice> {
        let control = OpenOptions::new().read(true).write(true).open(CONTROL_DEVICE)?;
        let mut config = configuration(backing.as_raw_fd(), read_only, label);
        for _ in 0..ATTEMPTS {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument.
            let number = super::check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) })?;
            let number = u32::try_from(number).map_err(|_| io::ErrorKind::InvalidData)?;
            let file = OpenOptions::new().read(true).write(!read_only).open(path(number))?;
            // SAFETY: LOOP_CONFIGURE reads one loop_config, which `config` is in size and layout.
            match super::check(unsafe { libc::ioctl(file.as_raw_fd(), LOOP_CONFIGURE, config.as_mut_ptr()) })
            {
                Ok(_) => return Ok(LoopDevice { file, number }),
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// Opens a device that is attached to something; ENXIO when it is not. As long as this is open it
    /// stays attached.
    pub fn open(number: u32) -> io::Result<(LoopDevice, Backing)> {
        let file = File::open(path(number))?;
        let mut info = [0; INFO_BYTES];
        // SAFETY: LOOP_GET_STATUS64 writes one loop_info64, whose size `info` has.
        super::check(unsafe { libc::ioctl(file.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) })?;
        Ok((LoopDevice { file, number }, backing(&info)))
    }

    /// The number in its name.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Its path under /dev.
    pub fn path(&self) -> PathBuf {
        path(self.number)
    }

    /// What is attached to it.
    pub fn backing(&self) -> io::Result<Backing> {
        Ok(LoopDevice::open(self.number)?.1)
    }

    /// Its size in bytes.
    pub fn size_bytes(&self) -> io::Result<u64> {
        use std::io::{Seek, SeekFrom};
        (&self.file).seek(SeekFrom::End(0))
    }
}

/// The numbers of all devices that are attached to something.
pub fn attached() -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir("/sys/block")? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok());
        // The directory is there only while a file is attached.
        if let Some(number) = number.filter(|_| entry.path().join("loop").exists()) {
            numbers.push(number);
        }
    }
    Ok(numbers)
}

fn path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

fn configuration(fd: i32, read_only: bool, label: &str) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    config[..4].copy_from_slice(&fd.to_ne_bytes());
    let flags = LO_FLAGS_AUTOCLEAR | if read_only { LO_FLAGS_READ_ONLY } else { 0 };
    let info = &mut config[8..8 + INFO_BYTES];
    info[INFO_FLAGS..][..4].copy_from_slice(&flags.to_ne_bytes());
    let length = label.len().min(FILE_NAME_BYTES - 1);
    info[INFO_FILE_NAME..][..length].copy_from_slice(&label.as_bytes()[..length]);
    config
}

fn backing(info: &[u8; INFO_BYTES]) -> Backing {
    let number = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&info[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    // lo_encrypt_key_size comes before lo_flags in the same eight bytes.
    let mut flags = [0; 4];
    flags.copy_from_slice(&info[INFO_FLAGS..INFO_FLAGS + 4]);
    let flags = u32::from_ne_bytes(flags);
    let whole = number(INFO_OFFSET) == 0 && number(INFO_SIZE_LIMIT) == 0;
    Backing {
        device: number(0),
        inode: number(8),
        own_kind: whole && flags & LO_FLAGS_AUTOCLEAR != 0,
        read_only: flags & LO_FLAGS_READ_ONLY != 0,
    }
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_has_the_headers_layout() {
        let mut expected = vec![7, 0, 0, 0, 0, 0, 0, 0];
        expected.resize(8 + 52, 0);
        expected.extend([5, 0, 0, 0]);
        expected.extend(b"disk.cow");
        expected.resize(304, 0);
        assert_eq!(configuration(7, true, "disk.cow")[..], expected);
        assert_eq!(configuration(7, false, &"x".repeat(100))[8 + 56 + 63], 0, "the name is terminated");
    }

    #[test]
    fn what_is_attached_is_read() {
        let mut info = [0; INFO_BYTES];
        info[..2].copy_from_slice(&[1, 8]);
        info[8..10].copy_from_slice(&[2, 1]);
        info[52] = 5;
        let expected = Backing { device: 0x801, inode: 0x102, own_kind: true, read_only: true };
        assert_eq!(backing(&info), expected);
        info[24] = 1;
        info[52] = 4;
        assert_eq!(backing(&info), Backing { own_kind: false, read_only: false, ..expected });
    }
}
