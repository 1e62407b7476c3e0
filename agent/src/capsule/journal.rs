//! A capsule's journal: what was intended and what was done, in order, in the capsule's directory. An agent
//! that finds it at its start knows what one before it has made, was making, or was taking away.
//!
//! A line is one entry: sixteen hexadecimal digits that check it, a space, and a JSON object. Lines are
//! appended and never changed. What a crash leaves of the last one is no entry: the step that it would have
//! told of had not begun, for a step begins when its entry is written. Where an entry changes what the
//! capsule owns it carries the whole [`Record`], so the last one that does is what holds.
//!
//! What has to survive a power cut is on disk before [`append`] returns. The rest needs to survive the agent
//! alone, for which the kernel's copy will do: after a power cut no machine, network or device is there.

use super::record::{self, Record};
use crate::whole_file;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use wire::auth::hmac_sha256;

/// The journal, in the capsule's directory.
pub const FILE_NAME: &str = "journal";
/// The longest journal that is read, in bytes: some entries of [`record::MAX_RECORD_BYTES`].
pub const MAX_JOURNAL_BYTES: u64 = 8 * record::MAX_RECORD_BYTES;
/// A journal longer than this, in bytes, begins anew with the next entry: neither years of snapshots nor a
/// resume that fails again and again may make one too long to be read.
const LONG_BYTES: u64 = 65_536;
/// How often a journal is opened anew that another job has begun anew meanwhile. A capsule has two jobs at most.
const OPEN_ATTEMPTS: u32 = 4;
/// Tells a journal's checks apart from those of anything else.
const CHECK_KEY: &[u8] = b"wrenn capsule journal v1";
const CHECK_DIGITS: usize = 16;
const MODE: u32 = 0o600;

/// What a capsule's life consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Its directory.
    Create,
    /// Making its network.
    Network,
    /// Making its disk.
    Disk,
    /// Starting its machine.
    Machine,
    /// Its guest daemon has answered: from now on somebody relies on it.
    Ready,
    /// Writing its memory and devices down.
    Save,
    /// Putting what has changed into its memory's file.
    Merge,
    /// Letting the guest of a restored machine go on: its image fits its disk no more.
    GoOn,
    /// Compressing its memory's file.
    Pack,
    /// Making a snapshot.
    Snapshot,
    /// Taking its network away.
    RemoveNetwork,
    /// Destroying it. Only then are its machine, its disk and its directory removed.
    Destroy,
    /// Taking its disk away.
    RemoveDisk,
    /// An agent has found it and goes on with it.
    Adopt,
}

/// Where a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It begins; nothing of it is done.
    Begin,
    /// It is done.
    Done,
    /// It was not done, and nothing of it is left.
    Failed,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// Milliseconds since 1970, for a person.
    at_ms: u64,
    step: Step,
    phase: Phase,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    record: Option<Record>,
}

/// What a journal says.
#[derive(Debug)]
pub struct History {
    /// What the capsule owns.
    pub record: Record,
    /// The last entry.
    pub last: (Step, Phase),
}

/// Begins a capsule's journal, in place of what is there of one. Blocks until it is on disk.
pub fn begin(directory: &Path, step: Step, phase: Phase, record: &Record) -> io::Result<()> {
    crash_point(directory, step, phase, Moment::Before);
    whole_file::replace(&directory.join(FILE_NAME), &line(step, phase, Some(record))?, MODE)?;
    crash_point(directory, step, phase, Moment::After);
    Ok(())
}

/// Begins a capsule's journal anew for an agent that takes it over. On a full disk the one that is there goes on,
/// without what a crash has left of its last line: what runs or is paused must not be given up for that. Blocks
/// until it is on disk.
pub fn take_over(directory: &Path, record: &Record) -> io::Result<()> {
    match begin(directory, Step::Adopt, Phase::Done, record) {
        Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            log::warn!("{}: the journal is not begun anew: {e}; make room", directory.display());
            cut_torn_end(&directory.join(FILE_NAME)).map_err(|_| e)
        }
        other => other,
    }
}

