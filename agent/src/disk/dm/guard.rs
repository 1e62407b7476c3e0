//! Watches the file system that copy-on-write files are on. When it is nearly full, all disks of this data
//! directory are suspended: what guests write waits, and nothing is lost. When there is room again they go
//! on. Were it to become full, the kernel would give up every disk that wanted to grow, with all it holds.

use super::{Store, control, own_devices, store};
use crate::disk::DiskError;
use crate::disk::room::reserve_bytes;
use crate::sys::resources::disk_space;
use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// The fastest that all guests together are taken to write: the next look comes before they could have
/// reached the reserve.
const FASTEST_BYTES_PER_MS: u64 = 2 * MIB;
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often is looked while all disks wait.
const HOLDING_PAUSE: Duration = Duration::from_millis(200);

/// Whether the disks wait, by the space that is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watch {
    Flowing,
    Holding,
}

impl Watch {
    /// The state after a look at the space, and how long until the next one.
    fn next(self, size_bytes: u64, free_bytes: u64) -> (Watch, Duration) {
        let reserve = reserve_bytes(size_bytes);
        // Twice the reserve to go on, so that it does not flutter.
        let enough = match self {
            Watch::Flowing => reserve,
            Watch::Holding => 2 * reserve,
        };
        if free_bytes < enough {
            return (Watch::Holding, HOLDING_PAUSE);
        }
        let until_reserve = Duration::from_millis((free_bytes - reserve) / FASTEST_BYTES_PER_MS);
        (Watch::Flowing, until_reserve.clamp(SHORTEST_PAUSE, LONGEST_PAUSE))
    }
}

/// The running watch; it ends when this is dropped. It has a thread of its own, since the workers may all
/// be waiting for the very disk that is full.
#[derive(Debug)]
pub struct Guard {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// Watches the disks of the capsules in `capsules`.
    pub fn start(capsules: &Path) -> io::Result<Guard> {
        let (stop, stopped) = channel();
        let mut state = State { capsules: capsules.to_owned(), watch: Watch::Flowing, lost: BTreeSet::new() };
        let thread = thread::Builder::new().name("disk-guard".into()).spawn(move || {
            loop {
                let pause = state.look().unwrap_or_else(|e| {
                    log::error!("watching the disks: {e}");
                    LONGEST_PAUSE
                });
                if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        })?;
        Ok(Guard { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.stop = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the watch over the disks ended in a panic");
        }
    }
}

struct State {
    capsules: PathBuf,
    watch: Watch,
    /// Devices whose loss has been told.
    lost: BTreeSet<String>,
}

impl State {
    fn look(&mut self) -> Result<Duration, DiskError> {
        let (size, free) = disk_space(&self.capsules)
            .map_err(DiskError::system("looking at the space in", &self.capsules))?;
        let (next, pause) = self.watch.next(size, free);
        if next != self.watch {
            let (place, free_mb) = (self.capsules.display(), free / MIB);
            match next {
                Watch::Holding => log::error!(
                    "{place} has only {free_mb} MiB left: all disks wait until it has {} MiB; make room, or \
                     destroy capsules",
                    2 * reserve_bytes(size) / MIB
                ),
                Watch::Flowing => log::warn!("{place} has {free_mb} MiB again: the disks go on"),
            }
        }
        self.watch = next;
        let control = control()?;
        let devices = own_devices(&control, &self.capsules)?;
        let mut lost = BTreeSet::new();
        for (name, id, device) in devices.into_iter().filter(|(_, _, device)| device.active) {
            let healthy = match store(&control, &name) {
                Ok(Some(Store::Good { .. })) => true,
                Ok(Some(Store::Lost { state })) => {
                    if !self.lost.contains(&name) {
                        log::error!("capsule {id}: its disk {name} is lost: {state}; destroy the capsule");
                    }
                    lost.insert(name.clone());
                    false
                }
                // Released, or just destroyed.
                Ok(None) | Err(_) => false,
            };
            // One that fails everything must not wait: its VMM could not end. Neither may one device's
            // failure keep the others from being held.
            let done = match (next, device.suspended) {
                (Watch::Holding, false) if healthy => control.suspend(&name),
                // Also those that an agent which has died was holding.
                (Watch::Flowing, true) => control.resume(&name),
                _ => Ok(()),
            };
            if let Err(e) = done.or_else(ignore_gone) {
                log::error!("capsule {id}: holding or freeing its disk {name}: {e}");
            }
        }
        self.lost = lost;
        Ok(pause)
    }
}

fn ignore_gone(error: io::Error) -> io::Result<()> {
    if error.raw_os_error() == Some(libc::ENXIO) { Ok(()) } else { Err(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1024 * MIB;

    #[test]
    fn disks_wait_below_the_reserve_and_go_on_at_twice_of_it() {
        let size = 16 * GIB;
        let reserve = 256 * MIB;
        let (flowing, holding) = (Watch::Flowing, Watch::Holding);
        assert_eq!(flowing.next(size, size), (flowing, LONGEST_PAUSE));
        // A gibibyte above the reserve is half a second at two gibibytes a second.
        assert_eq!(flowing.next(size, reserve + GIB), (flowing, Duration::from_millis(512)));
        assert_eq!(flowing.next(size, reserve), (flowing, SHORTEST_PAUSE));
        assert_eq!(flowing.next(size, reserve - 1), (holding, HOLDING_PAUSE));
        assert_eq!(holding.next(size, 2 * reserve - 1), (holding, HOLDING_PAUSE));
        assert_eq!(holding.next(size, 2 * reserve).0, flowing);
        assert_eq!(flowing.next(size, 0).0, holding);
    }

    #[test]
    fn the_next_look_comes_before_the_fastest_writer_has_used_half_the_reserve() {
        for size in [GIB, 16 * GIB, 1000 * GIB] {
            let reserve = reserve_bytes(size);
            for free in [reserve, reserve + MIB, 2 * reserve, size] {
                let (_, pause) = Watch::Flowing.next(size, free);
                // At the shortest pause a small file system's reserve is for slower storage.
                let rate = FASTEST_BYTES_PER_MS.min(reserve / 2 / SHORTEST_PAUSE.as_millis() as u64);
                assert!(pause.as_millis() as u64 * rate <= free - reserve / 2, "{size} {free}");
            }
        }
    }
}
