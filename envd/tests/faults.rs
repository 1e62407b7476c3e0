//! A real envd whose system calls are interrupted, cut short and refused: results are right, or the error
//! says what is the matter; nothing hangs, nothing is left, and once the trouble is over all is well.

mod common;

use common::inject::{Fault, Injector, Rule};
use common::{Client, Daemon, PATIENCE, command, shell};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use wire::codec::Bytes;
use wire::message::*;
use wire::session::{Event, Limits};

/// Content that shows any byte that is lost, doubled or moved.
fn content(bytes: usize) -> Vec<u8> {
    (0..bytes as u32).map(|n| (n ^ n >> 7 ^ n >> 15) as u8).collect()
}

/// What one stream gave.
#[derive(Debug, Default)]
struct Gave {
    data: Vec<u8>,
    messages: Vec<(u16, Vec<u8>)>,
}

/// Why something was not done.
#[derive(Debug)]
enum Trouble {
    /// envd said so.
    Told(Error),
    /// The stream, or the connection, was ended.
    Ended(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Trouble {
        Trouble::Told(error)
    }
}

/// Opens a stream, sends `input` on a channel, and takes everything until envd has ended its half.
fn converse<M: Message>(
    client: &mut Client,
    message: &M,
    input: Option<(u8, &[u8])>,
) -> Result<Gave, Trouble> {
    let stream = client.open(message, input.is_none());
    let (channel, mut left) = input.unwrap_or_default();
    let mut finished = input.is_none();
    let mut gave = Gave::default();
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "{} hangs; so far {:?}", M::NAME, gave.messages);
        if !left.is_empty() {
            // It may have been ended from the other side.
            let taken = client.session.send_data(stream, channel, left).unwrap_or(left.len());
            left = &left[taken..];
        } else if !finished {
            let _ = client.session.finish(stream);
            finished = true;
        }
        for (_, bytes) in client.take_data(stream) {
            gave.data.extend(bytes);
        }
        let of = |event: &Event| match event {
            Event::Message { stream: s, .. }
            | Event::Finished { stream: s }
            | Event::Reset { stream: s, .. } => *s == stream,
            Event::Closed { .. } => true,
            _ => false,
        };
        if !client.has(of) {
            client.turn(Duration::from_millis(20));
            continue;
        }
        match client.wait_for(of) {
            Event::Message { kind, body, cost, .. } => {
                client.session.release(stream, cost);
                if kind == Error::KIND {
                    return Err(Trouble::Told(Error::decode(&body).expect("an error")));
                }
                gave.messages.push((kind, body));
            }
            Event::Finished { .. } => return Ok(gave),
            Event::Reset { reason, .. } => return Err(Trouble::Ended(reason)),
            event => return Err(Trouble::Ended(format!("{event:?}"))),
        }
    }
}

/// The last message that a stream gave.
fn last<M: Message>(gave: &Gave) -> M {
    let (kind, body) = gave.messages.last().expect("a message");
    wire::message::expect(*kind, body).expect("the expected message")
}

fn run(
    client: &mut Client,
    start: &ProcessStart,
    input: Option<&[u8]>,
) -> Result<(Vec<u8>, ProcessExited), Trouble> {
    let gave = converse(client, start, input.map(|bytes| (CHANNEL_STDIN, bytes)))?;
    Ok((gave.data.clone(), last(&gave)))
}

