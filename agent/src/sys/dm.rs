//! Device-mapper: the ioctls of /dev/mapper/control, linux/dm-ioctl.h (interface version 4).
//!
//! Every call takes and gives one buffer: a `struct dm_ioctl` of 312 bytes, then what belongs to the call.
//! The buffers are made and read as bytes here, so the kernel's structures need no twins in Rust.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

/// The control device.
pub const CONTROL_DEVICE: &str = "/dev/mapper/control";
/// The longest device name, in bytes: `DM_NAME_LEN` without the terminator.
pub const MAX_NAME_BYTES: usize = 127;
/// The longest unique identifier, in bytes: `DM_UUID_LEN` without the terminator.
pub const MAX_UUID_BYTES: usize = 128;
/// The longest kind of target, in bytes: `DM_MAX_TYPE_NAME` without the terminator.
const MAX_KIND_BYTES: usize = 15;

/// `sizeof(struct dm_ioctl)`.
const HEADER_BYTES: usize = 312;
/// `sizeof(struct dm_target_spec)`.
const TARGET_BYTES: usize = 40;
const OFFSET_DATA_SIZE: usize = 12;
const OFFSET_DATA_START: usize = 16;
const OFFSET_TARGET_COUNT: usize = 20;
const OFFSET_OPEN_COUNT: usize = 24;
const OFFSET_FLAGS: usize = 28;
const OFFSET_DEVICE: usize = 40;
const OFFSET_NAME: usize = 48;
const OFFSET_UUID: usize = 176;
const UUID_END: usize = 305;

/// `_IOWR(DM_IOCTL, nr, struct dm_ioctl)` with `DM_IOCTL` 0xfd.
const fn command(nr: u8) -> libc::Ioctl {
    0xc138_fd00 | nr as libc::Ioctl
}
const DM_VERSION: libc::Ioctl = command(0);
const DM_LIST_DEVICES: libc::Ioctl = command(2);
const DM_DEV_CREATE: libc::Ioctl = command(3);
const DM_DEV_REMOVE: libc::Ioctl = command(4);
const DM_DEV_SUSPEND: libc::Ioctl = command(6);
const DM_DEV_STATUS: libc::Ioctl = command(7);
const DM_TABLE_LOAD: libc::Ioctl = command(9);
const DM_TABLE_STATUS: libc::Ioctl = command(12);

const DM_SUSPEND_FLAG: u32 = 1 << 1;
const DM_STATUS_TABLE_FLAG: u32 = 1 << 4;
const DM_ACTIVE_PRESENT_FLAG: u32 = 1 << 5;
const DM_BUFFER_FULL_FLAG: u32 = 1 << 8;
const DM_SKIP_LOCKFS_FLAG: u32 = 1 << 10;

/// Room for an answer at first, and at most: 65,536 devices with names of 100 bytes need 8 MiB.
const FIRST_ANSWER_BYTES: usize = 16 * 1024;
const MAX_ANSWER_BYTES: usize = 16 * 1024 * 1024;

/// One line of a device's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where on the device it begins, in sectors of 512 bytes.
    pub start_sector: u64,
    /// How long it is, in sectors.
    pub sectors: u64,
    /// What makes it: `snapshot`, `linear`, `error`...
    pub kind: String,
    /// What that kind wants to know; or, read back, what it says of itself.
    pub parameters: String,
}

/// What there is to know of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its unique identifier.
    pub uuid: String,
    /// Its number: /dev/dm-MINOR.
    pub minor: u32,
    /// Its number in sysfs's and dm tables' form, MAJOR:MINOR.
    pub number: String,
    /// How often it is open.
    pub open_count: u32,
    /// Whether its input and output wait.
    pub suspended: bool,
    /// Whether it has a table.
    pub active: bool,
}

/// The open control device.
#[derive(Debug)]
pub struct Control(File);

impl Control {
    /// Opens the control device and makes sure that the kernel speaks version 4. NotFound where there is
    /// no device-mapper.
    pub fn open() -> io::Result<Control> {
        let control = Control(OpenOptions::new().read(true).write(true).open(CONTROL_DEVICE)?);
        control.call(DM_VERSION, &mut header("", "", 0)?)?;
        Ok(control)
    }

