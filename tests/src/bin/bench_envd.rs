//! envd's part of `make bench`: the released program alone, over loopback, each figure beside a floor of
//! the same run.
//!
//! - exec of `/bin/true` beside fork and exec by this program;
//! - a keystroke's echo by a terminal;
//! - a file read and written beside a bare copy through a socket;
//! - memory idle and with a thousand processes, threads;
//! - a thousand streams of output at once, none of which loses a byte.
//!
//! `bench-envd PART...` runs only some of `execs`, `keys`, `files`, `processes` and `streams`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use wire::auth::{ITERATIONS, Verifier, hmac_sha256};
use wire::client::{Client, Identity, Incoming};
use wire::message::{
    CHANNEL_FILE, CHANNEL_STDOUT, CHANNEL_TERMINAL, Done, FileEntry, FileRead, FileRemove, FileWrite,
    Message, ProcessExited, ProcessStart, ProcessStarted,
};
use wire::session::StreamId;
use wrenn_tests::process::{Pid, random_hex};
use wrenn_tests::stack::project_root;
use wrenn_tests::{Context, Failure, Result, percentile};

const EXECS: usize = 1000;
const KEYS: usize = 1000;
const FILE_BYTES: usize = 256 << 20;
const PROCESSES: usize = 1000;
/// Connections that share the output streams: envd takes eight at once that have not proven who they are.
const CONNECTIONS: usize = 5;
const STREAM_BYTES: usize = 9_000;
const TIMEOUT: Duration = Duration::from_secs(60);

/// envd on loopback; ended when dropped.
struct Envd {
    child: Child,
    address: String,
    secret: String,
    verifier: PathBuf,
}

impl Envd {
    fn start() -> Result<Envd> {
        let secret = random_hex(16)?;
        let verifier = std::env::temp_dir().join(format!("wrenn-bench-envd-{}", std::process::id()));
        let text = Verifier::new(secret.as_bytes(), &[7; 16], ITERATIONS).to_text();
        wrenn_tests::process::write_secret(&verifier, &text)?;
        let program = project_root().join("builds/envd");
        let mut child = Command::new(&program)
            .args(["--listen", "127.0.0.1:0", "--verifier-file"])
            .arg(&verifier)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context(format!("{}: run `make build` first", program.display()))?;
        let mut line = String::new();
        let mut stderr = BufReader::new(child.stderr.take().ok_or("envd's stderr")?);
        stderr.read_line(&mut line).context("envd's first line")?;
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        let address = line.trim().rsplit(' ').next().unwrap_or_default().to_string();
        Ok(Envd { child, address, secret, verifier })
    }

    fn client(&self) -> Result<Client> {
        let identity = Identity { name: "agent", secret: self.secret.as_bytes(), program: "bench" };
        Client::connect(&self.address, identity, TIMEOUT).map_err(failed)
    }

    fn status(&self, name: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).context("status")?;
        let line = status.lines().find(|l| l.starts_with(name)).ok_or("a field of status")?;
        line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).ok_or_else(|| "a number".into())
    }

    /// Processor time that it has used, in user and in kernel mode: fields 14 and 15 of `/proc/PID/stat`
    /// (proc(5)), in hundredths of a second.
    fn busy(&self) -> Result<(Duration, Duration)> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).context("stat")?;
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let mut ticks = fields.split_whitespace().skip(11).filter_map(|f| f.parse::<u64>().ok());
        match (ticks.next(), ticks.next()) {
            (Some(user), Some(system)) => {
                Ok((Duration::from_millis(user * 10), Duration::from_millis(system * 10)))
            }
            _ => Err("processor time in stat".into()),
        }
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::of) {
            pid.signal(libc::SIGTERM);
        }
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.verifier);
    }
}

