//! Parts that fail: no guest, no agent, no database, a killed agent.

use crate::{Context, Outcome, Test, ensure};
use serde_json::json;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use wrenn_tests::leftovers::take_stock;
use wrenn_tests::process::wait_until;
use wrenn_tests::{Context as _, Result};

pub const TESTS: &[Test] = &[
    ("a_guest_that_never_comes_up_is_undone", a_guest_that_never_comes_up_is_undone),
    ("a_vmm_that_dies_is_noticed", a_vmm_that_dies_is_noticed),
    (
        "without_a_database_requests_are_refused_until_it_is_back",
        without_a_database_requests_are_refused_until_it_is_back,
    ),
    ("without_an_agent_requests_are_refused", without_an_agent_requests_are_refused),
    ("capsules_outlive_their_agent", capsules_outlive_their_agent),
    ("an_agent_that_dies_in_the_midst_loses_nothing", an_agent_that_dies_in_the_midst_loses_nothing),
    (
        "the_control_plane_restarts_without_losing_capsules",
        the_control_plane_restarts_without_losing_capsules,
    ),
    ("terminating_an_agent_takes_the_capsules_along", terminating_an_agent_takes_the_capsules_along),
];

const RECOVERY: Duration = Duration::from_secs(60);

fn a_guest_that_never_comes_up_is_undone(context: &mut Context) -> Result<Outcome> {
    // A disk image without a system on it: the guest's init finds nothing to start.
    let images = context.stack.data().join("images/hollow");
    std::fs::create_dir_all(&images).context(images.display())?;
    let file = std::fs::File::create(images.join("rootfs.ext4")).context("make an image")?;
    file.set_len(64 << 20).context("make an image")?;
    let before = take_stock();
    let answer =
        context.stack.client().post("/v1/capsules", &json!({"template": "hollow", "memory_mb": 256}))?;
    let failed = if answer.status == 201 {
        let path = format!("/v1/capsules/{}", answer.json()["id"].as_str().unwrap_or_default());
        wait_until("the create to fail", Duration::from_secs(120), || {
            context.stack.client().get(&path).is_ok_and(|a| a.status == 404 || a.json()["status"] == "error")
        })
    } else {
        ensure!(
            answer.status >= 500 && !answer.error_message().is_empty(),
            "{} {}",
            answer.status,
            answer.json()
        );
        Ok(())
    };
    let _ = std::fs::remove_dir_all(&images);
    failed?;
    let left: Vec<_> = take_stock().difference(&before).cloned().collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(Outcome::Passed)
}

/// The process of the one VM that the agent has.
fn vmm_of(context: &Context) -> Result<i32> {
    let (_, agent) = context.stack.pids();
    let agent = agent.ok_or("no agent runs")?;
    for entry in std::fs::read_dir("/proc").context("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit(')').next().and_then(|s| s.split_whitespace().nth(1)).unwrap_or_default();
        if exe.to_string_lossy().contains("qemu-system") && parent == agent.pid.to_string() {
            return Ok(pid);
        }
    }
    Err("the agent has no QEMU".into())
}

fn a_vmm_that_dies_is_noticed(context: &mut Context) -> Result<Outcome> {
    if let Some(shared) = context.shared_capsule.take() {
        context.destroy(&shared)?;
    }
    let before = take_stock();
    let id = context.create(&json!({"memory_mb": 256}))?;
    let pid = vmm_of(context)?;
    // SAFETY: kill(2) takes two numbers; the process is the agent's child, found above.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    let path = format!("/v1/capsules/{id}");
    let client = context.stack.client();
    wait_until("the capsule's death to be known", RECOVERY, || {
        client.get(&path).is_ok_and(|a| a.status == 404 || a.json()["status"] != "running")
    })?;
    let answer = context.exec(&id, &json!({"cmd": "/bin/true"}))?;
    ensure!(answer.status == 404 || answer.status == 409, "exec: {} {}", answer.status, answer.json());
    client.delete(&path)?;
    let mut left = Vec::new();
    let _ = wait_until("the remains to go", RECOVERY, || {
        left = take_stock().difference(&before).cloned().collect();
        left.is_empty()
    });
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(Outcome::Passed)
}

fn without_a_database_requests_are_refused_until_it_is_back(context: &mut Context) -> Result<Outcome> {
    let client = context.stack.client();
    context.stack.postgres.stop()?;
    for path in ["/v1/capsules", "/health"] {
        let answer = client.get(path)?;
        ensure!(
            answer.status == 503 && !answer.error_message().is_empty(),
            "{path}: {} {}",
            answer.status,
            answer.json()
        );
    }
    context.stack.postgres.launch()?;
    wait_until("the control plane to find its database again", RECOVERY, || {
        client.get("/v1/capsules").is_ok_and(|a| a.status == 200)
    })?;
    Ok(Outcome::Passed)
}

fn without_an_agent_requests_are_refused(context: &mut Context) -> Result<Outcome> {
    context.stack.stop_agent(libc::SIGTERM)?;
    let client = context.stack.client();
    let answer = client.post("/v1/capsules", &json!({"memory_mb": 256}))?;
    ensure!(
        answer.status == 503
            && answer.error_code() == "host_unavailable"
            && !answer.error_message().is_empty(),
        "{} {}",
        answer.status,
        answer.json()
    );
    context.stack.start_agent()?;
    wait_until("the agent's return", RECOVERY, || {
        context.create(&json!({"memory_mb": 256})).is_ok_and(|id| context.destroy(&id).is_ok())
    })?;
    Ok(Outcome::Passed)
}

