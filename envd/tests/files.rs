//! Files through a real envd.

mod common;

use common::{Client, Daemon};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;
use wire::codec::Bytes;
use wire::message::*;
use wire::session::{Event, StreamId};

/// A directory of the test's own, gone with it.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        let path = std::env::temp_dir().join(format!("envd-files-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).expect("mkdir");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).expect("chmod");
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

const ROOT: &str = "root";

fn write(
    client: &mut Client,
    path: Bytes,
    user: &str,
    mode: u32,
    content: &[u8],
) -> Result<FileEntry, Error> {
    let stream = client.open(&FileWrite { path, user: user.into(), mode }, false);
    let mut sent = 0;
    while sent < content.len() {
        match client.session.send_data(stream, CHANNEL_FILE, &content[sent..]) {
            Ok(n) => sent += n,
            Err(_) => break,
        }
        client.turn(Duration::from_millis(1));
    }
    let _ = client.session.finish(stream);
    client.answer(stream)
}

fn read_all(client: &mut Client, stream: StreamId) -> Result<Vec<u8>, Error> {
    client.answer::<FileEntry>(stream)?;
    let mut content = Vec::new();
    loop {
        for (channel, bytes) in client.take_data(stream) {
            assert_eq!(channel, CHANNEL_FILE);
            content.extend(bytes);
        }
        if client.has(|e| matches!(e, Event::Message { stream: s, .. } if *s == stream)) {
            client.answer::<Done>(stream)?;
            return Ok(content);
        }
        client.turn(Duration::from_millis(50));
    }
}

fn read(client: &mut Client, path: Bytes, user: &str, offset: u64, length: u64) -> Result<Vec<u8>, Error> {
    let stream = client.open(&FileRead { path, user: user.into(), offset, length }, true);
    read_all(client, stream)
}

fn list(client: &mut Client, path: Bytes, depth: u32) -> Result<Vec<FileEntry>, Error> {
    let stream = client.open(&FileList { path, user: ROOT.into(), depth }, true);
    let mut entries = Vec::new();
    loop {
        let event = client.wait_for(|e| matches!(e, Event::Message { stream: s, .. } if *s == stream));
        let Event::Message { kind, body, cost, .. } = event else { unreachable!() };
        client.session.release(stream, cost);
        match kind {
            FileEntry::KIND => entries.push(FileEntry::decode(&body).expect("entry")),
            Done::KIND => return Ok(entries),
            _ => return Err(Error::decode(&body).expect("error")),
        }
    }
}

fn names_in(path: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(path)
        .expect("read_dir")
        .map(|e| e.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn content_goes_in_and_out_whole() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let place = Place::new("content");
    let content: Vec<u8> = (0..3_000_000u32).map(|i| (i % 253) as u8).collect();
    let path = place.path("a/b/file");
    let entry = write(&mut client, path.clone(), ROOT, 0o640, &content).expect("written");
    assert_eq!((entry.size, entry.mode & 0o7777, entry.owner.as_str()), (3_000_000, 0o640, ROOT));
    assert_eq!(std::fs::read(place.0.join("a/b/file")).expect("there"), content);
    assert!(read(&mut client, path.clone(), ROOT, 0, 0).expect("read") == content);
    assert_eq!(read(&mut client, path.clone(), ROOT, 10, 5).expect("read"), &content[10..15]);
    assert_eq!(read(&mut client, path.clone(), ROOT, 2_999_999, 0).expect("read"), &content[2_999_999..]);
    assert_eq!(read(&mut client, path.clone(), ROOT, u64::MAX, u64::MAX).expect("read"), b"");
    // An existing file keeps its mode; an empty one is a file too.
    let entry = write(&mut client, path.clone(), ROOT, 0o777, b"").expect("written");
    assert_eq!((entry.size, entry.mode & 0o7777), (0, 0o640));
    assert_eq!(names_in(&place.0.join("a/b")), ["file"]);
    assert!(!read(&mut client, "/proc/self/status".into(), ROOT, 0, 0).expect("read").is_empty());
    daemon.wait_until_clean(files);
}

#[test]
fn a_write_that_breaks_off_leaves_the_old_file() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let place = Place::new("broken");
    write(&mut client, place.path("file"), ROOT, 0o644, b"old").expect("written");
    let stream = client.open(&FileWrite { path: place.path("file"), user: ROOT.into(), mode: 0 }, false);
    client.send_all(stream, CHANNEL_FILE, b"new but incomplete");
    client.session.reset(stream, Code::Cancelled, "gone");
    let _: HealthReply = client.ask(&Health {}).expect("healthy");
    assert_eq!(std::fs::read(place.0.join("file")).expect("there"), b"old");
    assert_eq!(names_in(&place.0), ["file"]);
    // A link is followed to the file that it points to, and stays.
    symlink("file", place.0.join("link")).expect("symlink");
    write(&mut client, place.path("link"), ROOT, 0o644, b"through").expect("written");
    assert_eq!(std::fs::read(place.0.join("file")).expect("there"), b"through");
    assert!(place.0.join("link").symlink_metadata().expect("there").is_symlink());
}

