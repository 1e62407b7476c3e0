//! Disks on real filesystems: overlays that QEMU's own tool finds in order, and reflinks where the
//! filesystem has them.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use wrenn_agent::disk::{Backend, Disk, DiskError, DiskSpec, Format};

const BASE_BYTES: u64 = 8 << 20;

struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("wrenn-disk-{name}-{}", std::process::id()));
        fs::create_dir(&path).expect("a temporary directory");
        Directory(path)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).expect("listed").flatten();
        let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort();
        names
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn base_image(directory: &Path) -> PathBuf {
    let path = directory.join("rootfs.ext4");
    let file = File::create(&path).expect("created");
    file.set_len(BASE_BYTES).expect("sized");
    file.write_all_at(b"the base's first sector", 0).expect("written");
    path
}

fn spec<'a>(base: &'a Path, directory: &'a Path, size_bytes: Option<u64>) -> DiskSpec<'a> {
    DiskSpec { base, directory, size_bytes }
}

/// Runs a program that this machine may not have; `None`, loudly, when it has not.
fn tool(program: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(program).args(arguments).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{program} {arguments:?}: {text}");
            Some(text.into_owned())
        }
        Err(_) => {
            eprintln!("SKIPPED a check with {program}, which is not on PATH");
            None
        }
    }
}

#[test]
fn an_overlay_is_what_qemus_own_tool_expects() {
    let directory = Directory::new("overlay");
    let base = base_image(&directory.0);
    for (size_bytes, expected) in [(None, BASE_BYTES), (Some(5 << 30), 5 << 30), (Some(4 << 40), 4 << 40)] {
        let began = Instant::now();
        let disk = Backend::Overlay.create(&spec(&base, &directory.0, size_bytes)).expect("created");
        eprintln!("overlay of {expected} bytes: made in {:?}", began.elapsed());
        assert_eq!(disk.virtual_bytes(), expected);
        let image = disk.image();
        assert_eq!((image.format, image.backing.as_deref()), (Format::Qcow2, Some(base.as_path())));
        assert!(disk.allocated_bytes().expect("examined") <= 64 * 1024);
        let path = image.path.to_str().expect("text");
        if let Some(report) = tool("qemu-img", &["check", path]) {
            assert!(report.contains("No errors were found"), "{report}");
        }
        if let Some(info) = tool("qemu-img", &["info", "--output=json", path]) {
            let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
            assert_eq!(info["virtual-size"], expected);
            assert_eq!(info["backing-filename-format"], "raw");
            assert_eq!(info["full-backing-filename"], base.to_str().expect("text"));
        }
        if size_bytes.is_none() {
            tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", base.to_str().expect("text"), path]);
        }
        let again = Backend::open(&directory.0).expect("read").expect("there");
        assert_eq!((again.image(), again.virtual_bytes()), (image, expected));
        disk.remove().expect("removed");
        again.remove().expect("removing twice is no error");
        assert!(Backend::open(&directory.0).expect("read").is_none());
    }
    assert_eq!(directory.names(), ["rootfs.ext4"]);
}

#[test]
fn a_flattened_overlay_is_what_qemus_own_tool_reads() {
    let directory = Directory::new("flatten");
    let base = base_image(&directory.0);
    let disk = Backend::Overlay.create(&spec(&base, &directory.0, Some(1 << 30))).expect("created");
    let flat = directory.0.join("flat");
    let written = disk.flatten(&flat).expect("flattened");
    assert_eq!(written, 4096, "the base's one block that is not zero");
    let mut sector = [0; 23];
    File::open(&flat).and_then(|f| f.read_exact_at(&mut sector, 0)).expect("read");
    assert_eq!(&sector, b"the base's first sector");
    fs::remove_file(&flat).expect("removed");
    let path = disk.image().path;
    let path = path.to_str().expect("text");
    // Across a cluster's end, in the second second-level table, and zero where the base is not.
    for command in
        ["write -P 0x5a 65000 2000", "write -P 0xa5 600M 128k", "write -P 1 1073741312 512", "write -z 0 64k"]
    {
        if tool("qemu-io", &["-f", "qcow2", "-c", command, path]).is_none() {
            return;
        }
    }
    disk.flatten(&flat).expect("flattened");
    let flat = flat.to_str().expect("text");
    tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", flat, path]);
    let mut byte = [0; 1];
    File::open(flat).and_then(|f| f.read_exact_at(&mut byte, 600 << 20)).expect("read");
    assert_eq!(byte, [0xa5]);
    assert!(matches!(disk.flatten(Path::new(flat)), Err(DiskError::System { step: "creating", .. })));
}

#[test]
fn a_template_that_is_replaced_leaves_capsules_their_own() {
    let images = Directory::new("images");
    let capsule = Directory::new("capsule");
    let base = base_image(&images.0);
    let disk = Backend::Overlay.create(&spec(&base, &capsule.0, None)).expect("created");
    // As a new build of the template is put in its place.
    let new = images.0.join("new");
    fs::write(&new, vec![b'x'; BASE_BYTES as usize]).expect("written");
    fs::rename(&new, &base).expect("replaced");
    let opened = Backend::open(&capsule.0).expect("read").expect("there");
    assert_eq!(opened.image(), disk.image());
    let disk = opened;
    let flat = capsule.0.join("flat");
    disk.flatten(&flat).expect("flattened");
    let mut sector = [0; 23];
    File::open(&flat).and_then(|f| f.read_exact_at(&mut sector, 0)).expect("read");
    assert_eq!(&sector, b"the base's first sector");
    disk.remove().expect("removed");
    assert_eq!(capsule.names(), ["flat"]);
}

