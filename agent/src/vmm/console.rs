//! What a guest writes to its serial port, kept in two files of bounded size: the newer one grows to its
//! limit, then takes the older one's place.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The newer file, in the capsule's directory.
pub const LOG_NAME: &str = "serial.log";
/// The older file.
pub const OLD_LOG_NAME: &str = "serial.log.1";
/// The size of one file. At least this much of what a guest wrote last is there, and at most twice.
pub const LOG_BYTES: u64 = 64 * 1024;

/// How much one [`Console::pump`] reads: a guest that prints without end gets its turn like all others.
const PUMP_BYTES: usize = 64 * 1024;
const CHUNK_BYTES: usize = 8 * 1024;

/// Whether there may be more to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pump {
    /// Everything has been read; wait for the descriptor to become readable.
    Drained,
    /// There may be more: call again, without waiting, after the others have had their turn.
    More,
    /// The other end is gone.
    Closed,
}

/// A guest's serial port, the host's end.
#[derive(Debug)]
pub struct Console {
    source: File,
    log: BoundedLog,
    /// Whether the log could not be written, and that was told.
    is_failing: bool,
}

impl Console {
    /// What comes from `source`, a socket or a pipe that does not block, goes to the log in `directory`,
    /// behind what is there already.
    pub fn new(source: OwnedFd, directory: &Path) -> io::Result<Console> {
        Ok(Console {
            source: File::from(source),
            log: BoundedLog::open(directory, LOG_BYTES)?,
            is_failing: false,
        })
    }

    /// The descriptor to wait on.
    pub fn fd(&self) -> RawFd {
        self.source.as_raw_fd()
    }

    /// Reads what there is, up to a bound; and why the log file could not be written (a full disk, say), once for
    /// each time that this begins: a guest that prints without end must not fill the host's own log with it. What
    /// the file does not take is lost, so that the guest does not wait for it.
    pub fn pump(&mut self) -> (Pump, Option<io::Error>) {
        let mut chunk = [0; CHUNK_BYTES];
        let mut trouble = None;
        for _ in 0..PUMP_BYTES / CHUNK_BYTES {
            match self.source.read(&mut chunk) {
                Ok(0) => return (Pump::Closed, trouble),
                Ok(count) => {
                    let failed = self.log.write(&chunk[..count]).err();
                    let was_failing = std::mem::replace(&mut self.is_failing, failed.is_some());
                    trouble = trouble.or(failed.filter(|_| !was_failing));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return (Pump::Drained, trouble),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return (Pump::Closed, trouble),
            }
        }
        (Pump::More, trouble)
    }

    /// The last `bytes` bytes, as text fit for an error message or a log.
    pub fn tail(&self, bytes: usize) -> String {
        printable(&self.log.tail(bytes))
    }
}

/// Control characters, with which a guest could play tricks on an operator's terminal, become spaces.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).replace("\r\n", "\n");
    text.chars()
        .map(|c| if c.is_control() && c != '\n' { ' ' } else { c })
        .collect::<String>()
        .trim()
        .to_owned()
}

#[derive(Debug)]
struct BoundedLog {
    path: PathBuf,
    old_path: PathBuf,
    file: File,
    length: u64,
    limit: u64,
}

impl BoundedLog {
    fn open(directory: &Path, limit: u64) -> io::Result<BoundedLog> {
        let path = directory.join(LOG_NAME);
        let file = open_log(&path)?;
        let length = file.metadata()?.len();
        Ok(BoundedLog { path, old_path: directory.join(OLD_LOG_NAME), file, length, limit })
    }

    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.length >= self.limit {
                fs::rename(&self.path, &self.old_path)?;
                self.file = open_log(&self.path)?;
                self.length = 0;
            }
            let room = (self.limit - self.length).min(bytes.len() as u64) as usize;
            self.file.write_all(&bytes[..room])?;
            self.length += room as u64;
            bytes = &bytes[room..];
        }
        Ok(())
    }

    fn tail(&self, bytes: usize) -> Vec<u8> {
        let mut tail = match self.length < bytes as u64 {
            true => File::open(&self.old_path)
                .map(|old| end_of(&old, bytes - self.length as usize))
                .unwrap_or_default(),
            false => Vec::new(),
        };
        tail.extend(end_of(&self.file, bytes.min(self.length as usize)));
        tail
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)
}

