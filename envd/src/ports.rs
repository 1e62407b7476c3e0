//! TCP ports of the guest: which are listened on, and streams to them, also where only the loopback reaches.

use crate::connection::{Connections, StreamKey, Task};
use crate::process::request::errno_error;
use crate::process::supervisor::Shell;
use crate::sys::syscall::Errno;
use crate::sys::{Fd, file, socket};
use crate::token::Token;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::vec::Vec;
use core::ffi::CStr;
use core::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use wire::message::{CHANNEL_PORT, Code, Done, Error, PortListReply};

/// Connections that may be open at once.
const MAX_CONNECTIONS: usize = 1024;
/// Bytes of each of the kernel's tables that are looked at.
const MAX_TABLE: usize = 1024 * 1024;
/// `TCP_LISTEN` (include/net/tcp_states.h).
const LISTENING: &str = "0A";
/// The kernel's tables of TCP sockets.
const TABLES: [&CStr; 2] = [c"/proc/net/tcp", c"/proc/net/tcp6"];

/// A connection's number; never used twice.
pub type PortKey = u32;

/// A port that is listened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listening {
    /// Whether only the loopback reaches it.
    pub loopback_only: bool,
    /// The user id that listens.
    pub user: u32,
    /// The inode of its socket; of the last one where there are several.
    pub inode: u64,
}

/// One line of a table, when it is a socket that listens.
fn listener(line: &str) -> Option<(u16, Listening)> {
    let mut fields = line.split_ascii_whitespace();
    let (address, port) = fields.nth(1)?.split_once(':')?;
    let state = fields.nth(1)?;
    if state != LISTENING {
        return None;
    }
    let user = fields.nth(3).and_then(|f| f.parse().ok()).unwrap_or(0);
    let inode = fields.nth(1).and_then(|f| f.parse().ok()).unwrap_or(0);
    // Addresses are 32-bit words in the machine's order: 127.x.y.z ends in 7F, ::1 in a word of 1.
    let loopback_only = match address.len() {
        8 => address.ends_with("7F"),
        32 => address == "00000000000000000000000001000000" || address.ends_with("FFFF00000100007F"),
        _ => return None,
    };
    Some((u16::from_str_radix(port, 16).ok()?, Listening { loopback_only, user, inode }))
}

/// The ports of the tables, in order; one that is listened on more than once is open when one of them is.
pub fn listeners<'a>(tables: impl Iterator<Item = &'a str>) -> BTreeMap<u16, Listening> {
    let mut ports: BTreeMap<u16, Listening> = BTreeMap::new();
    for (port, mut listening) in tables.flat_map(str::lines).filter_map(listener) {
        if let Some(other) = ports.get(&port) {
            listening.loopback_only &= other.loopback_only;
        }
        ports.insert(port, listening);
    }
    ports
}

/// Which ports are listened on, without envd's own.
pub fn list(own: u16) -> Result<PortListReply, Error> {
    let ports = listening(own)?.into_iter().map(|(port, l)| (port, l.loopback_only)).collect();
    Ok(PortListReply { ports })
}

/// The same, with who listens.
pub fn listening(own: u16) -> Result<BTreeMap<u16, Listening>, Error> {
    let mut tables = Vec::new();
    for path in TABLES {
        match file::read_file(path, MAX_TABLE) {
            Ok(content) => tables.push(content),
            // A kernel without IPv6 has no second table.
            Err(Errno(libc::ENOENT)) => {}
            Err(e) => return Err(errno_error("cannot read the kernel's table of sockets", e)),
        }
    }
    let texts = tables.iter().filter_map(|t| core::str::from_utf8(t).ok());
    let mut ports = listeners(texts);
    ports.remove(&own);
    Ok(ports)
}

/// One stream and its connection.
struct Link {
    key: StreamKey,
    port: u16,
    fd: Fd,
    connected: bool,
    /// Whether IPv6's loopback was tried.
    second_try: bool,
    /// From the stream, oldest first; bounded by its window.
    queue: VecDeque<(Vec<u8>, u32)>,
    written: usize,
    /// The stream's half has ended; the connection's follows when the queue is written.
    peer_finished: bool,
    sending_ended: bool,
    /// From the connection, what the stream did not take; at most one read.
    pending: Vec<u8>,
    receiving_ended: bool,
    /// What epoll watches for.
    watched: i32,
}

