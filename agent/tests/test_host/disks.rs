//! What is tried on a host that has device-mapper. Each case has a directory of its own, and must leave no
//! device, loop device or file behind that it did not find.

use crate::Case;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use wrenn_agent::capsule::recovery::{Take, recover};
use wrenn_agent::disk::dm::guard::Guard;
use wrenn_agent::disk::{self, Backend, Disk, DiskError, DiskSpec, Format, Store};
use wrenn_agent::layout::Layout;
use wrenn_agent::sys::dm::{Control, Device, Target};
use wrenn_agent::sys::loopdev::{self, LoopDevice};

const MIB: u64 = 1 << 20;
const BASE_BYTES: u64 = 16 * MIB;
const DISK_BYTES: u64 = 96 * MIB;
/// In this variable: where to make and remove disks until somebody kills this process.
const CRASH: &str = "WRENN_TEST_CRASH";

pub const CASES: &[Case] = &[
    ("the probe chooses it", the_probe_chooses_it),
    ("disks are separate and share their base", disks_are_separate_and_share_their_base),
    ("a file system on it grows", a_file_system_on_it_survives_a_reload),
    ("a replaced base stays with its disks", a_replaced_base_stays_with_its_disks),
    ("flattened", flattened_it_is_an_image_like_any_other),
    ("a busy device is removed when it is free", a_busy_device_is_removed_when_it_is_free),
    ("names of others are left alone", names_of_others_are_left_alone),
    ("a killed agent leaves what recovery removes", a_killed_agent_leaves_what_recovery_removes),
    ("a full store waits and goes on", a_full_store_waits_and_goes_on),
    ("a full store can be destroyed", a_full_store_can_be_destroyed),
    ("a store that could not write is told", a_store_that_could_not_write_is_told),
];

