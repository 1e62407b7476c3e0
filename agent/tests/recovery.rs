//! An agent's start with a capsule whose VMM does not let itself be spoken to at first. The VMM is played by a
//! process that sleeps and a thread that answers in its place; network, disk and journal are real.

mod support;

use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use support::{Machine, with_free_slot};
use wrenn_agent::capsule::journal::{self, Phase, Step};
use wrenn_agent::capsule::record::{Kept, ProcessRecord, Record, VERSION};
use wrenn_agent::capsule::recovery::{Take, recover};
use wrenn_agent::disk::{Backend, DiskSpec};
use wrenn_agent::layout::Layout;
use wrenn_agent::net::{CapsuleNetwork, Policy, Slot};
use wrenn_agent::sys::pidfd::Process;
use wrenn_agent::vmm::Kind;
use wrenn_agent::vmm::image::Image;

const ID: &str = "cl-1";

/// A QEMU's monitor that hangs up on those who connect, so many times.
struct Double {
    process: Child,
    connections: Arc<AtomicU32>,
}

impl Double {
    fn start(directory: &Path, hangs_up: u32) -> Double {
        let monitor = UnixListener::bind(directory.join("qmp.sock")).expect("listening");
        let console = UnixListener::bind(directory.join("serial.sock")).expect("listening");
        let connections = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&connections);
        std::thread::spawn(move || {
            let mut held = Vec::new();
            for stream in monitor.incoming().flatten() {
                held.push(console.accept());
                if count.fetch_add(1, Ordering::SeqCst) >= hangs_up {
                    std::thread::spawn(move || answer(stream));
                }
            }
        });
        Double { process: Command::new("sleep").arg("60").spawn().expect("started"), connections }
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        let _ = self.process.kill().and_then(|()| self.process.wait());
    }
}

fn answer(stream: UnixStream) {
    let mut out = stream.try_clone().expect("cloned");
    let version = json!({"qemu": {"major": 7, "minor": 2, "micro": 22}});
    writeln!(out, "{}", json!({"QMP": {"version": version, "capabilities": []}})).expect("written");
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let command: Value = serde_json::from_str(&line).expect("a command");
        let answer = match command["execute"].as_str() {
            Some("query-status") => json!({"return": {"status": "running"}, "id": command["id"]}),
            _ => json!({"return": {}, "id": command["id"]}),
        };
        writeln!(out, "{answer}").expect("written");
    }
}

fn record(slot: Slot) -> Record {
    Record {
        version: VERSION,
        capsule_id: ID.into(),
        template: "minimal".into(),
        vcpus: 1,
        memory_mb: 256,
        uid: 7,
        slot: Some(slot.index()),
        machine: None,
        image: None,
        base: None,
        generation: 0,
        ready: true,
        destroying: false,
        group: None,
        kept: Kept::default(),
    }
}

#[test]
fn a_paused_capsule_keeps_nothing_of_what_it_ran_from_before() {
    // Recovery starts programs: beside the other test, whose children are counted, it would be taken for a leak.
    let Some(machine) = Machine::take() else { return };
    let root: PathBuf = std::env::temp_dir().join(format!("wrenn-settled-{}", std::process::id()));
    let layout = Layout::new(&root);
    layout.prepare().expect("prepared");
    let directory = layout.capsule(ID).expect("a name");
    fs::create_dir(&directory).expect("made");
    let template = root.join("rootfs.ext4");
    File::create(&template).and_then(|file| file.set_len(8 << 20)).expect("made");
    let spec = DiskSpec { base: &template, directory: &directory, size_bytes: None };
    Backend::Overlay.create(&spec).expect("a disk");
    for file in ["memory-1", "memory-5", "state-5", "state-4"] {
        fs::write(directory.join(file), "x").expect("written");
    }
    // Killed once all of a memory was saved, while the machine still held the file that it was restored from.
    let image = Image { memory: 5, delta: None, state: 5, packed: false, vmm: Kind::Qemu };
    let slot = Slot::new(1).expect("a slot");
    let record = Record { image: Some(image), base: Some(1), generation: 5, ..record(slot) };
    journal::begin(&directory, Step::Save, Phase::Done, &record).expect("written");
    let summary = recover(&layout, Take::Over).expect("recovered");
    let [left] = &summary.paused[..] else { panic!("one paused capsule, not {:?}", summary.left) };
    assert_eq!((left.record.image, left.record.base), (Some(image), None));
    let is_there = |file: &&str| directory.join(file).exists();
    let files: Vec<&str> =
        ["memory-1", "memory-5", "state-5", "state-4"].into_iter().filter(is_there).collect();
    assert_eq!(files, ["memory-5", "state-5"]);
    fs::remove_dir_all(&root).expect("removed");
    machine.check();
}

#[test]
fn a_capsule_whose_machine_is_busy_is_adopted_a_moment_later() {
    let Some(machine) = Machine::take() else { return };
    let root: PathBuf = std::env::temp_dir().join(format!("wrenn-again-{}", std::process::id()));
    let layout = Layout::new(&root);
    layout.prepare().expect("prepared");
    let directory = layout.capsule(ID).expect("a name");
    let (network, tap) = with_free_slot(|slot| CapsuleNetwork::create(slot, &Policy::CLOSED));
    let slot = network.slot();
    let base = root.join("rootfs.ext4");
    File::create(&base).and_then(|file| file.set_len(8 << 20)).expect("made");

    // Twice is one connection and one further try; always is given up, and the capsule left.
    for (hangs_up, connections, is_adopted) in [(0, 1, true), (2, 3, true), (u32::MAX, 4, false)] {
        fs::create_dir(&directory).expect("made");
        let spec = DiskSpec { base: &base, directory: &directory, size_bytes: None };
        Backend::Overlay.create(&spec).expect("a disk");
        let double = Double::start(&directory, hangs_up);
        let process = Process::child(double.process.id()).expect("runs");
        let (pid, start_ticks) = (process.pid(), process.start_ticks());
        let machine = Some(ProcessRecord { pid, start_ticks, boot: None });
        let record = Record { machine, ..record(slot) };
        journal::begin(&directory, Step::Ready, Phase::Done, &record).expect("written");
        let summary = recover(&layout, Take::Over).expect("recovered");
        assert_eq!(double.connections.load(Ordering::SeqCst), connections, "{hangs_up}");
        assert_eq!((summary.running.len(), summary.cleared), (usize::from(is_adopted), 0), "{hangs_up}");
        let left = if is_adopted { vec![] } else { vec![(ID.to_string(), Some(slot))] };
        assert_eq!(summary.left, left, "{hangs_up}");
        fs::remove_dir_all(&directory).expect("removed");
    }
    drop(tap);
    network.destroy().expect("destroyed");
    fs::remove_dir_all(&root).expect("removed");
    machine.check();
}
