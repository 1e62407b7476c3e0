//! The test host: a machine in QEMU, started once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The file system on which the cases work.
const WORK_BYTES: u64 = 1 << 30;
/// How long all of it may take: five times what it takes.
const PATIENCE: Duration = Duration::from_secs(240);

/// A directory that goes when this is dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn run() {
    let Some(host) = std::env::var_os("WRENN_TEST_HOST").map(PathBuf::from) else {
        eprintln!("SKIPPED: WRENN_TEST_HOST names no test host (`tests/testhost/build.sh`)");
        return;
    };
    let scratch = Scratch(std::env::temp_dir().join(format!("wrenn-test-host-{}", std::process::id())));
    fs::create_dir(&scratch.0).expect("a directory");
    let (program, work, results, console) = (
        scratch.0.join("program"),
        scratch.0.join("work"),
        scratch.0.join("results"),
        scratch.0.join("console"),
    );
    let bytes = copy_whole_sectors(&std::env::current_exe().expect("this program"), &program);
    File::create(&work).and_then(|file| file.set_len(WORK_BYTES)).expect("a disk");
    let made = Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&work).status().expect("mkfs.ext4");
    assert!(made.success(), "mkfs.ext4: {made}");
    let began = Instant::now();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-M", "q35", "-accel", "tcg", "-cpu", "Nehalem,+svm", "-smp", "2", "-m", "768M"])
        .arg("-kernel")
        .arg(host.join("vmlinuz"))
        .arg("-initrd")
        .arg(host.join("initramfs.img"))
        .arg("-append")
        .arg(format!(
            "console=ttyS0 quiet loglevel=3 mitigations=off tsc=reliable no_timer_check reboot=t panic=-1 \
             random.trust_cpu=on wrenn.bytes={bytes}"
        ))
        .args(["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"])
        .args(drive("program", &program, "on"))
        .args(drive("work", &work, "off"))
        .args(["-device", "virtio-serial-pci", "-chardev"])
        .arg(format!("file,id=results,path={}", results.display()))
        .args(["-device", "virtserialport,chardev=results", "-serial"])
        .arg(format!("file:{}", console.display()))
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-system-x86_64");
    let ended = loop {
        if let Some(status) = qemu.try_wait().expect("waited") {
            break Some(status);
        }
        if began.elapsed() > PATIENCE {
            qemu.kill().and_then(|()| qemu.wait()).expect("killed");
            break None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let text = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let results = text(&results);
    println!("{results}the test host ended after {} ms: {ended:?}", began.elapsed().as_millis());
    assert!(
        results.lines().any(|line| line == "test host: exit status 0"),
        "the cases failed, see above; the console says:\n{}",
        text(&console)
    );
}

fn drive(name: &str, path: &Path, read_only: &str) -> [String; 4] {
    let path = path.display();
    [
        "-drive".into(),
        format!("if=none,id={name},file={path},format=raw,read-only={read_only},cache=unsafe"),
        "-device".into(),
        format!("virtio-blk-pci,drive={name}"),
    ]
}

/// A disk has whole sectors. Gives back how many bytes count.
fn copy_whole_sectors(from: &Path, to: &Path) -> u64 {
    let bytes = fs::copy(from, to).expect("copied");
    let file = File::options().write(true).open(to).expect("opened");
    file.set_len(bytes.next_multiple_of(4096)).expect("sized");
    bytes
}