/// More than is taken in before what came first is on the disk.
#[test]
fn large_content_goes_to_the_disk_apart_and_breaks_off_cleanly() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let place = Place::new("large");
    let content: Vec<u8> = (0..40_000_000u32).map(|i| (i % 251) as u8).collect();
    let entry = write(&mut client, place.path("file"), ROOT, 0o600, &content).expect("written");
    assert_eq!((entry.size, entry.mode & 0o7777), (40_000_000, 0o600));
    assert!(std::fs::read(place.0.join("file")).expect("there") == content);
    // Each leaves content that was not dealt with yet: its credit has to come back.
    for _ in 0..8 {
        let stream = client.open(&FileWrite { path: place.path("half"), user: ROOT.into(), mode: 0 }, false);
        client.send_all(stream, CHANNEL_FILE, &content[..17_000_000]);
        client.session.reset(stream, Code::Cancelled, "gone");
    }
    let entry = write(&mut client, place.path("after"), ROOT, 0o600, &content).expect("written");
    assert_eq!(entry.size, 40_000_000);
    assert_eq!(names_in(&place.0), ["after", "file"]);
    daemon.wait_until_clean(files);
}

#[test]
fn accesses_are_the_users_own() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let place = Place::new("user");
    let entry = write(&mut client, place.path("mine"), "nobody", 0o600, b"x").expect("written");
    assert_eq!(entry.owner, "nobody");
    assert_eq!(std::fs::metadata(place.0.join("mine")).expect("there").uid(), 65534);
    write(&mut client, place.path("roots"), ROOT, 0o600, b"secret").expect("written");
    let denied = |result: Result<(), Error>| {
        let error = result.expect_err("denied");
        assert_eq!((error.code(), error.errno), (Code::PermissionDenied, libc::EACCES as u32), "{error}");
        assert!(error.text.contains("EACCES"), "{error}");
    };
    denied(read(&mut client, place.path("roots"), "nobody", 0, 0).map(drop));
    denied(write(&mut client, place.path("roots"), "nobody", 0, b"y").map(drop));
    denied(write(&mut client, "/etc/envd-test".into(), "nobody", 0o644, b"y").map(drop));
    denied(write(&mut client, "/envd/test".into(), "nobody", 0o644, b"y").map(drop));
    let ask = FileRemove { path: "/etc/passwd".into(), user: "nobody".into() };
    denied(client.ask::<_, Done>(&ask).map(drop));
    // And root is root again.
    assert_eq!(read(&mut client, place.path("roots"), ROOT, 0, 0).expect("read"), b"secret");
}