fn failed(error: impl std::fmt::Display) -> Failure {
    Failure(error.to_string())
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<()> {
    let envd = Envd::start()?;
    let mut client = envd.client()?;
    println!("envd, {} threads, idle    {:8} KB resident", envd.status("Threads")?, envd.status("VmRSS")?);
    let parts: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    if wanted("execs") {
        execs(&mut client)?;
    }
    if wanted("keys") {
        keys(&mut client)?;
    }
    if wanted("files") {
        files(&envd, &mut client)?;
    }
    if wanted("processes") {
        processes(&envd, &mut client)?;
    }
    if wanted("streams") {
        streams(&envd)?;
    }
    Ok(())
}

fn percentile_us(samples: &mut [Duration], part: f64) -> f64 {
    percentile(samples, part).as_secs_f64() * 1e6
}

fn command(argv: &[&str]) -> ProcessStart {
    ProcessStart { argv: argv.iter().map(|a| a.as_bytes().into()).collect(), ..ProcessStart::default() }
}

/// Reads a stream to its end: bytes of a channel, and the last message's number.
fn drain(client: &mut Client, stream: StreamId, wanted: u8) -> Result<(usize, u16)> {
    let (mut bytes_seen, mut last) = (0, 0);
    loop {
        match client.next(stream).map_err(failed)? {
            Incoming::Data { channel, bytes } if channel == wanted => bytes_seen += bytes.len(),
            Incoming::Data { .. } => {}
            Incoming::Message { kind, .. } => last = kind,
            Incoming::Finished => return Ok((bytes_seen, last)),
        }
    }
}

fn execs(client: &mut Client) -> Result<()> {
    let (mut ours, mut floor) = (Vec::new(), Vec::new());
    for _ in 0..EXECS {
        let start = Instant::now();
        let stream = client.open(&command(&["/bin/true"]), true).map_err(failed)?;
        drain(client, stream, CHANNEL_STDOUT)?;
        ours.push(start.elapsed());
        let start = Instant::now();
        Command::new("/bin/true").status().context("/bin/true")?;
        floor.push(start.elapsed());
    }
    let rate = EXECS as f64 / ours.iter().sum::<Duration>().as_secs_f64();
    for part in [0.5, 0.99] {
        let (a, b) = (percentile_us(&mut ours, part), percentile_us(&mut floor, part));
        println!(
            "exec p{:<2.0}                  {a:8.0} us, bare fork and exec {b:.0} us, ratio {:.2}",
            part * 100.0,
            a / b
        );
    }
    println!("starts                    {rate:8.0} a second, one after another");
    Ok(())
}

fn keys(client: &mut Client) -> Result<()> {
    let start =
        ProcessStart { stdin: true, terminal_columns: 80, terminal_rows: 24, ..command(&["/bin/cat"]) };
    let stream = client.open(&start, false).map_err(failed)?;
    client.next_message::<ProcessStarted>(stream).map_err(failed)?;
    let mut echoes = Vec::new();
    for _ in 0..KEYS {
        let start = Instant::now();
        client.send_data(stream, CHANNEL_TERMINAL, b"x").map_err(failed)?;
        match client.next(stream).map_err(failed)? {
            Incoming::Data { channel: CHANNEL_TERMINAL, .. } => echoes.push(start.elapsed()),
            other => return Err(Failure(format!("{other:?} in place of an echo"))),
        }
    }
    client.cancel(stream, "measured").map_err(failed)?;
    let (p50, p99) = (percentile_us(&mut echoes, 0.5), percentile_us(&mut echoes, 0.99));
    println!("terminal echo             {p50:8.0} us p50, {p99:.0} us p99");
    Ok(())
}

/// Bytes a second through a socket, with nothing but copying.
fn bare_copy(content: &[u8]) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listen")?;
    let address = listener.local_addr().context("listen")?;
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let (mut socket, _) = listener.accept()?;
            let mut block = vec![0; 64 * 1024];
            let mut total = 0;
            loop {
                match socket.read(&mut block)? {
                    0 => return Ok::<usize, std::io::Error>(total),
                    n => total += n,
                }
            }
        });
        let start = Instant::now();
        let mut socket = TcpStream::connect(address).context("connect")?;
        socket.write_all(content).context("write")?;
        drop(socket);
        let total = reader.join().map_err(|_| "the reader panicked")?.context("read")?;
        Ok(total as f64 / start.elapsed().as_secs_f64())
    })
}

/// Bytes a second of what the protocol asks for each frame at either end: its MAC.
fn bare_mac(content: &[u8]) -> f64 {
    let start = Instant::now();
    for frame in content.chunks(wire::session::MAX_DATA) {
        std::hint::black_box(hmac_sha256(&[7; 32], &[frame]));
    }
    content.len() as f64 / start.elapsed().as_secs_f64()
}

/// Bytes a second written to a file and brought to the disk.
fn bare_write(path: &Path, content: &[u8]) -> Result<f64> {
    let start = Instant::now();
    let mut file = fs::File::create(path).context(path.display())?;
    for piece in content.chunks(wire::session::MAX_DATA) {
        file.write_all(piece).context(path.display())?;
    }
    file.sync_all().context(path.display())?;
    let rate = content.len() as f64 / start.elapsed().as_secs_f64();
    fs::remove_file(path).context(path.display())?;
    Ok(rate)
}

