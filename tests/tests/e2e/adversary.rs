//! What a guest's own programs do to its daemon, in one capsule that outlives all of it.

use crate::{Context, Outcome, Test, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use wrenn_tests::process::wait_until;
use wrenn_tests::{Context as _, Failure, Result};

pub const TESTS: &[Test] = &[
    ("adversary_every_process_has_its_control_group", every_process_has_its_control_group),
    ("adversary_a_fork_bomb_ends_with_its_command", a_fork_bomb_ends_with_its_command),
    ("adversary_who_eats_all_memory_is_killed_alone", who_eats_all_memory_is_killed_alone),
    ("adversary_a_full_disk_is_told", a_full_disk_is_told),
    ("adversary_a_user_kills_all_that_it_may", a_user_kills_all_that_it_may),
    ("adversary_standard_streams_may_be_closed", standard_streams_may_be_closed),
    ("adversary_clock_jumps_change_no_timeout", clock_jumps_change_no_timeout),
    ("adversary_a_large_upload_holds_nobody_up", a_large_upload_holds_nobody_up),
    ("adversary_envd_comes_back_when_it_is_killed", envd_comes_back_when_it_is_killed),
];

/// How long envd may take to answer after what was done to it.
const ANSWER: Duration = Duration::from_secs(30);
/// Shell functions for what the image has no programs for: the processes of a name, and how many have a
/// pattern in their arguments, which must not match itself.
const TOOLS: &str = r#"
of() { for d in /proc/[0-9]*; do read -r name 2> /dev/null < $d/comm && [ "$name" = "$1" ] && echo ${d#/proc/}; done; true; }
having() { grep -la "$1" /proc/[0-9]*/cmdline 2> /dev/null | wc -l; }
"#;
/// How long a command with a bound of its own may overrun it on a busy machine, in seconds.
const OVERRUN_SEC: f64 = 12.0;
/// What envd may have resident after some work, in KiB.
const MAX_RSS_KB: u64 = 1_200;
/// Memory of the capsule, in MiB.
const MEMORY_MB: u64 = 512;
/// A file that does not fit into the guest's cache of what is to be written, in bytes.
const UPLOAD_BYTES: usize = 300_000_000;
/// The longest that a command may take to be done while such a file comes in: an emulated guest on a busy
/// machine takes its time, and waiting for the whole file would take far longer.
const WORST_DURING_UPLOAD: Duration = Duration::from_secs(3);

impl Context {
    /// The capsule that the tests of this file maltreat.
    fn victim(&mut self) -> Result<String> {
        if let Some(id) = &self.victim {
            return Ok(id.clone());
        }
        let id = self.create(&json!({"template": "minimal", "memory_mb": MEMORY_MB}))?;
        self.victim = Some(id.clone());
        Ok(id)
    }

    /// As [`Context::shell`], with [`TOOLS`].
    fn look(&self, id: &str, command: &str) -> Result<String> {
        self.shell(id, &format!("{TOOLS}{command}"))
    }

    /// Runs a shell command with a bound on its time and gives its result, whatever it is.
    fn attack(&self, id: &str, command: &str, timeout_sec: u32) -> Result<Value> {
        let body = json!({"cmd": "/bin/sh", "args": ["-c", command], "timeout_sec": timeout_sec});
        let answer = self.exec(id, &body)?;
        ensure!(answer.status == 200, "{command}: {} {}", answer.status, answer.json());
        Ok(answer.json())
    }

    /// envd works as ever, after at most a while.
    fn is_well(&self, id: &str, after: &str) -> Result<Outcome> {
        let begun = Instant::now();
        wait_until(&format!("an answer after {after}"), ANSWER, || {
            self.shell(id, "echo well").is_ok_and(|out| out == "well")
        })?;
        println!("  well {:.0?} after {after}", begun.elapsed());
        Ok(Outcome::Passed)
    }

    /// Waits until nothing but a look at it runs in the groups of processes.
    fn groups_are_gone(&self, id: &str) -> Result<()> {
        wait_until("ended processes' control groups to be gone", ANSWER, || {
            self.shell(id, "ls -d /sys/fs/cgroup/wrenn/[0-9]* | wc -l").is_ok_and(|count| count == "1")
        })
    }
}

fn every_process_has_its_control_group(context: &mut Context) -> Result<Outcome> {
    let id = context.victim()?;
    let own = context.shell(&id, "cat /proc/self/cgroup")?;
    let group = own.strip_prefix("0::/wrenn/").ok_or_else(|| Failure(format!("it is in {own}")))?.to_string();
    ensure!(group.parse::<u32>().is_ok(), "it is in {own}");
    let daemon =
        context.look(&id, "for p in $(of envd); do cat /proc/$p/cgroup /proc/$p/oom_score_adj; done")?;
    ensure!(daemon == "0::/envd\n-900", "{daemon}");
    let status = "while read -r field value rest; do case $field in VmRSS:|Threads:) echo $value;; esac; done \
                  < /proc/$(of envd)/status";
    let status = context.look(&id, status)?;
    let figures: Vec<u64> = status.lines().filter_map(|line| line.parse().ok()).collect();
    ensure!(
        figures.len() == 2 && figures[0] <= MAX_RSS_KB && figures[1] == 1,
        "memory and threads: {status}"
    );
    println!("  envd has {} KiB resident", figures[0]);
    let bounds = "cd /sys/fs/cgroup/wrenn && cat pids.max memory.max $(basename $(cut -d: -f3 /proc/self/cgroup))/pids.max";
    let bounds = context.shell(&id, bounds)?;
    let numbers: Vec<u64> = bounds.lines().filter_map(|line| line.parse().ok()).collect();
    ensure!(numbers.len() == 3 && numbers[2] < numbers[0], "bounds: {bounds}");
    ensure!((100 << 20..MEMORY_MB << 20).contains(&numbers[1]), "memory bound: {bounds}");
    // What a command leaves in the background stays when it ends by itself, and goes when its time is up.
    let left = "setsid sleep 7654 > /dev/null 2>&1 < /dev/null & sleep 0.2; echo started";
    ensure!(context.shell(&id, left)? == "started", "it started");
    ensure!(
        context.look(&id, "having '7[6]54'")? == "1",
        "a process in the background was ended with its command"
    );
    context.look(&id, "kill $(of sleep)")?;
    let left = "setsid sleep 8765 > /dev/null 2>&1 < /dev/null & sleep 1000";
    let ended = context.attack(&id, left, 1)?;
    ensure!(ended["timed_out"] == true, "{ended}");
    ensure!(
        context.look(&id, "having '8[7]65'")? == "0",
        "a command's time was up, and what it started runs on"
    );
    context.groups_are_gone(&id)?;
    Ok(Outcome::Passed)
}

fn a_fork_bomb_ends_with_its_command(context: &mut Context) -> Result<Outcome> {
    let id = context.victim()?;
    for (who, command) in [
        ("user", "bomb() { bomb & bomb & wait; }; bomb"),
        ("root", "exec sudo /bin/sh -c 'bomb() { bomb & bomb & wait; }; bomb'"),
    ] {
        let (result, during) = std::thread::scope(|scope| {
            let shared: &Context = context;
            let bomb = scope.spawn(|| shared.attack(&id, command, 5));
            std::thread::sleep(Duration::from_secs(3));
            let begun = Instant::now();
            let during = shared.shell(&id, "cat /proc/loadavg").map(|load| (load, begun.elapsed()));
            (bomb.join().unwrap_or_else(|_| Err(Failure("it panicked".into()))), during)
        });
        let (load, took) = during?;
        println!("  during a fork bomb of {who}: an answer in {took:.0?}, load {load}");
        let result = result?;
        ensure!(result["timed_out"] == true, "{who}: {result}");
        let took = result["duration_ms"].as_f64().unwrap_or_default() / 1000.0;
        ensure!((5.0..5.0 + OVERRUN_SEC).contains(&took), "{who}: it ended after {took} s");
        context.is_well(&id, &format!("a fork bomb of {who}"))?;
        context.groups_are_gone(&id)?;
    }
    Ok(Outcome::Passed)
}

fn who_eats_all_memory_is_killed_alone(context: &mut Context) -> Result<Outcome> {
    let id = context.victim()?;
    let envd = context.look(&id, "of envd")?;
    for (who, command) in [("user", "exec tail /dev/zero"), ("root", "exec sudo tail /dev/zero")] {
        let result = context.attack(&id, command, 60)?;
        // sudo ends itself by the signal that has ended its command.
        ensure!(result["exit_code"] == 128 + 9, "{who}: {result}");
        context.is_well(&id, &format!("a process of {who} ate all memory"))?;
    }
    ensure!(context.look(&id, "of envd")? == envd, "envd was started again");
    Ok(Outcome::Passed)
}

fn a_full_disk_is_told(context: &mut Context) -> Result<Outcome> {
    let id = context.victim()?;
    let fill = "sudo fallocate -l $(($(df --output=size -k / | tail -1) / 8 * 7))K /fill; \
                sudo dd if=/dev/zero of=/fill2 bs=1M count=64 2> /dev/null; \
                while sudo fallocate -l $(($(df --output=avail -k / | tail -1) - 4))K /fill3; do :; done 2> /dev/null; \
                sudo sh -c 'cat /dev/zero > /fill4' 2>&1 | tail -1";
    let said = context.attack(&id, fill, 120)?;
    ensure!(said["stdout"].as_str().is_some_and(|s| s.contains("No space left")), "{said}");
    context.is_well(&id, "the disk was filled")?;
    let written = context.attack(&id, "echo much > /home/user/more", 10)?;
    ensure!(written["exit_code"] != 0, "there was room still: {written}");
    context.shell(&id, "sudo rm /fill*")?;
    context.shell(&id, "echo much > /home/user/more && rm /home/user/more")?;
    Ok(Outcome::Passed)
}

fn a_user_kills_all_that_it_may(context: &mut Context) -> Result<Outcome> {
    let id = context.victim()?;
    let envd = context.look(&id, "of envd")?;
    ensure!(context.shell(&id, "id -un")? == "user", "commands run as another account");
    // It hits all that the account may kill but who does it.
    let result = context.attack(&id, "sleep 3333 & sleep 0.2; kill -9 -1; wait $!; echo $?", 10)?;
    ensure!(result["stdout"] == "137\n", "not even its own were killed: {result}");
    context.is_well(&id, "kill -9 -1")?;
    ensure!(context.look(&id, "of envd")? == envd, "envd was started again");
    Ok(Outcome::Passed)
}

fn standard_streams_may_be_closed(context: &mut Context) -> Result<Outcome> {
    let id = context.victim()?;
    let result = context.attack(&id, "exec <&- >&- 2>&-; sleep 0.5; exit 7", 10)?;
    ensure!(result["exit_code"] == 7 && result["stdout"] == "", "{result}");
    context.is_well(&id, "a command closed its streams")
}

fn clock_jumps_change_no_timeout(context: &mut Context) -> Result<Outcome> {
    let id = context.victim()?;
    for jump in ["+10 years", "-20 years", "+10 years"] {
        let result = std::thread::scope(|scope| {
            let shared: &Context = context;
            let sleeper = scope.spawn(|| shared.attack(&id, "exec sleep 100", 4));
            std::thread::sleep(Duration::from_secs(1));
            let jumped = shared.shell(&id, &format!("sudo date -s '{jump}'"));
            (sleeper.join().unwrap_or_else(|_| Err(Failure("it panicked".into()))), jumped)
        });
        result.1.context("set the clock")?;
        let result = result.0?;
        let took = result["duration_ms"].as_f64().unwrap_or_default() / 1000.0;
        ensure!(result["timed_out"] == true && (4.0..4.0 + OVERRUN_SEC).contains(&took), "{jump}: {result}");
    }
    context.is_well(&id, "the clock jumped")
}

fn a_large_upload_holds_nobody_up(context: &mut Context) -> Result<Outcome> {
    let id = context.victim()?;
    let mut body = b"--b\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n/home/user/large\r\n--b\r\n\
        Content-Disposition: form-data; name=\"file\"; filename=\"large\"\r\n\r\n"
        .to_vec();
    body.resize(body.len() + UPLOAD_BYTES, b'x');
    body.extend(b"\r\n--b--\r\n");
    let client = context.stack.client().with_timeout(Duration::from_secs(240));
    let begun = Instant::now();
    let (uploaded, mut latencies) = std::thread::scope(|scope| {
        let path = format!("/v1/capsules/{id}/files/stream/write");
        let body = &body;
        let upload = scope
            .spawn(move || client.request("POST", &path, Some(("multipart/form-data; boundary=b", body))));
        let mut latencies = Vec::new();
        while !upload.is_finished() {
            let asked = Instant::now();
            if let Err(e) = context.shell(&id, "true") {
                return (Err(e), latencies);
            }
            latencies.push(asked.elapsed());
        }
        (upload.join().unwrap_or_else(|_| Err(Failure("it panicked".into()))), latencies)
    });
    let took = begun.elapsed();
    let uploaded = uploaded?;
    ensure!(uploaded.status == 204, "upload: {} {}", uploaded.status, uploaded.json());
    ensure!(
        context.shell(&id, "stat -c %s /home/user/large && rm /home/user/large")? == UPLOAD_BYTES.to_string(),
        "it is not whole"
    );
    latencies.sort();
    let worst = latencies.last().copied().unwrap_or_default();
    let rate = UPLOAD_BYTES as f64 / 1e6 / took.as_secs_f64();
    let middle = latencies.get(latencies.len() / 2).copied().unwrap_or_default();
    println!("  {rate:.0} MB/s; {} commands meanwhile, p50 {middle:.0?}, worst {worst:.0?}", latencies.len());
    ensure!(worst < WORST_DURING_UPLOAD, "a command took {worst:?} during an upload");
    Ok(Outcome::Passed)
}

fn envd_comes_back_when_it_is_killed(context: &mut Context) -> Result<Outcome> {
    let id = context.victim()?;
    let before = context.look(&id, "of envd")?;
    context.shell(&id, "setsid sleep 6543 > /dev/null 2>&1 < /dev/null & echo started")?;
    for signal in ["KILL", "TERM", "KILL"] {
        let answer = context.exec(
            &id,
            &json!({"cmd": "/bin/sh", "args": ["-c", format!("{TOOLS}sudo sh -c \"kill -{signal} $(of envd)\"; sleep 20")]}),
        )?;
        ensure!(answer.status >= 500, "SIG{signal}: {} {}", answer.status, answer.json());
        context.is_well(&id, &format!("envd got SIG{signal}"))?;
    }
    let after = context.look(&id, "of envd")?;
    ensure!(after != before && after.parse::<u32>().is_ok(), "envd was {before} and is {after}");
    ensure!(context.look(&id, "having '6[5]43'")? == "1", "what ran in the background is gone");
    ensure!(context.shell(&id, "cat /proc/self/cgroup")?.starts_with("0::/wrenn/"), "the groups are gone");
    let status = context.stack.client().get(&format!("/v1/capsules/{id}"))?.json();
    ensure!(status["status"] == "running", "{status}");
    context.look(&id, "kill $(of sleep)")?;
    context.groups_are_gone(&id)?;
    // Nothing more is done to it, and what comes after has to find its own capsule alone.
    context.victim = None;
    context.destroy(&id)?;
    Ok(Outcome::Passed)
}
