//! What is asked of processes that run already: to be found, signalled, resized, watched, listed.

use super::request;
use super::supervisor::{Shell, Supervisor};
use super::table::{Process, ProcessKey, Stopping, Timer, Watcher};
use crate::connection::{Connections, StreamKey, Task};
use crate::sys::{pty, signal};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;
use wire::codec::Bytes;
use wire::message::{Code, Error, ProcessAttached, ProcessListReply};

/// Streams that may watch one process.
const MAX_WATCHERS: usize = 64;
/// Bytes of arguments told of one process in a list.
const MAX_LISTED_ARGV: usize = 1024;
/// Bytes of one list message; longer lists come in several.
const MAX_LIST_MESSAGE: usize = 48 * 1024;

impl Supervisor {
    pub(super) fn by_tag(&self, tag: &str) -> Option<ProcessKey> {
        // The last one: a tag is free again once its process has ended.
        self.processes.iter().rev().find(|(_, p)| p.tag == tag).map(|(id, _)| *id)
    }

    /// Finds a process by its id in decimal, or by its tag.
    fn select(&self, selector: &str) -> Result<ProcessKey, Error> {
        let found = match crate::users::number(selector.as_bytes()) {
            Some(pid) => self.processes.iter().rev().find(|(_, p)| p.pid == pid).map(|(id, _)| *id),
            None if selector.is_empty() => None,
            None => self.by_tag(selector),
        };
        found.filter(|id| self.processes.get(id).is_some_and(|p| p.report.is_none())).ok_or_else(|| {
            Error::new(
                Code::NotFound,
                format!("no process {selector:?} runs: list the processes for their ids and tags"),
            )
        })
    }

    /// Sends a signal to the group of a selected process.
    pub fn signal(&mut self, selector: &str, number: u32) -> Result<(), Error> {
        let id = self.select(selector)?;
        self.signal_process(id, number)
    }

    /// Sends a signal to a process's group; SIGKILL to all that it has started.
    pub fn signal_process(&mut self, id: ProcessKey, number: u32) -> Result<(), Error> {
        if !(1..=signal::MAX_SIGNAL).contains(&number) {
            return Err(Error::new(Code::InvalidRequest, "a signal is a number from 1 to 64"));
        }
        match self.processes.get_mut(&id).filter(|p| p.exit.is_none()) {
            Some(process) if number == libc::SIGKILL as u32 => {
                process.stopping = Stopping::Killed;
                self.kill_tree(id);
                Ok(())
            }
            Some(process) => signal::kill_group(process.pid, number)
                .map_err(|e| request::errno_error("cannot send the signal", e)),
            None => Err(Error::new(Code::NotFound, "the process has ended already")),
        }
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, id: ProcessKey, columns: u16, rows: u16) -> Result<(), Error> {
        let process = self.processes.get(&id).filter(|p| p.terminal);
        let Some(master) = process.and_then(|p| p.outputs.first()).and_then(|o| o.fd.as_ref()) else {
            return Err(Error::new(Code::InvalidState, "the process has no terminal"));
        };
        pty::resize(master, columns.max(1), rows.max(1))
            .map_err(|e| request::errno_error("cannot resize the terminal", e))
    }

    /// Lets a stream watch a process.
    pub fn attach(
        &mut self,
        key: StreamKey,
        selector: &str,
        from_byte: u64,
        shell: &mut Shell<'_>,
    ) -> Result<(), Error> {
        let id = self.select(selector)?;
        let Some(process) = self.processes.get_mut(&id) else { return Ok(()) };
        if process.watchers.len() >= MAX_WATCHERS {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!("{MAX_WATCHERS} streams watch the process already"),
            ));
        }
        let at = from_byte.clamp(process.ring.start(), process.ring.end());
        process.watchers.push(Watcher { key, at });
        let attached = ProcessAttached { pid: process.pid, tag: process.tag.clone(), from_byte: at };
        shell.connections.send(key, &attached);
        shell.connections.set_task(key, Task::Watcher(id));
        // It is needed again for a while.
        process.clear_timer(&mut self.timers, id, Timer::Expire);
        self.ended.retain(|other| *other != id);
        self.advance(id, shell);
        Ok(())
    }

    /// Starts to tell a stream which processes run.
    pub fn list(&mut self, key: StreamKey, connections: &mut Connections) {
        connections.set_task(key, Task::Listing);
        self.listings.insert(key, 0);
    }

    /// Tells those that asked for a list some more of it, as far as their streams take it: thousands of
    /// processes are more than may wait on a stream.
    pub fn go_on_listing(&mut self, connections: &mut Connections) {
        let processes = &self.processes;
        self.listings.retain(|key, next| {
            while connections.is_idle(*key) {
                let (reply, rest) = list_from(processes, *next);
                let Some(rest) = rest else {
                    connections.send_last(*key, &reply);
                    return false;
                };
                *next = rest;
                connections.send(*key, &reply);
            }
            true
        });
    }

    /// A stream that asked for a list is gone.
    pub fn end_listing(&mut self, key: StreamKey) {
        self.listings.remove(&key);
    }
}

/// One message of a list, of bounded size, and where the next one begins if there is one.
fn list_from(
    processes: &BTreeMap<ProcessKey, Process>,
    from: ProcessKey,
) -> (ProcessListReply, Option<ProcessKey>) {
    let mut reply = ProcessListReply::default();
    let mut size = 0;
    for (id, process) in processes.range(from..).filter(|(_, p)| p.is_running()) {
        let argv = listed_argv(&process.argv);
        size += argv.iter().map(|a| a.len() + 4).sum::<usize>() + process.tag.len() + 16;
        if size > MAX_LIST_MESSAGE {
            return (reply, Some(*id));
        }
        reply.processes.push(((process.pid, process.tag.clone()), argv));
    }
    (reply, None)
}

/// The first arguments, as many as a list may show.
fn listed_argv(argv: &[Bytes]) -> Vec<Bytes> {
    let mut left = MAX_LISTED_ARGV;
    let mut listed = Vec::new();
    for argument in argv {
        let cut = argument.len().min(left);
        listed.push(Bytes(argument[..cut].to_vec()));
        left = left.saturating_sub(cut + 4);
        if left == 0 {
            break;
        }
    }
    listed
}
