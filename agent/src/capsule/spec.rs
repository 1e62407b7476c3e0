//! What a capsule shall be, checked before anything is made.

use super::admission::{self, Capacity, Need, Promised, Shortage};
use super::limits::host_memory_mb;
use crate::context::Host;
use crate::layout::{LayoutError, is_capsule_id};
use crate::snapshots::{Snapshot, SnapshotError};
use crate::sys::resources;
use std::fmt;
use std::path::PathBuf;
use wire::codec::Bytes;
use wire::message::{CapsuleCreate, Code};

/// Fewest and most virtual CPUs.
pub const VCPUS: std::ops::RangeInclusive<u32> = 1..=64;
/// Least and most memory, in MiB.
pub const MEMORY_MB: std::ops::RangeInclusive<u32> = 128..=1_048_576;
/// The longest deadline that may be asked for, in milliseconds.
pub const MAX_DEADLINE_MS: u32 = 600_000;
/// The most variables in the default environment.
pub const MAX_ENVIRONMENT: usize = 256;
/// The most bytes of all names and values of the default environment.
pub const MAX_ENVIRONMENT_BYTES: usize = 32 * 1024;
const MIB: u64 = 1024 * 1024;

/// What a capsule shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Its id: directory, host name and VMM name.
    pub id: String,
    /// The template's name.
    pub template: String,
    /// The template's image.
    pub image: PathBuf,
    /// The snapshot that it starts from instead of booting.
    pub snapshot: Option<Snapshot>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mb: u32,
    /// Size of the root disk in bytes; `None` for the template's own.
    pub disk_bytes: Option<u64>,
    /// Whether the guest may reach the internet.
    pub allow_internet: bool,
    /// Default environment of its processes.
    pub environment: Vec<(Bytes, Bytes)>,
    /// Idle seconds until it is paused; 0 for never.
    pub timeout_sec: u32,
    /// When creating is given up, in milliseconds after its begin.
    pub deadline_ms: u64,
}

/// Why a capsule is not admitted.
#[derive(Debug)]
pub enum SpecError {
    /// The id or the template cannot be used.
    Layout(LayoutError),
    /// The snapshot cannot be used.
    Snapshot(SnapshotError),
    /// A number is out of its range.
    OutOfRange {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// The disk is smaller than the template.
    DiskTooSmall {
        /// Asked for, in MiB.
        asked_mb: u64,
        /// The template's size, in MiB.
        template_mb: u64,
    },
    /// The environment is too large or has names that are none.
    BadEnvironment(String),
    /// The host has no room for it.
    NoRoom(Shortage),
}

impl SpecError {
    /// The error code that the far end gets.
    pub fn code(&self) -> Code {
        match self {
            SpecError::Layout(LayoutError::NoTemplate { .. }) => Code::NotFound,
            SpecError::Layout(LayoutError::Io { .. }) => Code::Internal,
            SpecError::Snapshot(SnapshotError::OtherVmm { .. }) => Code::InvalidState,
            SpecError::Snapshot(_) => Code::Internal,
            SpecError::NoRoom(shortage) if !shortage.is_for_ever() => Code::ResourceExhausted,
            _ => Code::InvalidRequest,
        }
    }
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SpecError::Layout(e) => e.fmt(f),
            SpecError::Snapshot(e) => e.fmt(f),
            SpecError::OutOfRange { field, value, min, max } => {
                write!(f, "{field} is {value}, but may be {min} to {max}")
            }
            SpecError::DiskTooSmall { asked_mb, template_mb } => write!(
                f,
                "disk_size_mb is {asked_mb}, but the template needs {template_mb}; ask for that or for 0"
            ),
            SpecError::BadEnvironment(why) => write!(f, "the environment {why}"),
            SpecError::NoRoom(shortage) => shortage.fmt(f),
        }
    }
}

impl std::error::Error for SpecError {}

impl From<LayoutError> for SpecError {
    fn from(e: LayoutError) -> SpecError {
        SpecError::Layout(e)
    }
}