    /// Makes a device without a table. EBUSY when the name or the identifier is taken.
    pub fn create(&self, name: &str, uuid: &str) -> io::Result<Device> {
        let mut buffer = header(name, uuid, 0)?;
        self.call(DM_DEV_CREATE, &mut buffer)?;
        device(&buffer)
    }

    /// Gives a device the table that its next [`Control::resume`] makes the valid one.
    pub fn load(&self, name: &str, targets: &[Target]) -> io::Result<()> {
        self.call(DM_TABLE_LOAD, &mut load_request(name, targets)?)
    }

    /// Lets a device's input and output wait from now on, once what is under way is done. A file system on
    /// it is not frozen. Blocks.
    pub fn suspend(&self, name: &str) -> io::Result<()> {
        self.call(DM_DEV_SUSPEND, &mut header(name, "", DM_SUSPEND_FLAG | DM_SKIP_LOCKFS_FLAG)?)
    }

    /// Makes a loaded table the valid one, and lets input and output go on.
    pub fn resume(&self, name: &str) -> io::Result<()> {
        self.call(DM_DEV_SUSPEND, &mut header(name, "", 0)?)
    }

    /// Removes a device. EBUSY while it is open, ENXIO when there is none.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.call(DM_DEV_REMOVE, &mut header(name, "", 0)?)
    }

    /// Looks at a device; `None` when there is none of that name.
    pub fn device(&self, name: &str) -> io::Result<Option<Device>> {
        let mut buffer = header(name, "", 0)?;
        match self.call(DM_DEV_STATUS, &mut buffer) {
            Ok(()) => device(&buffer).map(Some),
            Err(e) if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The valid table as it was loaded.
    pub fn table(&self, name: &str) -> io::Result<Vec<Target>> {
        self.answer(DM_TABLE_STATUS, name, DM_STATUS_TABLE_FLAG, targets)
    }

    /// The valid table with what each target says of its state.
    pub fn status(&self, name: &str) -> io::Result<Vec<Target>> {
        self.answer(DM_TABLE_STATUS, name, 0, targets)
    }

    /// The names of all devices of this machine.
    pub fn names(&self) -> io::Result<Vec<String>> {
        self.answer(DM_LIST_DEVICES, "", 0, names)
    }

    /// Calls with ever more room until the answer fits.
    fn answer<T>(
        &self,
        command: libc::Ioctl,
        name: &str,
        flags: u32,
        decode: fn(&[u8]) -> Option<T>,
    ) -> io::Result<T> {
        let mut size = FIRST_ANSWER_BYTES;
        while size <= MAX_ANSWER_BYTES {
            let mut buffer = header(name, "", flags)?;
            buffer.resize(size, 0);
            self.call(command, &mut buffer)?;
            if u32_at(&buffer, OFFSET_FLAGS).ok_or_else(malformed)? & DM_BUFFER_FULL_FLAG == 0 {
                return decode(&buffer).ok_or_else(malformed);
            }
            size *= 4;
        }
        Err(io::Error::new(io::ErrorKind::FileTooLarge, "device-mapper's answer is too long"))
    }

    fn call(&self, command: libc::Ioctl, buffer: &mut [u8]) -> io::Result<()> {
        assert!(buffer.len() >= HEADER_BYTES, "the kernel writes at least a header");
        let size = u32::try_from(buffer.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        buffer[OFFSET_DATA_SIZE..OFFSET_DATA_SIZE + 4].copy_from_slice(&size.to_ne_bytes());
        // SAFETY: the kernel reads and writes at most data_size bytes, which is this buffer's length.
        super::check(unsafe { libc::ioctl(self.0.as_raw_fd(), command, buffer.as_mut_ptr()) })?;
        Ok(())
    }
}

/// A request that has nothing but its header.
fn header(name: &str, uuid: &str, flags: u32) -> io::Result<Vec<u8>> {
    let fits = |text: &str, limit| text.len() <= limit && !text.contains('\0');
    if !fits(name, MAX_NAME_BYTES) || !fits(uuid, MAX_UUID_BYTES) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut buffer = vec![0; HEADER_BYTES];
    // The kernel takes any minor version that is not above its own.
    buffer[..4].copy_from_slice(&4u32.to_ne_bytes());
    buffer[OFFSET_DATA_SIZE..][..4].copy_from_slice(&(HEADER_BYTES as u32).to_ne_bytes());
    buffer[OFFSET_DATA_START..][..4].copy_from_slice(&(HEADER_BYTES as u32).to_ne_bytes());
    buffer[OFFSET_FLAGS..][..4].copy_from_slice(&flags.to_ne_bytes());
    buffer[OFFSET_NAME..][..name.len()].copy_from_slice(name.as_bytes());
    buffer[OFFSET_UUID..][..uuid.len()].copy_from_slice(uuid.as_bytes());
    Ok(buffer)
}

/// `struct dm_target_spec` and its parameters for each target. `next` counts from this target's beginning.
fn load_request(name: &str, targets: &[Target]) -> io::Result<Vec<u8>> {
    let mut buffer = header(name, "", 0)?;
    let count = u32::try_from(targets.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    buffer[OFFSET_TARGET_COUNT..][..4].copy_from_slice(&count.to_ne_bytes());
    for target in targets {
        if target.kind.len() > MAX_KIND_BYTES || target.parameters.contains('\0') {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let begin = buffer.len();
        // With its terminator, up to the next multiple of 8.
        let length = (TARGET_BYTES + target.parameters.len() + 1).next_multiple_of(8);
        let next = u32::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        buffer.extend_from_slice(&target.start_sector.to_ne_bytes());
        buffer.extend_from_slice(&target.sectors.to_ne_bytes());
        buffer.extend_from_slice(&0i32.to_ne_bytes());
        buffer.extend_from_slice(&next.to_ne_bytes());
        buffer.extend_from_slice(target.kind.as_bytes());
        buffer.resize(begin + TARGET_BYTES, 0);
        buffer.extend_from_slice(target.parameters.as_bytes());
        buffer.resize(begin + length, 0);
    }
    let size = u32::try_from(buffer.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    buffer[OFFSET_DATA_SIZE..][..4].copy_from_slice(&size.to_ne_bytes());
    Ok(buffer)
}

fn device(buffer: &[u8]) -> io::Result<Device> {
    let decode = || {
        let flags = u32_at(buffer, OFFSET_FLAGS)?;
        let number = u64_at(buffer, OFFSET_DEVICE)?;
        // huge_encode_dev() of linux/kdev_t.h.
        let major = number >> 8 & 0xfff;
        let minor = u32::try_from(number & 0xff | number >> 12 & 0xffff_ff00).ok()?;
        Some(Device {
            uuid: text(buffer.get(OFFSET_UUID..UUID_END)?)?,
            minor,
            number: format!("{major}:{minor}"),
            open_count: u32_at(buffer, OFFSET_OPEN_COUNT)?,
            suspended: flags & DM_SUSPEND_FLAG != 0,
            active: flags & DM_ACTIVE_PRESENT_FLAG != 0,
        })
    };
    decode().ok_or_else(malformed)
}

/// The targets of a table's answer. `next` counts from the first target's beginning.
fn targets(buffer: &[u8]) -> Option<Vec<Target>> {
    let start = usize::try_from(u32_at(buffer, OFFSET_DATA_START)?).ok()?;
    let data = buffer.get(start..)?;
    let count = u32_at(buffer, OFFSET_TARGET_COUNT)?;
    let mut at = 0;
    let mut found = Vec::new();
    for _ in 0..count {
        let parameters = data.get(at + TARGET_BYTES..)?;
        found.push(Target {
            start_sector: u64_at(data, at)?,
            sectors: u64_at(data, at + 8)?,
            kind: text(data.get(at + 24..at + TARGET_BYTES)?)?,
            parameters: text(parameters)?,
        });
        let next = usize::try_from(u32_at(data, at + 20)?).ok()?;
        if found.len() < count as usize && next < at + TARGET_BYTES {
            return None;
        }
        at = next;
    }
    Some(found)
}

/// The names of `struct dm_name_list`: {u64 dev, u32 next, name}, `next` from this entry's beginning and 0
/// in the last one. An empty list is one entry whose device is 0.
fn names(buffer: &[u8]) -> Option<Vec<String>> {
    const NAME: usize = 12;
    let mut at = usize::try_from(u32_at(buffer, OFFSET_DATA_START)?).ok()?;
    let mut found = Vec::new();
    if u64_at(buffer, at)? == 0 {
        return Some(found);
    }
    loop {
        found.push(text(buffer.get(at + NAME..)?)?);
        match usize::try_from(u32_at(buffer, at + 8)?).ok()? {
            0 => return Some(found),
            next if next <= NAME => return None,
            next => at += next,
        }
    }
}

fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|b| *b == 0)?;
    String::from_utf8(bytes[..end].to_vec()).ok()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "device-mapper's answer is not understood")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_headers_numbers() {
        // As `strace dmsetup` shows them.
        assert_eq!(DM_VERSION, 0xc138_fd00);
        assert_eq!(DM_DEV_CREATE, 0xc138_fd03);
        assert_eq!(DM_TABLE_STATUS, 0xc138_fd0c);
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn a_table_is_loaded_with_the_headers_layout() {
        let targets = [
            Target { start_sector: 0, sectors: 0x800, kind: "snapshot".into(), parameters: "7:0 7:1".into() },
            Target { start_sector: 0x800, sectors: 8, kind: "zero".into(), parameters: String::new() },
        ];
        let request = load_request("wrenn-a", &targets).expect("encoded");
        let mut expected = vec![4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        expected.extend([152, 1, 0, 0, 56, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        expected.resize(48, 0);
        expected.extend(b"wrenn-a");
        expected.resize(312, 0);
        expected.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 48, 0, 0, 0]);
        expected.extend(b"snapshot\0\0\0\0\0\0\0\x007:0 7:1\0");
        expected.extend([0, 8, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 48, 0, 0, 0]);
        expected.extend(b"zero\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(request, expected);
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn a_devices_answer_is_read() {
        let mut answer = header("wrenn-a", "WRENN-1", 0).expect("encoded");
        answer[24] = 3;
        answer[28] = 0x22;
        // 254:259, whose minor number needs more than eight bits.
        answer[40..48].copy_from_slice(&[3, 254, 0x10, 0, 0, 0, 0, 0]);
        let found = device(&answer).expect("read");
        let expected = Device {
            uuid: "WRENN-1".into(),
            minor: 259,
            number: "254:259".into(),
            open_count: 3,
            suspended: true,
            active: true,
        };
        assert_eq!(found, expected);
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn answers_of_tables_and_names_are_read_and_broken_ones_refused() {
        let mut answer = header("", "", 0).expect("encoded");
        answer[OFFSET_TARGET_COUNT] = 2;
        let mut target = |sectors: u8, next: u8, kind: &[u8], text: &[u8]| {
            let begin = answer.len();
            answer.extend([0; 8]);
            answer.extend([sectors, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, next, 0, 0, 0]);
            answer.extend(kind);
            answer.resize(begin + TARGET_BYTES, 0);
            answer.extend(text);
        };
        target(16, 56, b"snapshot", b"32/4096 16\0\0\0\0\0\0");
        target(8, 96, b"linear", b"\0");
        let found = targets(&answer).expect("read");
        assert_eq!(found[0].parameters, "32/4096 16");
        assert_eq!((found[1].kind.as_str(), found[1].sectors), ("linear", 8));
        for end in HEADER_BYTES..answer.len() {
            assert!(targets(&answer[..end]).is_none(), "cut at {end}");
        }
        answer[HEADER_BYTES + 20] = 0;
        assert!(targets(&answer).is_none(), "a target that begins before the end of the one before");

        let mut list = header("", "", 0).expect("encoded");
        list.extend([1, 254, 0, 0, 0, 0, 0, 0, 24, 0, 0, 0]);
        list.extend(b"wrenn-a\0\0\0\0\0");
        list.extend([2, 254, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        list.extend(b"b\0");
        assert_eq!(names(&list), Some(vec!["wrenn-a".to_string(), "b".to_string()]));
        assert_eq!(names(&list[..list.len() - 1]), None);
        list.resize(HEADER_BYTES + 12, 0);
        list[HEADER_BYTES..].fill(0);
        assert_eq!(names(&list), Some(Vec::new()));
    }

    #[test]
    fn names_that_do_not_fit_are_refused() {
        assert!(header(&"a".repeat(127), &"u".repeat(128), 0).is_ok());
        assert!(header(&"a".repeat(128), "", 0).is_err());
        assert!(header("", &"u".repeat(129), 0).is_err());
        assert!(header("a\0b", "", 0).is_err());
    }
}
