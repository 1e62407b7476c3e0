//! What Firecracker is told: pure functions from what a machine is to be like to the requests of its API, in
//! the order in which it wants them. Names of files are those in the machine's own root.

use crate::net::MacAddress;
use crate::net::tap;
use crate::vmm::DiskLimits;
use serde_json::{Value, json};

/// The files in the machine's root.
pub const KERNEL: &str = "kernel";
/// The initial RAM filesystem.
pub const INITRAMFS: &str = "initramfs";
/// What Firecracker has to say goes to this pipe.
pub const LOG: &str = "log";
/// What Firecracker counts goes to this pipe.
pub const METRICS: &str = "metrics";
/// The memory that a machine goes on from.
pub const MEMORY: &str = "memory";
/// The state that a machine goes on from.
pub const STATE: &str = "state";
/// The memory of a machine that is saved.
pub const NEW_MEMORY: &str = "memory.new";
/// The state of a machine that is saved.
pub const NEW_STATE: &str = "state.new";

/// In what time a limit's bucket is full again, in milliseconds: what it holds is a second's worth.
const REFILL_MS: u64 = 1_000;

/// The one network interface.
const INTERFACE: &str = "eth0";

/// A request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The method.
    pub method: &'static str,
    /// The path.
    pub path: String,
    /// The body.
    pub body: Value,
    /// For error messages: what it is to do.
    pub step: &'static str,
}

fn put(path: impl Into<String>, step: &'static str, body: Value) -> Request {
    Request { method: "PUT", path: path.into(), body, step }
}

/// A disk as Firecracker gets it.
pub fn disk_name(index: usize) -> String {
    format!("disk{index}")
}

/// What a machine that boots is made of.
#[derive(Debug)]
pub struct Boot<'a> {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mb: u32,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Whether there is an initial RAM filesystem.
    pub has_initramfs: bool,
    /// How many disks there are.
    pub disks: usize,
    /// How fast they may be used.
    pub disk_limits: DiskLimits,
    /// The guest's Ethernet address.
    pub guest_mac: MacAddress,
    /// What the guest is told about itself.
    pub metadata: &'a Value,
}

/// Sends what Firecracker has to say to a pipe; before anything else.
pub fn log() -> Request {
    put("/logger", "taking a log", json!({"log_path": LOG, "level": "Warning", "show_level": true}))
}

/// Sends what Firecracker counts to a pipe; before anything else too.
pub fn metrics() -> Request {
    put("/metrics", "taking a pipe for its figures", json!({"metrics_path": METRICS}))
}

/// All requests that make a machine and let it boot.
pub fn boot(boot: &Boot<'_>) -> Vec<Request> {
    let mut source = json!({"kernel_image_path": KERNEL, "boot_args": boot.command_line});
    if boot.has_initramfs {
        source["initrd_path"] = INITRAMFS.into();
    }
    let machine = json!({
        "vcpu_count": boot.vcpus,
        "mem_size_mib": boot.memory_mb,
        "smt": false,
        "track_dirty_pages": false,
    });
    let mut requests = vec![
        put("/machine-config", "setting processors and memory", machine),
        put("/boot-source", "taking the kernel", source),
    ];
    for index in 0..boot.disks {
        let name = disk_name(index);
        let drive = json!({
            "drive_id": name,
            "path_on_host": name,
            // The root is named on the kernel's command line.
            "is_root_device": false,
            "is_read_only": false,
            // What a guest has written out is written out.
            "cache_type": "Writeback",
            "io_engine": "Sync",
            "rate_limiter": rate_limiter(boot.disk_limits),
        });
        requests.push(put(format!("/drives/{name}"), "taking a disk", drive));
    }
    let interface = json!({
        "iface_id": INTERFACE,
        "host_dev_name": tap::NAME,
        "guest_mac": boot.guest_mac.to_string(),
    });
    requests.push(put(format!("/network-interfaces/{INTERFACE}"), "taking the network cable", interface));
    let config = json!({"version": "V2", "network_interfaces": [INTERFACE]});
    requests.push(put("/mmds/config", "setting up the metadata service", config));
    requests.push(metadata(boot.metadata));
    requests.push(put("/entropy", "making the source of randomness", json!({})));
    // Empty, and emptied before a guest runs out of memory.
    let balloon = json!({"amount_mib": 0, "deflate_on_oom": true});
    requests.push(put("/balloon", "making the balloon", balloon));
    requests.push(put("/actions", "starting the guest", json!({"action_type": "InstanceStart"})));
    requests
}

