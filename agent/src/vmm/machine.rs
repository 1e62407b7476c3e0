//! A machine that runs, whichever VMM runs it: its process, its control socket and its serial port.

use super::VmmError;
use super::console::{Console, Pump};
use super::firecracker::Instance;
use super::image::{COMMAND_TIMEOUT_MS, Image, Written};
use super::qemu::{self, Monitor};
use super::qmp::{CommandError, CommandId};
use crate::sys::memfd::Capture;
use crate::sys::pidfd::{Exit, Process};
use serde_json::Value;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::path::Path;

/// How much of a guest's last words goes into an error message.
const TAIL_BYTES: usize = 2 * 1024;

/// What has happened to a machine.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The VMM takes commands.
    Ready,
    /// The guest has powered off or rebooted, or the VMM was told to quit; its end follows.
    GuestShutdown {
        /// As QEMU calls it: `guest-shutdown`, `guest-reset`, `guest-panic`, `host-qmp-quit`...
        reason: String,
    },
    /// The guest stands still.
    Paused,
    /// The guest runs again.
    Resumed,
    /// A command's answer.
    Answer {
        /// The command.
        id: CommandId,
        /// What it returned, or why it failed.
        result: Result<Value, CommandError>,
    },
    /// Something went wrong in the VMM, which goes on.
    Fault {
        /// What, as the VMM calls it: `block_disk0.execute_fails`.
        what: String,
        /// How often of late.
        count: u64,
    },
    /// Something else.
    Other {
        /// Its name.
        name: String,
    },
}

/// A running machine. Dropping it leaves it running, as a restart of the agent must.
#[derive(Debug)]
pub struct Machine {
    process: Process,
    control: Control,
    console: Console,
    /// Unknown for a machine that an earlier agent has started.
    errors: Option<Capture>,
}

/// How the VMM is spoken to, which depends on which it is.
#[derive(Debug)]
pub(super) enum Control {
    /// QEMU's monitor.
    Qemu(Monitor),
    /// Firecracker's API.
    Firecracker(Box<Instance>),
}

/// Where a machine is to be saved.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    /// The directory.
    pub directory: &'a Path,
    /// The generation of the files.
    pub generation: u64,
    /// The generation of the memory, in the same directory, that the machine was restored from.
    pub base: Option<u64>,
    /// Whom the files belong to.
    pub owner: u32,
}

impl Machine {
    /// The machine of a process that is spoken to by `control`.
    pub(super) fn started(
        process: Process,
        control: Control,
        console: Console,
        errors: Option<Capture>,
    ) -> Machine {
        Machine { process, control, console, errors }
    }

    /// The machine that an earlier agent has started, by what its records say of it: which VMM runs it is
    /// seen in the directory. [`VmmError::System`] with NotFound when its process has ended since.
    pub fn adopt(directory: &Path, pid: u32, start_ticks: u64) -> Result<Machine, VmmError> {
        let process = Process::adopt(pid, start_ticks).map_err(system("adopting the VMM of", directory))?;
        let (control, console) = match Instance::find(directory, pid)? {
            Some(found) => found,
            None => qemu::connect(directory)?,
        };
        Ok(Machine::started(process, control, console, None))
    }

    /// Its Firecracker, where that is what it runs in.
    pub(super) fn instance(&self) -> Option<&Instance> {
        match &self.control {
            Control::Qemu(_) => None,
            Control::Firecracker(instance) => Some(instance),
        }
    }

    /// Whether it answers the guest at the metadata service's address itself.
    pub fn serves_metadata(&self) -> bool {
        self.instance().is_some()
    }

    /// The VMM's process number.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// When the VMM started, in clock ticks since boot; with the number, what [`Machine::adopt`] needs.
    pub fn start_ticks(&self) -> u64 {
        self.process.start_ticks()
    }

    /// A descriptor that becomes readable when the VMM has ended.
    pub fn exit_fd(&self) -> RawFd {
        self.process.exit_fd()
    }