/// The devices and loop devices of the machine, once those that are just closed are gone.
pub fn remains() -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        let mut found = control().names().expect("listed");
        found.extend(loopdev::attached().expect("listed").into_iter().map(|number| format!("loop{number}")));
        if found.is_empty() || Instant::now() > deadline {
            return found;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The names of the machine's devices.
pub fn device_names() -> Vec<String> {
    control().names().expect("listed")
}

/// So that a case which failed spoils no other. The whole machine is the test's.
pub fn remove_all_devices() {
    for name in control().names().expect("listed") {
        let _ = control().remove(&name);
    }
}

fn control() -> Control {
    Control::open().expect("device-mapper")
}

/// A base image with something at its beginning and end, and a data directory around it.
fn place(directory: &Path) -> (Layout, PathBuf) {
    let layout = Layout::new(directory.join("wrenn"));
    layout.prepare().expect("prepared");
    let base = layout.images().join("rootfs.ext4");
    let file = File::create(&base).expect("created");
    file.set_len(BASE_BYTES).expect("sized");
    file.write_all_at(b"the base's beginning", 0).expect("written");
    file.write_all_at(b"the base's end......", BASE_BYTES - 20).expect("written");
    (layout, base)
}

fn make(layout: &Layout, id: &str, base: &Path) -> Result<Box<dyn Disk>, DiskError> {
    let directory = layout.capsule(id).expect("an id");
    fs::create_dir(&directory).expect("made");
    let spec = DiskSpec { base, directory: &directory, size_bytes: Some(DISK_BYTES) };
    Backend::DeviceMapper.create(&spec)
}

fn remove(layout: &Layout, id: &str, disk: Box<dyn Disk>) {
    disk.remove().expect("removed");
    // Nothing of the disk is in it.
    fs::remove_dir(layout.capsule(id).expect("an id")).expect("an empty directory");
}

/// Past the page cache, as QEMU with `cache=none` and Firecracker with its synchronous engine do at a flush.
fn open(disk: &dyn Disk) -> File {
    let options =
        OpenOptions::new().read(true).write(true).custom_flags(libc_o_sync()).open(disk.image().path);
    options.expect("the device")
}

/// `O_SYNC`, asm-generic/fcntl.h.
fn libc_o_sync() -> i32 {
    0o4_010_000
}

fn read(file: &File, offset: u64) -> Vec<u8> {
    let mut bytes = vec![0; 20];
    file.read_exact_at(&mut bytes, offset).expect("read");
    bytes
}

fn run(program: &str, arguments: &[&Path]) {
    let status = Command::new(program).args(arguments).status().expect(program);
    assert!(status.success(), "{program} {arguments:?}: {status}");
}

fn the_probe_chooses_it(directory: &Path) {
    let (layout, base) = place(directory);
    assert_eq!(Backend::probe(&layout.images(), &layout.sandboxes()).expect("probed"), Backend::DeviceMapper);
    assert_eq!(fs::read_dir(layout.sandboxes()).expect("listed").count(), 0);
    // An agent that died in the middle of it.
    let left = layout.sandboxes().join(".probe-1");
    fs::create_dir(&left).expect("made");
    let spec = DiskSpec { base: &base, directory: &left, size_bytes: None };
    Backend::DeviceMapper.create(&spec).expect("created");
    assert_eq!(Backend::probe(&layout.images(), &layout.sandboxes()).expect("probed"), Backend::DeviceMapper);
    assert!(!left.exists() && remains().is_empty());
    // An agent that starts while nothing can be written must not make other disks, in another VMM, from then on.
    let ballast = ballast(directory, 8 * MIB);
    let mut rest = File::create(directory.join("rest")).expect("created");
    while std::io::Write::write_all(&mut rest, &[1; 4096]).is_ok() {}
    assert_eq!(Backend::probe(&layout.images(), &layout.sandboxes()).expect("probed"), Backend::DeviceMapper);
    fs::remove_file(ballast).expect("removed");
    assert_eq!(fs::read_dir(layout.sandboxes()).expect("listed").count(), 0);
}

fn disks_are_separate_and_share_their_base(directory: &Path) {
    let (layout, base) = place(directory);
    let before = fs::read(&base).expect("read");
    let mut times = Vec::new();
    let mut disks = Vec::new();
    for index in 0..8 {
        let began = Instant::now();
        disks.push(make(&layout, &format!("cl-{index}"), &base).expect("created"));
        times.push(began.elapsed().as_micros());
    }
    // One for the base, one each.
    assert_eq!(loopdev::attached().expect("listed").len(), 9);
    let places = [0, BASE_BYTES - 20, BASE_BYTES - 10, BASE_BYTES, DISK_BYTES - 20];
    for (index, disk) in disks.iter().enumerate() {
        let image = disk.image();
        assert_eq!((image.format, image.backing, disk.virtual_bytes()), (Format::Device, None, DISK_BYTES));
        let file = open(disk.as_ref());
        assert_eq!(read(&file, 0), b"the base's beginning");
        assert_eq!(read(&file, BASE_BYTES - 20), b"the base's end......");
        assert_eq!(read(&file, BASE_BYTES), [0; 20]);
        assert_eq!(read(&file, DISK_BYTES - 20), [0; 20]);
        for place in places {
            file.write_all_at(format!("{index:02} at {place:014}").as_bytes(), place).expect("written");
        }
    }
    for (index, disk) in disks.iter().enumerate() {
        let file = open(disk.as_ref());
        for place in [0, BASE_BYTES - 10, BASE_BYTES, DISK_BYTES - 20] {
            let expected = format!("{index:02} at {place:014}").into_bytes();
            if place == BASE_BYTES - 10 {
                // The next one was written over its second half.
                assert_eq!(read(&file, place)[..10], expected[..10]);
            } else {
                assert_eq!(read(&file, place), expected);
            }
        }
        let Store::Good { used_bytes } = disk.store().expect("looked") else { panic!("lost") };
        assert!((1..MIB).contains(&used_bytes), "{used_bytes}");
        assert!(disk.allocated_bytes().expect("looked") < MIB);
    }
    assert!(fs::read(&base).expect("read") == before, "the base has not changed");
    for (index, disk) in disks.into_iter().enumerate() {
        let began = Instant::now();
        remove(&layout, &format!("cl-{index}"), disk);
        times.push(began.elapsed().as_micros());
    }
    println!("  created in {:?} us, removed in {:?} us", &times[..8], &times[8..]);
}

fn a_file_system_on_it_survives_a_reload(directory: &Path) {
    let (layout, base) = place(directory);
    run("mkfs.ext4", &[Path::new("-q"), Path::new("-F"), &base]);
    let disk = make(&layout, "cl-1", &base).expect("created");
    let mount = directory.join("mount");
    fs::create_dir(&mount).expect("made");
    run("mount", &[&disk.image().path, &mount]);
    for index in 0..32u8 {
        fs::write(mount.join(format!("file-{index}")), vec![index; 100_000]).expect("written");
    }
    run("umount", &[&mount]);
    let capsule = layout.capsule("cl-1").expect("an id");
    let device = disk.image().path;
    drop(disk);
    // An agent that is started again finds it as it is.
    assert_eq!(Backend::open(&capsule).expect("opened").expect("there").image().path, device);
    // After a reboot the files are there and the devices are not.
    control().remove("wrenn-cl-1").expect("removed");
    assert_eq!(remains(), Vec::<String>::new());
    let disk = Backend::open(&capsule).expect("opened").expect("there");
    assert_eq!(disk.virtual_bytes(), DISK_BYTES);
    run("mount", &[&disk.image().path, &mount]);
    for index in 0..32u8 {
        assert!(fs::read(mount.join(format!("file-{index}"))).expect("read") == vec![index; 100_000]);
    }
    run("umount", &[&mount]);
    // Died between making the device and its table.
    control().remove("wrenn-cl-1").expect("removed");
    let uuid = "WRENN-0";
    control().create("wrenn-cl-1", uuid).expect("created");
    assert!(
        matches!(Backend::open(&capsule), Err(DiskError::NameTaken { .. })),
        "not ours by its identifier"
    );
    control().remove("wrenn-cl-1").expect("removed");
    remove(&layout, "cl-1", Backend::open(&capsule).expect("opened").expect("there"));
    assert!(Backend::open(&capsule).expect("looked").is_none());
}

fn a_replaced_base_stays_with_its_disks(directory: &Path) {
    let (layout, base) = place(directory);
    let capsule = layout.capsule("cl-old").expect("an id");
    make(&layout, "cl-old", &base).expect("created");
    let new = base.with_extension("new");
    fs::copy(&base, &new).expect("copied");
    File::options().write(true).open(&new).and_then(|f| f.write_all_at(b"a new", 0)).expect("written");
    fs::rename(&new, &base).expect("replaced");
    let disk = make(&layout, "cl-new", &base).expect("created");
    assert_eq!(loopdev::attached().expect("listed").len(), 4, "two bases");
    assert_eq!(&read(&open(disk.as_ref()), 0)[..5], b"a new");
    remove(&layout, "cl-new", disk);
    control().remove("wrenn-cl-old").expect("removed");
    let disk = Backend::open(&capsule).expect("opened").expect("there");
    assert_eq!(read(&open(disk.as_ref()), 0), b"the base's beginning");
    control().remove("wrenn-cl-old").expect("removed");
    // Changed in place, it fits no more.
    let own = capsule.join("disk.base");
    File::options().write(true).open(own).and_then(|f| f.write_all_at(b"x", 99)).expect("written");
    assert!(matches!(Backend::open(&capsule), Err(DiskError::BaseChanged { .. })));
    fs::remove_dir_all(capsule).expect("removed");
}

fn flattened_it_is_an_image_like_any_other(directory: &Path) {
    let (layout, base) = place(directory);
    let disk = make(&layout, "cl-1", &base).expect("created");
    // Through the page cache, and not synced: flattening has to see it all the same.
    let file = File::options().read(true).write(true).open(disk.image().path).expect("the device");
    for place in [4096, BASE_BYTES - 20, BASE_BYTES + 8192, DISK_BYTES - 20] {
        file.write_all_at(format!("own data {place:011}").as_bytes(), place).expect("written");
    }
    // Zero where the base is not.
    file.write_all_at(&[0; 20], 0).expect("written");
    drop(file);
    let image = layout.images().join("flat.ext4");
    let began = Instant::now();
    let written = disk.flatten(&image).expect("flattened");
    println!("  flattened {} MiB in {:?}", DISK_BYTES / MIB, began.elapsed());
    assert!(written < MIB, "{written}");
    assert!(
        fs::read(disk.image().path).expect("read") == fs::read(&image).expect("read"),
        "the same content"
    );
    assert!(matches!(disk.flatten(&image), Err(DiskError::System { .. })), "it replaces nothing");
    remove(&layout, "cl-1", disk);
    let again = make(&layout, "cl-2", &image).expect("created");
    assert_eq!(read(&open(again.as_ref()), BASE_BYTES + 8192)[..8], *b"own data");
    remove(&layout, "cl-2", again);
}

fn a_busy_device_is_removed_when_it_is_free(directory: &Path) {
    let (layout, base) = place(directory);
    let disk = make(&layout, "cl-1", &base).expect("created");
    let file = open(disk.as_ref());
    let holder = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(file);
    });
    remove(&layout, "cl-1", disk);
    holder.join().expect("ended");
    let disk = make(&layout, "cl-2", &base).expect("created");
    let file = open(disk.as_ref());
    let began = Instant::now();
    assert!(matches!(disk.remove(), Err(DiskError::Busy { .. })));
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    drop(file);
    let capsule = layout.capsule("cl-2").expect("an id");
    disk::clear(&capsule).expect("cleared");
    disk::clear(&capsule).expect("cleared again");
    fs::remove_dir_all(capsule).expect("removed");
}

