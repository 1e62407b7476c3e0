//! One stream's two halves: what may still be sent, what may still come.

use crate::frame::{FRAME_CHARGE, FrameType};
use alloc::collections::VecDeque;
use alloc::vec::Vec;

/// A message that waits for credit or for room in the output.
#[derive(Debug)]
pub(super) struct Queued {
    pub frame_type: FrameType,
    pub payload: Vec<u8>,
    pub fin: bool,
}

/// Whether the application wants to be told that it can send data again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    /// It does not wait.
    Nothing,
    /// It waits until the peer gives the stream credit.
    Credit,
    /// It waits in the session's line for room and connection credit.
    InLine,
}

/// Both halves of a stream.
#[derive(Debug)]
pub(super) struct Stream {
    /// Bytes (frame charges included) that the peer still takes on this stream.
    pub send_credit: u64,
    /// Messages not yet sent, oldest first.
    pub queue: VecDeque<Queued>,
    /// Payload bytes in `queue`.
    pub queued_bytes: usize,
    /// The application has ended its half.
    pub finishing: bool,
    /// The frame with FIN is sent.
    pub fin_sent: bool,
    /// The peer has ended its half.
    pub fin_received: bool,
    /// Whether the application waits to send.
    pub want: Want,
    /// Whether the stream's number is in the session's line.
    pub is_lined_up: bool,
    /// The credit that the stream started with.
    pub send_window: u64,
    /// Bytes (frame charges included) that the peer may still send.
    pub recv_left: u64,
    /// Bytes dealt with here and not yet given back as credit.
    pub unreturned: u64,
}

impl Stream {
    pub fn new(send_window: u32, recv_window: u32) -> Stream {
        Stream {
            send_credit: u64::from(send_window),
            queue: VecDeque::new(),
            queued_bytes: 0,
            finishing: false,
            fin_sent: false,
            fin_received: false,
            want: Want::Nothing,
            is_lined_up: false,
            send_window: u64::from(send_window),
            recv_left: u64::from(recv_window),
            unreturned: 0,
        }
    }

    /// What the stream's data may still cost now.
    pub fn allowance(&self, pool: Pool) -> u64 {
        let share = pool.share().saturating_sub(self.held());
        self.send_credit.min(pool.left).min(share)
    }

    /// Whether a message of this cost may go now. It cannot go in parts, so a stream of which the peer
    /// holds nothing may send one of any length.
    pub fn allows_message(&self, cost: u64, pool: Pool) -> bool {
        let held = self.held();
        cost <= self.send_credit && cost <= pool.left && (held == 0 || held + cost <= pool.share())
    }

    /// What the peer holds of this stream and has not given back.
    fn held(&self) -> u64 {
        self.send_window.saturating_sub(self.send_credit)
    }

    /// Both halves have ended.
    pub fn is_done(&self) -> bool {
        self.fin_sent && self.fin_received
    }

    /// Whether the stream's `OPEN` has not been sent yet.
    pub fn is_unopened(&self) -> bool {
        self.queue.front().is_some_and(|q| q.frame_type == FrameType::Open)
    }
}

/// A connection's credit: what is left of it, and what it started with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pool {
    /// Bytes left.
    pub left: u64,
    /// Bytes at the start.
    pub window: u64,
}

impl Pool {
    /// How much of the connection's credit one stream may hold. It shrinks as the credit does, so that
    /// however many readers stall, the next stream still finds some.
    pub fn share(self) -> u64 {
        let kib = match self.left {
            left if left >= self.window / 2 => return u64::MAX,
            left if left >= self.window / 4 => 16,
            left if left >= self.window / 8 => 4,
            _ => 1,
        };
        kib * 1024
    }

    /// Whether a receiver that owes this much of a window gives it back now: at a quarter of the window,
    /// and at once while the sender has less than half of the connection's credit left.
    pub fn is_due(self, owed: u64, window: u32) -> bool {
        owed > 0 && (owed >= u64::from(window) / 4 || self.left < self.window / 2)
    }
}

/// What a frame with this payload costs its sender in credit.
pub(super) fn charge(payload_len: usize, frame_type: FrameType) -> u64 {
    if payload_len == 0 && frame_type == FrameType::Data {
        // The bare end of a half is free, so that a stream can always be ended.
        0
    } else {
        payload_len as u64 + u64::from(FRAME_CHARGE)
    }
}
