//! All processes: their starts and ends, their input and output, who watches them.

use super::groups::{GroupNumber, Groups};
use super::request::{self, Defaults, start_error};
use super::streams::{Ends, close_input, read_after_exit, read_output, send_to_watchers, watch_output};
use super::table::{Piece, Process, ProcessKey, Stopping, Timer, Timers, Watcher};
use crate::connection::{Connections, StreamKey, Task};
use crate::sys::epoll::Epoll;
use crate::sys::signal::Exit;
use crate::sys::{Errno, Fd, signal, spawn};
use crate::token::{Token, Way};
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::vec::Vec;
use wire::message::{Code, Error, ProcessExited, ProcessStart, ProcessStarted};

/// Processes that envd supervises at once.
pub const MAX_PROCESSES: usize = 16_384;
/// Output held back for a stream that reads slowly, in bytes. After it the process has to wait.
const FOREGROUND_RING: usize = 64 * 1024;
/// Output kept of a detached process, in bytes.
pub const DETACHED_RING: usize = 256 * 1024;
/// Detached processes that have ended and whose result is kept; the oldest goes first.
const MAX_ENDED: usize = 32;
/// How long the result of a detached process is kept.
const KEEP_ENDED_MS: u64 = 10 * 60 * 1000;
/// Between SIGTERM (at a terminal SIGHUP) and SIGKILL.
const KILL_AFTER_MS: u64 = 2_000;
/// How long an ended process's pipes are read on when somebody else holds them open.
const DRAIN_MS: u64 = 100;
/// How long a watcher may hold a detached process up before it has to attach again.
const STALL_MS: u64 = 10_000;
/// How long a pipe that could not be watched, for lack of memory, is left alone.
const WATCH_AGAIN_MS: u64 = 50;
/// How often output is moved on in one turn: whoever an ended process left behind may write without end.
const MAX_MOVES: usize = 16;
/// Pipes of ended processes that are read on, so that what they left running is not hit by SIGPIPE.
const MAX_LEFT_OVER: usize = 256;

/// What the supervisor works with and does not own.
pub struct Shell<'a> {
    /// Where descriptors are watched.
    pub epoll: &'a Epoll,
    /// Where streams lead.
    pub connections: &'a mut Connections,
    /// Memory to read into.
    pub scratch: &'a mut [u8],
    /// The monotonic clock.
    pub now_ms: u64,
}

/// All processes that were started here.
#[derive(Default)]
pub struct Supervisor {
    pub(super) processes: BTreeMap<ProcessKey, Process>,
    by_pid: BTreeMap<u32, ProcessKey>,
    pub(super) timers: Timers,
    pub(super) ended: VecDeque<ProcessKey>,
    /// Streams that are told which processes run, and the first of which each has not heard.
    pub(super) listings: BTreeMap<StreamKey, ProcessKey>,
    left_over: BTreeMap<u32, Fd>,
    next_key: ProcessKey,
    next_left_over: u32,
    /// The control groups of what is started.
    pub(super) groups: Groups,
}

impl Supervisor {
    /// No processes yet; each of those to come gets one of these control groups.
    pub fn new(groups: Groups) -> Supervisor {
        Supervisor { groups, ..Supervisor::default() }
    }

    /// How many processes run.
    pub fn running(&self) -> usize {
        self.by_pid.len()
    }