fn files(envd: &Envd, client: &mut Client) -> Result<()> {
    let content = vec![0x5a; FILE_BYTES];
    let path = std::env::temp_dir().join(format!("wrenn-bench-file-{}", std::process::id()));
    let disk = bare_write(&path, &content)? / 1e6;
    let floor = bare_copy(&content)? / 1e6;
    println!("a MAC for each frame      {:8.0} MB/s, at either end", bare_mac(&content) / 1e6);
    let name = path.as_os_str().as_encoded_bytes();
    let user = "root".to_string();
    let idle = envd.busy()?;
    let start = Instant::now();
    let write = FileWrite { path: name.into(), user: user.clone(), mode: 0o600 };
    let stream = client.open(&write, false).map_err(failed)?;
    client.send_data(stream, CHANNEL_FILE, &content).map_err(failed)?;
    client.finish(stream).map_err(failed)?;
    client.next_message::<FileEntry>(stream).map_err(failed)?;
    let written = FILE_BYTES as f64 / 1e6 / start.elapsed().as_secs_f64();
    let wrote = envd.busy()?;
    let start = Instant::now();
    let request = FileRead { path: name.into(), user: user.clone(), ..FileRead::default() };
    let stream = client.open(&request, true).map_err(failed)?;
    let (bytes, last) = drain(client, stream, CHANNEL_FILE)?;
    let back = FILE_BYTES as f64 / 1e6 / start.elapsed().as_secs_f64();
    let read = envd.busy()?;
    let remove = FileRemove { path: name.into(), user };
    client.request::<_, Done>(&remove).map_err(failed)?;
    if bytes != FILE_BYTES || last != Done::KIND {
        return Err(Failure(format!("{bytes} bytes came back, then {last:#06x}")));
    }
    // Of its own time it is told apart from what the machine does besides.
    let time = |of: (Duration, Duration), after: (Duration, Duration)| {
        let share = |a: Duration, b: Duration| (b - a).as_secs_f64() * 1e9 / FILE_BYTES as f64;
        format!("envd {:.2} + {:.2} ns a byte (user + system)", share(of.0, after.0), share(of.1, after.1))
    };
    println!(
        "file write, fsync too     {written:8.0} MB/s, bare write and fsync {disk:.0}, ratio {:.2}; bare socket \
         copy {floor:.0}, ratio {:.2}; {}",
        written / disk,
        written / floor,
        time(idle, wrote)
    );
    println!(
        "file read                 {back:8.0} MB/s, bare socket copy {floor:.0}, ratio {:.2}; {}",
        back / floor,
        time(wrote, read)
    );
    Ok(())
}

fn processes(envd: &Envd, client: &mut Client) -> Result<()> {
    let mut running = Vec::new();
    for _ in 0..PROCESSES {
        let stream = client.open(&command(&["/bin/sleep", "600"]), true).map_err(failed)?;
        client.next_message::<ProcessStarted>(stream).map_err(failed)?;
        running.push(stream);
    }
    println!("envd with {PROCESSES} processes {:8} KB resident", envd.status("VmRSS")?);
    for stream in running {
        client.cancel(stream, "measured").map_err(failed)?;
    }
    Ok(())
}

/// All streams run at once; each connection's unread output fits its window, since it is read stream by
/// stream.
fn streams(envd: &Envd) -> Result<()> {
    let start = Instant::now();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(|| streams_of_one(envd))).collect();
        for reader in readers {
            reader.join().map_err(|_| "a reader panicked")??;
        }
        Ok::<(), Failure>(())
    })?;
    println!(
        "{PROCESSES} output streams       {:8.1} s at once, {} MB, no byte lost",
        start.elapsed().as_secs_f64(),
        PROCESSES * STREAM_BYTES / 1_000_000
    );
    Ok(())
}

fn streams_of_one(envd: &Envd) -> Result<()> {
    let mut client = envd.client()?;
    let bytes = STREAM_BYTES.to_string();
    let head = command(&["/usr/bin/head", "-c", &bytes, "/dev/zero"]);
    let mut open = Vec::new();
    for _ in 0..PROCESSES / CONNECTIONS {
        open.push(client.open(&head, true).map_err(failed)?);
    }
    for stream in open {
        let (got, last) = drain(&mut client, stream, CHANNEL_STDOUT)?;
        if got != STREAM_BYTES || last != ProcessExited::KIND {
            return Err(Failure(format!("{got} of {STREAM_BYTES} bytes on a stream, then {last:#06x}")));
        }
    }
    Ok(())
}
