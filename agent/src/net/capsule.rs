//! One capsule's network, made and unmade whole.

use super::conntrack;
use super::error::NetError;
use super::firewall;
use super::link::Links;
use super::netlink::VethEnd;
use super::netns::{self, Namespace};
use super::policy::Policy;
use super::slot::Slot;
use super::tap::Tap;
use super::{GUEST_ADDRESS, GUEST_LINK_NAME, METADATA_ADDRESS, METADATA_PORT, MTU, host};
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const HOST_PREFIX: u8 = 32;
const LINK_PREFIX: u8 = 31;
/// The default route: 0.0.0.0/0.
const EVERYWHERE: (std::net::Ipv4Addr, u8) = (std::net::Ipv4Addr::UNSPECIFIED, 0);

/// What a new namespace is told before anything is in it: forward between its two links, and know no IPv6.
const NAMESPACE_SETTINGS: [(&str, &str); 3] = [
    ("/proc/sys/net/ipv4/ip_forward", "1"),
    ("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1"),
    ("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"),
];

/// A capsule's network. Dropping it leaves everything in place, as a restart of the agent must;
/// [`CapsuleNetwork::destroy`] takes it away.
#[derive(Debug)]
pub struct CapsuleNetwork {
    slot: Slot,
    namespace: Arc<Namespace>,
    access: Arc<Mutex<Access>>,
}

/// How things stand between a guest and the world. Whoever changes that holds it, so that changes come one
/// after another and none comes after the end.
#[derive(Debug, Clone, Copy)]
struct Access {
    /// Whether its link may be in the host's set of links with internet.
    let_out: bool,
    /// Whether it may ever have been, so that the host's table may know the link.
    was_let_out: bool,
    /// The revision of the policy that holds.
    revision: u64,
    /// Whether the network is being taken away.
    ended: bool,
}

/// Changes what a guest may reach, from another thread than the one that has the [`CapsuleNetwork`].
#[derive(Debug, Clone)]
pub struct PolicyHandle {
    slot: Slot,
    namespace: Arc<Namespace>,
    access: Arc<Mutex<Access>>,
}

impl CapsuleNetwork {
    /// Makes the namespace, both cables, the addresses and the firewall. On failure nothing stays;
    /// [`NetError::NameTaken`] means that the slot belongs to somebody else. Blocks for about ten
    /// milliseconds. The [`Tap`] is for the VMM, and lasts as long as that.
    pub fn create(slot: Slot, policy: &Policy) -> Result<(CapsuleNetwork, Tap), NetError> {
        let mut undo = Undo { slot, namespace: false, link: false };
        let namespace = Namespace::create(&slot.namespace_name())?;
        undo.namespace = true;
        let (mut inner, tap) = namespace.run(|| furnish_namespace(slot))??;

        let _held = host::hold()?;
        let mut outer = Links::open()?;
        let host_end = VethEnd { name: &slot.host_link_name(), mac: slot.host_link_mac() };
        let guest_end = VethEnd { name: GUEST_LINK_NAME, mac: slot.guest_link_mac() };
        outer.create_veth(host_end, guest_end, MTU, namespace.as_fd())?;
        undo.link = true;
        furnish_host_end(&mut outer, slot)?;
        furnish_guest_end(&mut inner, slot)?;

        let network = CapsuleNetwork::new(slot, namespace, false);
        network.set_policy(policy)?;
        undo.disarm();
        Ok((network, tap))
    }

    /// The network of a capsule that an earlier agent has made.
    pub fn adopt(slot: Slot) -> Result<CapsuleNetwork, NetError> {
        Links::open()?.get(&slot.host_link_name())?;
        Ok(CapsuleNetwork::new(slot, Namespace::open(&slot.namespace_name())?, true))
    }

    fn new(slot: Slot, namespace: Namespace, let_out: bool) -> CapsuleNetwork {
        let access = Access { let_out, was_let_out: let_out, revision: 0, ended: false };
        CapsuleNetwork { slot, namespace: Arc::new(namespace), access: Arc::new(Mutex::new(access)) }
    }

