//! `make bench`: the figures of the main thread, each beside the floor it is measured against, in one
//! run on one machine.
//!
//! - create to first exec, over a bare QEMU boot of the same kernel, initramfs and image to the first
//!   line of its init;
//! - exec of `/bin/true` through all hops, beside the same fork and exec alone in the guest;
//! - size and idle memory of each program.

use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use wrenn_tests::http::{Client, Connection};
use wrenn_tests::process::Pid;
use wrenn_tests::stack::{Options, Stack};
use wrenn_tests::{Context, Failure, Result, percentile};

/// Boots and creates that are measured, alternating, so that both see the same machine.
const ROUNDS: usize = 8;
/// Commands that are measured.
const EXECS: usize = 1000;
/// What the guest's init says first when the kernel command line has `wrenn.announce`.
const ANNOUNCEMENT: &[u8] = b"wrenn-init: started";
/// How long a bare boot may take.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    let directory = PathBuf::from(format!("/var/tmp/wrenn-bench-{}", std::process::id()));
    let done = bench(&directory);
    let _ = fs::remove_dir_all(&directory);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn bench(directory: &Path) -> Result<()> {
    let mut stack = Stack::start(&Options::new(directory))?;
    boots(&stack)?;
    let id = create(&stack.client())?;
    execs(&stack, &id)?;
    sizes(&stack, &id)?;
    stack.stop()
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn create(client: &Client) -> Result<String> {
    let answer = client.post("/v1/capsules", &json!({"template": "minimal", "memory_mb": 512}))?;
    match answer.json()["id"].as_str() {
        Some(id) if answer.status == 201 => Ok(id.to_string()),
        _ => Err(Failure(format!("create: {} {}", answer.status, answer.json()))),
    }
}

fn exec_true(client: &Client, id: &str) -> Result<bool> {
    let answer = client.post(&format!("/v1/capsules/{id}/exec"), &json!({"cmd": "/bin/true"}))?;
    Ok(answer.status == 200 && answer.json()["exit_code"] == 0)
}

fn boots(stack: &Stack) -> Result<()> {
    let client = stack.client();
    let (mut bare, mut created) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bare.push(bare_boot(stack)?);
        let start = Instant::now();
        let id = create(&client)?;
        while !exec_true(&client, &id)? {
            if start.elapsed() > BOOT_LIMIT {
                return Err(Failure("the capsule never ran a command".into()));
            }
        }
        created.push(start.elapsed());
        client.delete(&format!("/v1/capsules/{id}"))?;
    }
    let (floor, ours) = (percentile(&mut bare, 0.5), percentile(&mut created, 0.5));
    println!("create to first exec     {:8.0} ms (median of {ROUNDS})", ms(ours));
    println!("bare QEMU boot to init   {:8.0} ms", ms(floor));
    println!("ratio                    {:8.2}", ours.as_secs_f64() / floor.as_secs_f64());
    Ok(())
}

/// The only file in a directory whose name starts so.
fn file_in(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let found = fs::read_dir(directory)
        .context(directory.display())?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)));
    found.ok_or_else(|| Failure(format!("{} has no {prefix}*", directory.display())))
}

