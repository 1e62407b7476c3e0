//! The lifecycle's part of `make bench`: the released agent alone, each figure beside a floor of the same run.
//!
//! - pausing and resuming, over the save and restore of a bare QEMU with the same kernel and image;
//! - clones of one capsule: the time of each over the bare restore, and the memory of each over the pages that
//!   its guest has written itself;
//! - memory of the agent, idle and for each capsule;
//! - deciding what happens to one of 10, 100 and 1,000 capsules, with a simulated VMM.
//!
//! `bench-lifecycle [pauses] [clones] [decisions] [firecracker]`: these parts alone. The last one is the first two
//! in Firecracker, where one is on PATH or named by WRENN_FIRECRACKER_BIN: on this machine when it has KVM and
//! device-mapper, and else in the test host, where KVM is translated: its ratios tell more than its times.

mod bare;
mod bare_firecracker;
mod simulated;
#[path = "../../../testhost/boot.rs"]
mod test_host;
mod vmm;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use vmm::Vmm;
use wire::auth::{ITERATIONS, Verifier};
use wire::client::{Client, Identity};
use wire::message::{
    CapsuleCreate, CapsuleDestroy, CapsuleInfo, CapsulePause, CapsuleResume, CapsuleSnapshot, Done,
    SnapshotDelete, SnapshotInfo,
};
use wrenn_tests::process::{Background, random_hex, tail, wait_until, write_secret};
use wrenn_tests::stack::link_tree;
use wrenn_tests::{Context, Failure, Result, percentile};

/// Guest memory of every machine, in MiB.
const MEMORY_MB: u32 = 256;
/// Pauses and resumes of one capsule.
const ROUNDS: usize = 7;
/// Machines that are saved for the first time.
const FIRST_ROUNDS: usize = 5;
const CLONES: usize = 20;
const DEADLINE_MS: u32 = 120_000;
const TIMEOUT: Duration = Duration::from_secs(150);
/// How long a guest may settle after its boot.
const SETTLE: Duration = Duration::from_secs(2);
/// Slots that no agent that happens to run here is likely to use.
const SLOTS: &str = "58000-58099";