    /// Its slot.
    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// The namespace, for setns(2).
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// For changing what the guest may reach later on.
    pub fn policy_handle(&self) -> PolicyHandle {
        let (namespace, access) = (Arc::clone(&self.namespace), Arc::clone(&self.access));
        PolicyHandle { slot: self.slot, namespace, access }
    }

    /// Changes what the guest may reach, for connections that exist as well. Blocks for milliseconds.
    pub fn set_policy(&self, policy: &Policy) -> Result<(), NetError> {
        self.policy_handle().apply(&mut held(&self.access), policy)
    }

    /// Begins a connection to a TCP port of the guest. The socket is non-blocking and becomes writable
    /// when the connection stands or has failed.
    pub fn connect_guest(&self, port: u16) -> Result<mio::net::TcpStream, NetError> {
        let address = SocketAddr::from((GUEST_ADDRESS, port));
        self.namespace
            .run(|| mio::net::TcpStream::connect(address))?
            .map_err(NetError::system("connecting to", address))
    }

    /// A non-blocking listener on the metadata service's address.
    pub fn metadata_listener(&self) -> Result<mio::net::TcpListener, NetError> {
        let address = SocketAddr::from((METADATA_ADDRESS, METADATA_PORT));
        let listen = || -> io::Result<mio::net::TcpListener> {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(mio::net::TcpListener::from_std(listener))
        };
        self.namespace.run(listen)?.map_err(NetError::system("listening on", address))
    }

    /// Takes everything away. The VMM must have ended, and sockets inside must be closed, for the kernel to
    /// free the namespace; its name and the host's link are gone when this returns. Blocks for
    /// milliseconds.
    pub fn destroy(self) -> Result<(), NetError> {
        let mut access = held(&self.access);
        access.ended = true;
        remove(self.slot, access.was_let_out).map(drop)
    }
}

impl PolicyHandle {
    /// Changes what the guest may reach, for connections that exist as well, and writes it into the
    /// capsule's directory, for the agents that come after this one. What held before holds again where
    /// that fails. Blocks for milliseconds.
    pub fn change(&self, policy: &Policy, directory: &Path) -> Result<(), NetError> {
        let mut access = held(&self.access);
        if access.ended {
            return Err(NetError::Ended);
        }
        if policy.revision < access.revision {
            return Err(NetError::Superseded { revision: policy.revision, by: access.revision });
        }
        let file = |e| NetError::system("writing the network policy to", directory.display())(e);
        let before = Policy::load(directory).map_err(file)?.unwrap_or_default();
        policy.save(directory).map_err(file)?;
        self.apply(&mut access, policy).inspect_err(|_| {
            let restored =
                before.save(directory).map_err(file).and_then(|()| self.apply(&mut access, &before));
            if let Err(e) = restored {
                log::error!("slot {}: going back to the old network policy: {e}", self.slot);
            }
        })
    }

    /// Lets the links of those that may out to the internet, as they should be already. Nothing changes that
    /// meanwhile.
    pub(super) fn admit_again(handles: &[PolicyHandle]) -> Result<(), NetError> {
        let held: Vec<_> = handles.iter().map(|handle| (handle.slot, held(&handle.access))).collect();
        let let_out = held.iter().filter(|(_, access)| access.let_out && !access.ended);
        let elements: String = let_out.map(|(slot, _)| firewall::host_element(*slot, true)).collect();
        if !elements.is_empty() {
            firewall::load(&elements, None)?;
        }
        Ok(())
    }

    fn apply(&self, access: &mut Access, policy: &Policy) -> Result<(), NetError> {
        let rules = firewall::capsule_rules(self.slot, policy);
        firewall::load(&rules, Some(self.namespace.as_fd()))?;
        access.revision = policy.revision;
        if access.let_out && !policy.lets_out() {
            host::shut_in(self.slot)?;
        }
        // Before the link is in the set: where that fails half-way, it is to be taken out again.
        access.let_out = policy.lets_out();
        access.was_let_out |= access.let_out;
        host::admit(self.slot, policy.lets_out())
    }
}

/// A thread that panicked with it has at worst not noted a change that it had begun: `let_out` is then what
/// is looked at again at the next change and at the end.
fn held(access: &Mutex<Access>) -> MutexGuard<'_, Access> {
    access.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes by name whatever there is of a capsule's network; false when there was nothing. Only for slots
