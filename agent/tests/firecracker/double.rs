//! Firecracker's double: listens on the API socket, takes every request apart by the shapes of the API's
//! description, and wants the order that Firecracker wants. What it does not take it refuses as Firecracker
//! does: status 400 and a `fault_message`. Where Firecracker would open a file, it does, with its own rights.

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// The version that it says it is of, unless a file beside it says another.
const VERSION: &str = "1.16.1";
/// What the state of its devices begins with.
const STATE_MAGIC: &str = "state of the double, ";
/// The size of a page of memory.
pub const PAGE: u64 = 4_096;

pub fn version() -> String {
    let file = std::env::current_exe().unwrap_or_default().with_file_name("firecracker.version");
    fs::read_to_string(file).map_or(VERSION.into(), |text| text.trim().to_owned())
}

pub fn main(arguments: &[String]) -> ExitCode {
    if arguments == ["--version"] {
        println!("Firecracker v{}\n\nSupported snapshot data format versions: v8.0.0", version());
        return ExitCode::SUCCESS;
    }
    let mut socket = None;
    let mut at = arguments.iter();
    while let Some(argument) = at.next() {
        match argument.as_str() {
            "--enable-pci" => {}
            "--id" | "--start-time-us" | "--start-time-cpu-us" => drop(at.next()),
            "--api-sock" => socket = at.next(),
            other => {
                eprintln!("Arguments parsing error: Found argument '{other}' which wasn't expected");
                return ExitCode::from(153);
            }
        }
    }
    let Some(socket) = socket else { return ExitCode::from(153) };
    println!("the guest's serial port begins");
    let listener = UnixListener::bind(socket).expect("the API's socket");
    let mut machine = Machine::default();
    for stream in listener.incoming().flatten() {
        machine.serve(stream);
    }
    ExitCode::SUCCESS
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    NotStarted,
    Running,
    Paused,
}

#[derive(Default)]
struct Machine {
    state: State,
    /// The paths that were put before the start, the logger excepted.
    configured: BTreeSet<String>,
    memory_mib: u64,
    has_log: bool,
    has_metadata_service: bool,
    tracks_changes: bool,
    /// Held as long as it runs.
    tap: Option<File>,
    /// The guest's memory, what fills each of its first pages: one is written each time that it is let run.
    pages: Vec<u8>,
    /// Pages that were written since changes are counted.
    changed: BTreeSet<usize>,
}

/// What a field must be.
#[derive(Clone, Copy)]
enum Is {
    Text,
    OneOf(&'static [&'static str]),
    Number(u64, u64),
    Flag,
    Texts,
    Object(Shape),
}

/// Fields: the name, whether it is required, and what it must be.
type Shape = &'static [(&'static str, bool, Is)];

const BACKEND: Shape =
    &[("backend_type", true, Is::OneOf(&["File", "Uffd"])), ("backend_path", true, Is::Text)];

const BUCKET: Shape = &[
    ("size", true, Is::Number(0, i64::MAX as u64)),
    ("refill_time", true, Is::Number(0, i64::MAX as u64)),
    ("one_time_burst", false, Is::Number(0, i64::MAX as u64)),
];
const RATE_LIMITER: Shape = &[("bandwidth", false, Is::Object(BUCKET)), ("ops", false, Is::Object(BUCKET))];