#[test]
fn directories_are_listed_to_their_depth() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let place = Place::new("list");
    let make = FileMakeDirectory { path: place.path("d/e"), user: ROOT.into(), mode: 0o750 };
    let entry: FileEntry = client.ask(&make).expect("made");
    assert_eq!(entry.mode & 0o7777, 0o750);
    let again: FileEntry = client.ask(&make).expect("there already");
    assert_eq!(again.path, place.path("d/e"));
    std::fs::write(place.0.join("d/e/deep"), b"12345").expect("write");
    std::fs::write(place.0.join("z"), b"").expect("write");
    symlink("/etc", place.0.join("link")).expect("symlink");
    let listed = |client: &mut Client, depth| -> Vec<String> {
        let prefix = place.path("").lossy().into_owned();
        let entries = list(client, place.path(""), depth).expect("listed");
        entries.iter().map(|e| e.path.lossy().strip_prefix(&prefix).expect("inside").to_string()).collect()
    };
    assert_eq!(listed(&mut client, 1), ["d", "link", "z"]);
    assert_eq!(listed(&mut client, 3), ["d", "d/e", "d/e/deep", "link", "z"]);
    let entries = list(&mut client, place.path(""), 1).expect("listed");
    assert_eq!(entries[1].symlink_target, Bytes::from("/etc"));
    assert_eq!(list(&mut client, place.path("none"), 1).expect_err("missing").code(), Code::NotFound);
    assert_eq!(list(&mut client, place.path("z"), 1).expect_err("a file").errno, libc::ENOTDIR as u32);
    let stat: FileEntry =
        client.ask(&FileStat { path: place.path("d/e/deep"), user: ROOT.into() }).expect("stat");
    assert_eq!(stat.size, 5);
    // A name that is not UTF-8, and far more entries than a stream may have waiting.
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"odd\xff");
    std::fs::write(place.0.join("d").join(odd), b"").expect("write");
    for i in 0..20_000 {
        std::fs::write(place.0.join(format!("d/a rather long name of a file, number {i:05}")), b"")
            .expect("write");
    }
    let entries = list(&mut client, place.path("d"), 1).expect("listed");
    assert_eq!(entries.len(), 20_002);
    assert!(entries.iter().any(|e| e.path.ends_with(b"/odd\xff")));
    let _: Done = client.ask(&FileRemove { path: place.path("d"), user: ROOT.into() }).expect("removed");
    assert_eq!(names_in(&place.0), ["link", "z"]);
}

#[test]
fn removing_stays_within_the_tree() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let place = Place::new("remove");
    std::fs::create_dir_all(place.0.join("keep")).expect("mkdir");
    std::fs::write(place.0.join("keep/file"), b"x").expect("write");
    std::fs::create_dir_all(place.0.join("tree/a/b/c/d")).expect("mkdir");
    symlink("../../keep", place.0.join("tree/a/out")).expect("symlink");
    let mut ask =
        |name: &str| client.ask::<_, Done>(&FileRemove { path: place.path(name), user: ROOT.into() });
    ask("tree").expect("removed");
    assert_eq!(names_in(&place.0.join("keep")), ["file"]);
    assert_eq!(ask("tree").expect_err("gone").code(), Code::NotFound);
    assert!(ask("keep/..").is_err());
    ask("keep/file").expect("removed");
    assert!(client.ask::<_, Done>(&FileRemove { path: "/".into(), user: ROOT.into() }).is_err());
    daemon.wait_until_clean(files);
}

#[test]
fn entries_move() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let place = Place::new("move");
    std::fs::write(place.0.join("a"), b"x").expect("write");
    let mut ask =
        |from: Bytes, to: Bytes| client.ask::<_, FileEntry>(&FileMove { from, to, user: ROOT.into() });
    assert_eq!(ask(place.path("a"), place.path("b")).expect("moved").path, place.path("b"));
    assert_eq!(ask(place.path("a"), place.path("b")).expect_err("gone").code(), Code::NotFound);
    assert_eq!(
        ask(place.path("b"), "/dev/shm/envd-moved".into()).expect_err("elsewhere").errno,
        libc::EXDEV as u32
    );
}

#[test]
fn what_is_no_file_is_told_and_does_not_hang() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let place = Place::new("odd");
    let status = std::process::Command::new("mkfifo").arg(place.0.join("fifo")).status().expect("mkfifo");
    assert!(status.success());
    for path in [place.path("fifo"), "/dev/zero".into()] {
        assert_eq!(
            read(&mut client, path.clone(), ROOT, 0, 0).expect_err("refused").code(),
            Code::InvalidState
        );
        assert_eq!(write(&mut client, path, ROOT, 0, b"x").expect_err("refused").code(), Code::InvalidState);
    }
    assert_eq!(read(&mut client, "/etc".into(), ROOT, 0, 0).expect_err("refused").errno, libc::EISDIR as u32);
    assert_eq!(
        write(&mut client, "/etc".into(), ROOT, 0, b"").expect_err("refused").errno,
        libc::EISDIR as u32
    );
    assert_eq!(
        write(&mut client, "/dev/full/x".into(), ROOT, 0, b"").expect_err("refused").errno,
        libc::ENOTDIR as u32
    );
}