#[test]
fn a_disk_that_cannot_be_leaves_nothing() {
    let directory = Directory::new("refused");
    let base = base_image(&directory.0);
    let create = |size| Backend::Overlay.create(&spec(&base, &directory.0, size)).map(drop);
    match create(Some(BASE_BYTES - 1)) {
        Err(error @ DiskError::TooSmall { .. }) => {
            assert!(error.to_string().contains("7 MiB is smaller"), "{error}")
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(create(Some((4 << 40) + 1)), Err(DiskError::TooLarge { .. })));
    let missing = directory.0.join("missing");
    let missing = Backend::Overlay.create(&spec(&missing, &directory.0, None)).map(drop);
    assert!(matches!(missing, Err(DiskError::System { step: "opening", .. })), "{missing:?}");
    assert_eq!(directory.names(), ["rootfs.ext4"]);

    create(None).expect("created");
    assert!(
        matches!(create(None), Err(DiskError::System { step: "creating", .. })),
        "a disk is never overwritten"
    );
    let mut file = File::create(directory.0.join("disk.qcow2")).expect("opened");
    file.write_all(b"QFI\xfb not really").expect("written");
    assert!(matches!(Backend::open(&directory.0), Err(DiskError::Malformed { .. })));
}

#[test]
fn a_full_filesystem_is_an_error_that_says_so() {
    let Some(mount) = Mount::new("full", "tmpfs", &["-t", "tmpfs", "-o", "size=64k", "none"]) else { return };
    let elsewhere = Directory::new("elsewhere");
    let base = base_image(&elsewhere.0);
    File::create(mount.0.0.join("filler")).expect("created").write_all(&[1; 60 * 1024]).expect("filled");
    let refused = Backend::Overlay.create(&spec(&base, &mount.0.0, None)).map(drop);
    let error = refused.expect_err("there is no room");
    assert!(error.is_storage_full() && error.to_string().contains("make room"), "{error}");
    assert_eq!(mount.0.names(), ["filler"]);
}

/// A filesystem mounted for a test.
struct Mount(Directory);

impl Mount {
    fn new(name: &str, kind: &str, arguments: &[&str]) -> Option<Mount> {
        let directory = Directory::new(name);
        let target = directory.0.to_str().expect("text").to_owned();
        let mounted =
            Command::new("mount").args(arguments).arg(&target).output().is_ok_and(|o| o.status.success());
        if !mounted {
            eprintln!("SKIPPED: {kind} cannot be mounted here (this needs root)");
            return None;
        }
        Some(Mount(directory))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.0.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

#[test]
fn reflinks_are_used_where_the_filesystem_has_them() {
    let storage = Directory::new("storage");
    let image = storage.0.join("btrfs.img");
    File::create(&image).and_then(|f| f.set_len(256 << 20)).expect("made");
    let image = image.to_str().expect("text");
    if tool("mkfs.btrfs", &["-q", image]).is_none() {
        return;
    }
    let Some(mount) = Mount::new("btrfs", "btrfs", &["-o", "loop", image]) else { return };
    let directory = &mount.0.0;
    assert_eq!(Backend::probe(directory, directory).expect("probed"), Backend::Reflink);
    let elsewhere = Directory::new("other-filesystem");
    assert_eq!(Backend::probe(&elsewhere.0, directory).expect("probed"), Backend::Overlay);
    assert!(mount.0.names().is_empty(), "the probe leaves nothing");
    // An agent that starts while it is full must not make other disks, in another VMM, from then on.
    let ballast = directory.join("ballast");
    let mut file = File::create(&ballast).expect("created");
    for size in [1 << 20, 4096, 1] {
        let piece = vec![1; size];
        while file.write_all(&piece).and_then(|()| file.sync_all()).is_ok() {}
    }
    assert_eq!(Backend::probe(directory, directory).expect("probed"), Backend::Reflink);
    drop(file);
    fs::remove_file(&ballast).expect("removed");
    tool("sync", &["-f", mount.0.0.to_str().expect("text")]);

    let base = base_image(directory);
    let disk = Backend::Reflink.create(&spec(&base, directory, Some(1 << 30))).expect("created");
    let image = disk.image();
    assert_eq!((image.format, image.backing), (Format::Raw, None));
    assert_eq!(disk.virtual_bytes(), 1 << 30);
    let file = File::options().read(true).write(true).open(&image.path).expect("opened");
    let mut sector = [0; 23];
    file.read_exact_at(&mut sector, 0).expect("read");
    assert_eq!(&sector, b"the base's first sector");
    file.write_all_at(b"own", 0).expect("written");
    File::open(&base).and_then(|f| f.read_exact_at(&mut sector, 0)).expect("read");
    assert_eq!(&sector[..3], b"the", "the base has not changed");
    assert_eq!(Backend::open(directory).expect("read").expect("there").virtual_bytes(), 1 << 30);
    disk.remove().expect("removed");
    assert_eq!(mount.0.names(), ["rootfs.ext4"]);
}

#[test]
fn the_probe_chooses_something_that_works_here() {
    let directory = Directory::new("probe");
    let base = base_image(&directory.0);
    let backend = Backend::probe(&directory.0, &directory.0).expect("probed");
    let disk: Box<dyn Disk> = backend.create(&spec(&base, &directory.0, None)).expect("created");
    eprintln!("disks here: {backend}");
    disk.remove().expect("removed");
    assert_eq!(directory.names(), ["rootfs.ext4"]);
}