    /// Starts a process for a stream. The answer follows when exec has succeeded or failed.
    pub fn start(
        &mut self,
        key: StreamKey,
        start: &ProcessStart,
        defaults: &Defaults,
        shell: &mut Shell<'_>,
    ) -> Result<(), Error> {
        if self.by_pid.len() >= MAX_PROCESSES {
            return Err(Error::new(
                Code::ResourceExhausted,
                format!("{MAX_PROCESSES} processes run in the capsule already: end some first"),
            ));
        }
        if !start.tag.is_empty() && self.by_tag(&start.tag).is_some_and(|p| self.processes[&p].is_alive()) {
            return Err(Error::new(
                Code::AlreadyExists,
                format!("a process with the tag {:?} runs already: choose another tag", start.tag),
            ));
        }
        let (plan, user) = request::plan(start, defaults)?;
        let ends = Ends::open(start, user.uid).map_err(|e| request::errno_error("cannot open a pipe", e))?;
        let group = self.groups.make();
        let counts_tasks = self.groups.count_tasks();
        let place = group.as_ref().map(|group| spawn::Place { group: &group.directory, counts_tasks });
        let started = spawn::spawn(&plan, [&ends.child[0], &ends.child[1], &ends.child[2]], place);
        let group = group.map(|group| group.number);
        let started = started.map_err(|e| {
            self.release_group(group, shell.now_ms);
            request::errno_error("cannot start a process", e)
        })?;
        let limit = if start.detached { DETACHED_RING } else { FOREGROUND_RING };
        let id = self.next_key;
        self.next_key += 1;
        let mut process = Process::new(started.pid, shell.now_ms, limit);
        process.group = group;
        process.tag = start.tag.clone();
        process.argv = start.argv.clone();
        process.cwd = plan.cwd.into_bytes();
        process.user = user.name;
        process.detached = start.detached;
        process.owner = Some(key);
        process.terminal = plan.terminal;
        process.input.fd = ends.input;
        process.outputs = ends.outputs;
        if start.timeout_ms > 0 {
            let at = shell.now_ms + u64::from(start.timeout_ms);
            process.set_timer(&mut self.timers, id, Timer::Deadline, at);
        }
        // A descriptor that cannot be watched would leave the stream without an answer for ever.
        let watched = shell.epoll.add(&started.report, libc::EPOLLIN, Token::Process(id, Way::Report).pack());
        process.report = Some(started.report);
        self.by_pid.insert(started.pid, id);
        self.processes.insert(id, process);
        shell.connections.set_task(key, Task::Owner(id));
        if watched.is_err() {
            self.on_report(id, shell);
        }
        Ok(())
    }

    /// The report pipe is readable: exec has succeeded, or a step before it has failed.
    pub fn on_report(&mut self, id: ProcessKey, shell: &mut Shell<'_>) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let Some(report) = process.report.take() else { return };
        let result = spawn::read_report(&report);
        drop(report);
        let owner = process.owner;
        match result {
            Ok(()) => {
                if let Some(key) = owner {
                    let started = ProcessStarted { pid: process.pid, tag: process.tag.clone() };
                    if process.detached {
                        shell.connections.send_last(key, &started);
                        process.owner = None;
                    } else {
                        shell.connections.send(key, &started);
                        process.watchers.push(Watcher { key, at: 0 });
                    }
                }
                self.advance(id, shell);
                self.write_input(id, shell);
            }
            Err((step, errno)) => {
                let program = process.argv.first().map_or(&b""[..], |p| p);
                let error = start_error(step, errno, program, &process.cwd, &process.user);
                if let Some(key) = owner {
                    shell.connections.fail(key, &error);
                }
                // It ends by itself, or here when its report could not be read. It is reaped like any
                // other; nothing of it is told.
                let _ = signal::kill_group(process.pid, libc::SIGKILL as u32);
                self.forget(id, shell);
            }
        }
    }

    /// Reaps every child that has ended, and gives those that are none of its processes.
    pub fn on_child_ended(&mut self, shell: &mut Shell<'_>) -> Vec<(u32, Exit)> {
        let mut others = Vec::new();
        // Bounded by the processes there are.
        for _ in 0..=MAX_PROCESSES {
            let Some(pid) = signal::ended_child() else { break };
            let id = self.by_pid.remove(&pid);
            if let Some(id) = id {
                self.on_report(id, shell);
                // While it is not reaped its group cannot be anybody else's.
                if self.processes.get(&id).is_some_and(|p| p.stopping != Stopping::No) {
                    self.kill_tree(id);
                }
            }
            let exit = signal::reap(pid);
            match (id, exit) {
                (Some(id), Some(exit)) => self.on_exit(id, exit, shell),
                (None, Some(exit)) => others.push((pid, exit)),
                (_, None) => {}
            }
        }
        others
    }

