//! The agent's own configuration: the typed form of its variables.

use crate::net::slot::Slot;
use crate::vmm::firecracker::Programs;
use crate::vmm::{DiskLimits, Wanted};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use wire::config::{ConfigError, HttpUrl, Settings};
use wire::network::{NOT_INTERNET, network_of};

/// Everything that the environment says.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the control plane's sessions are taken.
    pub listen_address: SocketAddr,
    /// The data directory.
    pub directory: PathBuf,
    /// The control plane; needed to register and for heartbeats.
    pub control_plane: Option<HttpUrl>,
    /// What capsules run in.
    pub vmm: Wanted,
    /// Firecracker and its jailer.
    pub firecracker: Programs,
    /// The QEMU program; `None` for the one on the PATH.
    pub qemu: Option<PathBuf>,
    /// The first and last network slot of this agent.
    pub slots: (Slot, Slot),
    /// The name server of guests with internet access.
    pub guest_dns: Option<Ipv4Addr>,
    /// How many virtual CPUs are promised for each core.
    pub vcpu_overcommit: u64,
    /// How many times over disk space is promised.
    pub disk_overcommit: u64,
    /// How long a capsule is paused until its memory is packed, in milliseconds; 0 for never.
    pub hibernate_after_ms: u64,
    /// How fast a capsule may use its disk.
    pub disk_limits: DiskLimits,
    /// How long a capsule may run until it is paused, in milliseconds; 0 for as long as it likes.
    pub max_run_ms: u64,
}

impl Config {
    /// The typed form of checked settings.
    ///
    /// # Errors
    /// A value that its variable does not accept.
    pub fn new(settings: &Settings) -> Result<Config, ConfigError> {
        let (first, last) = settings.range("WRENN_SLOTS")?;
        let slot = |index: u32| {
            Slot::new(index).ok_or_else(|| ConfigError::Malformed {
                name: "WRENN_SLOTS",
                value: Some(format!("{first}-{last}")),
                accepts: "FIRST-LAST, whole numbers from 1 to 65534".into(),
            })
        };
        Ok(Config {
            listen_address: settings.listen_address("WRENN_HOST_LISTEN_ADDR")?,
            directory: settings.path("WRENN_DIR")?,
            control_plane: optional(settings, "WRENN_CP_URL", Settings::http_url)?,
            vmm: match settings.get("WRENN_VMM") {
                Some("firecracker") => Wanted::Firecracker,
                Some("qemu") => Wanted::Qemu,
                _ => Wanted::Auto,
            },
            firecracker: Programs {
                firecracker: optional(settings, "WRENN_FIRECRACKER_BIN", Settings::path)?,
                jailer: optional(settings, "WRENN_JAILER_BIN", Settings::path)?,
                without_jailer: settings.boolean("WRENN_FIRECRACKER_UNJAILED")?,
            },
            qemu: optional(settings, "WRENN_QEMU_BIN", Settings::path)?,
            slots: (slot(first)?, slot(last)?),
            guest_dns: optional(settings, "WRENN_GUEST_DNS", Settings::ipv4)?,
            vcpu_overcommit: settings.number("WRENN_VCPU_OVERCOMMIT")?,
            disk_overcommit: settings.number("WRENN_DISK_OVERCOMMIT")?,
            hibernate_after_ms: settings.number("WRENN_HIBERNATE_AFTER_SEC")? * 1000,
            disk_limits: DiskLimits {
                bytes_per_sec: settings.number("WRENN_DISK_BYTES_PER_SEC")?,
                ops_per_sec: settings.number("WRENN_DISK_OPS_PER_SEC")?,
            },
            max_run_ms: settings.number("WRENN_MAX_RUN_SEC")? * 1000,
        })
    }
}