/// A directory of the test's own, gone with it.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        let path = std::env::temp_dir().join(format!("envd-faults-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).expect("mkdir");
        Place(path)
    }

    fn path(&self, name: &str) -> Bytes {
        self.0.join(name).to_str().expect("utf-8").into()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

type Work = fn(&mut Client, &Place) -> Result<(), Trouble>;

fn through_cat(client: &mut Client, _: &Place) -> Result<(), Trouble> {
    let bytes = content(300_000);
    let start = ProcessStart { stdin: true, ..command(&["cat"]) };
    let (output, exit) = run(client, &start, Some(&bytes))?;
    assert!(output == bytes, "{} of {} bytes came back, or others", output.len(), bytes.len());
    assert_eq!((exit.exit_code, exit.signal), (0, 0));
    Ok(())
}

fn exit_code(client: &mut Client, _: &Place) -> Result<(), Trouble> {
    let (output, exit) = run(client, &shell("printf out; exit 3"), None)?;
    assert_eq!((output.as_slice(), exit.exit_code, exit.signal), (&b"out"[..], 3, 0));
    Ok(())
}

fn terminal(client: &mut Client, _: &Place) -> Result<(), Trouble> {
    let start = ProcessStart { terminal_columns: 80, terminal_rows: 24, ..shell("stty size") };
    let (output, exit) = run(client, &start, None)?;
    assert_eq!((output.as_slice(), exit.exit_code), (&b"24 80\r\n"[..], 0));
    Ok(())
}

fn no_such_program(client: &mut Client, _: &Place) -> Result<(), Trouble> {
    match run(client, &command(&["no-such-program"]), None) {
        Err(Trouble::Told(error)) if error.code() == Code::NotFound => Ok(()),
        Err(trouble) => Err(trouble),
        Ok(ran) => panic!("there is no such program: {ran:?}"),
    }
}

fn file(client: &mut Client, place: &Place) -> Result<(), Trouble> {
    let bytes = content(300_000);
    let (path, user) = (place.path("deep/down/file"), String::from("root"));
    // What an earlier attempt came to may be there, but nothing that it should have taken away.
    let halves = std::fs::read_dir(place.0.join("deep/down")).into_iter().flatten();
    assert!(halves.flatten().all(|e| e.file_name() == "file"), "an upload left something");
    let _ = std::fs::remove_dir_all(place.0.join("deep"));
    let write = FileWrite { path: path.clone(), user: user.clone(), mode: 0o640 };
    let written = converse(client, &write, Some((CHANNEL_FILE, &bytes)));
    let after = std::fs::read(place.0.join("deep/down/file")).ok();
    match written {
        Ok(gave) => assert_eq!(last::<FileEntry>(&gave).size, bytes.len() as u64),
        Err(trouble) => {
            // All or nothing; where only telling of it has failed, it is all.
            assert!(after.is_none() || after.as_ref() == Some(&bytes), "a file in between");
            return Err(trouble);
        }
    }
    assert!(after.as_ref() == Some(&bytes));
    let read = FileRead { path: path.clone(), user: user.clone(), ..FileRead::default() };
    let gave = converse(client, &read, None)?;
    assert!(gave.data == bytes, "{} of {} bytes were read, or others", gave.data.len(), bytes.len());
    let stat = FileStat { path: path.clone(), user: user.clone() };
    let entry: FileEntry = last(&converse(client, &stat, None)?);
    assert_eq!((entry.size, entry.owner.as_str()), (bytes.len() as u64, "root"));
    let list = FileList { path: place.path("deep"), user: user.clone(), depth: 2 };
    let gave = converse(client, &list, None)?;
    assert_eq!(gave.messages.len(), 3, "the directory, the file and the end");
    let moved = FileMove { from: path, to: place.path("deep/other"), user: user.clone() };
    converse(client, &moved, None)?;
    let remove = FileRemove { path: place.path("deep"), user };
    converse(client, &remove, None)?;
    assert!(!place.0.join("deep").exists());
    Ok(())
}

fn port(client: &mut Client, _: &Place) -> Result<(), Trouble> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = listener.local_addr().expect("address").port();
    listener.set_nonblocking(true).expect("non-blocking");
    let bytes = content(200_000);
    let echo = std::thread::spawn(move || {
        // Nobody may come at all.
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(_) if Instant::now() > deadline => return,
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        stream.set_nonblocking(false).expect("blocking");
        let mut got = Vec::new();
        let _ = stream.read_to_end(&mut got);
        let _ = stream.write_all(&got);
    });
    let gave = converse(client, &PortConnect { port }, Some((CHANNEL_PORT, &bytes)));
    if gave.is_ok() {
        echo.join().expect("the echo");
    }
    assert!(gave?.data == bytes, "other bytes came back");
    Ok(())
}

fn guest(client: &mut Client, _: &Place) -> Result<(), Trouble> {
    let figures: GuestMetricsReply = last(&converse(client, &GuestMetrics {}, None)?);
    assert!(figures.processors >= 1 && figures.memory_total_bytes > 0 && figures.disk_total_bytes > 0);
    let _: PortListReply = last(&converse(client, &PortList {}, None)?);
    let _: ProcessListReply = last(&converse(client, &ProcessList {}, None)?);
    Ok(())
}

const WORK: [(&str, Work); 7] = [
    ("through_cat", through_cat),
    ("exit_code", exit_code),
    ("terminal", terminal),
    ("no_such_program", no_such_program),
    ("file", file),
    ("port", port),
    ("guest", guest),
];

