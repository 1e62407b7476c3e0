//! The network as `ip=` has it, the host name and the resolver.

use super::{BootError, During};
use crate::cmdline::{CommandLine, Network};
use crate::sys::link::Configurator;
use crate::sys::syscall::Errno;
use crate::sys::{boot, clock, file};
use alloc::ffi::CString;
use alloc::format;
use alloc::string::{String, ToString};
use core::ffi::CStr;

/// How long the interface may take to appear.
const INTERFACE_WAIT_MS: u64 = 3_000;
/// How long the interface may take to get its carrier. Without one the guest is still of use.
const CARRIER_WAIT_MS: u64 = 500;
/// Between two looks at it.
const INTERFACE_POLL_US: u64 = 500;
/// Bytes of `/etc/hosts` and the like that are compared before they are written.
const MAX_FILE: usize = 64 * 1024;

/// Configures everything that the command line gives.
pub fn configure(line: &CommandLine) -> Result<(), BootError> {
    let interfaces = Configurator::new().during("open a network socket")?;
    interfaces.bring_up("lo").during("bring up lo")?;
    if let Some(bad) = &line.bad_network {
        return Err(BootError::new(format!("read ip={bad}"), Errno(libc::EINVAL)));
    }
    let Some(network) = &line.network else { return Ok(()) };
    let device = wait_for_interface(&network.device)?;
    interfaces
        .set_address(&device, network.address, network.mask)
        .during(&format!("set {device} to {}/{}", network.address, network.mask))?;
    interfaces.bring_up(&device).during(&format!("bring up {device}"))?;
    if let Some(gateway) = network.gateway {
        interfaces.set_gateway(gateway).during(&format!("route by {gateway}"))?;
    }
    let named = name_host(network);
    wait_for_carrier(&device);
    named
}

/// Packets before this are lost, and the kernel asks for the gateway's hardware address again only after a
/// second. The carrier is what counts: whether the interface is `RUNNING` is known up to a second later
/// (net/core/link_watch.c).
fn wait_for_carrier(device: &str) {
    let Ok(path) = CString::new(format!("/sys/class/net/{device}/carrier")) else { return };
    let deadline = clock::monotonic_ms() + CARRIER_WAIT_MS;
    while clock::monotonic_ms() < deadline {
        if file::read_file(&path, MAX_FILE).is_ok_and(|carrier| carrier.starts_with(b"1")) {
            break;
        }
        clock::sleep_us(INTERFACE_POLL_US);
    }
    // The kernel's own work that lets packets through follows the carrier at once, but in another thread.
    clock::sleep_us(INTERFACE_POLL_US);
}

fn name_host(network: &Network) -> Result<(), BootError> {
    let name = &network.host_name;
    if !name.is_empty() {
        boot::set_host_name(name.as_bytes()).during("set the host name")?;
        put(c"/etc/hostname", &format!("{name}\n"))?;
        put(
            c"/etc/hosts",
            &format!("127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n::1\tlocalhost ip6-localhost ip6-loopback\n"),
        )?;
    }
    if !network.name_servers.is_empty() {
        let lines: String = network.name_servers.iter().map(|ip| format!("nameserver {ip}\n")).collect();
        put(c"/etc/resolv.conf", &lines)?;
    }
    Ok(())
}

/// Writes a file unless it has this content already: an unchanged disk block is one less to keep.
fn put(path: &CStr, content: &str) -> Result<(), BootError> {
    if file::read_file(path, MAX_FILE).is_ok_and(|old| old == content.as_bytes()) {
        return Ok(());
    }
    let result = match file::write_file(path, content.as_bytes(), 0o644) {
        // A link to something that a resolver service would have made.
        Err(Errno(libc::ENOENT)) => file::unlink(file::CURRENT, path, 0)
            .and_then(|()| file::write_file(path, content.as_bytes(), 0o644)),
        other => other,
    };
    result.during(&format!("write {}", path.to_string_lossy()))
}

fn wait_for_interface(wanted: &str) -> Result<String, BootError> {
    let deadline = clock::monotonic_ms() + INTERFACE_WAIT_MS;
    loop {
        if let Some(found) = interface(wanted) {
            return Ok(found);
        }
        if clock::monotonic_ms() >= deadline {
            return Err(BootError::new(format!("find network interface {wanted}"), Errno(libc::ENODEV)));
        }
        clock::sleep_us(INTERFACE_POLL_US);
    }
}

fn interface(wanted: &str) -> Option<String> {
    if !wanted.is_empty() {
        let path = CString::new(format!("/sys/class/net/{wanted}")).ok()?;
        return file::metadata_at(file::CURRENT, &path, 0).is_ok().then(|| wanted.to_string());
    }
    let directory =
        file::open(file::CURRENT, c"/sys/class/net", libc::O_RDONLY | libc::O_DIRECTORY, 0).ok()?;
    let mut first: Option<String> = None;
    file::read_directory(&directory, |name| {
        let name = name.to_string_lossy();
        if name != "lo" && first.as_deref().is_none_or(|f| *name < *f) {
            first = Some(name.to_string());
        }
        true
    })
    .ok()?;
    first
}
