//! Links, addresses, routes and neighbours of one network namespace: requests of [`super::netlink`] over a
//! socket of [`crate::sys::rtnetlink`], each waited for.

use super::error::NetError;
use super::mac::MacAddress;
use super::netlink::{Answer, Link, Refusal, Request, VethEnd, next_answer};
use crate::sys::rtnetlink::Socket;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::BorrowedFd;

/// Room for one datagram of answers: a link's description is about 1.5 KiB.
const ANSWER_BYTES: usize = 16 * 1024;
/// Datagrams read for one request before it counts as unanswered; two are usual.
const MAX_DATAGRAMS: usize = 16;

/// The links of the network namespace in which [`Links::open`] was called.
#[derive(Debug)]
pub struct Links {
    socket: Socket,
    sequence: u32,
}

impl Links {
    /// The links of the calling thread's network namespace.
    pub fn open() -> Result<Links, NetError> {
        let socket = Socket::open().map_err(NetError::system("opening", "an rtnetlink socket"))?;
        Ok(Links { socket, sequence: 0 })
    }

    /// Makes a veth pair, `host` here and `peer` in `namespace`.
    pub fn create_veth(
        &mut self,
        host: VethEnd<'_>,
        peer: VethEnd<'_>,
        mtu: u32,
        namespace: BorrowedFd<'_>,
    ) -> Result<(), NetError> {
        let request = Request::create_veth(host, peer, mtu, namespace);
        match self.run("creating veth pair", host.name, request) {
            Err(NetError::Refused { refusal, .. }) if refusal.errno == libc::EEXIST => {
                Err(NetError::NameTaken { name: host.name.to_owned() })
            }
            other => other.map(drop),
        }
    }

    /// The link called `name`; `None` when there is none.
    pub fn find(&mut self, name: &str) -> Result<Option<Link>, NetError> {
        match self.run("looking for link", name, Request::get_link(name)) {
            Err(e) if e.errno() == Some(libc::ENODEV) => Ok(None),
            other => other,
        }
    }

    /// The link called `name`, which must be there.
    pub fn get(&mut self, name: &str) -> Result<Link, NetError> {
        self.find(name)?.ok_or_else(|| {
            let refusal = Refusal { errno: libc::ENODEV, text: None };
            NetError::Refused { step: "looking for link", object: name.to_owned(), refusal }
        })
    }

    /// Deletes the link called `name`; false when there was none.
    pub fn delete(&mut self, name: &str) -> Result<bool, NetError> {
        match self.run("deleting link", name, Request::delete_link(name)) {
            Err(e) if e.errno() == Some(libc::ENODEV) => Ok(false),
            other => other.map(|_| true),
        }
    }

    /// Brings a link up, with this Ethernet address or the one that it has.
    pub fn bring_up(&mut self, link: Link, mac: Option<MacAddress>) -> Result<(), NetError> {
        self.run("bringing up link", link.index, Request::bring_up(link.index, mac)).map(drop)
    }

    /// Gives a link an address.
    pub fn add_address(&mut self, link: Link, address: Ipv4Addr, prefix: u8) -> Result<(), NetError> {
        self.run("adding address", address, Request::add_address(link.index, address, prefix)).map(drop)
    }

    /// Adds a route to `destination`/`prefix` through `gateway` on a link.
    pub fn add_route(
        &mut self,
        link: Link,
        destination: Ipv4Addr,
        prefix: u8,
        gateway: Ipv4Addr,
    ) -> Result<(), NetError> {
        let request = Request::add_route(destination, prefix, gateway, link.index);
        self.run("adding route to", destination, request).map(drop)
    }

    /// Adds a neighbour that never expires.
    pub fn add_neighbour(&mut self, link: Link, address: Ipv4Addr, mac: MacAddress) -> Result<(), NetError> {
        self.run("adding neighbour", address, Request::add_neighbour(link.index, address, mac)).map(drop)
    }

    /// Sends one request and waits for its acknowledgement; gives the link that came before it, if any.
    fn run(
        &mut self,
        step: &'static str,
        object: impl std::fmt::Display,
        request: Request,
    ) -> Result<Option<Link>, NetError> {
        let object = object.to_string();
        self.sequence = self.sequence.wrapping_add(1);
        match self.exchange(request) {
            Ok(Ok(link)) => Ok(link),
            Ok(Err(refusal)) => Err(NetError::Refused { step, object, refusal }),
            Err(source) => Err(NetError::System { step, object, source }),
        }
    }

    fn exchange(&mut self, request: Request) -> io::Result<Result<Option<Link>, Refusal>> {
        self.socket.send(&request.into_bytes(self.sequence))?;
        let mut buffer = vec![0; ANSWER_BYTES];
        let mut found = None;
        for _ in 0..MAX_DATAGRAMS {
            let length = self.socket.receive(&mut buffer)?;
            let mut bytes = &buffer[..length];
            while let Some(answer) = next_answer(&mut bytes, self.sequence) {
                match answer {
                    Answer::Done => return Ok(Ok(found)),
                    Answer::Refused(refusal) => return Ok(Err(refusal)),
                    Answer::Link(link) => found = Some(link),
                    Answer::Other => {}
                }
            }
        }
        Err(io::ErrorKind::TimedOut.into())
    }
}
