//! The jailer's double: takes the arguments that the jailer takes, makes the same root and leaves the same
//! rights. It stays outside of the root, for which Firecracker's double, linked with the system's libraries,
//! is not made; so names that are not relative to the root are not found either way.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const OPTIONS: [&str; 6] = ["--id", "--exec-file", "--uid", "--gid", "--chroot-base-dir", "--netns"];

pub fn main(arguments: &[String]) -> ExitCode {
    if arguments == ["--version"] {
        println!("Jailer v{}\n", super::double::version());
        return ExitCode::SUCCESS;
    }
    let error = jail(arguments).expect_err("returns only when it fails");
    eprintln!("jailer: {error}");
    ExitCode::FAILURE
}

fn jail(arguments: &[String]) -> Result<(), String> {
    let end =
        arguments.iter().position(|a| a == "--").ok_or("no `--`: Firecracker would get no arguments")?;
    let mut given: HashMap<&str, &str> = HashMap::new();
    for pair in arguments[..end].chunks(2) {
        let [option, value] = pair else { return Err(format!("{pair:?} has no value")) };
        if !OPTIONS.contains(&option.as_str()) || given.insert(option, value).is_some() {
            return Err(format!("found argument {option} which wasn't expected, or twice"));
        }
    }
    let value = |option| given.get(option).copied().ok_or(format!("{option} is missing"));
    let id = value("--id")?;
    if id.is_empty() || id.len() > 64 || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return Err(format!("invalid instance id: {id}"));
    }
    let number = |option| value(option)?.parse::<u32>().map_err(|e| format!("{option}: {e}"));
    let (uid, gid) = (number("--uid")?, number("--gid")?);
    if uid == 0 || gid == 0 {
        return Err("this would run as root".into());
    }
    let program = fs::canonicalize(value("--exec-file")?).map_err(|e| format!("--exec-file: {e}"))?;
    let name = program.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if !name.contains("firecracker") {
        return Err(format!("the filename {name} must contain \"firecracker\""));
    }
    let base =
        fs::canonicalize(value("--chroot-base-dir")?).map_err(|e| format!("--chroot-base-dir: {e}"))?;
    let root = base.join(name).join(id).join("root");
    let failed = |what: &'static str| move |e: std::io::Error| format!("{what}: {e}");
    fs::create_dir_all(&root).map_err(failed("the root"))?;
    fs::copy(&program, root.join(name)).map_err(failed("copying the program"))?;
    // What the double's version is read from.
    let _ = fs::copy(program.with_extension("version"), root.join(name).with_extension("version"));
    let namespace = fs::File::open(value("--netns")?).map_err(failed("--netns"))?;
    // SAFETY: setns takes its arguments by value.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
        return Err(format!("setns: {}", std::io::Error::last_os_error()));
    }
    std::env::set_current_dir(&root).map_err(failed("entering the root"))?;
    make_devices(uid, gid).map_err(failed("the devices"))?;
    for directory in [Path::new("."), Path::new("run")] {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed("a directory"))?;
        chown(directory, Some(uid), Some(gid)).map_err(failed("chown"))?;
    }
    let mut command = Command::new(PathBuf::from(".").join(name));
    command.arg0(name).arg("--id").arg(id).args(["--start-time-us", "1", "--start-time-cpu-us", "1"]);
    command.args(&arguments[end + 1..]).env_clear().uid(uid).gid(gid);
    Err(format!("exec: {}", command.exec()))
}

fn make_devices(uid: u32, gid: u32) -> std::io::Result<()> {
    fs::create_dir_all("dev/net")?;
    for (name, major, minor) in [("dev/net/tun", 10, 200), ("dev/kvm", 10, 232), ("dev/urandom", 1, 9)] {
        let path = CString::new(name)?;
        // SAFETY: `path` is NUL-terminated and outlives the call.
        let made = unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(major, minor)) };
        if made != 0 {
            return Err(std::io::Error::last_os_error());
        }
        chown(name, Some(uid), Some(gid))?;
    }
    chown("dev", Some(uid), Some(gid))?;
    chown("dev/net", Some(uid), Some(gid))
}