fn names_of_others_are_left_alone(directory: &Path) {
    let (layout, base) = place(directory);
    let other = Layout::new(directory.join("other"));
    other.prepare().expect("prepared");
    let zero = Target { start_sector: 0, sectors: 8, kind: "error".into(), parameters: String::new() };
    for (name, uuid) in [("wrenn-cl-1", "LVM-abc"), ("other", "WRENN-0-cl-2")] {
        control().create(name, uuid).expect("created");
        control()
            .load(name, std::slice::from_ref(&zero))
            .and_then(|()| control().resume(name))
            .expect("loaded");
    }
    assert!(matches!(make(&layout, "cl-1", &base), Err(DiskError::NameTaken { .. })));
    let disk = make(&other, "cl-3", &base).expect("created");
    assert_eq!(disk::clear_orphans(&layout.sandboxes()).expect("looked"), Vec::<String>::new());
    disk::clear(&layout.capsule("cl-1").expect("an id")).expect("nothing of ours");
    disk::clear(&layout.capsule("cl-3").expect("an id")).expect("another directory's");
    assert!(disk.store().is_ok());
    // A directory that somebody removed leaves a device without an owner.
    fs::remove_dir_all(other.capsule("cl-3").expect("an id")).expect("removed");
    assert_eq!(disk::clear_orphans(&other.sandboxes()).expect("looked"), ["wrenn-cl-3"]);
    for name in ["wrenn-cl-1", "other"] {
        control().remove(name).expect("still there");
    }
}

