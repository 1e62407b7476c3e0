//! Damaged input is refused, never a panic or an endless loop: seeded mutations of everything that is
//! read from outside.

use vendor_check::archive::Archive;
use vendor_check::codec::{gzip, inflate, sha256, tar, zlib};
use vendor_check::lock::CrateId;
use vendor_check::{dependencies, elf, scan, toml};

use crate::support::{self, Fixture};

const ROUNDS: u64 = 3000;
const LIMIT: usize = 1 << 20;

/// xorshift64*: the same mutations in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % bound.max(1)
    }
}

/// A copy with a few bytes changed, cut off, or doubled.
fn mutate(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut copy = bytes.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(copy.len());
        match random.below(5) {
            0 => copy.truncate(at),
            1 => copy.extend_from_within(at..),
            _ if copy.is_empty() => {}
            2 => copy[at] ^= 1 << random.below(8),
            _ => copy[at] = random.below(256) as u8,
        }
    }
    copy
}

#[test]
fn archives() {
    let f = Fixture::new("robustness-archives");
    let packed = f.read("dist/crates/dep-1.0.0.crate");
    let plain = gzip::decompress(&packed, LIMIT).expect("sound");
    let id = CrateId { name: "dep".into(), version: "1.0.0".into() };
    let mut random = Random(1);
    for _ in 0..ROUNDS {
        let damaged = mutate(&packed, &mut random);
        if let Ok(plain) = gzip::decompress(&damaged, LIMIT) {
            assert!(plain.len() <= LIMIT);
        }
        let _ = inflate::inflate(&damaged[damaged.len().min(10)..], LIMIT);
        let inner = mutate(&plain, &mut random);
        let _ = tar::entries(&inner);
        // Hash and wrapping fit: only the inside is damaged.
        let wrapped = support::gzip(&inner);
        let _ = Archive::unpack(&id, &sha256(&wrapped), &wrapped);
    }
}

#[test]
fn texts() {
    let f = Fixture::new("robustness-texts");
    let mut random = Random(2);
    let source =
        "fn f<'a>(x: &'a str) -> u8 { /* c */ unsafe { r#\"s\"#; b'\\''; \"t\\\"\" } } include!(\"x\");";
    for text in [f.read("Cargo.lock"), f.read("app/Cargo.toml"), source.as_bytes().to_vec()] {
        for _ in 0..ROUNDS {
            let damaged = String::from_utf8_lossy(&mutate(&text, &mut random)).into_owned();
            let _ = toml::parse(&damaged);
            scan::scan(&damaged);
        }
    }
}

#[test]
fn binaries() {
    let list = serde_json::json!({ "packages": [] });
    // A small ELF file: a header and the names' section alone.
    let mut file = vec![0u8; 64];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let names = b"\0.shstrtab\0";
    file.extend(names);
    file.resize(80, 0);
    let mut header = [0u8; 64];
    header[0] = 1;
    header[24] = 64;
    header[32] = names.len() as u8;
    file.extend([0u8; 64]);
    file.extend(header);
    file[40] = 80;
    file[58] = 64;
    file[60] = 2;
    file[62] = 1;
    let embedded = dependencies::embed(&file, &list, "x").expect("sound");
    assert_eq!(dependencies::extract(&embedded, "x").expect("sound"), list);
    let mut random = Random(3);
    for _ in 0..ROUNDS {
        let damaged = mutate(&embedded, &mut random);
        let _ = dependencies::extract(&damaged, "x");
        let _ = elf::add_section(&damaged, ".other", b"data");
        let _ = zlib::decompress(&damaged, LIMIT);
    }
}