/// What there is to measure.
const PARTS: [&str; 4] = ["pauses", "clones", "decisions", FIRECRACKER];
const FIRECRACKER: &str = "firecracker";

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = wanted.iter().find(|part| !PARTS.contains(&part.as_str())) {
        eprintln!("{unknown:?} is none of {}", PARTS.join(", "));
        return ExitCode::FAILURE;
    }
    let base = std::env::var_os(test_host::INSIDE).map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let directory = base.join(format!("wrenn-bench-lifecycle-{}", std::process::id()));
    let done = bench(&directory, |part| wanted.is_empty() || wanted.iter().any(|w| w == part));
    let _ = fs::remove_dir_all(&directory);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn bench(directory: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<()> {
    fs::create_dir_all(directory).context(directory.display())?;
    if is_wanted("pauses") || is_wanted("clones") {
        measure(Vmm::Qemu, directory, is_wanted("clones"))?;
    }
    if is_wanted("decisions") {
        simulated::measure();
    }
    if is_wanted(FIRECRACKER) {
        match vmm::firecracker() {
            None => println!(
                "{FIRECRACKER:<24} SKIPPED: none on PATH, and WRENN_FIRECRACKER_BIN names none; its figures need one"
            ),
            Some((program, _)) if vmm::can_run_firecracker() => {
                measure(Vmm::Firecracker(program), directory, true)?;
            }
            Some(programs) => vmm::in_test_host(programs)?,
        }
    }
    Ok(())
}

/// The figures of an agent with this VMM.
fn measure(vmm: Vmm, directory: &Path, clones_too: bool) -> Result<()> {
    println!("{}", vmm.name());
    let mut host = Host::start(vmm, &directory.join("data"))?;
    let idle_kb = host.resident_kb()?;
    let restore = pauses(&mut host, directory)?;
    if clones_too {
        clones(&mut host, restore, idle_kb)?;
    }
    host.stop()
}

/// Milliseconds.
fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// A line with a figure, its floor and how the two are to each other.
fn tell(what: &str, ours: Duration, floor_name: &str, floor: Duration) {
    let ratio = ours.as_secs_f64() / floor.as_secs_f64();
    println!("{what:<24} {:8.1} ms, {floor_name} {:.1} ms, ratio {ratio:.2}", ms(ours), ms(floor));
}

/// An agent with a data directory of its own.
struct Host {
    agent: Background,
    client: Client,
    vmm: Vmm,
    data: PathBuf,
}

impl Host {
    fn start(vmm: Vmm, data: &Path) -> Result<Host> {
        let (guest, program) = vmm::builds();
        let _ = fs::remove_dir_all(data);
        link_tree(&guest, data)?;
        let secret = random_hex(16)?;
        let verifier = Verifier::new(secret.as_bytes(), &[7; 16], ITERATIONS).to_text();
        let token = serde_json::json!({"host_id": "host-bench", "token": "t", "refresh_token": "r",
            "wire_verifier": verifier, "obtained_sec": u32::MAX});
        write_secret(&data.join("host-token"), &token.to_string())?;
        let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
        let address = listener.local_addr().context("find a free port")?.to_string();
        drop(listener);
        let mut command = Command::new(program);
        vmm.choose(&mut command);
        command.env_remove("WRENN_CP_URL").env("WRENN_DIR", data).env("LOG_LEVEL", "debug");
        command.env("WRENN_HOST_LISTEN_ADDR", &address).env("WRENN_SLOTS", SLOTS);
        // Clones of a capsule that does nothing need no processor.
        command.env("WRENN_VCPU_OVERCOMMIT", "64").current_dir(data);
        let agent = Background::start(command, None, &data.join("agent.log"), None)?;
        wait_until("the agent to listen", TIMEOUT, || TcpStream::connect(&address).is_ok())
            .context(tail(&agent.log))?;
        let identity = Identity { name: "cp", secret: secret.as_bytes(), program: "bench/1" };
        let client = Client::connect(address.as_str(), identity, TIMEOUT).context("connect to the agent")?;
        Ok(Host { agent, client, vmm, data: data.to_owned() })
    }

    fn create(&mut self, id: &str, template: &str) -> Result<Duration> {
        let began = Instant::now();
        let request = CapsuleCreate {
            capsule_id: id.into(),
            template: template.into(),
            vcpus: 1,
            memory_mb: MEMORY_MB,
            deadline_ms: DEADLINE_MS,
            ..Default::default()
        };
        let _: CapsuleInfo = self.client.request(&request).context("create")?;
        Ok(began.elapsed())
    }

    fn pause(&mut self, id: &str) -> Result<Duration> {
        let began = Instant::now();
        let _: CapsuleInfo = self.client.request(&CapsulePause { capsule_id: id.into() }).context("pause")?;
        Ok(began.elapsed())
    }

    fn resume(&mut self, id: &str) -> Result<Duration> {
        let began = Instant::now();
        let request = CapsuleResume { capsule_id: id.into(), deadline_ms: DEADLINE_MS };
        let _: CapsuleInfo = self.client.request(&request).context("resume")?;
        Ok(began.elapsed())
    }

    /// What the agent's log says last between these two words, in milliseconds.
    fn logged(&self, before: &str) -> Result<Duration> {
        let log = fs::read_to_string(&self.agent.log).context(self.agent.log.display())?;
        let told = log.lines().rev().find_map(|line| line.split_once(before));
        let number = told.and_then(|(_, rest)| rest.split_once(" ms")?.0.parse().ok());
        number.map(Duration::from_millis).ok_or_else(|| Failure(format!("the log has no {before:?}")))
    }

    /// Waits until nothing is left of the machine of the capsule that was paused last. From the request on.
    fn machine_gone(&self) -> Result<Duration> {
        // What the agent says of one capsule comes in order, and it is told to no other meanwhile.
        let is_gone = || {
            let log = fs::read_to_string(&self.agent.log).unwrap_or_default();
            log.rfind(": network removed after ") > log.rfind(": saved in ")
        };
        wait_until("the paused capsule's machine to be gone", TIMEOUT, is_gone)?;
        self.logged(": network removed after ")
    }

    fn destroy(&mut self, id: &str) -> Result<()> {
        let Done {} = self.client.request(&CapsuleDestroy { capsule_id: id.into() }).context("destroy")?;
        Ok(())
    }

    fn resident_kb(&self) -> Result<u64> {
        let path = format!("/proc/{}/smaps_rollup", self.agent.pid.pid);
        kilobytes(&fs::read_to_string(&path).context(path)?, "Rss:").ok_or_else(|| "no Rss".into())
    }

    fn stop(mut self) -> Result<()> {
        self.agent.end(libc::SIGTERM)
    }
}

/// The first value of this name in the text of /proc/PID/smaps or its like.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// Returns how long a bare VMM takes to restore.
fn pauses(host: &mut Host, directory: &Path) -> Result<Duration> {
    let (mut floors, mut first, mut first_saved) = (Vec::new(), Vec::new(), Vec::new());
    let (mut first_gone, mut gone, mut created) = (Vec::new(), Vec::new(), Vec::new());
    // In turns, so that both see the same disk.
    for _ in 0..FIRST_ROUNDS {
        floors.push(host.vmm.floor(directory, &host.data)?);
        created.push(host.create("cl-first", "minimal")?);
        std::thread::sleep(SETTLE);
        first.push(host.pause("cl-first")?);
        first_saved.push(host.logged("saved in ")?);
        first_gone.push(host.machine_gone()?);
        host.destroy("cl-first")?;
    }
    let median =
        |of: fn(&bare::Floor) -> Duration| percentile(&mut floors.iter().map(of).collect::<Vec<_>>(), 0.5);
    tell(
        "create to guest daemon",
        percentile(&mut created, 0.5),
        "bare boot to its init",
        median(|f| f.boot),
    );
    let (save, unsynced, restore) = (median(|f| f.save), median(|f| f.unsynced), median(|f| f.restore));
    let mib = floors.iter().map(|f| f.bytes).max().unwrap_or(0) >> 20;
    println!(
        "{:<24} {:8.1} ms, {:.1} ms of them for {mib} MiB to be on disk",
        "bare save",
        ms(save),
        ms(save.saturating_sub(unsynced))
    );
    host.create("cl-paused", "minimal")?;
    std::thread::sleep(SETTLE);
    host.pause("cl-paused")?;
    host.machine_gone()?;
    let (mut again, mut saved) = (Vec::new(), Vec::new());
    let (mut resumed, mut restored) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        resumed.push(host.resume("cl-paused")?);
        restored.push(host.logged(": restored after ")?);
        again.push(host.pause("cl-paused")?);
        saved.push(host.logged("saved in ")?);
        gone.push(host.machine_gone()?);
    }
    host.destroy("cl-paused")?;
    for (what, times) in [
        ("first pause", &mut first),
        ("  the guest saved", &mut first_saved),
        ("  until its VMM is gone", &mut first_gone),
        ("further pause", &mut again),
        ("  the guest saved", &mut saved),
        ("  until its VMM is gone", &mut gone),
    ] {
        tell(what, percentile(times, 0.5), "bare save", save);
    }
    tell("resume to guest daemon", percentile(&mut resumed, 0.5), "bare restore", restore);
    tell("  to a guest that runs", percentile(&mut restored, 0.5), "bare restore", restore);
    Ok(restore)
}