/// The bodies that the description has, for the requests that the driver makes.
const SHAPES: [(&str, &str, Shape); 15] = [
    ("PUT", "/metrics", &[("metrics_path", true, Is::Text)]),
    (
        "PUT",
        "/logger",
        &[
            ("log_path", false, Is::Text),
            ("level", false, Is::OneOf(&["Error", "Warning", "Info", "Debug", "Trace", "Off"])),
            ("show_level", false, Is::Flag),
            ("show_log_origin", false, Is::Flag),
            ("module", false, Is::Text),
        ],
    ),
    (
        "PUT",
        "/machine-config",
        &[
            ("vcpu_count", true, Is::Number(1, 32)),
            ("mem_size_mib", true, Is::Number(1, 1 << 20)),
            ("smt", false, Is::Flag),
            ("track_dirty_pages", false, Is::Flag),
            ("cpu_template", false, Is::Text),
            ("huge_pages", false, Is::OneOf(&["None", "Transparent", "2M"])),
        ],
    ),
    (
        "PUT",
        "/boot-source",
        &[
            ("kernel_image_path", true, Is::Text),
            ("boot_args", false, Is::Text),
            ("initrd_path", false, Is::Text),
        ],
    ),
    (
        "PUT",
        "/drives/",
        &[
            ("drive_id", true, Is::Text),
            ("is_root_device", true, Is::Flag),
            ("path_on_host", false, Is::Text),
            ("is_read_only", false, Is::Flag),
            ("partuuid", false, Is::Text),
            ("cache_type", false, Is::OneOf(&["Unsafe", "Writeback"])),
            ("io_engine", false, Is::OneOf(&["Sync", "Async"])),
            ("rate_limiter", false, Is::Object(RATE_LIMITER)),
        ],
    ),
    (
        "PATCH",
        "/drives/",
        &[
            ("drive_id", true, Is::Text),
            ("path_on_host", false, Is::Text),
            ("rate_limiter", false, Is::Object(RATE_LIMITER)),
        ],
    ),
    (
        "PUT",
        "/network-interfaces/",
        &[
            ("iface_id", true, Is::Text),
            ("host_dev_name", true, Is::Text),
            ("guest_mac", false, Is::Text),
            ("mtu", false, Is::Number(68, 65_535)),
        ],
    ),
    (
        "PUT",
        "/mmds/config",
        &[
            ("network_interfaces", true, Is::Texts),
            ("version", false, Is::OneOf(&["V1", "V2"])),
            ("ipv4_address", false, Is::Text),
            ("imds_compat", false, Is::Flag),
        ],
    ),
    ("PUT", "/entropy", &[]),
    (
        "PUT",
        "/balloon",
        &[
            ("amount_mib", true, Is::Number(0, 1 << 20)),
            ("deflate_on_oom", true, Is::Flag),
            ("stats_polling_interval_s", false, Is::Number(0, 65_535)),
            ("free_page_hinting", false, Is::Flag),
            ("free_page_reporting", false, Is::Flag),
        ],
    ),
    ("PUT", "/actions", &[("action_type", true, Is::OneOf(&["InstanceStart", "FlushMetrics"]))]),
    (
        "PUT",
        "/snapshot/load",
        &[
            ("snapshot_path", true, Is::Text),
            ("mem_backend", true, Is::Object(BACKEND)),
            ("track_dirty_pages", false, Is::Flag),
            ("resume_vm", false, Is::Flag),
            ("clock_realtime", false, Is::Flag),
        ],
    ),
    (
        "PUT",
        "/snapshot/create",
        &[
            ("snapshot_path", true, Is::Text),
            ("mem_file_path", true, Is::Text),
            ("snapshot_type", false, Is::OneOf(&["Full", "Diff"])),
        ],
    ),
    ("PATCH", "/vm", &[("state", true, Is::OneOf(&["Paused", "Resumed"]))]),
    ("PUT", "/mmds", &[]),
];

fn check(shape: Shape, body: &Value) -> Result<(), String> {
    let fields = body.as_object().ok_or("the body is no object")?;
    if let Some(unknown) = fields.keys().find(|k| shape.iter().all(|(name, ..)| name != k)) {
        return Err(format!("unknown field `{unknown}`"));
    }
    for (name, required, is) in shape {
        let Some(value) = fields.get(*name) else {
            if *required {
                return Err(format!("missing field `{name}`"));
            }
            continue;
        };
        let ok = match is {
            Is::Text => value.as_str().is_some_and(|text| !text.is_empty()),
            Is::OneOf(words) => value.as_str().is_some_and(|word| words.contains(&word)),
            Is::Number(min, max) => value.as_u64().is_some_and(|n| (min..=max).contains(&&n)),
            Is::Flag => value.is_boolean(),
            Is::Texts => {
                value.as_array().is_some_and(|all| !all.is_empty() && all.iter().all(Value::is_string))
            }
            Is::Object(shape) => return check(shape, value),
        };
        if !ok {
            return Err(format!("`{name}` cannot be {value}"));
        }
    }
    Ok(())
}

impl Machine {
    fn serve(&mut self, mut stream: UnixStream) {
        let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
        let Some((method, path, body)) = read_request(&mut stream) else { return };
        let answer = match self.take(&method, &path, &body) {
            Ok(()) => "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n".to_owned(),
            Err(why) => {
                self.log(&format!("[anonymous-instance:ERROR] {method} {path}: {why}"));
                let fault = json!({"fault_message": why}).to_string();
                format!(
                    "HTTP/1.1 400 \r\nServer: Firecracker API\r\nContent-Type: application/json\r\n\
                     Content-Length: {}\r\n\r\n{fault}",
                    fault.len()
                )
            }
        };
        let _ = stream.write_all(answer.as_bytes());
    }