/// All connections to ports.
#[derive(Default)]
pub struct Ports {
    links: BTreeMap<PortKey, Link>,
    next: PortKey,
}

impl Ports {
    /// Connects a stream to a port.
    pub fn connect(&mut self, key: StreamKey, port: u16, shell: &mut Shell<'_>) -> Result<(), Error> {
        if port == 0 {
            return Err(Error::new(Code::InvalidRequest, "a port is a number from 1 to 65535"));
        }
        if self.links.len() >= MAX_CONNECTIONS {
            let text = format!("{MAX_CONNECTIONS} connections to ports are open already: close some first");
            return Err(Error::new(Code::ResourceExhausted, text));
        }
        let failed = |e| errno_error("cannot open a connection", e);
        let fd = socket::connect(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)).map_err(failed)?;
        let id = self.next;
        self.next += 1;
        shell.epoll.add(&fd, libc::EPOLLOUT, Token::Port(id).pack()).map_err(failed)?;
        let link = Link {
            key,
            port,
            fd,
            connected: false,
            second_try: false,
            queue: VecDeque::new(),
            written: 0,
            peer_finished: false,
            sending_ended: false,
            pending: Vec::new(),
            receiving_ended: false,
            watched: libc::EPOLLOUT,
        };
        self.links.insert(id, link);
        shell.connections.set_task(key, Task::Port(id));
        Ok(())
    }

    /// The connection's socket is ready, or its stream takes more.
    pub fn go_on(&mut self, id: PortKey, shell: &mut Shell<'_>) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let result = link.go_on(id, shell);
        let is_done = link.sending_ended && link.receiving_ended && link.pending.is_empty();
        match result {
            Ok(()) if !is_done => {}
            Ok(()) => self.forget(id, shell.connections),
            Err(errno) => {
                let (key, port, connected) = (link.key, link.port, link.connected);
                self.forget(id, shell.connections);
                if connected {
                    shell.connections.reset(key, Code::Unavailable, &format!("port {port}: {errno}"));
                } else {
                    let text = format!("nothing answers on port {port} in the capsule: {errno}");
                    shell.connections.fail(key, &Error::with_errno(Code::Unavailable, errno.0, text));
                }
            }
        }
    }

    /// Bytes came from a stream.
    pub fn on_data(&mut self, id: PortKey, bytes: Vec<u8>, cost: u32, shell: &mut Shell<'_>) {
        if let Some(link) = self.links.get_mut(&id).filter(|l| !l.sending_ended) {
            link.queue.push_back((bytes, cost));
            self.go_on(id, shell);
        }
    }

    /// A stream's half has ended.
    pub fn on_finished(&mut self, id: PortKey, shell: &mut Shell<'_>) {
        if let Some(link) = self.links.get_mut(&id) {
            link.peer_finished = true;
            self.go_on(id, shell);
        }
    }

    /// A stream is gone, and its connection with it.
    pub fn on_stream_gone(&mut self, id: PortKey) {
        self.links.remove(&id);
    }

    fn forget(&mut self, id: PortKey, connections: &mut Connections) {
        if let Some(link) = self.links.remove(&id) {
            for (_, cost) in link.queue {
                connections.release(link.key, cost);
            }
            connections.end_task(link.key);
        }
    }
}

impl Link {
    fn go_on(&mut self, id: PortKey, shell: &mut Shell<'_>) -> Result<(), Errno> {
        if !self.connected && !self.finish_connecting(id, shell)? {
            return Ok(());
        }
        self.write(shell.connections)?;
        self.read(shell)?;
        let mut wanted = 0;
        if !self.queue.is_empty() {
            wanted |= libc::EPOLLOUT;
        }
        if self.pending.is_empty() && !self.receiving_ended {
            wanted |= libc::EPOLLIN;
        }
        self.watch(wanted, id, shell)
    }