/// that the caller's own records name. Every step is tried; the first error is returned.
pub fn destroy_remains(slot: Slot) -> Result<bool, NetError> {
    remove(slot, true)
}

fn remove(slot: Slot, was_let_out: bool) -> Result<bool, NetError> {
    let forgotten = if was_let_out { host::forget(slot) } else { Ok(()) };
    let link = Links::open().and_then(|mut links| links.delete(&slot.host_link_name()));
    let namespace = netns::remove(&slot.namespace_name());
    // With the link gone no packet makes a new one. Where the kernel cannot be asked, entries end by themselves, and
    // slots are given out in turn: no reason to keep a capsule.
    match conntrack::forget(slot) {
        Ok(0) => {}
        Ok(count) => log::debug!("slot {slot}: {count} connections forgotten"),
        Err(e) => log::warn!("slot {slot}: the kernel may remember its connections until they time out: {e}"),
    }
    forgotten?;
    Ok(link? | namespace?)
}

/// What somebody has of a slot's names, if anything. [`CapsuleNetwork::create`] finds out as well; but before it is
/// asked, a record names the slot, and what a record names an agent that starts after a crash takes away.
pub fn taken_name(slot: Slot) -> Option<String> {
    let (namespace, link) = (slot.namespace_name(), slot.host_link_name());
    if netns::is_there(&namespace) {
        return Some(namespace);
    }
    host::has_link(&link).then_some(link)
}

/// The slots of which there is something on this host, ours or another agent's, in order.
pub fn existing_slots() -> io::Result<Vec<Slot>> {
    host::links()
}

/// Runs inside the namespace.
fn furnish_namespace(slot: Slot) -> Result<(Links, Tap), NetError> {
    for (path, value) in NAMESPACE_SETTINGS {
        write_setting(path, value)?;
    }
    let mut links = Links::open()?;
    let loopback = links.get("lo")?;
    links.bring_up(loopback, None)?;
    links.add_address(loopback, METADATA_ADDRESS, HOST_PREFIX)?;
    let tap = Tap::create(&mut links, slot)?;
    Ok((links, tap))
}

fn furnish_host_end(links: &mut Links, slot: Slot) -> Result<(), NetError> {
    let name = slot.host_link_name();
    write_setting(&format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1")?;
    let link = links.get(&name)?;
    links.bring_up(link, None)?;
    links.add_address(link, slot.host_link(), LINK_PREFIX)?;
    links.add_neighbour(link, slot.guest_link(), slot.guest_link_mac())?;
    links.add_route(link, slot.host_ip(), HOST_PREFIX, slot.guest_link())
}

fn furnish_guest_end(links: &mut Links, slot: Slot) -> Result<(), NetError> {
    let link = links.get(GUEST_LINK_NAME)?;
    links.bring_up(link, None)?;
    links.add_address(link, slot.guest_link(), LINK_PREFIX)?;
    links.add_neighbour(link, slot.host_link(), slot.host_link_mac())?;
    links.add_route(link, EVERYWHERE.0, EVERYWHERE.1, slot.host_link())
}

/// Writes a kernel setting; one that this kernel does not have (IPv6 may be compiled out) needs no change.
fn write_setting(path: &str, value: &str) -> Result<(), NetError> {
    match fs::write(path, value) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(NetError::system("writing", path)(e)),
        _ => Ok(()),
    }
}

/// Takes back, when a creation fails half-way, what that creation had made, and nothing else.
struct Undo {
    slot: Slot,
    namespace: bool,
    link: bool,
}

impl Undo {
    fn disarm(mut self) {
        (self.namespace, self.link) = (false, false);
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        let report = |result: Result<bool, NetError>| {
            if let Err(e) = result {
                log::warn!("slot {}: undoing a failed creation: {e}", self.slot);
            }
        };
        if self.link {
            report(host::forget(self.slot).map(|()| true));
            report(Links::open().and_then(|mut links| links.delete(&self.slot.host_link_name())));
        }
        if self.namespace {
            report(netns::remove(&self.slot.namespace_name()));
        }
    }
}
