//! Messages between the outside and a capsule's guest daemon: processes and terminals.
//!
//! Output travels as DATA on the stream that started or attached to the process: channel 1 is stdout,
//! 2 stderr, 3 a terminal. Input travels as DATA on channel 0; FIN on the stream closes stdin.

use super::messages;
use crate::codec::Bytes;
use alloc::string::String;
use alloc::vec::Vec;

/// DATA channel of a process's standard input.
pub const CHANNEL_STDIN: u8 = 0;
/// DATA channel of a process's standard output.
pub const CHANNEL_STDOUT: u8 = 1;
/// DATA channel of a process's standard error.
pub const CHANNEL_STDERR: u8 = 2;
/// DATA channel of a terminal, both ways.
pub const CHANNEL_TERMINAL: u8 = 3;

messages! {
    /// Starts a process. Answered by `ProcessStarted` and, unless detached, its output as DATA and
    /// `ProcessExited`; or by `Error` when it could not be started. It is killed with everything that it has
    /// started, in whatever group or session, when its time runs out, when it is sent SIGKILL, and when it is
    /// not detached and its stream ends. What it has put into the background stays when it ends by itself or
    /// by another signal. In a guest without control groups (version 2), only its process group is killed.
    ProcessStart = 0x0200 {
        /// Program and arguments; the program is looked up in the environment's PATH.
        argv: Vec<Bytes>,
        /// Environment over the defaults.
        environment: Vec<(Bytes, Bytes)>,
        /// Working directory; empty for the user's home.
        cwd: Bytes,
        /// Account name; empty for the capsule's default user.
        user: String,
        /// A name to select the process by; empty for none.
        tag: String,
        /// Milliseconds until it is sent SIGTERM, and when it has ended or 2 s later SIGKILL; 0 for never.
        timeout_ms: u32,
        /// Whether the process outlives the stream; its output is then kept in a bounded ring.
        detached: bool,
        /// Whether stdin is a pipe from this stream; else it is empty.
        stdin: bool,
        /// Columns of its terminal; 0 for no terminal.
        terminal_columns: u16,
        /// Rows of its terminal; 0 for no terminal.
        terminal_rows: u16,
    }

    /// The process runs.
    ProcessStarted = 0x0201 {
        /// Its process id in the guest.
        pid: u32,
        /// Its tag.
        tag: String,
    }

    /// The process ended and all its output was sent.
    ProcessExited = 0x0202 {
        /// Its exit code; 0 when a signal ended it.
        exit_code: u32,
        /// The signal that ended it; 0 when it exited.
        signal: u32,
        /// Whether its time ran out.
        timed_out: bool,
        /// How long it ran, in milliseconds.
        duration_ms: u64,
    }

    /// Sends a signal to a process's group; SIGKILL to everything that it has started too. Answered by
    /// `Done`; on the stream of a process, with an empty selector, it is for that process and not answered.
    ProcessSignal = 0x0203 {
        /// A process id in decimal, or a tag.
        selector: String,
        /// The signal's number, 1 to 64.
        signal: u32,
    }

    /// Asks for all processes that were started here. Answered by one or more `ProcessListReply`, the last
    /// of which ends the stream.
    ProcessList = 0x0204 {
    }

    /// The processes that were started here and still run.
    ProcessListReply = 0x0205 {
        /// For each: its id in decimal with its tag, and its program and arguments.
        processes: Vec<((u32, String), Vec<Bytes>)>,
    }

    /// Watches a process that runs detached. Answered by `ProcessAttached`, then its output as DATA and
    /// `ProcessExited`.
    ProcessAttach = 0x0206 {
        /// A process id in decimal, or a tag.
        selector: String,
        /// The byte of its output to go on from, counted from 0 over all channels.
        from_byte: u64,
    }

    /// The process is watched from here on.
    ProcessAttached = 0x0207 {
        /// Its process id in the guest.
        pid: u32,
        /// Its tag.
        tag: String,
        /// The number of the first byte that follows; bytes before it that were asked for are lost.
        from_byte: u64,
    }

    /// Resizes the terminal of the process of this stream.
    TerminalResize = 0x0208 {
        /// Columns, 1 to 65,535.
        columns: u16,
        /// Rows, 1 to 65,535.
        rows: u16,
    }

    /// Closes the standard input of the process of this stream, once everything sent before is written:
    /// for a detached process, whose input does not end with a stream. Not answered.
    ProcessEndInput = 0x0209 {
    }
}