    fn log(&self, line: &str) {
        if self.has_log
            && let Ok(mut log) = OpenOptions::new().append(true).open("log")
        {
            let _ = writeln!(log, "{line}");
        }
    }

    fn take(&mut self, method: &str, path: &str, body: &str) -> Result<(), String> {
        let body: Value = serde_json::from_str(body).map_err(|e| format!("the body is no JSON: {e}"))?;
        let known = SHAPES.iter().find(|(m, p, _)| {
            *m == method
                && if p.ends_with('/') { path.len() > p.len() && path.starts_with(p) } else { path == *p }
        });
        let (_, kind, shape) =
            known.ok_or(format!("Invalid request method and/or path: {method} {path}."))?;
        if *kind != "/mmds" {
            check(shape, &body)?;
        }
        let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
        let after_start = method == "PATCH" || *kind == "/snapshot/create";
        if !after_start && *kind != "/mmds" && self.state != State::NotStarted {
            return Err("The requested operation is not supported after starting the microVM.".into());
        }
        if after_start && self.state == State::NotStarted {
            return Err("The requested operation is not supported before starting the microVM.".into());
        }
        match *kind {
            "/logger" => {
                open(&text("log_path"), true)?;
                self.has_log = true;
                return Ok(());
            }
            "/metrics" => {
                let mut metrics = open(&text("metrics_path"), true)?;
                // What the tests look for: a line of a minute in which something went wrong.
                let line =
                    json!({"block_disk0": {"execute_fails": 2, "read_count": 9}, "vmm": {"panic_count": 0}});
                return writeln!(metrics, "{line}").map_err(|e| e.to_string());
            }
            "/machine-config" => {
                self.memory_mib = body["mem_size_mib"].as_u64().unwrap_or(0);
                self.tracks_changes = body["track_dirty_pages"] == true;
            }
            "/boot-source" => {
                open(&text("kernel_image_path"), false)?;
                if body["initrd_path"].is_string() {
                    open(&text("initrd_path"), false)?;
                }
            }
            "/drives/" => {
                if path != format!("/drives/{}", text("drive_id")) {
                    return Err("the id in the path is not the id in the body".into());
                }
                if method == "PATCH" && !self.configured.contains(path) {
                    return Err(format!("Invalid block device ID: {}", text("drive_id")));
                }
                if body["path_on_host"].is_string() {
                    open(&text("path_on_host"), body["is_read_only"] != true)?;
                }
                // What the guest would feel, for the tests to read.
                fs::write("limits", body["rate_limiter"].to_string()).map_err(|e| e.to_string())?;
            }
            "/network-interfaces/" => {
                if path != format!("/network-interfaces/{}", text("iface_id")) {
                    return Err("the id in the path is not the id in the body".into());
                }
                self.tap = Some(attach(&text("host_dev_name"))?);
            }
            "/mmds/config" => {
                for interface in body["network_interfaces"].as_array().into_iter().flatten() {
                    let path = format!("/network-interfaces/{}", interface.as_str().unwrap_or_default());
                    if !self.configured.contains(&path) {
                        return Err("The network interface for the MMDS does not exist.".into());
                    }
                }
                self.has_metadata_service = true;
            }
            "/mmds" => {
                if !self.has_metadata_service || !body.is_object() {
                    return Err("The MMDS is not configured, or the body is no object.".into());
                }
                // What the guest would get, for the tests to read.
                return fs::write("told", body.to_string()).map_err(|e| e.to_string());
            }
            "/actions" => return self.start(),
            "/snapshot/load" => return self.load(&body),
            "/snapshot/create" => return self.save(&body),
            "/vm" => {
                self.state = if body["state"] == "Paused" { State::Paused } else { self.run()? };
                return Ok(());
            }
            _ => {}
        }
        self.configured.insert(path.to_owned());
        Ok(())
    }

    fn start(&mut self) -> Result<(), String> {
        if !self.configured.contains("/boot-source") {
            return Err("Cannot start microvm without kernel configuration.".into());
        }
        if self.tap.is_none() || !self.configured.contains("/drives/disk0") {
            return Err("a guest of ours has a disk and a cable".into());
        }
        self.state = self.run()?;
        Ok(())
    }

    /// The guest runs, and changes a page.
    fn run(&mut self) -> Result<State, String> {
        self.changed.insert(self.pages.len());
        self.pages.push(self.pages.len() as u8 + 1);
        println!("turn {}", self.pages.len());
        Ok(State::Running)
    }

