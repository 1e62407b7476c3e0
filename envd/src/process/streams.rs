//! What flows in and out of one process: its pipes or terminal, its ring, its watchers.

use super::supervisor::Shell;
use super::table::{Output, Process, ProcessKey};
use crate::connection::Connections;
use crate::sys::epoll::Epoll;
use crate::sys::{Errno, Fd, fd, file, pty};
use crate::token::{Token, Way};
use alloc::vec::Vec;
use wire::message::{CHANNEL_STDERR, CHANNEL_STDOUT, CHANNEL_TERMINAL, ProcessStart};

/// Both ends of a new process's standard streams.
pub(super) struct Ends {
    pub child: [Fd; 3],
    pub input: Option<Fd>,
    pub outputs: Vec<Output>,
}

impl Ends {
    pub fn open(start: &ProcessStart, owner: u32) -> Result<Ends, Errno> {
        let output = |fd, channel| Output { fd: Some(fd), channel, watched: false };
        if start.terminal_columns > 0 {
            let (master, slave) = pty::open(owner, start.terminal_columns, start.terminal_rows)?;
            let child = [slave.duplicate()?, slave.duplicate()?, slave];
            let input = master.duplicate()?;
            let outputs = alloc::vec![output(master, CHANNEL_TERMINAL)];
            return Ok(Ends { child, input: Some(input), outputs });
        }
        let (stdin, input) = if start.stdin {
            let (reader, writer) = fd::pipe(0)?;
            writer.set_nonblocking()?;
            (reader, Some(writer))
        } else {
            (file::open(file::CURRENT, c"/dev/null", libc::O_RDONLY, 0)?, None)
        };
        let (out_reader, stdout) = fd::pipe(0)?;
        let (error_reader, stderr) = fd::pipe(0)?;
        out_reader.set_nonblocking()?;
        error_reader.set_nonblocking()?;
        let outputs = alloc::vec![output(out_reader, CHANNEL_STDOUT), output(error_reader, CHANNEL_STDERR)];
        Ok(Ends { child: [stdin, stdout, stderr], input, outputs })
    }
}

/// Gives every watcher what it has not got and can take now. Whether anything moved.
pub(super) fn send_to_watchers(process: &mut Process, connections: &mut Connections) -> bool {
    let mut moved = false;
    let ring = &process.ring;
    process.watchers.retain_mut(|watcher| {
        // A watcher of a detached process that was held up longer than others were.
        watcher.at = watcher.at.max(ring.start());
        while let Some((channel, piece)) = ring.piece(watcher.at) {
            let Some(taken) = connections.send_data(watcher.key, channel, piece) else { return false };
            watcher.at += taken as u64;
            moved |= taken > 0;
            if taken < piece.len() {
                break;
            }
        }
        true
    });
    moved
}

/// What a read from a process gave.
pub(super) enum Read {
    Some,
    Nothing,
    End,
}

/// Reads once, as much as the ring has room for.
pub(super) fn read_output(process: &mut Process, index: usize, shell: &mut Shell<'_>) -> Read {
    let room = process.ring.room_keeping(process.needed_from()).min(shell.scratch.len());
    let Some(output) = process.outputs.get_mut(index) else { return Read::Nothing };
    let Some(fd) = &output.fd else { return Read::End };
    if room == 0 {
        return Read::Nothing;
    }
    match fd.read(&mut shell.scratch[..room]) {
        Ok(0) => {}
        Ok(n) => {
            process.ring.push(output.channel, &shell.scratch[..n]);
            return Read::Some;
        }
        Err(Errno(libc::EAGAIN)) => return Read::Nothing,
        // A terminal ends with EIO once nobody has it open.
        Err(_) => {}
    }
    output.fd = None;
    output.watched = false;
    Read::End
}

/// Reads what an ended process left in its pipes. When it has been given its time, a pipe that is empty
/// but held open by others is taken from the process.
pub(super) fn read_after_exit(process: &mut Process, left_over: &mut Vec<Fd>, shell: &mut Shell<'_>) -> bool {
    let mut moved = false;
    for index in 0..process.outputs.len() {
        let room = process.ring.room_keeping(process.needed_from());
        match read_output(process, index, shell) {
            Read::Some => moved = true,
            Read::Nothing if process.drained && room > 0 => {
                let output = &mut process.outputs[index];
                if let Some(fd) = output.fd.take() {
                    if output.watched {
                        shell.epoll.remove(&fd);
                        output.watched = false;
                    }
                    if !process.terminal {
                        left_over.push(fd);
                    }
                }
            }
            Read::Nothing | Read::End => {}
        }
    }
    moved
}

/// Watches an output while there is room for what it gives. A pipe that is not read is not watched at all:
/// its end would be reported again and again. Whether that is done; the kernel may lack the memory for it.
pub(super) fn watch_output(
    process: &mut Process,
    id: ProcessKey,
    index: usize,
    wanted: bool,
    epoll: &Epoll,
) -> bool {
    let output = &mut process.outputs[index];
    // Before exec has succeeded there is nothing to tell yet.
    let wanted = wanted && process.report.is_none();
    let Some(fd) = output.fd.as_ref().filter(|_| wanted != output.watched) else { return true };
    if wanted {
        let token = Token::Process(id, Way::Output(index as u8)).pack();
        output.watched = epoll.add(fd, libc::EPOLLIN, token).is_ok();
    } else {
        epoll.remove(fd);
        output.watched = false;
    }
    output.watched == wanted
}

/// Closes a process's input and gives back the credit of what it did not take.
pub(super) fn close_input(process: &mut Process, connections: &mut Connections) {
    process.input.fd = None;
    process.input.watched = false;
    process.input.written = 0;
    for piece in core::mem::take(&mut process.input.queue) {
        connections.release(piece.from, piece.cost);
    }
}
