//! The crash sweep: the agent, its machine, or both are killed at every entry of a capsule's journal, while
//! it is created, started from a snapshot, paused, resumed, made a snapshot of and destroyed. The next agent
//! has to find each capsule whole or gone, as the entry says, and nothing else on the host.

use crate::common::commands::{count, shell_when_reached as shell, start_counter};
use crate::common::{Agent, Client, Place, creation, guest_directory};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Instant;
use wire::message::{
    CapsuleCreate, CapsuleDestroy, CapsuleGet, CapsuleInfo, CapsulePause, CapsuleResume, CapsuleSnapshot,
    CapsuleState, Code, Done, Error, Message, SnapshotDelete, SnapshotInfo,
};
use wrenn_agent::sys::cgroup;
use wrenn_agent::sys::dm::Control;

/// The capsule that lives through it all, and the one that is made anew for each crash that ends it.
const LASTING: &str = "cl-lasting";
pub const FLEETING: &str = "cl-fleeting";
const SNAPSHOT: &str = "warm";

/// What a crash leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Running,
    Paused,
    Gone,
}
use Left::{Gone, Paused, Running};

/// Where the crash is and what it leaves. `torn:` leaves half of the entry.
type Point = (&'static str, Left);

/// Of a capsule that boots: until its guest daemon has answered nobody was told of it.
const CREATE: &[Point] = &[
    ("before:create.done", Gone),
    ("create.done", Gone),
    ("before:network.begin", Gone),
    ("network.begin", Gone),
    ("torn:network.begin", Gone),
    ("before:network.done", Gone),
    ("network.done", Gone),
    ("disk.begin", Gone),
    ("before:disk.done", Gone),
    ("disk.done", Gone),
    ("before:machine.begin", Gone),
    ("machine.begin", Gone),
    ("before:machine.done", Gone),
    ("torn:machine.done", Gone),
    ("machine.done", Gone),
];
/// Of one that starts from a snapshot.
const START: &[Point] = &[
    ("create.done", Gone),
    ("network.done", Gone),
    ("disk.begin", Gone),
    ("disk.done", Gone),
    ("machine.begin", Gone),
    ("before:machine.done", Gone),
    ("machine.done", Gone),
    ("before:ready.done", Gone),
    ("torn:ready.done", Gone),
    ("ready.done", Running),
];
const PAUSE: &[Point] = &[
    ("before:save.begin", Running),
    ("save.begin", Running),
    ("torn:save.begin", Running),
    ("before:save.done", Running),
    ("torn:save.done", Running),
    ("save.done", Paused),
    ("before:merge.done", Paused),
    ("torn:merge.done", Paused),
    ("merge.done", Paused),
    ("remove_network.begin", Paused),
    ("before:remove_network.done", Paused),
    ("remove_network.done", Paused),
];
const RESUME: &[Point] = &[
    ("before:network.begin", Paused),
    ("network.begin", Paused),
    ("network.done", Paused),
    ("machine.begin", Paused),
    ("before:machine.done", Paused),
    ("torn:machine.done", Paused),
    ("machine.done", Paused),
    ("before:go_on.begin", Paused),
    ("torn:go_on.begin", Paused),
    ("go_on.begin", Running),
    ("before:go_on.done", Running),
    ("go_on.done", Running),
];
const MAKE_SNAPSHOT: &[Point] = &[
    ("before:snapshot.begin", Running),
    ("snapshot.begin", Running),
    ("before:snapshot.done", Running),
    ("snapshot.done", Running),
];
const DESTROY: &[Point] = &[
    ("before:destroy.begin", Running),
    ("torn:destroy.begin", Running),
    ("destroy.begin", Gone),
    ("remove_network.begin", Gone),
    ("before:remove_network.done", Gone),
    ("remove_network.done", Gone),
    ("remove_disk.begin", Gone),
];
const DESTROY_PAUSED: &[Point] =
    &[("before:destroy.begin", Paused), ("destroy.begin", Gone), ("remove_disk.begin", Gone)];
/// Of one that hibernates.
const PACK: &[Point] = &[
    ("before:pack.begin", Paused),
    ("pack.begin", Paused),
    ("before:pack.done", Paused),
    ("torn:pack.done", Paused),
    ("pack.done", Paused),
];
/// The machine dies with the agent: what ran is lost, what was paused is not.
const PAUSE_WITH_MACHINE: &[Point] =
    &[("save.begin", Gone), ("before:save.done", Gone), ("save.done", Paused), ("merge.done", Paused)];
const RESUME_WITH_MACHINE: &[Point] =
    &[("machine.done", Paused), ("before:go_on.begin", Paused), ("go_on.begin", Gone)];
const SNAPSHOT_WITH_MACHINE: &[Point] = &[("snapshot.begin", Gone), ("before:snapshot.done", Gone)];
const DESTROY_WITH_MACHINE: &[Point] = &[("before:destroy.begin", Gone), ("destroy.begin", Gone)];

struct Sweep {
    place: Place,
    /// What the counters have counted to.
    counted: u32,
    crashes: u32,
}

fn start(id: &str) -> CapsuleCreate {
    CapsuleCreate { template: SNAPSHOT.into(), ..creation(id) }
}

fn pause(id: &str) -> CapsulePause {
    CapsulePause { capsule_id: id.into() }
}

fn resume(id: &str) -> CapsuleResume {
    CapsuleResume { capsule_id: id.into(), deadline_ms: 0 }
}

fn destroy(id: &str) -> CapsuleDestroy {
    CapsuleDestroy { capsule_id: id.into() }
}

fn snapshot(id: &str, name: &str) -> CapsuleSnapshot {
    CapsuleSnapshot { capsule_id: id.into(), name: name.into(), overwrite: true }
}

fn left(cp: &mut Client, id: &str) -> Left {
    match cp.ask::<_, CapsuleInfo>(&CapsuleGet { capsule_id: id.into() }) {
        Ok(info) if info.state == CapsuleState::Running => Running,
        Ok(info) if matches!(info.state, CapsuleState::Paused | CapsuleState::Hibernated) => Paused,
        Ok(info) => panic!("{id} is {:?}", info.state),
        Err(e) if e.code() == Code::NotFound => Gone,
        Err(e) => panic!("{e}"),
    }
}

/// What the kernel has of a capsule, where it has control groups and device-mapper.
fn nothing_of_it_in_the_kernel(id: &str, state: Left, point: &str) {
    let groups = Path::new(cgroup::ROOT).join(cgroup::NAME);
    if groups.is_dir() {
        assert_eq!(groups.join(id).exists(), state == Running, "{point}: the group of {id}");
    }
    let Ok(devices) = Control::open().and_then(|control| control.names()) else { return };
    let has_device = devices.contains(&format!("wrenn-{id}"));
    // One that is paused may keep its own until the host is rebooted.
    assert!(has_device == (state == Running) || state == Paused, "{point}: {devices:?}");
}

impl Sweep {
    fn agent(&self) -> Agent {
        Agent::start(&self.place)
    }

    /// What is on the host is what these capsules have, and no file is there that nobody needs.
    fn nothing_else(&self, states: &[(&str, Left)], point: &str) {
        let count = |wanted| states.iter().filter(|(_, left)| *left == wanted).count();
        let remains = self.place.remains();
        let of = |what: &str| remains.iter().filter(|item| item.contains(what)).count();
        assert_eq!(of("sandboxes/"), count(Running) + count(Paused), "{point}: {remains:?}");
        for what in ["netns", "class/net", "VMM process"] {
            assert_eq!(of(what), count(Running), "{point}: {remains:?}");
        }
        for (id, state) in states {
            nothing_of_it_in_the_kernel(id, *state, point);
            let directory = self.place.directory.join("sandboxes").join(id);
            let Ok(files) = fs::read_dir(&directory) else { continue };
            let files: BTreeSet<String> =
                files.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
            let of = |prefix: &str| files.iter().filter(|name| name.starts_with(prefix)).count();
            // Hibernated, it has its memory under another name.
            let images = (of("memory-") + of("packed-"), of("delta-"), of("state-"));
            match state {
                Paused => assert!(matches!(images, (1, 0 | 1, 1)), "{point}: {files:?}"),
                // The memory that it was restored from is mapped still.
                _ => assert!(matches!(images, (0 | 1, 0, 0)), "{point}: {files:?}"),
            }
            assert_eq!(of("journal.new"), 0, "{point}: {files:?}");
        }
        let drafts = fs::read_dir(self.place.directory.join("snapshots")).expect("listed").flatten();
        let drafts: Vec<_> =
            drafts.map(|e| e.file_name()).filter(|n| n.to_string_lossy().starts_with('.')).collect();
        assert!(drafts.is_empty(), "{point}: {drafts:?}");
    }

    /// Both capsules are as they are to be: the lasting one counts on, whatever happened to the other.
    fn check(&mut self, agent: &Agent, fleeting: Left, point: &str) {
        let mut cp = agent.client();
        assert_eq!(left(&mut cp, FLEETING), fleeting, "{point}");
        self.nothing_else(&[(LASTING, Running), (FLEETING, fleeting)], point);
        match fleeting {
            Gone => {}
            Running => {
                count(&mut cp, FLEETING);
            }
            Paused => {
                let info: CapsuleInfo = cp.ask(&resume(FLEETING)).expect("resumed");
                assert_eq!(info.state, CapsuleState::Running);
                count(&mut cp, FLEETING);
            }
        }
        if fleeting != Gone {
            let Done {} = cp.ask(&destroy(FLEETING)).expect("destroyed");
        }
        self.counted += 1;
        assert_eq!(count(&mut cp, LASTING), self.counted, "{point}");
    }

    /// Starts an agent that dies at a point of the request, gives it the request, and waits for its death.
    fn crash<M: Message>(&mut self, point: &str, kill: &str, request: &M) {
        let mut agent = Agent::start_with(&self.place, |command| {
            command.env("CRASH_AT", point).env("CRASH_KILL", kill);
        });
        let mut cp = agent.client();
        // What the request is about has to be reached first.
        if left(&mut cp, FLEETING) == Running {
            shell(&mut cp, FLEETING, "true");
        }
        if left(&mut cp, LASTING) == Running {
            shell(&mut cp, LASTING, "true");
        }
        cp.session.open(request, true).expect("opened");
        cp.flush();
        let status = agent.wait();
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{point}: the agent ended with {status}");
        self.crashes += 1;
    }

    /// Crashes at each point of a request about the fleeting capsule, which `prepare` has made.
    fn fleeting<M: Message>(
        &mut self,
        name: &str,
        points: &[Point],
        kill: &str,
        prepare: impl Fn(&mut Client),
        request: &M,
    ) {
        let begun = Instant::now();
        for (point, expected) in points {
            let agent = self.agent();
            prepare(&mut agent.client());
            assert!(agent.hand_over().success());
            self.crash(point, kill, request);
            let agent = self.agent();
            self.check(&agent, *expected, &format!("{name}, {point}, {kill}"));
            assert!(agent.hand_over().success());
        }
        eprintln!("{name} ({kill}): {} crashes in {:.1?}", points.len(), begun.elapsed());
    }

    /// Crashes at each point of packing the lasting capsule, which the agent begins by itself when the capsule
    /// has been paused for some time.
    fn packing(&mut self) {
        let begun = Instant::now();
        for (point, expected) in PACK {
            let mut agent = Agent::start_with(&self.place, |command| {
                command.env("CRASH_AT", point).env("WRENN_HIBERNATE_AFTER_SEC", "1");
            });
            let mut cp = agent.client();
            shell(&mut cp, LASTING, "true");
            let _: CapsuleInfo = cp.ask(&pause(LASTING)).expect("paused");
            assert_eq!(agent.wait().signal(), Some(libc::SIGKILL), "{point}");
            self.crashes += 1;
            let agent = self.agent();
            let mut cp = agent.client();
            assert_eq!(left(&mut cp, LASTING), *expected, "{point}");
            self.nothing_else(&[(LASTING, *expected)], point);
            let _: CapsuleInfo = cp.ask(&resume(LASTING)).expect("resumed");
            self.counted += 1;
            assert_eq!(count(&mut cp, LASTING), self.counted, "{point}");
            assert!(agent.hand_over().success());
        }
        eprintln!("pack: {} crashes in {:.1?}", PACK.len(), begun.elapsed());
    }

    /// Crashes at each point of a request about the lasting capsule, which is in `before` then, and brings it
    /// back to running after each.
    fn lasting<M: Message>(&mut self, name: &str, points: &[Point], before: Left, request: &M) {
        let begun = Instant::now();
        for (point, expected) in points {
            if before == Paused {
                let agent = self.agent();
                let mut cp = agent.client();
                shell(&mut cp, LASTING, "true");
                let _: CapsuleInfo = cp.ask(&pause(LASTING)).expect("paused");
                assert!(agent.hand_over().success());
            }
            self.crash(point, "agent", request);
            let agent = self.agent();
            let mut cp = agent.client();
            assert_eq!(left(&mut cp, LASTING), *expected, "{name}, {point}");
            self.nothing_else(&[(LASTING, *expected)], point);
            if *expected == Paused {
                let _: CapsuleInfo = cp.ask(&resume(LASTING)).expect("resumed");
            }
            self.counted += 1;
            assert_eq!(count(&mut cp, LASTING), self.counted, "{name}, {point}");
            assert!(agent.hand_over().success());
        }
        eprintln!("{name}: {} crashes in {:.1?}", points.len(), begun.elapsed());
    }

    /// The machine dies at a point, and the agent does not: it says so, and goes on.
    fn machine_dies<M: Message>(
        &mut self,
        point: &str,
        prepare: impl Fn(&mut Client),
        request: &M,
        (succeeds, expected): (bool, Left),
    ) {
        let agent = Agent::start_with(&self.place, |command| {
            command.env("CRASH_AT", point).env("CRASH_KILL", "vmm");
        });
        let mut cp = agent.client();
        prepare(&mut cp);
        let (kind, body) = cp.request(request);
        if succeeds {
            assert_eq!(kind, CapsuleInfo::KIND, "{point}");
        } else {
            let error = Error::decode(&body).unwrap_or_else(|e| panic!("{point}: {kind:#06x}: {e}"));
            assert!(error.text.len() > 20, "{point}: {error}");
        }
        if expected == Gone
            && let Err(e) = cp.ask::<_, Done>(&destroy(FLEETING))
        {
            // What has ended by itself is told of until it is destroyed; what never ran is not there.
            assert_eq!(e.code(), Code::NotFound, "{point}: {e}");
        }
        self.crashes += 1;
        // The next one would die at that point as well.
        assert!(agent.hand_over().success());
        let agent = self.agent();
        self.check(&agent, expected, point);
        assert!(agent.hand_over().success());
    }
}

/// Every entry that a whole life writes is one at which the sweep crashes.
fn every_entry_is_swept(journal: &str) {
    let lists = [CREATE, START, PAUSE, RESUME, MAKE_SNAPSHOT, DESTROY, DESTROY_PAUSED];
    let swept: BTreeSet<&str> = lists.concat().iter().map(|(point, _)| *point).collect();
    for line in journal.lines() {
        let field = |name: &str| {
            let rest = line.split(&format!("\"{name}\":\"")).nth(1).expect("a field");
            rest.split('"').next().expect("its end").to_string()
        };
        let entry = format!("{}.{}", field("step"), field("phase"));
        // An agent that takes over changes nothing: what it was before, it is after.
        assert!(entry == "adopt.done" || swept.contains(entry.as_str()), "no crash at {entry}");
    }
}

/// A sweep whose lasting capsule has led a whole life, and a snapshot to start others from. `None` where there
/// is no guest.
fn prepared(number: u32) -> Option<Sweep> {
    let sweep = Sweep { place: Place::with_guest(number, &guest_directory()?), counted: 0, crashes: 0 };
    let agent = sweep.agent();
    let mut cp = agent.client();
    cp.create(LASTING).expect("created");
    // Before the snapshot, so that it is in every capsule.
    start_counter(&mut cp, LASTING);
    let _: SnapshotInfo = cp.ask(&snapshot(LASTING, SNAPSHOT)).expect("made");
    let _: CapsuleInfo = cp.ask(&pause(LASTING)).expect("paused");
    let _: CapsuleInfo = cp.ask(&resume(LASTING)).expect("resumed");
    let journal = sweep.place.directory.join("sandboxes").join(LASTING).join("journal");
    every_entry_is_swept(&fs::read_to_string(journal).expect("a journal"));
    assert!(agent.hand_over().success());
    Some(sweep)
}

/// Everything goes, and nothing is left.
fn finish(sweep: &Sweep, snapshots: &[&str]) {
    let agent = sweep.agent();
    let mut cp = agent.client();
    for name in snapshots {
        let Done {} = cp.ask(&SnapshotDelete { name: (*name).into() }).expect("deleted");
    }
    let Done {} = cp.ask(&destroy(LASTING)).expect("destroyed");
    assert_eq!(sweep.place.remains(), Vec::<String>::new());
    assert!(agent.terminate().success());
    eprintln!("{} crashes", sweep.crashes);
}

fn started(cp: &mut Client) {
    let _: CapsuleInfo = cp.ask(&start(FLEETING)).expect("started");
}

fn paused(cp: &mut Client) {
    started(cp);
    let _: CapsuleInfo = cp.ask(&pause(FLEETING)).expect("paused");
}

pub fn a_crash_at_any_entry_of_making_and_destroying_loses_and_leaks_nothing() {
    let Some(mut sweep) = prepared(0) else { return };
    sweep.fleeting("create", CREATE, "agent", |_| {}, &creation(FLEETING));
    sweep.fleeting("start from a snapshot", START, "agent", |_| {}, &start(FLEETING));
    sweep.fleeting("destroy", DESTROY, "agent", started, &destroy(FLEETING));
    sweep.fleeting("destroy, paused", DESTROY_PAUSED, "agent", paused, &destroy(FLEETING));
    sweep.fleeting("destroy", DESTROY_WITH_MACHINE, "both", started, &destroy(FLEETING));
    sweep.machine_dies("machine.done", |_| {}, &start(FLEETING), (false, Gone));
    finish(&sweep, &[SNAPSHOT]);
}

pub fn a_crash_at_any_entry_of_pausing_resuming_and_snapshots_loses_and_leaks_nothing() {
    let Some(mut sweep) = prepared(1) else { return };
    sweep.lasting("pause", PAUSE, Running, &pause(LASTING));
    sweep.lasting("resume", RESUME, Paused, &resume(LASTING));
    sweep.lasting("snapshot", MAKE_SNAPSHOT, Running, &snapshot(LASTING, "other"));
    sweep.packing();
    sweep.fleeting("pause", PAUSE_WITH_MACHINE, "both", started, &pause(FLEETING));
    sweep.fleeting("resume", RESUME_WITH_MACHINE, "both", paused, &resume(FLEETING));
    sweep.fleeting("snapshot", SNAPSHOT_WITH_MACHINE, "both", started, &snapshot(FLEETING, "other"));
    sweep.machine_dies("save.begin", started, &pause(FLEETING), (false, Gone));
    sweep.machine_dies("save.done", started, &pause(FLEETING), (true, Paused));
    sweep.machine_dies("go_on.begin", paused, &resume(FLEETING), (false, Paused));
    finish(&sweep, &[SNAPSHOT, "other"]);
}