    fn on_exit(&mut self, id: ProcessKey, exit: Exit, shell: &mut Shell<'_>) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.exit = Some((exit, shell.now_ms));
        let group = process.group.take();
        process.clear_timer(&mut self.timers, id, Timer::Deadline);
        process.clear_timer(&mut self.timers, id, Timer::Kill);
        process.set_timer(&mut self.timers, id, Timer::Drain, shell.now_ms + DRAIN_MS);
        close_input(process, shell.connections);
        self.release_group(group, shell.now_ms);
        self.advance(id, shell);
    }

    /// Moves output on: from the pipes into the ring, from the ring to the watchers; and ends what has
    /// ended.
    pub(super) fn advance(&mut self, id: ProcessKey, shell: &mut Shell<'_>) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let mut left_over = Vec::new();
        // What is not moved then is heard of again, from epoll or the stream.
        for _ in 0..MAX_MOVES {
            let mut moved = send_to_watchers(process, shell.connections);
            if !process.detached {
                process.ring.forget_before(process.needed_from());
            }
            // While it runs, epoll says when there is something to read.
            if process.exit.is_some() {
                moved |= read_after_exit(process, &mut left_over, shell);
            }
            if !moved {
                break;
            }
        }
        let room = process.ring.room_keeping(process.needed_from());
        for index in 0..process.outputs.len() {
            if !watch_output(process, id, index, room > 0, shell.epoll) {
                process.set_timer(&mut self.timers, id, Timer::Watch, shell.now_ms + WATCH_AGAIN_MS);
            }
        }
        if room > 0 || !process.detached {
            process.clear_timer(&mut self.timers, id, Timer::Stall);
        } else if !process.has_timer(Timer::Stall) {
            process.set_timer(&mut self.timers, id, Timer::Stall, shell.now_ms + STALL_MS);
        }
        for fd in left_over {
            self.keep_left_over(fd, shell);
        }
        self.finish(id, shell);
    }

    /// Tells the end to watchers that have everything, and lets go of what nobody needs any more.
    fn finish(&mut self, id: ProcessKey, shell: &mut Shell<'_>) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let Some((exit, ended_ms)) = process.exit else { return };
        if !process.outputs_ended() || process.report.is_some() {
            return;
        }
        let message = ProcessExited {
            exit_code: exit.code,
            signal: exit.signal,
            timed_out: process.timed_out,
            duration_ms: ended_ms.saturating_sub(process.started_ms),
        };
        let end = process.ring.end();
        process.watchers.retain(|watcher| {
            if watcher.at == end {
                shell.connections.send_last(watcher.key, &message);
            }
            watcher.at != end
        });
        process.clear_timer(&mut self.timers, id, Timer::Drain);
        if !process.watchers.is_empty() {
            return;
        }
        if !process.detached {
            self.forget(id, shell);
        } else if !process.has_timer(Timer::Expire) {
            process.set_timer(&mut self.timers, id, Timer::Expire, shell.now_ms + KEEP_ENDED_MS);
            self.ended.push_back(id);
            if self.ended.len() > MAX_ENDED
                && let Some(oldest) = self.ended.front().copied()
            {
                self.forget(oldest, shell);
            }
        }
    }

    fn forget(&mut self, id: ProcessKey, shell: &mut Shell<'_>) {
        let Some(mut process) = self.processes.remove(&id) else { return };
        process.clear_timers(&mut self.timers, id);
        self.ended.retain(|other| *other != id);
        self.release_group(process.group.take(), shell.now_ms);
        close_input(&mut process, shell.connections);
        for watcher in &process.watchers {
            shell.connections.reset(
                watcher.key,
                Code::NotFound,
                "the process's result is not kept any longer",
            );
        }
        if self.by_pid.get(&process.pid) == Some(&id) {
            self.by_pid.remove(&process.pid);
        }
    }