#[test]
fn changes_are_told_as_they_happen() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let place = Place::new("watch");
    std::fs::create_dir(place.0.join("old")).expect("mkdir");
    let watch = FileWatch { path: place.path(""), user: ROOT.into(), recursive: true };
    let stream = client.open(&watch, false);
    client.answer::<Done>(stream).expect("watched");
    let change = |client: &mut Client, change: u8, from: &str, path: &str| {
        let next: FileChange = client.answer(stream).expect("a change");
        let from = if from.is_empty() { Bytes::default() } else { place.path(from) };
        assert_eq!((next.change, &next.from, &next.path), (change, &from, &place.path(path)), "{next:?}");
    };
    std::fs::write(place.0.join("old/file"), b"x").expect("write");
    change(&mut client, CHANGE_MADE, "", "old/file");
    change(&mut client, CHANGE_WRITTEN, "", "old/file");
    std::fs::rename(place.0.join("old"), place.0.join("new")).expect("rename");
    change(&mut client, CHANGE_MOVED, "old", "new");
    std::fs::remove_file(place.0.join("new/file")).expect("remove");
    change(&mut client, CHANGE_REMOVED, "", "new/file");
    // A tree that comes all at once is watched to its leaves.
    std::fs::create_dir_all(place.0.join("a/b")).expect("mkdir");
    change(&mut client, CHANGE_MADE, "", "a");
    change(&mut client, CHANGE_MADE, "", "a/b");
    std::fs::write(place.0.join("a/b/leaf"), b"").expect("write");
    loop {
        let next: FileChange = client.answer(stream).expect("a change");
        // The directory may have been seen by both the walk and its event.
        if next.path == place.path("a/b/leaf") {
            break;
        }
        assert_eq!(next.path, place.path("a/b"));
    }
    // Out of what is watched is gone.
    let outside = Place::new("watch-outside");
    std::fs::rename(place.0.join("a"), outside.0.join("a")).expect("rename");
    change(&mut client, CHANGE_REMOVED, "", "a");
    client.session.reset(stream, Code::Cancelled, "enough");
    let missing = FileWatch { path: place.path("none"), ..watch };
    assert_eq!(client.ask::<_, Done>(&missing).expect_err("missing").code(), Code::NotFound);
    daemon.wait_until_clean(files);
}

/// What does not fit into 32 bits, with holes.
#[test]
fn files_beyond_4_gib_are_read_where_it_is_asked_for() {
    const FAR: u64 = (4 << 30) + 5;
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let place = Place::new("large");
    let file = std::fs::File::create(place.0.join("sparse")).expect("create");
    file.set_len(5 << 30).expect("grow");
    std::os::unix::fs::FileExt::write_all_at(&file, b"far out", FAR).expect("write");
    let path = place.path("sparse");
    let stat = FileStat { path: path.clone(), user: ROOT.into() };
    assert_eq!(client.ask::<_, FileEntry>(&stat).expect("there").size, 5 << 30);
    assert_eq!(read(&mut client, path.clone(), ROOT, FAR - 2, 11).expect("read"), b"\0\0far out\0\0");
    assert_eq!(read(&mut client, path.clone(), ROOT, (5 << 30) - 3, 0).expect("read"), b"\0\0\0");
    assert_eq!(read(&mut client, path, ROOT, 5 << 30, 0).expect("read"), b"");
}

/// A file system of its own, unmounted with its place.
struct Mounted(Place);

