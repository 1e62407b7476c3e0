//! QEMU's command line for a machine: a pure function of what the machine is to be like and of the
//! descriptors that QEMU inherits. QEMU opens nothing by a name of ours: kernel, memory, disks, cable and
//! sockets all come as descriptors, so it needs no right to any directory.

use super::Accelerator;
use crate::disk::Format;
use crate::net::MacAddress;
use crate::vmm::DiskLimits;
use serde_json::{Value, json};
use std::os::fd::RawFd;

/// A firmware that does nothing but load a kernel; comes with most builds of QEMU.
pub(super) const SMALL_FIRMWARE: &str = "qboot.rom";

/// Translated code that one machine keeps. QEMU's own default is a gigabyte, which would be host memory on
/// top of the guest's that nobody has accounted for.
pub(super) const TRANSLATION_CACHE_MB: u32 = 256;

/// Without what a server has no use for, firmware and guest have less to look for.
const MACHINE: &str = "q35,memory-backend=memory,usb=off,vmport=off,smbus=off,sata=off,i8042=off,\
                       suppress-vmdesc=on";

/// The group of limits that all disks are in.
const DISK_LIMITS: &str = "disk-limits";

/// What QEMU may not do, once it runs, by seccomp.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// A disk's descriptors: the file, and the one behind it.
#[derive(Debug, Clone, Copy)]
pub(super) struct DiskFds {
    pub format: Format,
    pub file: RawFd,
    pub backing: Option<RawFd>,
}

/// Everything that the command line depends on.
#[derive(Debug)]
pub(super) struct Inputs<'a> {
    pub accelerator: Accelerator,
    pub name: &'a str,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub command_line: &'a str,
    pub guest_mac: MacAddress,
    pub kernel: RawFd,
    pub initramfs: Option<RawFd>,
    pub memory: RawFd,
    /// The device state that it goes on from; its memory then is private to it.
    pub state: Option<RawFd>,
    pub tap: RawFd,
    pub monitor: RawFd,
    pub console: RawFd,
    pub disks: &'a [DiskFds],
    pub disk_limits: DiskLimits,
}

/// The arguments, without the program's name.
pub(super) fn arguments(inputs: &Inputs<'_>) -> Vec<String> {
    let mut arguments = Arguments::default();
    machine(&mut arguments, inputs);
    match inputs.state {
        Some(state) => restore(&mut arguments, state),
        None => boot(&mut arguments, inputs),
    }
    let is_limited = inputs.disk_limits != DiskLimits::default();
    if is_limited {
        limit_disks(&mut arguments, inputs.disk_limits);
    }
    let mut next_set = 1;
    for (index, disk) in inputs.disks.iter().enumerate() {
        add_disk(&mut arguments, index, disk, is_limited, &mut next_set);
    }
    devices(&mut arguments, inputs);
    arguments.0
}

fn machine(arguments: &mut Arguments, inputs: &Inputs<'_>) {
    arguments.add("-name", format!("guest={},process=wrenn-vm", inputs.name));
    arguments.flag("-nodefaults");
    arguments.flag("-no-user-config");
    arguments.flag("-no-reboot");
    arguments.add("-display", "none");
    arguments.add("-sandbox", SANDBOX);
    arguments.add("-machine", MACHINE);
    match inputs.accelerator {
        Accelerator::Kvm { .. } => {
            arguments.add("-accel", "kvm");
            arguments.add("-cpu", "host");
        }
        Accelerator::Tcg { qboot } => {
            arguments.add("-accel", format!("tcg,thread=multi,tb-size={TRANSLATION_CACHE_MB}"));
            // A fixed model, so that a snapshot made on one host can go on on another; x86-64-v2, as
            // programs are built for today. Later models only take longer to boot.
            arguments.add("-cpu", "Nehalem");
            // A tenth of a second less. (Without ACPI tables it would be less still, but Debian's kernel
            // then finds one processor and no APIC.)
            if qboot {
                arguments.add("-bios", SMALL_FIRMWARE);
            }
        }
    }
    arguments.add("-smp", format!("cpus={0},sockets=1,cores={0},threads=1", inputs.vcpus));
    arguments.add("-m", format!("{}M", inputs.memory_mb));
    // Shared, so that a snapshot can take the guest's memory as it lies there. Saved memory is mapped copy
    // on write: pages are read when they are touched, and what is written stays this machine's own.
    let share = if inputs.state.is_some() { "off" } else { "on" };
    arguments.add(
        "-object",
        format!(
            "memory-backend-file,id=memory,size={}M,mem-path=/proc/self/fd/{},share={share}",
            inputs.memory_mb, inputs.memory
        ),
    );
}

/// Kernel and all lie in the memory already. The state has no section on QEMU's own configuration.
fn restore(arguments: &mut Arguments, state: RawFd) {
    arguments.flag("-S");
    arguments.add("-incoming", format!("fd:{state}"));
    arguments.add("-global", "migration.send-configuration=off");
}