    fn load(&mut self, body: &Value) -> Result<(), String> {
        if !self.configured.is_empty() {
            return Err(
                "Loading a microVM snapshot not allowed after configuring boot-specific resources.".into()
            );
        }
        let memory = body["mem_backend"]["backend_path"].as_str().unwrap_or_default();
        let memory = open(memory, false)?;
        let state = fs::read_to_string(body["snapshot_path"].as_str().unwrap_or_default());
        let state = state.map_err(|e| format!("Cannot open the snapshot file: {e}"))?;
        let count = state.strip_prefix(STATE_MAGIC).and_then(|count| count.parse().ok());
        let count: usize = count.ok_or("Failed to deserialize the microVM state: invalid magic")?;
        self.memory_mib = memory.metadata().map_err(|e| e.to_string())?.len() >> 20;
        self.pages = vec![0; count];
        for (page, byte) in (0u64..).zip(self.pages.chunks_mut(1)) {
            memory.read_exact_at(byte, page * PAGE).map_err(|e| e.to_string())?;
        }
        self.tap = Some(attach("tap0")?);
        open("disk0", true)?;
        self.configured.insert("/drives/disk0".into());
        self.tracks_changes = body["track_dirty_pages"] == true;
        self.changed.clear();
        self.has_metadata_service = true;
        self.state = if body["resume_vm"] == true { self.run()? } else { State::Paused };
        Ok(())
    }

    fn save(&mut self, body: &Value) -> Result<(), String> {
        if self.state != State::Paused {
            return Err("Create snapshot error: the microVM is not paused".into());
        }
        let only_changes = body["snapshot_type"] == "Diff";
        if only_changes && !self.tracks_changes {
            return Err("Diff snapshots are not allowed on uVMs with dirty page tracking disabled.".into());
        }
        let failed = |e: std::io::Error| e.to_string();
        let path = body["mem_file_path"].as_str().unwrap_or_default();
        let memory =
            OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(failed)?;
        memory.set_len(self.memory_mib << 20).map_err(failed)?;
        for (index, byte) in self.pages.iter().enumerate() {
            if !only_changes || self.changed.contains(&index) {
                memory.write_all_at(&[*byte; PAGE as usize], index as u64 * PAGE).map_err(failed)?;
            }
        }
        // Whichever it was, changes are counted anew.
        self.changed.clear();
        let state = body["snapshot_path"].as_str().unwrap_or_default();
        fs::write(state, format!("{STATE_MAGIC}{}", self.pages.len())).map_err(failed)
    }
}

fn open(name: &str, writes: bool) -> Result<File, String> {
    // In the root that it would be shut in, every name is one of that root.
    if Path::new(name).components().count() != 1 || name.starts_with('/') {
        return Err(format!("{name} is not in the root"));
    }
    let opened = OpenOptions::new().read(true).write(writes).open(name);
    opened.map_err(|e| format!("Cannot open {name}: {e}"))
}

/// Opens a TAP device as Firecracker does, with the rights of this process.
fn attach(name: &str) -> Result<File, String> {
    let failed = |e: std::io::Error| format!("Open tap device failed: {e}");
    // In its root that is `/dev/net/tun`.
    let device = if Path::new("dev/net/tun").exists() { "dev/net/tun" } else { "/dev/net/tun" };
    let file = OpenOptions::new().read(true).write(true).open(device).map_err(failed)?;
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF, `_IOW('T', 202, int)`, reads and writes one ifreq, which `request` is.
    if unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, &raw mut request) } != 0 {
        return Err(failed(std::io::Error::last_os_error()));
    }
    Ok(file)
}

/// Method, path and body of a request, by hand: it is the other side's codec that is on trial.
fn read_request(stream: &mut UnixStream) -> Option<(String, String, String)> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 1_024];
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break end;
        }
        match stream.read(&mut chunk) {
            Ok(count) if count > 0 && bytes.len() < 51_200 => bytes.extend_from_slice(&chunk[..count]),
            _ => return None,
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).ok()?;
    let mut lines = head.split("\r\n");
    let mut words = lines.next()?.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    assert_eq!(words.next(), Some("HTTP/1.1"));
    let length = lines.find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let length: usize = length.unwrap_or(0);
    while bytes.len() < end + 4 + length {
        match stream.read(&mut chunk) {
            Ok(count) if count > 0 && bytes.len() < 51_200 => bytes.extend_from_slice(&chunk[..count]),
            _ => return None,
        }
    }
    Some((method, path, String::from_utf8(bytes[end + 4..end + 4 + length].to_vec()).ok()?))
}