fn clones(host: &mut Host, floor: Duration, idle_kb: u64) -> Result<()> {
    host.create("cl-origin", "minimal")?;
    std::thread::sleep(SETTLE);
    let began = Instant::now();
    let order = CapsuleSnapshot { capsule_id: "cl-origin".into(), name: "warm".into(), overwrite: false };
    let _: SnapshotInfo = host.client.request(&order).context("snapshot")?;
    println!("{:<24} {:8.1} ms", "snapshot to clone from", ms(began.elapsed()));
    let ids: Vec<String> = (0..CLONES).map(|number| format!("cl-clone-{number}")).collect();
    let mut times = vec![host.create(&ids[0], "warm")?];
    // What only the first one takes is not each one's.
    let first_kb = host.resident_kb()?;
    let mut restored = Vec::new();
    for id in &ids[1..] {
        times.push(host.create(id, "warm")?);
        restored.push(host.logged(": restored after ")?);
    }
    tell("clone, each of 20", percentile(&mut times, 0.5), "bare restore", floor);
    tell("  to a guest that runs", percentile(&mut restored, 0.5), "bare restore", floor);
    let mut memories = ids.iter().map(|id| Memory::of(machine(id)?)).collect::<Result<Vec<_>>>()?;
    memories.sort_unstable_by_key(Memory::over_kb);
    let (median, most) = (&memories[CLONES / 2], &memories[CLONES - 1]);
    let mib = |kb: u64| kb as f64 / 1024.0;
    println!(
        "{:<24} {:8.1} MiB over the guest's own pages (median of {CLONES}), at most {:.1} MiB; {:.1} MiB of the \
         median are translated code",
        "PSS of a clone",
        mib(median.over_kb()),
        mib(most.over_kb()),
        mib(median.code_kb)
    );
    let all_kb = host.resident_kb()?;
    let each = all_kb.saturating_sub(first_kb) / (CLONES as u64 - 1);
    println!(
        "{:<24} {idle_kb:8} KB idle, {all_kb} KB with {}, {each} KB for each further capsule",
        "wrenn-agent, resident",
        CLONES + 1
    );
    for id in ids.iter().map(String::as_str).chain(["cl-origin"]) {
        host.destroy(id)?;
    }
    let Done {} = host.client.request(&SnapshotDelete { name: "warm".into() }).context("delete")?;
    Ok(())
}