/// The last `bytes` bytes of a file, or as many as there are and can be read.
fn end_of(file: &File, bytes: usize) -> Vec<u8> {
    let length = file.metadata().map_or(0, |m| m.len());
    let start = length.saturating_sub(bytes as u64);
    let mut end = vec![0; (length - start) as usize];
    match file.read_exact_at(&mut end, start) {
        Ok(()) => end,
        Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> io::Result<Directory> {
            let path = std::env::temp_dir().join(format!("wrenn-console-{name}-{}", std::process::id()));
            fs::create_dir(&path)?;
            Ok(Directory(path))
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_log_keeps_the_last_and_stays_bounded() -> io::Result<()> {
        let directory = Directory::new("bounded")?;
        let mut log = BoundedLog::open(&directory.0, 10)?;
        assert_eq!(log.tail(100), b"");
        log.write(b"0123")?;
        assert_eq!(log.tail(100), b"0123");
        log.write(b"456789abcdefghijklmnopq")?;
        assert_eq!(log.tail(100), b"abcdefghijklmnopq");
        assert_eq!(log.tail(8), b"jklmnopq");
        assert_eq!(log.tail(3), b"opq");
        drop(log);
        let mut log = BoundedLog::open(&directory.0, 10)?;
        log.write(b"rs")?;
        assert_eq!(log.tail(100), b"abcdefghijklmnopqrs");
        let sizes: u64 = [LOG_NAME, OLD_LOG_NAME]
            .iter()
            .map(|n| fs::metadata(directory.0.join(n)).map_or(0, |m| m.len()))
            .sum();
        assert_eq!(sizes, 19);
        Ok(())
    }

    #[test]
    fn a_flood_is_read_in_turns_and_the_end_is_noticed() -> io::Result<()> {
        let directory = Directory::new("flood")?;
        let (mut guest, host) = UnixStream::pair()?;
        host.set_nonblocking(true)?;
        let mut console = Console::new(host.into(), &directory.0)?;
        assert_eq!(console.pump().0, Pump::Drained);
        let writer = std::thread::spawn(move || guest.write_all(&[b'x'; 4 * PUMP_BYTES]));
        let mut seen = Pump::Drained;
        while seen != Pump::Closed {
            seen = console.pump().0;
        }
        assert!(writer.join().is_ok_and(|r| r.is_ok()));
        assert_eq!(console.tail(1_000_000).len() as u64, 2 * LOG_BYTES);
        Ok(())
    }

    #[test]
    fn a_log_that_cannot_be_written_is_told_once_and_holds_nobody_up() -> io::Result<()> {
        let directory = Directory::new("full")?;
        let (mut guest, host) = UnixStream::pair()?;
        host.set_nonblocking(true)?;
        let mut console = Console::new(host.into(), &directory.0)?;
        let log = std::mem::replace(&mut console.log.file, OpenOptions::new().write(true).open("/dev/full")?);
        let mut told = 0;
        for _ in 0..3 {
            guest.write_all(&[b'x'; 2 * CHUNK_BYTES])?;
            let (pump, trouble) = console.pump();
            assert_eq!(pump, Pump::Drained, "the guest would wait");
            told += trouble.iter().len();
        }
        assert_eq!(told, 1);
        console.log.file = log;
        guest.write_all(b"again")?;
        assert!(console.pump().1.is_none() && console.tail(100) == "again");
        Ok(())
    }

    #[test]
    fn control_characters_do_not_reach_a_terminal() {
        assert_eq!(printable(b"\x1b[2Jhello\r\nworld\x07\xff\n\n"), "[2Jhello\nworld \u{fffd}");
    }
}