    /// A pipe or terminal of a process is readable, or has ended.
    pub fn on_output(&mut self, id: ProcessKey, index: usize, shell: &mut Shell<'_>) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        read_output(process, index, shell);
        self.advance(id, shell);
    }

    /// A process's input takes more.
    pub fn write_input(&mut self, id: ProcessKey, shell: &mut Shell<'_>) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let input = &mut process.input;
        while let (Some(fd), Some(piece)) = (&input.fd, input.queue.front()) {
            match fd.write(&piece.bytes[input.written..]) {
                Ok(n) => {
                    input.written += n;
                    if input.written == piece.bytes.len() {
                        shell.connections.release(piece.from, piece.cost);
                        input.queue.pop_front();
                        input.written = 0;
                    }
                }
                Err(Errno(libc::EAGAIN)) => break,
                Err(_) => {
                    // Nobody reads any more; the process may well go on.
                    close_input(process, shell.connections);
                    return;
                }
            }
        }
        if input.queue.is_empty() && input.closing && !process.terminal {
            close_input(process, shell.connections);
            return;
        }
        let Some(fd) = &input.fd else { return };
        let wanted = !input.queue.is_empty();
        if wanted != input.watched {
            if wanted {
                let token = Token::Process(id, Way::Input).pack();
                input.watched = shell.epoll.add(fd, libc::EPOLLOUT, token).is_ok();
                if !input.watched {
                    process.set_timer(&mut self.timers, id, Timer::Watch, shell.now_ms + WATCH_AGAIN_MS);
                }
            } else {
                shell.epoll.remove(fd);
                input.watched = false;
            }
        }
    }

    /// Input came for a process.
    pub fn on_input(&mut self, id: ProcessKey, piece: Piece, shell: &mut Shell<'_>) {
        match self.processes.get_mut(&id) {
            Some(process) if process.input.fd.is_some() && !process.input.closing => {
                process.input.queue.push_back(piece);
                if process.report.is_none() {
                    self.write_input(id, shell);
                }
            }
            _ => shell.connections.release(piece.from, piece.cost),
        }
    }

    /// The stream that started a process has ended its half. That is the end of the input, but for a
    /// detached process, whose input comes from whoever attaches.
    pub fn on_finished(&mut self, id: ProcessKey, shell: &mut Shell<'_>) {
        if self.processes.get(&id).is_some_and(|p| !p.detached) {
            self.end_input(id, shell);
        }
    }

    /// Closes a process's input once everything before is written. A terminal has no such end.
    pub fn end_input(&mut self, id: ProcessKey, shell: &mut Shell<'_>) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.input.closing = !process.terminal;
        self.write_input(id, shell);
    }

    /// A stream can take more output.
    pub fn on_writable(&mut self, id: ProcessKey, shell: &mut Shell<'_>) {
        self.advance(id, shell);
    }

    /// A stream is gone.
    pub fn on_stream_gone(&mut self, key: StreamKey, task: Task, shell: &mut Shell<'_>) {
        let (Task::Owner(id) | Task::Watcher(id)) = task else { return };
        let Some(process) = self.processes.get_mut(&id) else { return };
        process.watchers.retain(|w| w.key != key);
        if process.owner == Some(key) {
            process.owner = None;
            if !process.detached {
                if process.terminal && process.watchers.is_empty() {
                    // The terminal is gone, and with it the reads that could outlast a signal.
                    close_input(process, shell.connections);
                    process.outputs.clear();
                }
                self.stop(id, shell.now_ms);
            }
        }
        self.advance(id, shell);
    }