fn boot(arguments: &mut Arguments, inputs: &Inputs<'_>) {
    arguments.add("-kernel", format!("/proc/self/fd/{}", inputs.kernel));
    if let Some(initramfs) = inputs.initramfs {
        arguments.add("-initrd", format!("/proc/self/fd/{initramfs}"));
    }
    arguments.add("-append", kernel_command_line(inputs.command_line, inputs.accelerator));
}

/// What the caller wants, and what makes a kernel start faster on this machine (measured).
fn kernel_command_line(wanted: &str, accelerator: Accelerator) -> String {
    // No tests of its own ciphers.
    let common = "cryptomgr.notests";
    match accelerator {
        Accelerator::Kvm { .. } => format!("{wanted} {common}"),
        // No patching of code that has been translated already; memory of a fresh machine is zero as it is.
        Accelerator::Tcg { .. } => format!("{wanted} {common} noreplace-smp init_on_alloc=0"),
    }
}

fn devices(arguments: &mut Arguments, inputs: &Inputs<'_>) {
    arguments.add("-netdev", format!("tap,id=net,fd={},vhost=off", inputs.tap));
    // No option ROM: nothing boots from the network.
    arguments.add(
        "-device",
        format!("virtio-net-pci,netdev=net,mac={},disable-legacy=on,romfile=", inputs.guest_mac),
    );
    arguments.add("-object", "rng-builtin,id=rng");
    arguments.add("-device", "virtio-rng-pci,rng=rng,disable-legacy=on");
    for (name, fd) in [("monitor", inputs.monitor), ("console", inputs.console)] {
        arguments.add("-chardev", format!("socket,id={name},fd={fd},server=on,wait=off"));
    }
    arguments.add("-mon", "chardev=monitor,mode=control");
    arguments.add("-serial", "chardev:console");
}

/// What all disks together may do; 0 is QEMU's word for no limit as well.
fn limit_disks(arguments: &mut Arguments, limits: DiskLimits) {
    let limits = json!({"bps-total": limits.bytes_per_sec, "iops-total": limits.ops_per_sec});
    let group = json!({"qom-type": "throttle-group", "id": DISK_LIMITS, "limits": limits});
    arguments.add("-object", group.to_string());
}

/// A disk as a graph of block nodes, the device's node named `disk{index}`.
fn add_disk(arguments: &mut Arguments, index: usize, disk: &DiskFds, is_limited: bool, next_set: &mut u32) {
    let name = format!("disk{index}");
    let mut set = |arguments: &mut Arguments, fd: RawFd| {
        arguments.add("-add-fd", format!("fd={fd},set={next_set}"));
        *next_set += 1;
        format!("/dev/fdset/{}", *next_set - 1)
    };
    let driver = match disk.format {
        Format::Device => "host_device",
        Format::Raw | Format::Qcow2 => "file",
    };
    let file = json!({"driver": driver, "filename": set(arguments, disk.file), "discard": "unmap"});
    let node = match disk.format {
        Format::Raw | Format::Device => {
            json!({"driver": "raw", "discard": "unmap", "file": file})
        }
        Format::Qcow2 => {
            let backing = disk.backing.map(|fd| {
                let file = json!({"driver": "file", "filename": set(arguments, fd), "read-only": true});
                json!({"driver": "raw", "read-only": true, "file": file})
            });
            json!({"driver": "qcow2", "discard": "unmap", "file": file, "backing": backing.unwrap_or(Value::Null)})
        }
    };
    let mut node = match is_limited {
        true => {
            json!({"driver": "throttle", "throttle-group": DISK_LIMITS, "discard": "unmap", "file": node})
        }
        false => node,
    };
    node["node-name"] = name.as_str().into();
    arguments.add("-blockdev", node.to_string());
    arguments.add("-device", format!("virtio-blk-pci,drive={name},disable-legacy=on"));
}

#[derive(Default)]
struct Arguments(Vec<String>);

