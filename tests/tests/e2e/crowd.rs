//! Ten thousand processes in one capsule, all of them alive at once.

use crate::wire::Key;
use crate::{Context, Outcome, Test, ensure};
use serde_json::json;
use std::time::{Duration, Instant};
use wire::message::{GuestMetrics, GuestMetricsReply};
use wrenn_tests::process::wait_until;
use wrenn_tests::{Context as _, Failure, Result};

pub const TESTS: &[Test] = &[("ten_thousand_processes_are_ordinary", ten_thousand_processes_are_ordinary)];

const CROWD: u32 = 10_000;
/// Memory that the crowd fits into, in MiB: the kernel lets a guest have eight tasks a MiB, of which one
/// tree of processes gets seven eighths.
const MEMORY_MB: u64 = 2048;
/// How long an emulated guest on a busy machine may take to start the crowd, and to end it.
const CROWD_LIMIT: Duration = Duration::from_secs(180);
/// How long it may take to answer meanwhile.
const WORST_ANSWER: Duration = Duration::from_secs(10);
/// What envd may have resident, in KiB: it knows of one process only.
const MAX_RSS_KB: u64 = 1_400;
/// Commands with long arguments that run besides: their list does not fit into one message.
const LISTED: usize = 60;
const LONG_ARGUMENT: usize = 1000;
/// Processes of a guest that does nothing, at most.
const QUIET: u32 = 200;

/// Forks children that only wait, says how many there are, and stays.
const START: &str = r#"
my $n = 0;
my $why = "";
while ($n < CROWD) {
    my $child = fork;
    if (!defined $child) { $why = $!; last }
    if (!$child) { sleep 100000 while 1 }
    $n++;
}
open my $out, ">", "/tmp/crowd.new";
print $out "$n$why";
close $out;
rename "/tmp/crowd.new", "/tmp/crowd";
sleep 100000 while 1;
"#;

/// envd's resident memory, in KiB: it is among the first processes.
const RSS: &str = r#"
for d in /proc/[0-9] /proc/[0-9][0-9] /proc/[0-9][0-9][0-9]; do
    read -r name < $d/comm
    [ "$name" = envd ] || continue
    while read -r field value rest; do [ $field != VmRSS: ] || echo $value; done < $d/status
done
true
"#;

/// The guest's own figures, over the wire protocol.
fn figures(context: &Context, key: &Key, capsule: &str) -> Result<GuestMetricsReply> {
    let mut client = context.dial(&key.id, &key.secret).context("dial")?;
    let stream = client.open_in(capsule, &GuestMetrics {}, true).context("ask for metrics")?;
    client.next_message(stream).context("metrics")
}

/// Does something that must not take long.
fn prompt<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    let result = work()?;
    let took = begun.elapsed();
    println!("    {what}: {took:.0?}");
    ensure!(took < WORST_ANSWER, "{what} took {took:?} among {CROWD} processes");
    Ok(result)
}

fn ten_thousand_processes_are_ordinary(context: &mut Context) -> Result<Outcome> {
    let id = context.create(&json!({"template": "minimal", "memory_mb": MEMORY_MB}))?;
    let result = crowd(context, &id);
    context.destroy(&id)?;
    result.map(|()| Outcome::Passed)
}

fn crowd(context: &Context, id: &str) -> Result<()> {
    let client = context.stack.client();
    let path = |rest: &str| format!("/v1/capsules/{id}/{rest}");
    let rss = || -> Result<u64> {
        let text = context.shell(id, RSS)?;
        text.trim().parse().map_err(|_| Failure(format!("envd's memory: {text:?}")))
    };
    let key = context.new_key(&context.stack.admin()?)?;
    let begun = Instant::now();
    let script = START.replace("CROWD", &CROWD.to_string());
    let start = json!({"cmd": "perl", "args": ["-e", script], "background": true, "tag": "crowd"});
    let started = context.exec(id, &start)?;
    ensure!(started.status == 202, "start: {} {}", started.status, started.json());
    wait_until("the crowd to be there", CROWD_LIMIT, || {
        context.shell(id, "sleep 1; test -e /tmp/crowd").is_ok()
    })?;
    let there = context.shell(id, "cat /tmp/crowd")?;
    ensure!(there == CROWD.to_string(), "{there} of {CROWD} processes could be started");
    println!("    {CROWD} processes after {:.1?}", begun.elapsed());

    let figures_now = prompt("the guest's figures", || figures(context, &key, id))?;
    ensure!(figures_now.processes >= CROWD, "{figures_now:?}");
    println!("    {} MiB of memory left", figures_now.memory_available_bytes >> 20);
    prompt("a command", || context.shell(id, "echo well"))?;
    let argument = "x".repeat(LONG_ARGUMENT);
    for number in 0..LISTED {
        let start = json!({"cmd": "sh", "args": ["-c", "exec sleep 100000", argument],
            "background": true, "tag": format!("listed-{number}")});
        let started = context.exec(id, &start)?;
        ensure!(started.status == 202, "start: {} {}", started.status, started.json());
    }
    let list = prompt("the list of processes", || client.get(&path("processes")))?;
    let list = list.json()["processes"].as_array().cloned().unwrap_or_default();
    ensure!(list.len() == LISTED + 1, "{} of {} are listed", list.len(), LISTED + 1);
    ensure!(list.iter().any(|p| p["tag"] == "crowd" && p["cmd"] == "perl"), "{list:?}");
    let upload = format!(
        "--b\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n/tmp/among\r\n--b\r\n\
         Content-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n{argument}\r\n--b--\r\n"
    );
    let written = prompt("a file written", || {
        let body = ("multipart/form-data; boundary=b", upload.as_bytes());
        client.request("POST", &path("files/write"), Some(body))
    })?;
    ensure!(written.status == 204, "{} {}", written.status, written.json());
    let read = prompt("a file read", || client.post(&path("files/read"), &json!({"path": "/tmp/among"})))?;
    ensure!(read.body == argument.as_bytes(), "{} bytes came back", read.body.len());
    let proc = prompt("a listing of /proc", || client.post(&path("files/list"), &json!({"path": "/proc"})))?;
    let entries = proc.json()["entries"].as_array().map_or(0, Vec::len);
    ensure!(entries > CROWD as usize, "{entries} entries in /proc");
    let during = rss()?;
    println!("    envd has {during} KiB resident");
    ensure!(during <= MAX_RSS_KB, "envd has {during} KiB resident");

    let begun = Instant::now();
    let ended = client.delete(&path("processes/crowd"))?;
    ensure!(ended.status == 204, "{} {}", ended.status, ended.json());
    wait_until("the crowd to be gone", CROWD_LIMIT, || {
        figures(context, &key, id).is_ok_and(|f| f.processes < QUIET)
    })?;
    println!("    gone after {:.1?}", begun.elapsed());
    for number in 0..LISTED {
        client.delete(&path(&format!("processes/listed-{number}")))?;
    }
    wait_until("nothing to be left", CROWD_LIMIT, || {
        context.shell(id, "ls -d /sys/fs/cgroup/wrenn/[0-9]* | wc -l").is_ok_and(|count| count == "1")
    })?;
    let list = client.get(&path("processes"))?.json();
    ensure!(list["processes"].as_array().is_some_and(Vec::is_empty), "{list}");
    Ok(())
}