/// A bucket of size 0 is none.
fn rate_limiter(limits: DiskLimits) -> Value {
    let bucket = |size: u64| json!({"size": size, "refill_time": if size == 0 { 0 } else { REFILL_MS }});
    json!({"bandwidth": bucket(limits.bytes_per_sec), "ops": bucket(limits.ops_per_sec)})
}

/// All requests that make a machine of one that was saved, standing still. With `track_changes` it can be
/// asked later for what has changed.
pub fn load(document: &Value, track_changes: bool, disks: usize, limits: DiskLimits) -> Vec<Request> {
    let body = json!({
        "snapshot_path": STATE,
        "mem_backend": {"backend_type": "File", "backend_path": MEMORY},
        "track_dirty_pages": track_changes,
        "resume_vm": false,
    });
    // What the metadata service tells is not in what was saved.
    let mut requests = vec![put("/snapshot/load", "taking the saved machine", body), metadata(document)];
    // The limits are, those of then.
    requests.extend((0..disks).map(|index| {
        let name = disk_name(index);
        let body = json!({"drive_id": name, "rate_limiter": rate_limiter(limits)});
        Request { method: "PATCH", path: format!("/drives/{name}"), body, step: "limiting a disk" }
    }));
    requests
}

fn metadata(document: &Value) -> Request {
    put("/mmds", "handing over the metadata", document.clone())
}

/// Stands the guest still, or lets it go on.
pub fn set_running(runs: bool) -> Request {
    let (state, step) = if runs { ("Resumed", "going on") } else { ("Paused", "standing still") };
    Request { method: "PATCH", path: "/vm".into(), body: json!({"state": state}), step }
}

/// Writes the state of the devices, and memory: all of it, or what has changed.
pub fn save(only_changes: bool) -> Request {
    let body = json!({
        "snapshot_type": if only_changes { "Diff" } else { "Full" },
        "snapshot_path": NEW_STATE,
        "mem_file_path": NEW_MEMORY,
    });
    put("/snapshot/create", "saving the machine", body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_boots_is_described_in_order() {
        let document = json!({"instanceID": "cl-1"});
        let requests = boot(&Boot {
            vcpus: 2,
            memory_mb: 256,
            command_line: "console=ttyS0",
            has_initramfs: true,
            disks: 1,
            disk_limits: DiskLimits { bytes_per_sec: 1 << 20, ops_per_sec: 0 },
            guest_mac: MacAddress([2, 0xfc, 0, 0, 0, 7]),
            metadata: &document,
        });
        let paths: Vec<&str> = requests.iter().map(|r| r.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "/machine-config",
                "/boot-source",
                "/drives/disk0",
                "/network-interfaces/eth0",
                "/mmds/config",
                "/mmds",
                "/entropy",
                "/balloon",
                "/actions"
            ]
        );
        assert!(requests.iter().all(|r| r.method == "PUT"));
        assert_eq!(requests[1].body["initrd_path"], "initramfs");
        let limiter = json!({"bandwidth": {"size": 1_048_576, "refill_time": 1_000},
                             "ops": {"size": 0, "refill_time": 0}});
        assert_eq!(requests[2].body["rate_limiter"], limiter);
        assert_eq!(requests[3].body["guest_mac"], "02:fc:00:00:00:07");
        assert_eq!(requests[5].body, document);
    }

    #[test]
    fn a_saved_machine_is_loaded_before_it_is_told_who_it_is() {
        let limits = DiskLimits { bytes_per_sec: 0, ops_per_sec: 100 };
        let requests = load(&json!({"instanceID": "cl-2"}), true, 1, limits);
        assert_eq!(requests[0].path, "/snapshot/load");
        assert_eq!(requests[0].body["resume_vm"], false);
        assert_eq!(requests[0].body["track_dirty_pages"], true);
        assert_eq!(requests[1].path, "/mmds");
        assert_eq!((requests[2].method, requests[2].path.as_str()), ("PATCH", "/drives/disk0"));
        assert_eq!(requests[2].body["rate_limiter"]["ops"]["size"], 100);
        assert_eq!(save(true).body["snapshot_type"], "Diff");
        assert_eq!(save(false).body["snapshot_type"], "Full");
        assert_eq!(
            (set_running(false).body, set_running(true).method),
            (json!({"state": "Paused"}), "PATCH")
        );
    }
}