    /// Asks a process group to end, and kills it when it does not.
    fn stop(&mut self, id: ProcessKey, now_ms: u64) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        if process.exit.is_some() || process.stopping != Stopping::No {
            return;
        }
        process.stopping = Stopping::Asked;
        // A shell at a terminal takes no notice of SIGTERM; a terminal that goes away says SIGHUP.
        let polite = if process.terminal { libc::SIGHUP } else { libc::SIGTERM };
        let _ = signal::kill_group(process.pid, polite as u32);
        process.set_timer(&mut self.timers, id, Timer::Kill, now_ms + KILL_AFTER_MS);
    }

    /// Kills a process that is not reaped yet, with everything that it has started. Without a control group
    /// that is what has stayed in its process group.
    pub(super) fn kill_tree(&self, id: ProcessKey) {
        let Some(process) = self.processes.get(&id).filter(|p| p.exit.is_none()) else { return };
        // When its control group was full, it may itself not be in it.
        let _ = signal::kill_group(process.pid, libc::SIGKILL as u32);
        if let Some(group) = process.group {
            self.groups.kill(group);
        }
    }

    fn release_group(&mut self, group: Option<GroupNumber>, now_ms: u64) {
        if let Some(group) = group {
            self.groups.release(group, now_ms);
        }
    }

    /// When the first timer is due.
    pub fn next_timeout_ms(&self) -> Option<u64> {
        self.timers.next_ms().into_iter().chain(self.groups.next_timeout_ms()).min()
    }

    /// Does what is due.
    pub fn handle_timeouts(&mut self, shell: &mut Shell<'_>) {
        self.groups.sweep(shell.now_ms);
        while let Some((id, timer)) = self.timers.take_due(shell.now_ms) {
            let Some(process) = self.processes.get_mut(&id) else { continue };
            process.clear_timer(&mut self.timers, id, timer);
            match timer {
                Timer::Deadline => {
                    process.timed_out = true;
                    self.stop(id, shell.now_ms);
                }
                Timer::Kill => {
                    process.stopping = Stopping::Killed;
                    self.kill_tree(id);
                }
                Timer::Drain => {
                    process.drained = true;
                    self.advance(id, shell);
                }
                Timer::Stall => self.cut_stalled(id, shell),
                Timer::Expire => self.forget(id, shell),
                Timer::Watch => {
                    // Read as well, so that it goes on where memory stays short.
                    for index in 0..process.outputs.len() {
                        read_output(process, index, shell);
                    }
                    self.write_input(id, shell);
                    self.advance(id, shell);
                }
            }
        }
    }

    /// Lets go of the watchers that hold a detached process up.
    fn cut_stalled(&mut self, id: ProcessKey, shell: &mut Shell<'_>) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let slowest = process.needed_from();
        process.watchers.retain(|watcher| {
            if watcher.at == slowest {
                let text = format!("this watcher fell behind: attach again from byte {}", watcher.at);
                shell.connections.reset(watcher.key, Code::ResourceExhausted, &text);
            }
            watcher.at != slowest
        });
        self.advance(id, shell);
    }

    /// Ends every process, at the end of envd itself.
    pub fn kill_all(&mut self) {
        for id in self.processes.keys() {
            self.kill_tree(*id);
        }
    }

    /// Takes over a pipe of an ended process that others still write to.
    fn keep_left_over(&mut self, fd: Fd, shell: &Shell<'_>) {
        if self.left_over.len() >= MAX_LEFT_OVER {
            self.left_over.pop_first();
        }
        let number = self.next_left_over;
        self.next_left_over = self.next_left_over.wrapping_add(1);
        if shell.epoll.add(&fd, libc::EPOLLIN, Token::LeftOver(number).pack()).is_ok() {
            self.left_over.insert(number, fd);
        }
    }

    /// Throws away what came through a left-over pipe.
    pub fn on_left_over(&mut self, number: u32, scratch: &mut [u8]) {
        if let Some(fd) = self.left_over.get(&number)
            && !matches!(fd.read(scratch), Ok(1..) | Err(Errno(libc::EAGAIN)))
        {
            self.left_over.remove(&number);
        }
    }
}
