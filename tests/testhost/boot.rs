//! Boots the test host, a virtual machine in QEMU, with a disk of what it is to run; for the agent's tests and the
//! benchmarks, which are programs that run again in there.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// An AMD processor, whose virtualization QEMU can translate, and no more than it can.
const CPU: &str = "EPYC,+svm,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save,\
                   -xsavec";

/// Set in the test host: a directory on the disk that it got.
pub const INSIDE: &str = "WRENN_TEST_HOST_WORK";

/// One processor: where the kernel changes code that another one runs (static keys, at the first control group or
/// the first machine of KVM), the other may go on with a stale translation of it for ever.
const CPUS: &str = "1";

/// What the test host gets and does.
pub struct Contents<'a> {
    /// Where `tests/testhost/build.sh` has put it.
    pub host: &'a Path,
    /// What becomes `/testhost` there: the path in it, and the file that it is a copy of. `program` is run.
    pub files: Vec<(String, PathBuf)>,
    /// What the program is told, in place of what tests are, a line each; it runs only once then.
    pub arguments: &'a [&'a str],
    /// Its memory, in MiB.
    pub memory_mib: u32,
    /// The file system on which the program works: this, in bytes, and what is put there for it.
    pub work_bytes: u64,
    /// How long all of it may take.
    pub patience: Duration,
}

/// What it did.
pub struct Outcome {
    /// What the program printed.
    pub results: String,
    /// What the kernel and the VMs in it said.
    pub console: String,
}

impl Outcome {
    /// Whether the program ended well in this half.
    pub fn is_good(&self, half: &str) -> bool {
        let wanted = format!("test host, {half}: exit status 0");
        self.results.lines().any(|line| line == wanted)
    }
}

/// A directory that goes when this is dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Boots it and waits for its end.
pub fn run(contents: &Contents<'_>) -> Outcome {
    let scratch = Scratch(std::env::temp_dir().join(format!("wrenn-test-host-{}", std::process::id())));
    fs::create_dir(&scratch.0).expect("a directory");
    let [tree, work, results, console] =
        ["tree", "work", "results", "console"].map(|name| scratch.0.join(name));
    let mut bytes = contents.work_bytes;
    for (to, from) in &contents.files {
        let to = tree.join(to);
        fs::create_dir_all(to.parent().expect("in the tree")).expect("a directory");
        if fs::hard_link(from, &to).is_err() {
            fs::copy(from, &to).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
        }
        bytes += to.metadata().expect("placed").len();
    }
    if !contents.arguments.is_empty() {
        fs::write(tree.join("arguments"), contents.arguments.join("\n")).expect("written");
    }
    File::create(&work).and_then(|file| file.set_len(bytes)).expect("a disk");
    let made = Command::new("mkfs.ext4").args(["-q", "-m", "0", "-d"]).args([&tree, &work]).status();
    assert!(made.as_ref().is_ok_and(|status| status.success()), "mkfs.ext4: {made:?}");
    let began = Instant::now();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args([
            "-M",
            "q35",
            "-accel",
            "tcg",
            "-cpu",
            CPU,
            "-smp",
            CPUS,
            "-m",
            &format!("{}M", contents.memory_mib),
        ])
        .arg("-kernel")
        .arg(contents.host.join("vmlinuz"))
        .arg("-initrd")
        .arg(contents.host.join("initramfs.img"))
        .arg("-append")
        .arg(
            "console=ttyS0 quiet loglevel=5 mitigations=off tsc=reliable no_timer_check reboot=t panic=-1 \
             random.trust_cpu=on",
        )
        .args(["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"])
        .args(drive("root", &contents.host.join("root.ext4"), "on"))
        .args(drive("work", &work, "off"))
        .args(["-device", "virtio-serial-pci", "-chardev"])
        .arg(format!("file,id=results,path={}", results.display()))
        .args(["-device", "virtserialport,chardev=results", "-serial"])
        .arg(format!("file:{}", console.display()))
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-system-x86_64");
    while qemu.try_wait().expect("waited").is_none() {
        if began.elapsed() > contents.patience {
            qemu.kill().and_then(|()| qemu.wait()).expect("killed");
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let text = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
    let took = format!("the test host ended after {} ms\n", began.elapsed().as_millis());
    Outcome { results: text(&results) + &took, console: text(&console) }
}

/// Firecracker and its jailer, `None` where there is none.
pub fn firecracker() -> Option<(PathBuf, PathBuf)> {
    let on_path = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
    };
    let firecracker = std::env::var_os("WRENN_FIRECRACKER_BIN").map(PathBuf::from);
    let firecracker = firecracker.or_else(|| on_path("firecracker"))?;
    let beside = firecracker.with_file_name("jailer");
    let jailer = if beside.is_file() { Some(beside) } else { on_path("jailer") };
    let jailer = jailer.unwrap_or_else(|| panic!("no jailer beside {}", firecracker.display()));
    Some((firecracker, jailer))
}

/// The kernels and the image of `guest`, as files of `/testhost/guest`.
pub fn guest_files(guest: &Path) -> Vec<(String, PathBuf)> {
    let image = "images/minimal/rootfs.ext4";
    let mut files = vec![(format!("guest/{image}"), guest.join(image))];
    for entry in fs::read_dir(guest.join("kernels")).expect("kernels").flatten() {
        files.push((format!("guest/kernels/{}", entry.file_name().display()), entry.path()));
    }
    files
}

/// With `snapshot`, what is written goes with the machine.
fn drive(name: &str, path: &Path, snapshot: &str) -> [String; 4] {
    let path = path.display();
    [
        "-drive".into(),
        format!("if=none,id={name},file={path},format=raw,snapshot={snapshot},cache=unsafe"),
        "-device".into(),
        format!("virtio-blk-pci,drive={name}"),
    ]
}