    /// How the VMM ended, or `None` while it runs. Never blocks.
    pub fn try_wait(&mut self) -> io::Result<Option<Exit>> {
        let exit = self.process.try_wait()?;
        self.note_end(exit);
        Ok(exit)
    }

    /// Waits at most `timeout_ms` for the VMM's end. Blocks.
    pub fn wait(&mut self, timeout_ms: i32) -> io::Result<Option<Exit>> {
        let exit = self.process.wait(timeout_ms)?;
        self.note_end(exit);
        Ok(exit)
    }

    /// What only a running VMM needs is of no use any more; what cannot be removed goes with the capsule.
    fn note_end(&self, exit: Option<Exit>) {
        if let (Some(instance), Some(_)) = (self.instance(), exit)
            && let Err(e) = instance.clear()
        {
            log::warn!("VMM {}: {e}", self.pid());
        }
    }

    /// Ends the VMM at once. The guest is told nothing and its disk is as after a power cut.
    pub fn kill(&self) -> io::Result<()> {
        self.process.kill()
    }

    /// Asks the VMM to end, with its disks written out where it can do that. Its end is seen at
    /// [`Machine::exit_fd`].
    pub fn quit(&mut self) -> Result<(), VmmError> {
        match &mut self.control {
            Control::Qemu(monitor) => monitor.execute("quit", None).map(drop),
            // It keeps nothing back that would have to be written.
            Control::Firecracker(_) => {
                self.process.kill().map_err(system("killing", Path::new("firecracker")))
            }
        }
    }

    /// Tells a guest that stands still to go on; that it does is an [`Event`].
    pub fn begin_going_on(&mut self) -> Result<(), VmmError> {
        match &mut self.control {
            Control::Qemu(monitor) => monitor.execute("cont", None).map(drop),
            // It stops no guest by itself: a write that does not fit is an error in the guest.
            Control::Firecracker(_) => Ok(()),
        }
    }

    /// Stands the guest still. Blocks.
    pub fn stand_still(&mut self) -> Result<(), VmmError> {
        match &mut self.control {
            Control::Qemu(monitor) => monitor.call("stop", None, None, COMMAND_TIMEOUT_MS).map(drop),
            Control::Firecracker(instance) => instance.set_running(false),
        }
    }

    /// Sees to it that the guest of a machine runs which another agent may have left in the midst of saving
    /// or restoring it. Blocks.
    pub fn run_on(&mut self) -> Result<(), VmmError> {
        match &mut self.control {
            Control::Qemu(monitor) => qemu::run_on(monitor),
            // For one that runs this is nothing.
            Control::Firecracker(instance) => instance.set_running(true),
        }
    }

    /// Lets a guest that stands still go on. A VMM that does not answer is asked once more; a guest of which nobody
    /// can know whether it goes on counts as one that does. Blocks.
    ///
    /// # Errors
    /// The guest stands still.
    pub fn go_on(&mut self) -> Result<(), VmmError> {
        match &mut self.control {
            Control::Qemu(monitor) => qemu::go_on(monitor, COMMAND_TIMEOUT_MS),
            // For one that goes on already the second is nothing, so it answers what it would be asked.
            Control::Firecracker(instance) => told_twice(|| instance.set_running(true)),
        }
    }

    /// Waits until a machine that was started of an image has taken it; the guest then stands still.
    /// Blocks.
    pub fn wait_until_restored(&mut self) -> Result<(), VmmError> {
        match &mut self.control {
            Control::Qemu(monitor) => qemu::wait_until_restored(monitor),
            // It had before it was started.
            Control::Firecracker(_) => Ok(()),
        }
    }

    /// Stands the guest still and writes an image to `directory` under `generation`, on disk when this
    /// returns. `base` is the generation of the memory that the machine was restored from. The files belong
    /// to `owner`: whom the machine runs as, or root. After a failure the guest still stands. Blocks.
    pub fn save(
        &mut self,
        directory: &Path,
        generation: u64,
        base: Option<u64>,
        owner: u32,
    ) -> Result<(Image, Written), VmmError> {
        let place = Place { directory, generation, base, owner };
        let saved = match &mut self.control {
            Control::Qemu(monitor) => qemu::save(monitor, self.process.pid(), &place)?,
            Control::Firecracker(instance) => instance.save(&place)?,
        };
        let handle = File::open(directory).map_err(system("opening", directory))?;
        handle.sync_all().map_err(system("writing out", directory))?;
        Ok(saved)
    }