impl Mounted {
    fn new(name: &str, options: &str) -> Mounted {
        let place = Place::new(name);
        run("mount", &["-t", "tmpfs", "-o", options, "tmpfs", place.0.to_str().expect("utf-8")]);
        Mounted(place)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[self.0.0.to_str().expect("utf-8")]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = std::process::Command::new(program).args(arguments).status().expect("runs");
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

#[test]
fn full_and_read_only_file_systems_are_told_by_name() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let files = daemon.open_files();
    let mounted = Mounted::new("mounted", "size=1m,mode=777");
    let place = &mounted.0;
    write(&mut client, place.path("old"), ROOT, 0o644, b"old").expect("written");
    for user in [ROOT, "nobody"] {
        let error = write(&mut client, place.path("new"), user, 0o644, &[7; 3 << 20]).expect_err("full");
        assert_eq!((error.code(), error.errno), (Code::ResourceExhausted, libc::ENOSPC as u32), "{error}");
        assert!(error.text.contains("ENOSPC") && error.text.contains("/new"), "{error}");
        assert_eq!(names_in(&place.0), ["old"], "nothing half done is left");
    }
    let error = write(&mut client, place.path("old"), ROOT, 0o644, &[7; 3 << 20]).expect_err("full");
    assert_eq!(error.errno, libc::ENOSPC as u32);
    assert_eq!(read(&mut client, place.path("old"), ROOT, 0, 0).expect("read"), b"old");

    run("mount", &["-o", "remount,ro", place.0.to_str().expect("utf-8")]);
    let user = || ROOT.to_string();
    let refused = |error: Error| {
        assert_eq!((error.code(), error.errno), (Code::PermissionDenied, libc::EROFS as u32), "{error}");
        assert!(error.text.contains("EROFS"), "{error}");
    };
    refused(write(&mut client, place.path("old"), ROOT, 0, b"x").expect_err("read only"));
    refused(write(&mut client, place.path("a/b"), ROOT, 0, b"x").expect_err("read only"));
    let make = FileMakeDirectory { path: place.path("d"), user: user(), mode: 0o755 };
    refused(client.ask::<_, FileEntry>(&make).expect_err("read only"));
    let rename = FileMove { from: place.path("old"), to: place.path("x"), user: user() };
    refused(client.ask::<_, FileEntry>(&rename).expect_err("read only"));
    refused(
        client.ask::<_, Done>(&FileRemove { path: place.path("old"), user: user() }).expect_err("read only"),
    );
    assert_eq!(read(&mut client, place.path("old"), ROOT, 0, 0).expect("read"), b"old");
    daemon.wait_until_clean(files);
}

#[test]
fn names_are_bytes() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let place = Place::new("bytes");
    let named = |name: &[u8]| {
        let mut path = place.0.as_os_str().as_encoded_bytes().to_vec();
        path.push(b'/');
        path.extend_from_slice(name);
        Bytes(path)
    };
    let (odd, other) = (named(b"\xff\xfe \n\"x"), named(b"\xc3\x28"));
    let watch = client.open(&FileWatch { path: place.path(""), user: ROOT.into(), recursive: false }, false);
    client.answer::<Done>(watch).expect("watched");
    assert_eq!(write(&mut client, odd.clone(), ROOT, 0o600, b"x").expect("written").path, odd);
    let listed = list(&mut client, place.path(""), 1).expect("listed");
    assert_eq!(listed.iter().map(|e| &e.path).collect::<Vec<_>>(), [&odd]);
    let rename = FileMove { from: odd.clone(), to: other.clone(), user: ROOT.into() };
    assert_eq!(client.ask::<_, FileEntry>(&rename).expect("moved").path, other);
    loop {
        let change: FileChange = client.answer(watch).expect("a change");
        if change.change == CHANGE_MOVED && change.from == odd {
            break assert_eq!(change.path, other);
        }
    }
    assert_eq!(read(&mut client, other.clone(), ROOT, 0, 0).expect("read"), b"x");
    client.ask::<_, Done>(&FileRemove { path: other, user: ROOT.into() }).expect("removed");
    assert!(names_in(&place.0).is_empty());
}

#[test]
fn changes_that_are_too_many_are_told_to_be_lost() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let place = Place::new("flood");
    let stream = client.open(&FileWatch { path: place.path(""), user: ROOT.into(), recursive: true }, false);
    client.answer::<Done>(stream).expect("watched");
    // More than the stream, envd and the kernel's queue hold together, with nobody reading.
    let made = 40_000;
    for number in 0..made {
        std::fs::write(place.0.join(format!("{number:08}")), b"").expect("write");
    }
    std::fs::create_dir_all(place.0.join("late/later")).expect("mkdir");
    let (mut told, mut lost) = (0, 0);
    while lost == 0 {
        match client.answer::<FileChange>(stream).expect("a change").change {
            CHANGE_MADE => told += 1,
            CHANGES_LOST => lost += 1,
            other => panic!("change {other}"),
        }
    }
    assert!((1_000..made).contains(&told), "{told} of {made} were told");
    // It goes on, also in directories whose making was lost.
    for name in ["after", "late/later/file"] {
        std::fs::write(place.0.join(name), b"").expect("write");
        while client.answer::<FileChange>(stream).expect("a change").path != place.path(name) {}
    }
    assert!(daemon.status_kb("VmRSS") < 8_000, "{} KB resident", daemon.status_kb("VmRSS"));
}