/// Fewer faults in one run prove nothing.
const MIN_FAULTS: usize = 5;

/// A connection, however often it takes: one for which envd has no descriptor is one that is tried again.
fn connect(daemon: &Daemon) -> Client {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut client = Client::dial(&daemon.address, "agent", common::SECRET, Limits::default());
        let event = client.wait_for(|e| matches!(e, Event::Ready { .. } | Event::Closed { .. }));
        if matches!(event, Event::Ready { .. }) {
            return client;
        }
        assert!(Instant::now() < deadline, "nobody is let in: {event:?}");
    }
}

/// Decides which calls are hit: the same ones in each run, unless the environment has another.
fn seed() -> u64 {
    std::env::var("ENVD_FAULT_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0x5eed)
}

/// Does all work under the rules, several times; `allowed` says which trouble may come of them. Then
/// without them, when everything has to work.
fn work_under(name: &str, rounds: u64, rules: &[Rule], allowed: fn(&Trouble) -> bool) {
    let daemon = Daemon::start();
    let place = Place::new(name);
    let mut client = connect(&daemon);
    // The least of a few looks: envd may be looking into its own figures.
    let files = (0..5).map(|_| daemon.open_files()).min().expect("five looks");
    let injector = Injector::attach(daemon.child.id(), seed());
    let (mut done, mut refused) = (0, 0);
    for _ in 0..rounds {
        for (what, work) in WORK {
            injector.set(rules);
            match work(&mut client, &place) {
                Ok(()) => done += 1,
                Err(trouble) if allowed(&trouble) => {
                    refused += 1;
                    if matches!(&trouble, Trouble::Ended(why) if why.contains("Closed")) {
                        client = connect(&daemon);
                    }
                }
                Err(trouble) => panic!("{what}: {trouble:?}"),
            }
            injector.set(&[]);
        }
    }
    let injected = injector.injected();
    eprintln!("{name}: {injected} faults, {done} done, {refused} refused");
    assert!(injected >= MIN_FAULTS, "only {injected} faults were injected");
    drop(injector);
    let _ = std::fs::remove_dir_all(place.0.join("deep"));
    for (what, work) in WORK {
        work(&mut client, &place).unwrap_or_else(|trouble| panic!("{what}, afterwards: {trouble:?}"));
    }
    assert_eq!(std::fs::read_dir(&place.0).expect("list").count(), 0, "files are left");
    daemon.wait_until_clean(files);
}

fn any(_: i32, _: [u64; 6]) -> bool {
    true
}

/// Whether a call's first argument is a descriptor of a file on a disk.
fn of_file(pid: i32, arguments: [u64; 6]) -> bool {
    let opened = std::fs::read_link(format!("/proc/{pid}/fd/{}", arguments[0]));
    opened.is_ok_and(|path| path.starts_with("/") && !path.starts_with("/dev"))
}

/// A read or write of content, rather than of one of the kernel's records, which come whole.
fn of_content(_: i32, arguments: [u64; 6]) -> bool {
    arguments[2] > 256
}

/// A read of what others send.
fn of_stream(pid: i32, arguments: [u64; 6]) -> bool {
    of_content(pid, arguments) && !of_file(pid, arguments)
}

/// A descriptor that is to be watched for the first time.
fn of_new_watch(_: i32, arguments: [u64; 6]) -> bool {
    arguments[1] == libc::EPOLL_CTL_ADD as u64
}

/// A file that is made if it is not there.
fn of_new_file(_: i32, arguments: [u64; 6]) -> bool {
    arguments[2] & libc::O_CREAT as u64 != 0
}

fn rule(call: i64, fault: Fault, one_in: u64) -> Rule {
    Rule { call, applies: any, fault, one_in }
}

#[test]
fn interrupted_calls_are_made_again() {
    let calls = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_pread64,
        libc::SYS_sendto,
        libc::SYS_openat,
        libc::SYS_accept4,
        libc::SYS_getrandom,
        libc::SYS_epoll_pwait,
        libc::SYS_fsync,
    ];
    let rules = calls.map(|call| rule(call, Fault::Errno(libc::EINTR), 3));
    work_under("interrupted", 3, &rules, |_| false);
}

#[test]
fn short_reads_and_writes_lose_nothing() {
    let rules = [libc::SYS_read, libc::SYS_write, libc::SYS_pread64, libc::SYS_sendto]
        .map(|call| Rule { applies: of_content, ..rule(call, Fault::Short, 2) });
    work_under("short", 3, &rules, |_| false);
}