/// From QEMU's exec to the first line that the guest's init prints, with the machine that the agent
/// makes but for its network.
fn bare_boot(stack: &Stack) -> Result<Duration> {
    let kernels = stack.data().join("kernels");
    let image = stack.data().join("images/minimal/rootfs.ext4");
    let mut command =
        Command::new(std::env::var("WRENN_QEMU_BIN").unwrap_or_else(|_| "qemu-system-x86_64".into()));
    command
        .args(["-M", "q35,usb=off,vmport=off,smbus=off,sata=off,i8042=off"])
        .args(["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "Nehalem", "-bios", "qboot.rom"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "512"])
        .arg("-kernel")
        .arg(file_in(&kernels, "vmlinux")?)
        .arg("-initrd")
        .arg(file_in(&kernels, "initramfs")?)
        .arg("-append")
        .arg(
            "console=ttyS0 quiet loglevel=1 mitigations=off tsc=reliable no_timer_check reboot=t panic=-1 \
             random.trust_cpu=on root=/dev/vda rw cryptomgr.notests noreplace-smp init_on_alloc=0 \
             wrenn.announce",
        )
        .arg("-drive")
        .arg(format!("file={},if=none,id=d0,format=raw,snapshot=on", image.display()))
        .args(["-device", "virtio-blk-pci,drive=d0,disable-legacy=on"])
        .args(["-device", "virtio-rng-pci,disable-legacy=on", "-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let start = Instant::now();
    let mut qemu = command.spawn().context("start QEMU")?;
    let mut said = Vec::new();
    let mut block = [0; 256];
    let mut took = None;
    // The firmware may have said something before.
    while let Some(Ok(n)) = qemu.stdout.as_mut().map(|out| out.read(&mut block)) {
        said.extend_from_slice(&block[..n]);
        if said.windows(ANNOUNCEMENT.len()).any(|w| w == ANNOUNCEMENT) {
            took = Some(start.elapsed());
        }
        if n == 0 || took.is_some() || start.elapsed() > BOOT_LIMIT {
            break;
        }
    }
    let _ = qemu.kill();
    let _ = qemu.wait();
    took.ok_or_else(|| {
        Failure(format!("the bare guest's init did not start: {}", String::from_utf8_lossy(&said)))
    })
}

fn execs(stack: &Stack, id: &str) -> Result<()> {
    let client = stack.client();
    let path = format!("/v1/capsules/{id}/exec");
    let body = json!({"cmd": "/bin/true"});
    let mut connection = Connection::open(&client)?;
    let mut through = Vec::new();
    for _ in 0..EXECS {
        let start = Instant::now();
        let answer = connection.post(&path, &body)?;
        through.push(start.elapsed());
        if answer.status != 200 || answer.json()["exit_code"] != 0 {
            return Err(Failure(format!("exec: {} {}", answer.status, answer.json())));
        }
    }
    // The same in the guest alone: fork, exec, wait, timed by the guest.
    let script = format!(
        "use Time::HiRes 'time'; for (1..{EXECS}) {{ my $t = time; system('/bin/true'); \
         print int((time - $t) * 1e6), \"\\n\" }}"
    );
    let answer =
        connection.post(&path, &json!({"cmd": "perl", "args": ["-e", script], "timeout_sec": 300}))?.json();
    let mut alone: Vec<Duration> = answer["stdout"]
        .as_str()
        .unwrap_or_default()
        .lines()
        .filter_map(|l| Some(Duration::from_micros(l.parse().ok()?)))
        .collect();
    if alone.len() != EXECS {
        return Err(Failure(format!("the guest's own measurement failed: {answer}")));
    }
    for (name, part) in [("p50", 0.5), ("p99", 0.99)] {
        let (ours, floor) = (percentile(&mut through, part), percentile(&mut alone, part));
        println!(
            "exec /bin/true {name}       {:8.2} ms, fork and exec in the guest {:.2} ms, ratio {:.2}",
            ms(ours),
            ms(floor),
            ours.as_secs_f64() / floor.as_secs_f64()
        );
    }
    Ok(())
}

fn memory_kb(pid: Pid) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.pid)).context("status")?;
    rss_kb(&status).ok_or_else(|| Failure("a process without VmRSS".into()))
}

fn rss_kb(status: &str) -> Option<u64> {
    let line = status.lines().find(|l| l.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn sizes(stack: &Stack, id: &str) -> Result<()> {
    let (cp, agent) = stack.pids();
    let script = "for p in /proc/[0-9]*; do [ \"$(cat $p/comm)\" = envd ] && cat $p/status && break; done";
    let body = json!({"cmd": "/bin/sh", "args": ["-c", script]});
    let answer: Value = stack.client().post(&format!("/v1/capsules/{id}/exec"), &body)?.json();
    let envd_kb = rss_kb(answer["stdout"].as_str().unwrap_or_default());
    let builds = wrenn_tests::stack::project_root().join("builds");
    let memory = [
        ("wrenn-cp", cp.map(memory_kb).transpose()?),
        ("wrenn-agent", agent.map(memory_kb).transpose()?),
        ("envd", envd_kb),
    ];
    for (name, resident_kb) in memory {
        let bytes = fs::metadata(builds.join(name)).context(name)?.len();
        let resident = resident_kb.map_or_else(|| "unknown".into(), |kb| format!("{kb} KB"));
        println!("{name:<12} {:8} KB on disk, {resident} resident", bytes / 1024);
    }
    Ok(())
}
