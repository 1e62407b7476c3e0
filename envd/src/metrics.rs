//! What the guest uses of its machine, from the kernel's tables, read when it is asked for.

use crate::process::request::errno_error;
use crate::sys::{clock, file};
use alloc::format;
use alloc::string::String;
use core::ffi::CStr;
use wire::message::{Error, GuestMetricsReply};

/// Bytes of a table that are looked at: what is needed stands at its start.
const MAX_TABLE: usize = 64 * 1024;
/// Milliseconds of one tick in `/proc/stat` (`USER_HZ` is 100 on every Linux that envd runs on).
const TICK_MS: u64 = 10;

/// A table. What the kernel does not have is told as zero.
fn read(path: &CStr) -> Result<String, Error> {
    let bytes = file::read_if_any(path, MAX_TABLE)
        .map_err(|e| errno_error(&format!("cannot read {}", path.to_string_lossy()), e))?;
    Ok(String::from_utf8(bytes).unwrap_or_default())
}

/// Far above any real figure, and low enough for sums and units not to overflow.
const MAX_FIGURE: u64 = 1 << 50;

fn number(field: Option<&str>) -> u64 {
    field.and_then(|f| f.parse().ok()).unwrap_or(0).min(MAX_FIGURE)
}

/// Working and idle time in milliseconds, and the number of processors.
pub fn processors(stat: &str) -> (u64, u64, u32) {
    let mut fields = stat.lines().next().unwrap_or("").split_ascii_whitespace().skip(1);
    let mut next = || number(fields.next());
    let (user, nice, system, idle, wait) = (next(), next(), next(), next(), next());
    let (irq, soft_irq, stolen) = (next(), next(), next());
    let busy = user + nice + system + irq + soft_irq + stolen;
    let count = stat.lines().skip(1).take_while(|l| l.starts_with("cpu")).count();
    (busy * TICK_MS, (idle + wait) * TICK_MS, count as u32)
}

/// A field of `/proc/meminfo`, in bytes.
pub fn memory(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|l| l.strip_prefix(name)).and_then(|l| l.strip_prefix(':'));
    number(line.and_then(|l| l.split_ascii_whitespace().next())) * 1024
}

/// Received and sent bytes of all interfaces but the loopback.
pub fn network(dev: &str) -> (u64, u64) {
    let mut sum = (0, 0);
    for (name, fields) in dev.lines().filter_map(|l| l.split_once(':')) {
        if name.trim() != "lo" {
            let mut fields = fields.split_ascii_whitespace();
            sum.0 += number(fields.next());
            sum.1 += number(fields.nth(7));
        }
    }
    sum
}

/// The load over one minute in thousandths, and the number of processes.
pub fn load(loadavg: &str) -> (u32, u32) {
    let mut fields = loadavg.split_ascii_whitespace();
    let (whole, part) = fields.next().and_then(|f| f.split_once('.')).unwrap_or(("0", "0"));
    let thousandths = number(Some(whole)) * 1000 + number(part.get(..2)) * 10;
    let processes = fields.nth(2).and_then(|f| f.split_once('/')).map(|(_, all)| all);
    (thousandths as u32, number(processes) as u32)
}

/// The present figures.
pub fn now() -> Result<GuestMetricsReply, Error> {
    let (busy_ms, idle_ms, processors) = processors(&read(c"/proc/stat")?);
    let meminfo = read(c"/proc/meminfo")?;
    let (received, sent) = network(&read(c"/proc/net/dev")?);
    let (load_1m_thousandths, processes) = load(&read(c"/proc/loadavg")?);
    let (disk_total_bytes, disk_available_bytes) =
        file::space(c"/").map_err(|e| errno_error("cannot read the size of the disk", e))?;
    Ok(GuestMetricsReply {
        at_ms: clock::monotonic_ms(),
        processors,
        busy_ms,
        idle_ms,
        memory_total_bytes: memory(&meminfo, "MemTotal"),
        memory_available_bytes: memory(&meminfo, "MemAvailable"),
        disk_total_bytes,
        disk_available_bytes,
        network_received_bytes: received,
        network_sent_bytes: sent,
        load_1m_thousandths,
        processes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let stat = "cpu  100 1 20 3000 40 5 6 7 0 0\ncpu0 50 0 10 1500 20 2 3 3 0 0\ncpu1 50 1 10 1500 20 3 3 4 0 0\nintr 5\n";
        assert_eq!(processors(stat), (1390, 30400, 2));
        assert_eq!(memory("MemTotal:  500 kB\nMemAvailable:   7 kB\n", "MemAvailable"), 7168);
        let dev = "Inter-| Receive\n face |bytes\n    lo: 9 1 0 0 0 0 0 0 9 1 0 0 0 0 0 0\n  eth0: 100 2 0 0 0 0 0 0 50 3 0 0 0 0 0 0\n";
        assert_eq!(network(dev), (100, 50));
        assert_eq!(load("1.25 0.50 0.10 2/345 999\n"), (1250, 345));
        for empty in ["", "\n", "cpu", "x: y"] {
            let _ = (processors(empty), memory(empty, "MemTotal"), network(empty), load(empty));
        }
    }
}
