//! Starts envd again when something in the guest has ended it.
//!
//! tini ends with its one child, and the machine with tini. So between tini and envd is this process, which
//! does nothing but wait: whatever befalls envd, the capsule stays and can be reached again. What envd knew
//! is lost: streams end, processes run on unlisted and without a reader of their output, and nothing is done
//! before the agent has come back and said what [`crate::trust`] waits for. Root can end the guard as well,
//! and the machine with it, as it can by other means.

use crate::log::log;
use crate::sys::epoll::Epoll;
use crate::sys::signal::{self, Exit};
use crate::sys::{Errno, Fd, boot, clock, fd};

/// envd's exit status when it could not start. For the first time, that ends the machine: its host learns of
/// it at once.
pub const CANNOT_START: i32 = 1;
/// Exit status when the guard itself cannot work.
const CANNOT_GUARD: i32 = 4;
/// The pause before envd is started again, in milliseconds: doubled each time up to the greatest, and as at
/// first once envd has lasted.
const FIRST_PAUSE_MS: u64 = 50;
const MAX_PAUSE_MS: u64 = 5_000;
const LASTED_MS: u64 = 10_000;

/// Runs `serve` in processes of its own, one after another, and gives the exit status for the guard. It
/// returns when it is asked to end by SIGTERM or SIGINT, which it passes on.
pub fn run(serve: impl Fn() -> i32) -> i32 {
    let prepared = fd::sanitize_inherited().and_then(|()| {
        let signals = signal::block_all()?;
        let epoll = Epoll::new()?;
        epoll.add(&signals, libc::EPOLLIN, 0)?;
        Ok((signals, epoll))
    });
    let (signals, mut epoll) = match prepared {
        Ok(prepared) => prepared,
        Err(e) => {
            log!("cannot wait for signals: {e}");
            return CANNOT_GUARD;
        }
    };
    boot::set_process_name(c"envd-guard");
    boot::set_oom_score(b"-1000");
    let mut first = true;
    let mut pause_ms = FIRST_PAUSE_MS;
    loop {
        let started_ms = clock::monotonic_ms();
        match run_once(&serve, &signals, &mut epoll) {
            Ok(Ended::Asked) => return 0,
            Ok(Ended::Itself(exit)) if first && exit.code == CANNOT_START as u32 => return CANNOT_START,
            Ok(Ended::Itself(exit)) => {
                log!(
                    "envd has ended (exit code {}, signal {}); it is started again. Its streams are cut; what \
                     it ran is not listed any more",
                    exit.code,
                    exit.signal
                );
            }
            Err(e) => log!("cannot start envd: {e}"),
        }
        first = false;
        if clock::monotonic_ms().saturating_sub(started_ms) >= LASTED_MS {
            pause_ms = FIRST_PAUSE_MS;
        }
        clock::sleep_us(pause_ms * 1000);
        pause_ms = (pause_ms * 2).min(MAX_PAUSE_MS);
    }
}

enum Ended {
    /// The guard was asked to end, and envd has.
    Asked,
    /// envd has ended.
    Itself(Exit),
}

fn run_once(serve: &impl Fn() -> i32, signals: &Fd, epoll: &mut Epoll) -> Result<Ended, Errno> {
    let pid = boot::fork(|| {
        boot::set_process_name(c"envd");
        serve()
    })?;
    let mut asked = false;
    loop {
        epoll.wait(-1)?;
        while let Some(number) = signal::next(signals) {
            if number != libc::SIGCHLD {
                asked = true;
                // It may have ended already; that is the next that is heard.
                let _ = signal::send(pid, libc::SIGTERM as u32);
            }
        }
        if let Some(exit) = signal::reap(pid) {
            return Ok(if asked { Ended::Asked } else { Ended::Itself(exit) });
        }
    }
}
