//! What an operator asks of the agent that serves a data directory, from another process: to end in a
//! certain way. Where no agent serves it, its capsules are destroyed without one.

use crate::agent::Outcome;
use crate::capsule::recovery::{self, Take};
use crate::config::Config;
use crate::ending::Ending;
use crate::layout::{Holder, Layout};
use crate::net::host;
use crate::startup::StartError;
use crate::sys::pidfd::Process;

/// How much longer than its own limit an agent is waited for, in milliseconds.
const GRACE_MS: u64 = 10_000;

/// Tells the agent that serves the data directory to end so, waits for its end, and prints what is left.
/// Blocks.
///
/// # Errors
/// No agent serves it, or it cannot be told.
pub fn give(config: &Config, ending: Ending) -> Result<Outcome, StartError> {
    let layout = Layout::new(&config.directory);
    layout.prepare()?;
    match layout.holder()? {
        Holder::Nobody(lock) => {
            if ending != Ending::Terminate {
                return Err(StartError::NotServing(config.directory.clone()));
            }
            let found = recovery::recover(&layout, Take::Away)?;
            host::remove_if_unused()?;
            drop(lock);
            println!("no agent was serving; destroyed {} capsules", found.cleared);
            Ok(outcome(found.left.len()))
        }
        Holder::Agent { pid, start_ticks } => {
            let process = Process::adopt(pid, start_ticks);
            let mut process = process.map_err(StartError::system("looking at the agent"))?;
            process.signal(ending.signal()).map_err(StartError::system("telling the agent"))?;
            let limit = i32::try_from(ending.limit_ms() + GRACE_MS).unwrap_or(i32::MAX);
            if process.wait(limit).map_err(StartError::system("waiting for the agent's end"))?.is_none() {
                return Err(StartError::StillServes(pid));
            }
            report(&layout, ending)
        }
    }
}

/// Prints what the agent has left, by the capsules' journals.
fn report(layout: &Layout, ending: Ending) -> Result<Outcome, StartError> {
    let capsules = recovery::survey(layout)?;
    let left: Vec<_> =
        capsules.iter().filter(|capsule| ending == Ending::Terminate || !capsule.is_paused).collect();
    match ending {
        Ending::HandOver => println!("the agent has ended; {} capsules are left", capsules.len()),
        Ending::Drain => println!("the agent has ended; {} capsules are paused", capsules.len() - left.len()),
        Ending::Terminate => println!("the agent has ended, and its capsules are destroyed"),
    }
    if ending == Ending::HandOver {
        return Ok(Outcome::Clean);
    }
    for capsule in &left {
        println!("but not {}", capsule.id);
    }
    Ok(outcome(left.len()))
}

fn outcome(left: usize) -> Outcome {
    match left {
        0 => Outcome::Clean,
        count => Outcome::Remains(count),
    }
}