impl Spec {
    /// Checks a request against its own bounds and against what the host has and has left. Blocks for a
    /// `stat` or two.
    pub fn admit(request: &CapsuleCreate, host: &Host, promised: &Promised) -> Result<Spec, SpecError> {
        if !is_capsule_id(&request.capsule_id) {
            return Err(LayoutError::BadCapsuleId(request.capsule_id.clone()).into());
        }
        in_range("vcpus", request.vcpus, &VCPUS)?;
        in_range("memory_mb", request.memory_mb, &MEMORY_MB)?;
        in_range("deadline_ms", request.deadline_ms, &(0..=MAX_DEADLINE_MS))?;
        check_environment(&request.environment)?;
        // A template before a snapshot of the same name. A snapshot's machine is as it was.
        let (image, snapshot) = match host.layout.template(&request.template) {
            Ok(image) => (image, None),
            Err(e @ LayoutError::NoTemplate { .. }) => {
                match Snapshot::find(&host.layout, &request.template) {
                    Ok(snapshot) => (snapshot.disk(), Some(snapshot)),
                    Err(SnapshotError::NotThere(_)) => return Err(e.into()),
                    Err(e) => return Err(SpecError::Snapshot(e)),
                }
            }
            Err(e) => return Err(e.into()),
        };
        if let Some(snapshot) = &snapshot {
            snapshot.check_vmm(&host.vmm.describe()).map_err(SpecError::Snapshot)?;
        }
        let as_saved = snapshot.as_ref().map(|s| (s.manifest.vcpus, s.manifest.memory_mb));
        let (vcpus, memory_mb) = as_saved.unwrap_or((request.vcpus, request.memory_mb));
        let template_bytes = std::fs::metadata(&image).map_or(0, |m| m.len());
        let asked_bytes = if snapshot.is_some() { 0 } else { u64::from(request.disk_size_mb) * MIB };
        if asked_bytes != 0 && asked_bytes < template_bytes {
            return Err(SpecError::DiskTooSmall {
                asked_mb: u64::from(request.disk_size_mb),
                template_mb: template_bytes.div_ceil(MIB),
            });
        }
        let disk_mb = if asked_bytes == 0 { template_bytes } else { asked_bytes }.div_ceil(MIB);
        // The memory that capsules of one snapshot share comes to what each of them may change of it.
        let shared = snapshot.as_ref().filter(|_| !host.vmm.shares_files());
        let shared_mb = shared.map_or(0, |s| host.shared_memory.bytes_to_read(s)).div_ceil(MIB);
        let need = need(host, vcpus, memory_mb);
        let need = Need { memory_mb: need.memory_mb + shared_mb, disk_mb: need.disk_mb + disk_mb, ..need };
        admission::check(&capacity(host), promised, &need).map_err(SpecError::NoRoom)?;
        Ok(Spec {
            id: request.capsule_id.clone(),
            template: request.template.clone(),
            image,
            snapshot,
            vcpus,
            memory_mb,
            disk_bytes: (asked_bytes != 0).then_some(asked_bytes),
            allow_internet: request.allow_internet,
            environment: request.environment.clone(),
            timeout_sec: request.timeout_sec,
            deadline_ms: match request.deadline_ms {
                0 => host.create_deadline_ms,
                asked => u64::from(asked),
            },
        })
    }
}

/// Checks whether the host has room for a capsule that is to go on.
pub fn readmit(spec: &Spec, host: &Host, promised: &Promised) -> Result<(), SpecError> {
    // Its disk is among what is promised.
    let need = need(host, spec.vcpus, spec.memory_mb);
    admission::check(&capacity(host), promised, &need).map_err(SpecError::NoRoom)
}

/// What a capsule needs beside its disk and what it shares.
fn need(host: &Host, vcpus: u32, memory_mb: u32) -> Need {
    Need {
        vcpus: u64::from(vcpus),
        memory_mb: host_memory_mb(memory_mb, host.vmm.overhead_mb()),
        // When it is paused, its memory is saved.
        disk_mb: u64::from(memory_mb),
    }
}

/// What the host has for capsules now. Blocks for a `statvfs` and a small file. What cannot be found out
/// does not stop a capsule: it then fails where the resource is taken.
pub fn capacity(host: &Host) -> Capacity {
    let (disk_bytes, disk_free_bytes) = resources::disk_space(host.layout.root()).unwrap_or_else(|e| {
        log::warn!("space in {}: {e}", host.layout.root().display());
        (u64::MAX, u64::MAX)
    });
    let memory_available_mb = resources::available_memory_bytes().map_or_else(
        |e| {
            log::warn!("the memory that is available: {e}");
            u64::from(host.memory_mb)
        },
        |bytes| bytes / MIB,
    );
    Capacity {
        cpu_cores: u64::from(host.cpu_cores),
        memory_mb: u64::from(host.memory_mb),
        memory_available_mb,
        disk_mb: disk_bytes / MIB,
        disk_free_mb: disk_free_bytes / MIB,
        vcpu_overcommit: host.config.vcpu_overcommit,
        disk_overcommit: host.config.disk_overcommit,
    }
}