/// The VMM of a capsule, which has its id on its command line.
fn machine(id: &str) -> Result<u32> {
    let wanted = [format!("guest={id},"), format!("--id\0{id}\0")];
    let processes = fs::read_dir("/proc").context("/proc")?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let found = pids.find(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        wanted.iter().any(|wanted| line.contains(wanted))
    });
    found.ok_or_else(|| Failure(format!("{id} has no process")))
}

/// What a VMM takes of the host.
struct Memory {
    /// Its proportional share of all that it maps, in KiB.
    pss_kb: u64,
    /// Pages of its guest's memory that nobody else has, in KiB.
    own_kb: u64,
    /// What it can write to and run, which a VMM that translates its guest's instructions has, in KiB.
    code_kb: u64,
}

impl Memory {
    fn of(pid: u32) -> Result<Memory> {
        let path = format!("/proc/{pid}/smaps");
        Memory::parse(&fs::read_to_string(&path).context(path)?).ok_or_else(|| "a VMM without memory".into())
    }

    fn parse(smaps: &str) -> Option<Memory> {
        let pss = smaps.lines().filter_map(|l| l.strip_prefix("Pss:"));
        let pss_kb = pss.filter_map(|v| v.split_whitespace().next()?.parse::<u64>().ok()).sum();
        let size = format!("{} kB", MEMORY_MB * 1024);
        let memory = smaps.split("\nSize:").find(|mapping| mapping.trim_start().starts_with(&size))?;
        // A mapping's first line has its addresses and what may be done with it, proc(5).
        let is_code = |line: &str| line.split(' ').nth(1).is_some_and(|mode| mode.starts_with("rwx"));
        let lines: Vec<&str> = smaps.lines().collect();
        let code = lines.iter().enumerate().filter(|(_, line)| is_code(line));
        let code_kb = code.filter_map(|(at, _)| kilobytes(&lines[at + 1..].join("\n"), "Rss:")).sum();
        Some(Memory { pss_kb, own_kb: kilobytes(memory, "Anonymous:")?, code_kb })
    }

    fn over_kb(&self) -> u64 {
        self.pss_kb.saturating_sub(self.own_kb)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_smaps() {
        let smaps = "7f00-7f01 rw-p 0 00:01 5 /memfd:snapshot memory (deleted)\nSize:             262144 kB\n\
                     Rss: 900 kB\nPss:  500 kB\nAnonymous:   300 kB\nVmFlags: rd\n\
                     5400-5401 rwxp 0 00:00 0\nSize:  80 kB\nRss:  60 kB\nPss:  60 kB\nAnonymous:  60 kB\n\
                     5500-5501 r-xp 0 00:01 5 /qemu\nSize:  40 kB\nRss: 40 kB\nPss:  7 kB\nAnonymous:  0 kB\n";
        let memory = Memory::parse(smaps).expect("complete");
        assert_eq!((memory.pss_kb, memory.own_kb, memory.over_kb(), memory.code_kb), (567, 300, 267, 60));
        assert!(Memory::parse("Pss: 3 kB\n").is_none());
    }
}