fn optional<T>(
    settings: &Settings,
    name: &'static str,
    read: impl Fn(&Settings, &'static str) -> Result<T, ConfigError>,
) -> Result<Option<T>, ConfigError> {
    settings.get(name).map(|_| read(settings, name)).transpose()
}

/// The name server for guests: the configured one, else the first of the host's own `resolv.conf` (its
/// text) that a guest with internet may reach, which one of a private network is not.
pub fn guest_name_server(configured: Option<Ipv4Addr>, resolv_conf: &str) -> Option<Ipv4Addr> {
    configured.or_else(|| {
        resolv_conf
            .lines()
            .filter_map(|line| line.trim().strip_prefix("nameserver"))
            .filter_map(|rest| rest.trim().parse::<Ipv4Addr>().ok())
            .find(|address| is_internet(*address))
    })
}

/// Why capsules with internet access will find no names, where they will not; for a person.
pub fn why_no_names(configured: Option<Ipv4Addr>, resolv_conf: &str) -> Option<String> {
    match guest_name_server(configured, resolv_conf) {
        None => Some(
            "none of this host's name servers is on the public internet, which is all that capsules may reach; \
             set WRENN_GUEST_DNS to one that is"
                .into(),
        ),
        Some(address) if !is_internet(address) => Some(format!(
            "WRENN_GUEST_DNS is {address}, which is not on the public internet, which is all that capsules may \
             reach; set it to one that is"
        )),
        Some(_) => None,
    }
}

fn is_internet(address: Ipv4Addr) -> bool {
    !NOT_INTERNET.iter().any(|(network, prefix)| network_of(address, *prefix) == *network)
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::config::Program;

    fn config(pairs: &[(&str, &str)]) -> Config {
        let pairs = pairs.iter().map(|(n, v)| (n.to_string(), v.to_string()));
        let settings = Settings::read(Program::Agent, pairs, "").expect("settings");
        Config::new(&settings).expect("config")
    }

    #[test]
    fn defaults() {
        let config = config(&[]);
        assert_eq!(config.listen_address.to_string(), "0.0.0.0:50051");
        assert_eq!(config.directory, PathBuf::from("/var/lib/wrenn"));
        assert!(config.control_plane.is_none() && config.qemu.is_none() && config.guest_dns.is_none());
        assert_eq!((config.slots.0.index(), config.slots.1.index()), (1, 65_534));
        assert_eq!((config.vcpu_overcommit, config.disk_overcommit), (8, 8));
        assert_eq!((config.hibernate_after_ms, config.max_run_ms), (0, 0));
        assert_eq!(config.disk_limits, DiskLimits::default());
        assert_eq!(config.vmm, Wanted::Auto);
        assert!(config.firecracker.firecracker.is_none() && !config.firecracker.without_jailer);
    }

    #[test]
    fn values() {
        let config = config(&[
            ("WRENN_CP_URL", "http://cp:8000"),
            ("WRENN_SLOTS", "100-199"),
            ("WRENN_GUEST_DNS", "9.9.9.9"),
            ("WRENN_VMM", "firecracker"),
            ("WRENN_FIRECRACKER_BIN", "/opt/firecracker"),
            ("WRENN_FIRECRACKER_UNJAILED", "true"),
        ]);
        assert_eq!(config.control_plane.map(|u| u.port), Some(8000));
        assert_eq!(config.slots.1.index(), 199);
        assert_eq!(config.vmm, Wanted::Firecracker);
        assert_eq!(config.firecracker.firecracker, Some(PathBuf::from("/opt/firecracker")));
        assert!(config.firecracker.without_jailer);
        assert_eq!(config.guest_dns, Some(Ipv4Addr::new(9, 9, 9, 9)));
    }

    #[test]
    fn a_guest_gets_a_name_server_that_it_can_reach() {
        let text =
            "# stub\nnameserver 127.0.0.53\nnameserver ::1\nnameserver\t10.0.0.2\nnameserver 1.1.1.1\n";
        // What the network policy refuses is of no use to it.
        assert_eq!(guest_name_server(None, text), Some(Ipv4Addr::new(1, 1, 1, 1)));
        assert_eq!(guest_name_server(Some(Ipv4Addr::new(9, 9, 9, 9)), text), Some(Ipv4Addr::new(9, 9, 9, 9)));
        for private in ["127.0.0.1", "169.254.169.253", "192.168.1.1", "0.0.0.0"] {
            let text = format!("nameserver {private}");
            assert_eq!(guest_name_server(None, &text), None);
            assert!(why_no_names(None, &text).is_some_and(|why| why.contains("WRENN_GUEST_DNS")));
        }
        assert!(why_no_names(Some(Ipv4Addr::new(10, 0, 0, 2)), text).is_some());
        assert_eq!(why_no_names(None, text), None);
    }
}