/// What is appended after half a line would make that line damage in the midst.
fn cut_torn_end(path: &Path) -> io::Result<()> {
    let text = whole_file::read(path, MAX_JOURNAL_BYTES, "journal")?.ok_or(io::ErrorKind::NotFound)?;
    let lines = text.split_inclusive(|b| *b == b'\n');
    let whole: usize = lines.take_while(|line| entry_of(line).is_some()).map(<[u8]>::len).sum();
    if whole == 0 {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(whole as u64)?;
    file.sync_data()
}

/// Appends an entry, with a record where what the capsule owns changes with it. Blocks.
///
/// # Errors
/// Nothing of it is in the journal then.
pub fn append(directory: &Path, step: Step, phase: Phase, record: Option<&Record>) -> io::Result<()> {
    let path = directory.join(FILE_NAME);
    let mut file = open_locked(&path)?;
    let length = file.metadata()?.len();
    if length > LONG_BYTES {
        match begin_anew(directory, step, phase, record) {
            Ok(()) => return Ok(()),
            // On a full disk an entry may still fit where a journal does not.
            Err(e) => log::warn!("{}: beginning the journal anew: {e}", directory.display()),
        }
    }
    crash_point(directory, step, phase, Moment::Before);
    let line = line(step, phase, record)?;
    #[cfg(feature = "crash-points")]
    crash::torn(&mut file, &line, step, phase);
    let written = file.write_all(&line).and_then(|()| match survives_power_cut(step, phase) {
        true => file.sync_data(),
        false => Ok(()),
    });
    if written.is_err() {
        file.set_len(length)?;
    }
    written?;
    drop(file);
    crash_point(directory, step, phase, Moment::After);
    Ok(())
}

/// Puts a journal of this one entry in place of a long one, which the caller has locked.
fn begin_anew(directory: &Path, step: Step, phase: Phase, record: Option<&Record>) -> io::Result<()> {
    let known = match record {
        Some(_) => None,
        None => read(directory)?.map(|history| history.record),
    };
    let record = record.or(known.as_ref()).ok_or_else(|| invalid("the journal has no record".into()))?;
    begin(directory, step, phase, record)
}

/// Opens a journal to append to it, locked: jobs of one capsule may run at once, and a failure is taken back.
fn open_locked(path: &Path) -> io::Result<File> {
    for _ in 0..OPEN_ATTEMPTS {
        let file = OpenOptions::new().append(true).open(path)?;
        file.lock()?;
        // The one that it was waited for may have been replaced meanwhile: what goes there, nobody reads.
        if file.metadata()?.ino() == fs::metadata(path)?.ino() {
            return Ok(file);
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "the journal is begun anew again and again"))
}

/// What the journal in a capsule's directory says; `None` where there is none. Blocks.
///
/// # Errors
/// `InvalidData` when an entry in its midst is damaged, or it is a later agent's.
pub fn read(directory: &Path) -> io::Result<Option<History>> {
    let Some(text) = whole_file::read(&directory.join(FILE_NAME), MAX_JOURNAL_BYTES, "journal")? else {
        return Ok(None);
    };
    parse(&text)
}

fn parse(text: &[u8]) -> io::Result<Option<History>> {
    let mut history: Option<History> = None;
    let mut damaged = None;
    for (number, line) in (1..).zip(text.split_inclusive(|b| *b == b'\n')) {
        let Some(entry) = entry_of(line) else {
            damaged.get_or_insert(number);
            continue;
        };
        if let Some(number) = damaged {
            return Err(invalid(format!("line {number} of the journal is damaged, and others follow it")));
        }
        let entry: Entry = serde_json::from_slice(entry)?;
        let record = entry.record.or_else(|| Some(history.take()?.record));
        let record = record.ok_or_else(|| invalid("the journal begins without a record".into()))?;
        history = Some(History { record, last: (entry.step, entry.phase) });
    }
    if let Some(History { record, .. }) = &history {
        record.check_version()?;
    }
    Ok(history)
}

/// The JSON of a line that is whole.
fn entry_of(line: &[u8]) -> Option<&[u8]> {
    let (digits, rest) = line.split_at_checked(CHECK_DIGITS)?;
    let json = rest.strip_prefix(b" ")?.strip_suffix(b"\n")?;
    (digits == check(json).as_bytes()).then_some(json)
}

fn line(step: Step, phase: Phase, record: Option<&Record>) -> io::Result<Vec<u8>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let at_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let json = serde_json::to_vec(&Entry { at_ms, step, phase, record: record.cloned() })?;
    let mut line = check(&json).into_bytes();
    line.push(b' ');
    line.extend_from_slice(&json);
    line.push(b'\n');
    Ok(line)
}

fn check(json: &[u8]) -> String {
    let digest = hmac_sha256(CHECK_KEY, &[json]);
    digest.iter().take(CHECK_DIGITS / 2).map(|byte| format!("{byte:02x}")).collect()
}

/// A paused capsule is all that a power cut leaves, and whether it is one must not depend on the moment.
fn survives_power_cut(step: Step, phase: Phase) -> bool {
    matches!(
        (step, phase),
        (Step::Save | Step::Merge | Step::Pack, Phase::Done)
            | (Step::GoOn | Step::Destroy, Phase::Begin)
            | (Step::Machine, Phase::Failed)
    )
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    Before,
    After,
}