/// An agent that is killed or ended in good order leaves its capsules running, and the next goes on with
/// them: what was reachable is so again, with the guest's processes as they were.
fn capsules_outlive_their_agent(context: &mut Context) -> Result<Outcome> {
    let id = context.create(&json!({"memory_mb": 256}))?;
    context.shell(
        &id,
        "(trap '' HUP; exec sleep 1000) >/dev/null 2>&1 & echo $! >/tmp/pid; echo kept >/dev/shm/file",
    )?;
    let client = context.stack.client();
    for signal in [libc::SIGKILL, libc::SIGTERM] {
        context.stack.stop_agent(signal)?;
        let answer = context.exec(&id, &json!({"cmd": "/bin/true"}))?;
        ensure!(answer.status >= 500, "without an agent: {} {}", answer.status, answer.json());
        context.stack.start_agent()?;
        wait_until("the capsule to be reached again", RECOVERY, || {
            context.shell(&id, "kill -0 $(cat /tmp/pid) && cat /dev/shm/file").is_ok_and(|out| out == "kept")
        })?;
        let capsule = client.get(&format!("/v1/capsules/{id}"))?;
        ensure!(capsule.json()["status"] == "running", "{}", capsule.json());
    }
    context.destroy(&id)?;
    Ok(Outcome::Passed)
}

/// How long after an agent's start it is killed, in milliseconds: before it listens, while its control plane
/// connects, while capsules change their state.
const KILLED_AFTER_MS: [u64; 8] = [900, 150, 400, 1_300, 250, 700, 50, 1_000];

/// Agents are killed one after another while one capsule is paused and resumed and others are made and
/// destroyed. In the end the control plane and the host agree, and the one is as whole as it was.
fn an_agent_that_dies_in_the_midst_loses_nothing(context: &mut Context) -> Result<Outcome> {
    let before = take_stock();
    let is_agent = |(_, name): &&(_, String)| name.starts_with("wrenn-agent");
    let id = context.create(&json!({"memory_mb": 256}))?;
    context.shell(&id, "echo kept >/dev/shm/file; echo kept >$HOME/file")?;
    let client = context.stack.client();
    let path = format!("/v1/capsules/{id}");
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let killed: Result<()> = std::thread::scope(|scope| {
        let is_over = &is_over;
        // Whatever each of these is answered: the agent may be dead, or the capsule in another state.
        let (changing, making) = (context.stack.client(), context.stack.client());
        let change = format!("{path}/");
        scope.spawn(move || {
            while !is_over.load(Relaxed) {
                let _ = changing.post(&format!("{change}pause"), &json!({}));
                let _ = changing.post(&format!("{change}resume"), &json!({}));
            }
        });
        scope.spawn(move || {
            while !is_over.load(Relaxed) {
                let Ok(made) = making.post("/v1/capsules", &json!({"memory_mb": 256})) else { continue };
                if let Some(id) = made.json()["id"].as_str() {
                    let _ = making.delete(&format!("/v1/capsules/{id}"));
                }
            }
        });
        let killed = KILLED_AFTER_MS.iter().try_for_each(|ms| {
            std::thread::sleep(Duration::from_millis(*ms));
            context.stack.stop_agent(libc::SIGKILL)?;
            context.stack.start_agent()
        });
        is_over.store(true, Relaxed);
        killed
    });
    killed?;
    let mut status = String::new();
    wait_until("the capsule to be settled", RECOVERY, || {
        let answer = client.get(&path);
        status = answer.map(|a| a.json()["status"].to_string()).unwrap_or_default();
        ["\"running\"", "\"paused\""].contains(&status.as_str())
            && client
                .post(&format!("{path}/resume"), &json!({}))
                .is_ok_and(|a| [200, 409].contains(&a.status))
            && context.shell(&id, "cat /dev/shm/file $HOME/file").is_ok_and(|out| out == "kept\nkept")
    })
    .map_err(|e| wrenn_tests::Failure(format!("{e}; it is {status}")))?;
    wait_until("the others to be gone", RECOVERY, || {
        let Ok(list) = client.get("/v1/capsules") else { return false };
        let list = list.json();
        let others: Vec<String> = list
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|capsule| capsule["id"].as_str())
            .filter(|other| *other != id && Some(*other) != context.shared_capsule.as_deref())
            .map(str::to_string)
            .collect();
        others.iter().for_each(|other| drop(client.delete(&format!("/v1/capsules/{other}"))));
        others.is_empty()
    })?;
    context.destroy(&id)?;
    let mut left = Vec::new();
    let _ = wait_until("the remains to go", RECOVERY, || {
        let now = take_stock();
        left = now.difference(&before).filter(|item| !is_agent(item)).cloned().collect();
        left.is_empty()
    });
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(Outcome::Passed)
}

fn the_control_plane_restarts_without_losing_capsules(context: &mut Context) -> Result<Outcome> {
    let id = context.create(&json!({"memory_mb": 256}))?;
    context.stack.stop_cp()?;
    context.stack.start_cp()?;
    wait_until("exec after the restart", RECOVERY, || {
        context.shell(&id, "echo back").is_ok_and(|out| out == "back")
    })?;
    context.destroy(&id)?;
    Ok(Outcome::Passed)
}

fn terminating_an_agent_takes_the_capsules_along(context: &mut Context) -> Result<Outcome> {
    if let Some(shared) = context.shared_capsule.take() {
        context.destroy(&shared)?;
    }
    let own = |(_, name): &(_, String)| name.starts_with("wrenn-agent");
    let before: std::collections::BTreeSet<_> = take_stock().into_iter().filter(|item| !own(item)).collect();
    context.create(&json!({"memory_mb": 256}))?;
    context.stack.terminate()?;
    let left: Vec<_> = take_stock().difference(&before).filter(|item| !own(item)).cloned().collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    context.stack.start_agent()?;
    Ok(Outcome::Passed)
}