#[test]
fn readiness_that_was_none_is_waited_for_again() {
    let rules = [
        Rule { applies: of_stream, ..rule(libc::SYS_read, Fault::Errno(libc::EAGAIN), 3) },
        rule(libc::SYS_sendto, Fault::Errno(libc::EAGAIN), 3),
        rule(libc::SYS_accept4, Fault::Errno(libc::EAGAIN), 2),
    ];
    work_under("again", 3, &rules, |_| false);
}

/// Trouble of which whoever asked is told, as the shortage that it is.
fn told_of_shortage(trouble: &Trouble) -> bool {
    match trouble {
        Trouble::Told(error) => error.code() == Code::ResourceExhausted && error.errno != 0,
        Trouble::Ended(_) => false,
    }
}

#[test]
fn a_shortage_of_descriptors_is_told_and_passes() {
    let calls = [libc::SYS_openat, libc::SYS_pipe2, libc::SYS_socket, libc::SYS_accept4, libc::SYS_fcntl];
    for errno in [libc::EMFILE, libc::ENFILE] {
        let rules = calls.map(|call| rule(call, Fault::Errno(errno), 12));
        work_under("descriptors", 8, &rules, told_of_shortage);
    }
}

#[test]
fn a_shortage_of_memory_is_told_and_passes() {
    let calls = [
        libc::SYS_openat,
        libc::SYS_pipe2,
        libc::SYS_socket,
        libc::SYS_clone,
        libc::SYS_newfstatat,
        libc::SYS_getdents64,
        libc::SYS_mkdirat,
        libc::SYS_fsync,
    ];
    let rules = calls.map(|call| rule(call, Fault::Errno(libc::ENOMEM), 10));
    work_under("memory", 8, &rules, told_of_shortage);
}

#[test]
fn what_cannot_be_watched_now_is_watched_later() {
    for errno in [libc::ENOMEM, libc::ENOSPC] {
        let add = Rule { applies: of_new_watch, ..rule(libc::SYS_epoll_ctl, Fault::Errno(errno), 2) };
        work_under("watched", 8, &[add], told_of_shortage);
    }
}

#[test]
fn a_full_disk_is_told_and_leaves_whole_files() {
    for errno in [libc::ENOSPC, libc::EDQUOT] {
        let rules = [
            Rule { applies: of_file, ..rule(libc::SYS_write, Fault::Errno(errno), 8) },
            Rule { applies: of_new_file, ..rule(libc::SYS_openat, Fault::Errno(errno), 2) },
            rule(libc::SYS_mkdirat, Fault::Errno(errno), 3),
            rule(libc::SYS_renameat2, Fault::Errno(errno), 3),
            rule(libc::SYS_fsync, Fault::Errno(errno), 3),
        ];
        work_under("disk", 12, &rules, told_of_shortage);
    }
}

/// More than one piece, and the rest more than what is waited for without a helper.
#[test]
fn without_helpers_large_content_is_brought_to_the_disk_all_the_same() {
    let daemon = Daemon::start();
    let place = Place::new("helpers");
    let mut client = connect(&daemon);
    let injector = Injector::attach(daemon.child.id(), seed());
    let bytes = content(20_000_000);
    let write = FileWrite { path: place.path("large"), user: "root".into(), mode: 0o600 };
    let no_helper = rule(libc::SYS_clone, Fault::Errno(libc::EAGAIN), 1);
    injector.set(&[no_helper]);
    let gave = converse(&mut client, &write, Some((CHANNEL_FILE, &bytes))).expect("written");
    assert_eq!(last::<FileEntry>(&gave).size, bytes.len() as u64);
    assert!(std::fs::read(place.0.join("large")).expect("there") == bytes);
    assert!(injector.injected() >= 3, "each piece and the end would have had a helper");
    // And when that fails, it is told, and the old file stays alone.
    injector.set(&[no_helper, rule(libc::SYS_fsync, Fault::Errno(libc::EIO), 1)]);
    match converse(&mut client, &write, Some((CHANNEL_FILE, &bytes[1..]))) {
        Err(Trouble::Told(error)) => assert_eq!(error.errno, libc::EIO as u32),
        other => panic!("{other:?}"),
    }
    injector.set(&[]);
    assert!(std::fs::read(place.0.join("large")).expect("there") == bytes);
    assert_eq!(std::fs::read_dir(&place.0).expect("list").count(), 1, "an upload left something");
}