impl Arguments {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.to_owned());
    }

    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.0.push(option.to_owned());
        self.0.push(value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(accelerator: Accelerator, disks: &[DiskFds]) -> Inputs<'_> {
        Inputs {
            accelerator,
            name: "cap-1",
            vcpus: 2,
            memory_mb: 512,
            command_line: "console=ttyS0 quiet",
            guest_mac: MacAddress([2, 0xfc, 1, 0, 0, 7]),
            kernel: 10,
            initramfs: Some(11),
            memory: 12,
            state: None,
            tap: 13,
            monitor: 14,
            console: 15,
            disks,
            disk_limits: DiskLimits::default(),
        }
    }

    fn values<'a>(arguments: &'a [String], option: &str) -> Vec<&'a str> {
        arguments.windows(2).filter(|w| w[0] == option).map(|w| w[1].as_str()).collect()
    }

    #[test]
    fn everything_comes_by_descriptor_and_nothing_by_name() {
        let disks = [
            DiskFds { format: Format::Qcow2, file: 20, backing: Some(21) },
            DiskFds { format: Format::Raw, file: 22, backing: None },
            DiskFds { format: Format::Device, file: 23, backing: None },
        ];
        let arguments = arguments(&inputs(Accelerator::Tcg { qboot: true }, &disks));
        assert_eq!(values(&arguments, "-kernel"), ["/proc/self/fd/10"]);
        assert_eq!(values(&arguments, "-initrd"), ["/proc/self/fd/11"]);
        assert!(values(&arguments, "-append")[0].starts_with("console=ttyS0 quiet "));
        assert_eq!(
            values(&arguments, "-add-fd"),
            ["fd=20,set=1", "fd=21,set=2", "fd=22,set=3", "fd=23,set=4"]
        );
        assert!(values(&arguments, "-netdev")[0].starts_with("tap,id=net,fd=13,"));
        assert!(values(&arguments, "-chardev")[0].starts_with("socket,id=monitor,fd=14,"));
        assert!(values(&arguments, "-object")[0].contains("size=512M,mem-path=/proc/self/fd/12,share=on"));
        let nodes: Vec<Value> =
            values(&arguments, "-blockdev").iter().filter_map(|n| serde_json::from_str(n).ok()).collect();
        assert_eq!(nodes[0]["driver"], "qcow2");
        assert_eq!(nodes[0]["file"]["filename"], "/dev/fdset/1");
        assert_eq!(nodes[0]["backing"]["file"]["filename"], "/dev/fdset/2");
        assert_eq!(nodes[0]["backing"]["read-only"], true);
        assert_eq!(nodes[1]["file"]["filename"], "/dev/fdset/3");
        assert_eq!((&nodes[1]["file"]["driver"], &nodes[1]["driver"]), (&"file".into(), &"raw".into()));
        assert_eq!(
            (&nodes[2]["file"]["driver"], &nodes[2]["driver"]),
            (&"host_device".into(), &"raw".into())
        );
        let devices = values(&arguments, "-device");
        assert!(devices[0].contains("drive=disk0") && devices[1].contains("drive=disk1"));
        assert!(devices[3].contains("mac=02:fc:01:00:00:07") && devices[3].ends_with("romfile="));
    }

    #[test]
    fn all_disks_share_their_limits() {
        let disk = DiskFds { format: Format::Raw, file: 20, backing: None };
        let limits = DiskLimits { bytes_per_sec: 1 << 20, ops_per_sec: 0 };
        let disks = [disk, DiskFds { file: 21, ..disk }];
        let arguments =
            arguments(&Inputs { disk_limits: limits, ..inputs(Accelerator::Tcg { qboot: true }, &disks) });
        let group: Value = serde_json::from_str(values(&arguments, "-object")[1]).expect("an object");
        assert_eq!(group["limits"], json!({"bps-total": 1_048_576, "iops-total": 0}));
        for (index, node) in values(&arguments, "-blockdev").iter().enumerate() {
            let node: Value = serde_json::from_str(node).expect("an object");
            assert_eq!(
                (&node["driver"], &node["node-name"]),
                (&"throttle".into(), &format!("disk{index}").into())
            );
            assert_eq!((&node["throttle-group"], &node["file"]["driver"]), (&group["id"], &"raw".into()));
        }
    }

    #[test]
    fn a_saved_machine_boots_nothing_and_keeps_what_it_writes_to_itself() {
        let mut inputs = inputs(Accelerator::Tcg { qboot: true }, &[]);
        inputs.state = Some(16);
        let arguments = arguments(&inputs);
        assert_eq!(values(&arguments, "-incoming"), ["fd:16"]);
        assert!(arguments.iter().any(|a| a == "-S"));
        assert!(!arguments.iter().any(|a| ["-kernel", "-initrd", "-append"].contains(&a.as_str())));
        assert!(values(&arguments, "-object")[0].ends_with("share=off"));
    }

    #[test]
    fn the_accelerator_decides_the_processor() {
        let tcg = arguments(&inputs(Accelerator::Tcg { qboot: true }, &[]));
        assert_eq!(
            (values(&tcg, "-accel"), values(&tcg, "-cpu")),
            (vec!["tcg,thread=multi,tb-size=256"], vec!["Nehalem"])
        );
        let kvm = arguments(&inputs(Accelerator::Kvm { group: Some(104) }, &[]));
        assert_eq!((values(&kvm, "-accel"), values(&kvm, "-cpu")), (vec!["kvm"], vec!["host"]));
        assert!(values(&kvm, "-sandbox")[0].contains("spawn=deny"));
        assert!(values(&tcg, "-append")[0].ends_with(" cryptomgr.notests noreplace-smp init_on_alloc=0"));
        assert!(values(&kvm, "-append")[0].ends_with(" cryptomgr.notests"));
        assert_eq!(values(&kvm, "-machine"), values(&tcg, "-machine"));
        assert_eq!(values(&tcg, "-bios"), ["qboot.rom"]);
        assert!(values(&kvm, "-bios").is_empty());
        let plain = arguments(&inputs(Accelerator::Tcg { qboot: false }, &[]));
        assert!(values(&plain, "-bios").is_empty());
    }
}
