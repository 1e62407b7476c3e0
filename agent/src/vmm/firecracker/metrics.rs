//! What Firecracker counts: once a minute a line of JSON comes on a pipe. What went wrong in that minute is
//! told; all else is counted elsewhere. Bytes in, findings out.
//!
//! The peer is a VMM that a guest may have taken over: a line has a bound, and so has what is told of one.

use serde_json::Value;

/// The longest line that is read. Firecracker's have some 10 KiB, and more with each device.
pub const MAX_LINE_BYTES: usize = 256 * 1024;
/// The most findings of one line.
const MAX_FINDINGS: usize = 16;

/// Something that went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What, as Firecracker calls it: `block_disk0.execute_fails`.
    pub what: String,
    /// How often since the line before.
    pub count: u64,
}

/// The lines as they come.
#[derive(Debug, Default)]
pub struct Lines {
    input: Vec<u8>,
    /// Whether the line that comes is over its bound, and so passed over.
    skips: bool,
}

impl Lines {
    /// Bytes have come; what the lines that are complete with them tell.
    pub fn receive(&mut self, bytes: &[u8]) -> Vec<Finding> {
        let mut findings = Vec::new();
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.skips |= self.input.len() + piece.len() > MAX_LINE_BYTES;
            if self.skips {
                self.input.clear();
            } else {
                self.input.extend_from_slice(piece);
            }
            if piece.ends_with(b"\n") {
                findings.extend(read_line(&self.input));
                self.input.clear();
                self.skips = false;
            }
        }
        findings
    }
}

/// What a line tells; a line that is none tells nothing.
fn read_line(line: &[u8]) -> Vec<Finding> {
    let Ok(Value::Object(groups)) = serde_json::from_slice(line) else { return Vec::new() };
    let fields = groups.iter().filter_map(|(group, fields)| Some((group, fields.as_object()?)));
    let counts =
        fields.flat_map(|(group, fields)| fields.iter().map(move |(name, value)| (group, name, value)));
    let wrong = counts.filter(|(_, name, _)| is_fault(name));
    let found = wrong.filter_map(|(group, name, value)| {
        let count = value.as_u64().filter(|count| *count > 0)?;
        let what = format!("{group}.{name}").chars().filter(|c| !c.is_control()).collect();
        Some(Finding { what, count })
    });
    found.take(MAX_FINDINGS).collect()
}

fn is_fault(name: &str) -> bool {
    name.ends_with("_fails") || matches!(name, "num_faults" | "panic_count")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_told_and_nothing_else() {
        let line = br#"{"utc_timestamp_ms":1,"block_disk0":{"execute_fails":2,"read_count":9,"cfg_fails":0},
            "seccomp":{"num_faults":1},"vmm":{"panic_count":0}}"#;
        let line: Vec<u8> = line.iter().copied().filter(|b| *b != b'\n').chain(*b"\n").collect();
        let expected = [
            Finding { what: "block_disk0.execute_fails".into(), count: 2 },
            Finding { what: "seccomp.num_faults".into(), count: 1 },
        ];
        for size in [1, 50, 1_000] {
            let mut lines = Lines::default();
            let told: Vec<Finding> = line.chunks(size).flat_map(|piece| lines.receive(piece)).collect();
            assert_eq!(told, expected);
        }
    }

    #[test]
    fn nonsense_and_too_much_tell_nothing_and_do_no_harm() {
        let mut lines = Lines::default();
        for bad in [&b"\n"[..], b"nonsense\n", b"[1]\n", b"{\"a\":{\"b_fails\":-1}}\n", b"\xff\n"] {
            assert_eq!(lines.receive(bad), [], "{bad:?}");
        }
        for _ in 0..2 * MAX_LINE_BYTES / 1_024 {
            assert_eq!(lines.receive(&[b'x'; 1_024]), []);
        }
        assert_eq!(lines.receive(b"\n"), []);
        let told = lines.receive(b"{\"net\":{\"tx_fails\":3}}\n");
        assert_eq!(told, [Finding { what: "net.tx_fails".into(), count: 3 }]);
        let many: Vec<String> = (0..100).map(|i| format!("\"f{i}_fails\":1")).collect();
        assert_eq!(
            lines.receive(format!("{{\"g\":{{{}}}}}\n", many.join(",")).as_bytes()).len(),
            MAX_FINDINGS
        );
    }
}