#[cfg(not(feature = "crash-points"))]
fn crash_point(_: &Path, _: Step, _: Phase, _: Moment) {}

#[cfg(feature = "crash-points")]
use crash::crash_point;

/// Ends the agent, its machine or both at an entry of the journal, for tests of what the next one finds.
#[cfg(feature = "crash-points")]
mod crash {
    use super::{Moment, Path, Phase, Step, Write, read};
    use std::fs::File;

    /// Where: `[before:|torn:]STEP.PHASE`.
    const AT: &str = "CRASH_AT";
    /// What ends: `agent`, which holds where it is not set, `vmm` or `both`.
    const KILL: &str = "CRASH_KILL";

    fn is_wanted(prefix: &str, step: Step, phase: Phase) -> bool {
        std::env::var(AT).is_ok_and(|at| at == format!("{prefix}{}.{}", name(&step), name(&phase)))
    }

    /// As the journal has it.
    fn name(part: &impl serde::Serialize) -> String {
        serde_json::to_string(part).unwrap_or_default().trim_matches('"').to_string()
    }

    pub fn crash_point(directory: &Path, step: Step, phase: Phase, moment: Moment) {
        let prefix = if moment == Moment::Before { "before:" } else { "" };
        if is_wanted(prefix, step, phase) {
            crash(directory);
        }
    }

    pub fn torn(file: &mut File, line: &[u8], step: Step, phase: Phase) {
        if is_wanted("torn:", step, phase) {
            let _ = file.write_all(&line[..line.len() / 2]);
            end_agent();
        }
    }

    fn crash(directory: &Path) {
        let kill = std::env::var(KILL).unwrap_or_default();
        if matches!(kill.as_str(), "vmm" | "both") {
            let machine = read(directory).ok().flatten().and_then(|history| history.record.machine);
            if let Some(machine) = machine
                && let Ok(process) = machine.open()
            {
                let _ = process.kill();
            }
        }
        if kill != "vmm" {
            end_agent();
        }
    }

