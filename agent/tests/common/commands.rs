//! Shell commands in capsules, and a process there that counts, so that it is seen whether it lives on.

use super::{Client, Ran};
use wire::codec::Bytes;
use wire::message::{Forward, Message, ProcessStart, ProcessStarted};

/// Counts in its memory alone, and tells when it is asked by a signal. Its files are in memory as well: a guest that
/// writes to its disk on full storage stands still.
const COUNTER: &str = "n=0; trap 'n=$((n+1)); echo $n >/dev/shm/told' USR1; echo $$ >/dev/shm/pid; \
                       while :; do sleep 0.02; done";
const COUNTER_RUNS: &str = "while [ ! -s /dev/shm/pid ]; do sleep 0.02; done";
const ASK_COUNTER: &str =
    "cd /dev/shm; rm -f told; kill -USR1 $(cat pid); while [ ! -s told ]; do sleep 0.02; done; cat told";

/// The standard output of a shell command that has succeeded.
pub fn text_of(command: &str, ran: &Ran) -> String {
    let text = String::from_utf8_lossy(&ran.stdout).trim().to_string();
    assert_eq!(ran.exit_code, 0, "{command}: {text} {}", String::from_utf8_lossy(&ran.stderr));
    text
}

/// The same, of one that is run once the guest daemon is reached.
pub fn shell_when_reached(cp: &mut Client, id: &str, command: &str) -> String {
    text_of(command, &cp.exec_when_reached(id, &["/bin/sh", "-c", command]))
}

/// Starts a shell command that outlives its stream.
pub fn start_detached(cp: &mut Client, id: &str, command: &str) {
    let stream = cp.session.open(&Forward { capsule_id: id.into() }, false).expect("opened");
    let argv = ["/bin/sh", "-c", command].map(|argument| Bytes(argument.as_bytes().to_vec()));
    let start = ProcessStart { argv: argv.to_vec(), detached: true, ..Default::default() };
    cp.session.send_last(stream, &start).expect("sent");
    assert_eq!(cp.answer(stream).0, ProcessStarted::KIND);
}

/// Starts a process that counts from 0.
pub fn start_counter(cp: &mut Client, id: &str) {
    start_detached(cp, id, COUNTER);
    shell_when_reached(cp, id, COUNTER_RUNS);
}

/// The number that the process has counted to by now, one more each time, which only its memory knows.
pub fn count(cp: &mut Client, id: &str) -> u32 {
    shell_when_reached(cp, id, ASK_COUNTER).parse().expect("a number")
}
