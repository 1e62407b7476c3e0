//! Parsers of what comes from outside: whatever they are given, they return.

use envd::{cmdline, json, metadata, metrics, options, ports, sys::inotify, users};

/// xorshift64*: the same inputs in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit.max(1)
    }

    /// A seed with some bytes changed, put in, taken out or repeated.
    fn mutated(&mut self, seed: &[u8]) -> Vec<u8> {
        let mut bytes = seed.to_vec();
        for _ in 0..=self.below(8) {
            let at = self.below(bytes.len() + 1);
            match self.below(5) {
                0 if at < bytes.len() => bytes[at] = self.below(256) as u8,
                1 => bytes.insert(at, b"\0:\n=,\"{}[]\\/ 0\xff"[self.below(15)]),
                2 if at < bytes.len() => drop(bytes.remove(at)),
                3 => bytes.truncate(at),
                _ => {
                    let from = self.below(bytes.len() + 1);
                    let piece = bytes[from..(from + 9).min(bytes.len())].to_vec();
                    bytes.splice(at.min(bytes.len())..at.min(bytes.len()), piece);
                }
            }
        }
        bytes
    }
}

const ROUNDS: usize = 20_000;

fn each(seed: &[u8], mut run: impl FnMut(&[u8])) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..ROUNDS {
        run(&random.mutated(seed));
    }
}

#[test]
fn accounts() {
    let passwd = b"root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:,,,:/home/user:/bin/bash\n";
    let group = b"root:x:0:\nsudo:x:27:user\n";
    each(passwd, |bytes| {
        for name in ["root", "user", "1000", ""] {
            if let Some(user) = users::find(bytes, group, name) {
                assert!(user.uid != u32::MAX && user.gid != u32::MAX && user.groups.contains(&user.gid));
            }
        }
    });
    each(group, |bytes| {
        let user = users::find(passwd, bytes, "user").expect("the account is there");
        assert!(user.groups.len() <= users::MAX_GROUPS);
    });
}

#[test]
fn documents() {
    let document = br#"{"instanceID":"cl-1","envID":"minimal","x":[1,{"y":null}],"address":"a\u00e9"}"#;
    each(document, |bytes| {
        let _ = json::string_members(bytes);
        if let Ok(metadata) = metadata::parse_document(bytes) {
            assert!(!metadata.instance_id.is_empty() && !metadata.env_id.is_empty());
        }
    });
    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\ntoken";
    each(answer, |bytes| {
        let (mut fetch, _) = metadata::Fetch::start();
        let _ = fetch.receive(bytes);
    });
}

#[test]
fn command_lines() {
    let line = b"quiet root=/dev/vda rw ip=169.254.0.21::169.254.0.22:255.255.255.252:cl-1:eth0:off:1.1.1.1";
    each(line, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        if let Some(network) = cmdline::parse(&text).network {
            assert!(network.host_name.len() <= cmdline::MAX_HOST_NAME && !network.device.contains('/'));
        }
        let _ = options::parse(text.split(' '));
    });
}

#[test]
fn kernel_tables() {
    let table = b"  sl local\n   0: 0100007F:1F90 00000000:0000 0A 0:0\n 1: 00000000000000000000000001000000:0BB8 0:0 0A\n";
    each(table, |bytes| {
        let _ = ports::listeners([String::from_utf8_lossy(bytes).as_ref()].into_iter());
    });
    let stat = b"cpu  100 1 20 3000 40 5 6 7 0 0\ncpu0 50 0 10 1500\n";
    each(stat, |bytes| _ = metrics::processors(&String::from_utf8_lossy(bytes)));
    let memory = b"MemTotal:       500 kB\nMemAvailable:   7 kB\n";
    each(memory, |bytes| _ = metrics::memory(&String::from_utf8_lossy(bytes), "MemAvailable"));
    let network = b"    lo: 9 1 0 0 0 0 0 0 9 1\n  eth0: 100 2 0 0 0 0 0 0 50 3\n";
    each(network, |bytes| _ = metrics::network(&String::from_utf8_lossy(bytes)));
    each(b"1.25 0.50 0.10 2/345 999\n", |bytes| _ = metrics::load(&String::from_utf8_lossy(bytes)));
    let events = b"\x01\0\0\0\0\x01\0\0\0\0\0\0\x04\0\0\0abc\0\x02\0\0\0\x40\0\0\0\x07\0\0\0\0\0\0\0";
    each(events, |bytes| {
        let names: usize = inotify::events(bytes).map(|e| e.name.len()).sum();
        assert!(names <= bytes.len());
    });
}