    fn end_agent() {
        // SAFETY: both calls take plain numbers. SIGKILL to itself ends a process before kill(2) returns.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::{Image, Kind};
    use std::path::PathBuf;

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Directory {
            let path = std::env::temp_dir().join(format!("wrenn-journal-{name}-{}", std::process::id()));
            std::fs::create_dir(&path).expect("made");
            Directory(path)
        }

        fn text(&self) -> Vec<u8> {
            std::fs::read(self.0.join(FILE_NAME)).expect("there")
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn record() -> Record {
        record::tests::record()
    }

    fn written(directory: &Directory) -> (Record, Record) {
        let first = record();
        begin(&directory.0, Step::Create, Phase::Done, &first).expect("begun");
        append(&directory.0, Step::Disk, Phase::Begin, None).expect("appended");
        let second = Record {
            image: Some(Image { memory: 9, delta: None, state: 9, packed: false, vmm: Kind::Qemu }),
            ..first.clone()
        };
        append(&directory.0, Step::Save, Phase::Done, Some(&second)).expect("appended");
        append(&directory.0, Step::RemoveNetwork, Phase::Begin, None).expect("appended");
        (first, second)
    }

    #[test]
    fn the_last_record_holds_and_the_last_step_is_known() {
        let directory = Directory::new("last");
        assert!(read(&directory.0).expect("none").is_none());
        assert!(append(&directory.0, Step::Disk, Phase::Begin, None).is_err(), "there is no journal");
        let (_, second) = written(&directory);
        let history = read(&directory.0).expect("read").expect("there");
        assert_eq!((history.record, history.last), (second, (Step::RemoveNetwork, Phase::Begin)));
        let text = String::from_utf8(directory.text()).expect("text");
        assert_eq!(text.lines().count(), 4);
        assert!(text.contains(r#""step":"remove_network","phase":"begin"}"#), "{text}");
    }

    #[test]
    fn a_torn_end_is_no_entry_wherever_it_is_torn() {
        let directory = Directory::new("torn");
        let (first, second) = written(&directory);
        let text = directory.text();
        let ends: Vec<usize> =
            text.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(i, _)| i + 1).collect();
        for length in 0..=text.len() {
            let whole = ends.iter().filter(|end| **end <= length).count();
            let history = parse(&text[..length]).expect("torn, not damaged");
            let expected = [None, Some(&first), Some(&first), Some(&second), Some(&second)][whole];
            assert_eq!(history.as_ref().map(|h| &h.record), expected, "{length}");
            // As after a power cut: the file is longer, the bytes never came.
            let zeros: Vec<u8> = text[..length].iter().copied().chain([0; 40]).collect();
            let history = parse(&zeros).expect("torn, not damaged");
            assert_eq!(history.as_ref().map(|h| &h.record), expected, "{length}, zeros");
        }
    }

    #[test]
    fn damage_in_the_midst_is_told() {
        let directory = Directory::new("damage");
        written(&directory);
        let text = directory.text();
        let last = text[..text.len() - 1].iter().rposition(|b| *b == b'\n').expect("lines") + 1;
        // Without the line end before it, the last entry looks torn.
        for at in 0..last - 1 {
            let mut bad = text.clone();
            bad[at] ^= 0x01;
            let error = parse(&bad).expect_err("damaged");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{at}: {error}");
        }
        let newer = Record { version: record::VERSION + 1, ..record() };
        let line = line(Step::Create, Phase::Done, Some(&newer)).expect("a line");
        assert!(parse(&line).expect_err("newer").to_string().contains("version"));
        let line = self::line(Step::Disk, Phase::Done, None).expect("a line");
        assert!(parse(&line).is_err(), "no record");
    }

    #[test]
    fn a_long_journal_begins_anew_whatever_makes_it_long() {
        let large = Record {
            kept: crate::capsule::record::Kept {
                environment: vec![("QQ==".into(), "A".repeat(44_000))],
                ..record().kept
            },
            ..record()
        };
        let same: &[(Step, Phase, bool)] =
            &[(Step::Save, Phase::Begin, true), (Step::Save, Phase::Failed, true)];
        // A resume that fails, as often as somebody asks for it; snapshots of one that is never paused.
        let resume =
            [(Step::Network, Phase::Begin), (Step::Machine, Phase::Done), (Step::Machine, Phase::Failed)];
        let resume = resume.map(|(step, phase)| (step, phase, true));
        let snapshot = [(Step::Snapshot, Phase::Begin, false), (Step::Snapshot, Phase::Done, false)];
        for (name, record, entries, times) in [
            ("long", record(), same, 1_000),
            ("long-resume", large, &resume[..], 30),
            ("long-snapshot", record(), &snapshot[..], 12_000),
        ] {
            let directory = Directory::new(name);
            begin(&directory.0, Step::Create, Phase::Done, &record).expect("begun");
            let mut longest = 0;
            for _ in 0..times {
                for (step, phase, with_record) in entries {
                    append(&directory.0, *step, *phase, with_record.then_some(&record)).expect("appended");
                }
                longest = longest.max(fs::metadata(directory.0.join(FILE_NAME)).expect("there").len());
            }
            assert!(longest > LONG_BYTES && longest < 3 * LONG_BYTES, "{name}: {longest}");
            let history = read(&directory.0).expect("read").expect("there");
            let last = entries.last().map(|(step, phase, _)| (*step, *phase));
            assert_eq!((history.record, Some(history.last)), (record, last), "{name}");
        }
    }

    #[test]
    fn a_torn_end_is_cut_off_and_nothing_else() {
        let directory = Directory::new("cut");
        let (_, second) = written(&directory);
        let (path, text) = (directory.0.join(FILE_NAME), directory.text());
        for torn in [&b""[..], b"0", b"0123456789abcdef {\"at_ms\":1", &[0; 40]] {
            fs::write(&path, [&text[..], torn].concat()).expect("written");
            cut_torn_end(&path).expect("cut");
            assert!(directory.text() == text);
            append(&directory.0, Step::RemoveNetwork, Phase::Done, None).expect("appended");
            let history = read(&directory.0).expect("read").expect("there");
            assert_eq!((history.record, history.last), (second.clone(), (Step::RemoveNetwork, Phase::Done)));
        }
        // Of an agent before the journal there is nothing that could go on.
        fs::write(&path, b"").expect("written");
        assert!(cut_torn_end(&path).is_err());
        fs::remove_file(&path).expect("removed");
        assert!(cut_torn_end(&path).is_err());
    }

    #[test]
    fn what_waits_for_a_journal_that_is_begun_anew_goes_into_the_new_one() {
        let directory = Directory::new("anew");
        let record = record();
        begin(&directory.0, Step::Create, Phase::Done, &record).expect("begun");
        let held = open_locked(&directory.0.join(FILE_NAME)).expect("locked");
        let path = directory.0.clone();
        let waiting = std::thread::spawn(move || append(&path, Step::RemoveDisk, Phase::Begin, None));
        // Long enough for it to have opened the old one; were it not, it would be no less right.
        std::thread::sleep(std::time::Duration::from_millis(50));
        begin(&directory.0, Step::Save, Phase::Begin, &record).expect("begun anew");
        drop(held);
        waiting.join().expect("ended").expect("appended");
        let last = read(&directory.0).expect("read").expect("there").last;
        assert_eq!(last, (Step::RemoveDisk, Phase::Begin));
    }
}