fn in_range(field: &'static str, value: u32, range: &std::ops::RangeInclusive<u32>) -> Result<(), SpecError> {
    if range.contains(&value) {
        return Ok(());
    }
    let (min, max) = (u64::from(*range.start()), u64::from(*range.end()));
    Err(SpecError::OutOfRange { field, value: u64::from(value), min, max })
}

fn check_environment(environment: &[(Bytes, Bytes)]) -> Result<(), SpecError> {
    let bad = |why: String| Err(SpecError::BadEnvironment(why));
    if environment.len() > MAX_ENVIRONMENT {
        return bad(format!("has {} variables, at most {MAX_ENVIRONMENT} are allowed", environment.len()));
    }
    let bytes: usize = environment.iter().map(|(n, v)| n.0.len() + v.0.len()).sum();
    if bytes > MAX_ENVIRONMENT_BYTES {
        return bad(format!("has {bytes} bytes, at most {MAX_ENVIRONMENT_BYTES} are allowed"));
    }
    for (name, value) in environment {
        if name.0.is_empty() || name.0.contains(&b'=') || name.0.contains(&0) || value.0.contains(&0) {
            return bad(format!(
                "has the variable {:?}: a name is not empty and has no '=', and neither it nor its value \
                 has a zero byte",
                name.lossy()
            ));
        }
    }
    Ok(())
}

/// The kernel command line of a guest. `dns` even where it may not reach the internet: that may change.
pub fn command_line(spec: &Spec, dns: Option<std::net::Ipv4Addr>) -> String {
    use crate::net::{GATEWAY_ADDRESS, GUEST_ADDRESS};
    let dns = dns.map(|a| a.to_string()).unwrap_or_default();
    format!(
        "console=ttyS0 quiet loglevel=1 mitigations=off tsc=reliable no_timer_check reboot=t panic=-1 \
         random.trust_cpu=on root=/dev/vda rw ip={GUEST_ADDRESS}::{GATEWAY_ADDRESS}:255.255.255.252:{}:eth0:\
         off:{dns}",
        spec.id
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(result: Result<(), SpecError>) -> String {
        result.expect_err("refused").to_string()
    }

    #[test]
    fn a_full_host_may_have_room_later_and_a_small_one_never() {
        let shortage = Shortage { resource: admission::Resource::Memory, needed: 300, left: 200, has: 400 };
        assert_eq!(SpecError::NoRoom(shortage).code(), Code::ResourceExhausted);
        assert_eq!(SpecError::NoRoom(Shortage { has: 299, ..shortage }).code(), Code::InvalidRequest);
    }

    #[test]
    fn ranges() {
        assert!(in_range("vcpus", 1, &VCPUS).is_ok());
        assert_eq!(refused(in_range("vcpus", 0, &VCPUS)), "vcpus is 0, but may be 1 to 64");
        assert!(in_range("memory_mb", 127, &MEMORY_MB).is_err());
    }

    #[test]
    fn environments() {
        let pair = |n: &str, v: &str| (Bytes(n.as_bytes().to_vec()), Bytes(v.as_bytes().to_vec()));
        assert!(check_environment(&[pair("A", "b=c"), pair("B", "")]).is_ok());
        for bad in [pair("", "x"), pair("A=B", "x"), pair("A\0", "x"), pair("A", "\0")] {
            assert!(check_environment(std::slice::from_ref(&bad)).is_err(), "{bad:?}");
        }
        assert!(check_environment(&vec![pair("A", "b"); MAX_ENVIRONMENT + 1]).is_err());
        assert!(check_environment(&[pair("A", &"b".repeat(MAX_ENVIRONMENT_BYTES))]).is_err());
    }

    #[test]
    fn command_lines() {
        let spec = Spec {
            id: "cl-1".into(),
            template: "minimal".into(),
            image: PathBuf::new(),
            snapshot: None,
            vcpus: 1,
            memory_mb: 256,
            disk_bytes: None,
            allow_internet: true,
            environment: Vec::new(),
            timeout_sec: 0,
            deadline_ms: 1,
        };
        let dns = Some(std::net::Ipv4Addr::new(9, 9, 9, 9));
        let ip = "root=/dev/vda rw ip=169.254.0.21::169.254.0.22:255.255.255.252:cl-1:eth0:off:";
        assert!(command_line(&spec, dns).ends_with(&format!("{ip}9.9.9.9")), "{}", command_line(&spec, dns));
        assert!(command_line(&spec, None).ends_with(ip));
    }
}