    /// Whether the connection is there. Services of some runtimes listen on IPv6's loopback only.
    fn finish_connecting(&mut self, id: PortKey, shell: &mut Shell<'_>) -> Result<bool, Errno> {
        match socket::take_error(&self.fd) {
            // Also called when data comes before the connection does.
            Ok(()) if !socket::is_connected(&self.fd) => return Ok(false),
            Ok(()) => {}
            Err(Errno(libc::ECONNREFUSED)) if !self.second_try => {
                self.second_try = true;
                let address = SocketAddrV6::new(Ipv6Addr::LOCALHOST, self.port, 0, 0);
                self.fd = socket::connect_v6(address).map_err(|_| Errno(libc::ECONNREFUSED))?;
                shell.epoll.add(&self.fd, libc::EPOLLOUT, Token::Port(id).pack())?;
                self.watched = libc::EPOLLOUT;
                return Ok(false);
            }
            Err(e) => return Err(e),
        }
        self.connected = true;
        shell.connections.send(self.key, &Done {});
        Ok(true)
    }

    fn write(&mut self, connections: &mut Connections) -> Result<(), Errno> {
        while let Some((bytes, cost)) = self.queue.front() {
            match socket::send(&self.fd, &bytes[self.written..]) {
                Ok(n) => self.written += n,
                Err(Errno(libc::EAGAIN)) => return Ok(()),
                Err(e) => return Err(e),
            }
            if self.written == bytes.len() {
                connections.release(self.key, *cost);
                self.queue.pop_front();
                self.written = 0;
            }
        }
        if self.peer_finished && !self.sending_ended {
            socket::shutdown_send(&self.fd);
            self.sending_ended = true;
        }
        Ok(())
    }

    /// Reads once, so that others have their turn, when the stream has taken what was read before.
    fn read(&mut self, shell: &mut Shell<'_>) -> Result<(), Errno> {
        if !self.pending.is_empty() {
            let taken = shell.connections.send_data(self.key, CHANNEL_PORT, &self.pending).unwrap_or(0);
            self.pending.drain(..taken);
            if !self.pending.is_empty() {
                return Ok(());
            }
            self.pending = Vec::new();
        }
        if self.receiving_ended {
            return Ok(());
        }
        match self.fd.read(shell.scratch) {
            Ok(0) => {
                self.receiving_ended = true;
                shell.connections.finish(self.key);
            }
            Ok(n) => {
                let bytes = &shell.scratch[..n];
                let taken = shell.connections.send_data(self.key, CHANNEL_PORT, bytes).unwrap_or(0);
                self.pending.extend_from_slice(&bytes[taken..]);
            }
            Err(Errno(libc::EAGAIN)) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// A socket that nothing is wanted of is not watched at all: its end would be reported all the time.
    fn watch(&mut self, wanted: i32, id: PortKey, shell: &Shell<'_>) -> Result<(), Errno> {
        if wanted == self.watched {
            return Ok(());
        }
        let token = Token::Port(id).pack();
        match (self.watched, wanted) {
            (0, _) => shell.epoll.add(&self.fd, wanted, token)?,
            (_, 0) => shell.epoll.remove(&self.fd),
            _ => shell.epoll.modify(&self.fd, wanted, token)?,
        }
        self.watched = wanted;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TCP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 1 1 0 100 0 0 10 0\n   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0\n   2: 0100007F:A000 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1000        0 3 1 0 20 4 30 10 -1\n";
    const TCP6: &str = "  sl  local_address ...\n   0: 00000000000000000000000001000000:0BB8 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 9\n   1: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 9\n nonsense\n";

    #[test]
    fn listeners_are_read_from_the_kernels_tables() {
        let of = |loopback_only, user, inode| Listening { loopback_only, user, inode };
        let v4: Vec<_> = listeners([TCP].into_iter()).into_iter().collect();
        assert_eq!(v4, [(22, of(false, 0, 2)), (8080, of(true, 1000, 1))]);
        let both: Vec<_> =
            listeners([TCP, TCP6].into_iter()).into_iter().map(|(p, l)| (p, l.loopback_only)).collect();
        assert_eq!(both, [(22, false), (3000, true), (8080, false)]);
    }
}
