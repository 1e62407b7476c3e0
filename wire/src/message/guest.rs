//! Messages between the agent and a capsule's guest daemon about the guest itself.

use super::messages;
use crate::codec::Bytes;
use alloc::string::String;
use alloc::vec::Vec;

/// DATA channel of a TCP connection to a port of the guest's, both ways.
pub const CHANNEL_PORT: u8 = 5;

messages! {
    /// Tells the guest daemon what it could not know: sent by the agent after boot and each resume.
    /// Every other session of the agent's ends with it: after a resume nobody is at their other end.
    /// Until it has come, with the time and at least 32 bytes of randomness, a guest that was just started
    /// or resumed answers all but this and `Health` with the error `unavailable`. That holds too for a guest
    /// daemon that was ended and has started again: its sessions were cut, and what it ran before runs on,
    /// but is not listed any more and its output is lost. Answered by `Done`.
    GuestInit = 0x0400 {
        /// Wall clock time, in microseconds since the epoch.
        time_us: u64,
        /// Account for requests that name none; empty for `user`, or root where that does not exist.
        default_user: String,
        /// Default environment of processes.
        environment: Vec<(Bytes, Bytes)>,
        /// Bytes to mix into the guest's random pool.
        entropy: Bytes,
    }

    /// Makes the guest ready to be saved: everything written is on disk, and every other session of the
    /// agent's ends. From then on only this session does work; on any other, `GuestInit` has to come first,
    /// so that nothing is started in a guest that was resumed before its clock and random numbers are its
    /// own. Answered by `Done`.
    GuestPrepareSnapshot = 0x0401 {
    }

    /// Asks for the guest's use of its machine. Answered by `GuestMetricsReply`.
    GuestMetrics = 0x0410 {
    }

    /// The guest's use of its machine at one moment. Times are sums since its start: two replies give a
    /// rate.
    GuestMetricsReply = 0x0411 {
        /// Milliseconds of the guest's monotonic clock.
        at_ms: u64,
        /// Processors.
        processors: u32,
        /// Processor time spent working, in milliseconds over all processors.
        busy_ms: u64,
        /// Processor time not spent, in milliseconds over all processors.
        idle_ms: u64,
        /// Memory that the kernel has, in bytes.
        memory_total_bytes: u64,
        /// Memory that programs can have without swapping, in bytes.
        memory_available_bytes: u64,
        /// Size of the root file system, in bytes.
        disk_total_bytes: u64,
        /// What an ordinary user can still write to it, in bytes.
        disk_available_bytes: u64,
        /// Bytes received on all interfaces but the loopback.
        network_received_bytes: u64,
        /// Bytes sent on all interfaces but the loopback.
        network_sent_bytes: u64,
        /// Load average over one minute, in thousandths.
        load_1m_thousandths: u32,
        /// Processes in the guest.
        processes: u32,
    }

    /// Asks for the figures that the guest daemon has taken, one a second of the last 10 minutes. Answered
    /// by one `GuestMetricsReply` each, the oldest first, then `Done`.
    GuestMetricsHistory = 0x0412 {
        /// Only those that were taken later than this, see `at_ms` there; 0 for all.
        after_ms: u64,
    }

    /// Connects to a TCP port of the guest's own, also one that only its loopback reaches. Answered by
    /// `Done`, then DATA on channel 5 both ways; FIN is the end of a half, RESET of both.
    PortConnect = 0x0420 {
        /// The port, 1 to 65,535.
        port: u16,
    }

    /// Asks which TCP ports are listened on. Answered by `PortListReply`.
    PortList = 0x0421 {
    }

    /// The TCP ports that are listened on, in their order, but envd's own.
    PortListReply = 0x0422 {
        /// Each port, and whether only the guest's loopback reaches it.
        ports: Vec<(u16, bool)>,
    }

    /// Asks to be told of the TCP ports that are listened on: of each that is now, then `Done`, then of each
    /// change, within a second, until the stream ends.
    PortWatch = 0x0423 {
    }

    /// A TCP port is listened on, or not any more.
    PortChange = 0x0424 {
        /// The port.
        port: u16,
        /// Whether it is listened on now.
        listening: bool,
        /// Whether only the guest's loopback reaches it.
        loopback_only: bool,
        /// The user id that listens.
        user: u32,
        /// The process that listens; 0 where it is not known.
        pid: u32,
    }
}