/// In a process of its own: makes and removes disks until it is killed.
pub fn crash_if_told() {
    let Some(directory) = std::env::var_os(CRASH).map(PathBuf::from) else { return };
    let layout = Layout::new(directory.join("wrenn"));
    let base = layout.images().join("rootfs.ext4");
    for number in 0u64.. {
        let disk = make(&layout, &format!("cl-{number}"), &base).expect("created");
        open(disk.as_ref()).write_all_at(&[7; 4096], 4096).expect("written");
        if number % 2 == 1 {
            remove(&layout, &format!("cl-{number}"), disk);
        }
    }
}

fn a_killed_agent_leaves_what_recovery_removes(directory: &Path) {
    let (layout, _) = place(directory);
    let (mut cleared, mut active) = (0, 0);
    for round in 0..24u64 {
        let mut agent = Command::new(std::env::current_exe().expect("this program"))
            .args(["--nocapture", "--test-threads=1"])
            .env(CRASH, directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("started");
        // The start alone takes some 50 ms here; a step of the sweep is less than what one disk takes.
        let deadline = Instant::now() + Duration::from_secs(20);
        while fs::read_dir(layout.sandboxes()).expect("listed").next().is_none() && Instant::now() < deadline
        {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(round * 3));
        agent.kill().and_then(|()| agent.wait()).expect("killed");
        active += control().names().expect("listed").len();
        let summary = recover(&layout, Take::Over).expect("recovered");
        assert_eq!(summary.left, Vec::new(), "round {round}");
        cleared += summary.cleared;
        assert_eq!(remains(), Vec::<String>::new(), "round {round}");
    }
    println!("  {cleared} capsules cleared away, {active} of them with a device");
    assert!(cleared >= 24 && active > 0);
}

/// Waits until the disk is suspended, or not.
fn wait_until(name: &str, wanted: bool) -> Device {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let device = control().device(name).expect("looked").expect("there");
        if device.suspended == wanted {
            return device;
        }
        assert!(Instant::now() < deadline, "{name} is never suspended: {wanted}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Fills the file system up to a bit above what is kept free.
fn ballast(directory: &Path, leave_bytes: u64) -> PathBuf {
    let path = directory.join("ballast");
    let (_, free) = wrenn_agent::sys::resources::disk_space(directory).expect("looked");
    let length = format!("{}", free - leave_bytes);
    run("fallocate", &[Path::new("--length"), Path::new(&length), &path]);
    path
}

/// Writes a pattern to all of the disk, as a guest would, in a thread of its own.
fn fill(disk: &dyn Disk) -> thread::JoinHandle<std::io::Result<()>> {
    let file = open(disk);
    thread::spawn(move || {
        for index in 0..DISK_BYTES / MIB {
            file.write_all_at(&vec![index as u8 ^ 0x5a; MIB as usize], index * MIB)?;
        }
        Ok(())
    })
}

fn a_full_store_waits_and_goes_on(directory: &Path) {
    let (layout, base) = place(directory);
    let disk = make(&layout, "cl-1", &base).expect("created");
    // The file system keeps 64 MiB: the guest gets about 36 MiB through.
    let ballast = ballast(directory, 100 * MIB);
    let guard = Guard::start(&layout.sandboxes()).expect("started");
    let writer = fill(disk.as_ref());
    wait_until("wrenn-cl-1", true);
    assert!(!writer.is_finished(), "the guest waits");
    let refused = make(&layout, "cl-2", &base);
    assert!(matches!(refused, Err(DiskError::NoSpace { .. })), "{refused:?}");
    fs::remove_dir(layout.capsule("cl-2").expect("an id")).expect("nothing in it");
    fs::remove_file(ballast).expect("removed");
    wait_until("wrenn-cl-1", false);
    writer.join().expect("ended").expect("all written");
    assert!(matches!(disk.store().expect("looked"), Store::Good { .. }));
    let file = open(disk.as_ref());
    let mut bytes = vec![0; MIB as usize];
    for index in 0..DISK_BYTES / MIB {
        file.read_exact_at(&mut bytes, index * MIB).expect("read");
        assert!(bytes.iter().all(|byte| *byte == index as u8 ^ 0x5a), "MiB {index}");
    }
    drop(file);
    drop(guard);
    remove(&layout, "cl-1", disk);
}

fn a_full_store_can_be_destroyed(directory: &Path) {
    let (layout, base) = place(directory);
    let disk = make(&layout, "cl-1", &base).expect("created");
    let _ballast = ballast(directory, 90 * MIB);
    let guard = Guard::start(&layout.sandboxes()).expect("started");
    let writer = fill(disk.as_ref());
    wait_until("wrenn-cl-1", true);
    let capsule = layout.capsule("cl-1").expect("an id");
    disk::release(&capsule).expect("released");
    assert!(writer.join().expect("ended").is_err(), "what waits fails");
    // What comes later fails as well, though the rest waits.
    thread::sleep(Duration::from_millis(500));
    let later = File::options().write(true).custom_flags(libc_o_sync()).open(disk.image().path);
    assert!(later.expect("the device").write_all_at(&[1; 4096], 0).is_err());
    // What got through is there for an agent that starts later.
    drop(disk);
    let disk = Backend::open(&capsule).expect("opened").expect("there");
    let mut bytes = vec![0; MIB as usize];
    open(disk.as_ref()).read_exact_at(&mut bytes, 0).expect("read");
    assert!(bytes.iter().all(|byte| *byte == 0x5a));
    remove(&layout, "cl-1", disk);
    drop(guard);
}

fn a_store_that_could_not_write_is_told(directory: &Path) {
    let (layout, base) = place(directory);
    let disk = make(&layout, "cl-1", &base).expect("created");
    // Nobody watches: room for less than the base.
    let ballast = ballast(directory, 8 * MIB);
    assert!(fill(disk.as_ref()).join().expect("ended").is_err(), "the device fails");
    let store = disk.store().expect("looked");
    assert!(matches!(store, Store::Lost { .. }), "{store:?}");
    let flattened = disk.flatten(&layout.images().join("flat.ext4"));
    assert!(matches!(flattened, Err(DiskError::Lost { .. } | DiskError::System { .. })), "{flattened:?}");
    remove(&layout, "cl-1", disk);
    // The loop devices of others are not ours to detach.
    let file = File::create(directory.join("other")).expect("created");
    fs::remove_file(ballast).expect("removed");
    file.set_len(MIB).expect("sized");
    let other = LoopDevice::attach(&file, true, "other").expect("attached");
    assert_eq!(other.size_bytes().expect("looked"), MIB);
    recover(&layout, Take::Over).expect("recovered");
    assert!(other.backing().expect("still attached").own_kind);
}