    /// The descriptor on which the VMM tells what happens, to wait on for reading and writing.
    pub fn monitor_fd(&self) -> RawFd {
        match &self.control {
            Control::Qemu(monitor) => monitor.fd(),
            Control::Firecracker(instance) => instance.metrics_fd(),
        }
    }

    /// Writes and reads what can be written and read, up to a bound. Call it when the control socket's
    /// descriptor is ready, once right after the start, and again after [`Pump::More`]; then take the
    /// events.
    pub fn pump_monitor(&mut self) -> Result<Pump, VmmError> {
        match &mut self.control {
            Control::Qemu(monitor) => monitor.pump(),
            Control::Firecracker(instance) => Ok(instance.pump_metrics()),
        }
    }

    /// The next thing that has happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        match &mut self.control {
            Control::Qemu(monitor) => monitor.poll_event(),
            Control::Firecracker(instance) => instance.next_fault(),
        }
    }

    /// The serial port's descriptor, to wait on for reading.
    pub fn console_fd(&self) -> RawFd {
        self.console.fd()
    }

    /// Moves what the guest has written to its serial port into the log, up to a bound; and why that could not be
    /// written, once for each time that this begins.
    pub fn pump_console(&mut self) -> (Pump, Option<io::Error>) {
        self.console.pump()
    }

    /// The last few lines of what the guest has written to its serial port, at most 2 KiB, as text.
    pub fn console_tail(&self) -> String {
        self.console.tail(TAIL_BYTES)
    }

    /// What the VMM itself has written to its standard output and error and to its log: why it could not start,
    /// mostly.
    pub fn diagnostics(&self) -> String {
        let mut text = self.errors.as_ref().map(Capture::text).unwrap_or_default();
        let logged = self.instance().map(Instance::logged).unwrap_or_default();
        if !text.is_empty() && !logged.is_empty() {
            text.push('\n');
        }
        text + &logged
    }
}

/// Tells a VMM once more to let its guest go on where it has not answered.
fn told_twice(mut tell: impl FnMut() -> Result<(), VmmError>) -> Result<(), VmmError> {
    match tell() {
        // Each request has a connection of its own: one that was closed says nothing of the next.
        Err(VmmError::NoAnswer { .. } | VmmError::MonitorClosed) => match tell() {
            Err(e @ VmmError::NoAnswer { .. }) => {
                log::error!("{e}, nor before: its guest counts as one that goes on");
                Ok(())
            }
            other => other,
        },
        other => other,
    }
}

/// For `map_err`: a system call that failed in this step on this file.
pub(super) fn system(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VmmError {
    let path = path.to_owned();
    move |source| VmmError::System { step, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_that_does_not_answer_is_told_twice() {
        let silent = || Err(VmmError::NoAnswer { command: "PATCH /vm" });
        let refused = || Err(VmmError::Refused { command: "PATCH /vm", why: "no".into() });
        for (answers, times, goes_on) in [
            (vec![Ok(())], 1, true),
            (vec![refused()], 1, false),
            (vec![silent(), Ok(())], 2, true),
            (vec![Err(VmmError::MonitorClosed), Ok(())], 2, true),
            (vec![Err(VmmError::MonitorClosed), Err(VmmError::MonitorClosed)], 2, false),
            (vec![silent(), refused()], 2, false),
            (vec![silent(), silent()], 2, true),
        ] {
            let (mut answers, mut told) = (answers.into_iter(), 0);
            let result = told_twice(|| {
                told += 1;
                answers.next().expect("no more than that")
            });
            assert_eq!((told, result.is_ok()), (times, goes_on), "{result:?}");
        }
    }
}
