//! Rings as bytes, for a file: eight bytes that say what it is and in which version, eight that check the rest, and
//! the rings. Numbers are big-endian.

use super::{Ring, Sample, TIERS, Usage};
use std::fmt;
use wire::auth::hmac_sha256;

/// What a file of figures begins with; the version is behind it.
const MAGIC: &[u8; 6] = b"wusage";
/// The version of the form. Figures of another are begun anew: they are not worth a second reader.
const VERSION: u16 = 1;
/// Tells these checks apart from those of anything else.
const CHECK_KEY: &[u8] = b"wrenn capsule usage v1";
const CHECK_BYTES: usize = 8;
const HEAD_BYTES: usize = MAGIC.len() + size_of::<u16>() + CHECK_BYTES;
/// Of a ring, before its samples: the step under way, what has come of it, and how many samples follow.
const RING_BYTES: usize = 4 + 4 * 8 + 4;
const SAMPLE_BYTES: usize = 4 + 2 + 4 + 4;

/// The longest form of a capsule's rings, in bytes: less than 24 KiB.
pub const MAX_BYTES: usize = {
    let mut bytes = HEAD_BYTES;
    let mut tier = 0;
    while tier < TIERS.len() {
        bytes += RING_BYTES + TIERS[tier].length * SAMPLE_BYTES;
        tier += 1;
    }
    bytes
};

/// Why bytes are no rings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FormError {
    /// They are of another version.
    Version(u16),
    /// They are damaged, or something else.
    Damaged,
}

impl fmt::Display for FormError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FormError::Version(version) => {
                write!(f, "the figures are of version {version}, this agent knows {VERSION}")
            }
            FormError::Damaged => f.write_str("the figures are damaged"),
        }
    }
}

impl std::error::Error for FormError {}

impl Usage {
    /// At most [`MAX_BYTES`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(MAX_BYTES);
        for ring in &self.rings {
            body.extend(ring.step.to_be_bytes());
            for sum in [ring.count, ring.cpu, ring.memory_kib, ring.disk_kib] {
                body.extend(sum.to_be_bytes());
            }
            body.extend((ring.samples.len() as u32).to_be_bytes());
            for (step, sample) in &ring.samples {
                body.extend(step.to_be_bytes());
                body.extend(sample.cpu.to_be_bytes());
                body.extend(sample.memory_kib.to_be_bytes());
                body.extend(sample.disk_kib.to_be_bytes());
            }
        }
        [&MAGIC[..], &VERSION.to_be_bytes(), &check(&body), &body].concat()
    }

    /// The rings that [`Usage::to_bytes`] has made these of.
    ///
    /// # Errors
    /// They are no such bytes, all of them and nothing else.
    pub fn from_bytes(bytes: &[u8]) -> Result<Usage, FormError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(FormError::Damaged)?;
        let (version, rest) = rest.split_first_chunk().ok_or(FormError::Damaged)?;
        let version = u16::from_be_bytes(*version);
        if version != VERSION {
            return Err(FormError::Version(version));
        }
        let (checked, body) = rest.split_first_chunk::<CHECK_BYTES>().ok_or(FormError::Damaged)?;
        if *checked != check(body) {
            return Err(FormError::Damaged);
        }
        rings(body).ok_or(FormError::Damaged)
    }
}

fn rings(body: &[u8]) -> Option<Usage> {
    let mut reader = Reader(body);
    let mut usage = Usage::default();
    for (ring, tier) in usage.rings.iter_mut().zip(TIERS) {
        let step = reader.u32()?;
        let (count, cpu, memory_kib, disk_kib) = (reader.u64()?, reader.u64()?, reader.u64()?, reader.u64()?);
        *ring = Ring { step, count, cpu, memory_kib, disk_kib, ..Ring::default() };
        let length = usize::try_from(reader.u32()?).ok().filter(|length| *length <= tier.length)?;
        for _ in 0..length {
            let step = reader.u32()?;
            let sample = Sample { cpu: reader.u16()?, memory_kib: reader.u32()?, disk_kib: reader.u32()? };
            ring.samples.push_back((step, sample));
        }
    }
    reader.0.is_empty().then_some(usage)
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }
}

fn check(body: &[u8]) -> [u8; CHECK_BYTES] {
    let digest = hmac_sha256(CHECK_KEY, &[body]);
    std::array::from_fn(|at| digest[at])
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOON: u64 = 1_800_000_000_000;

    fn full() -> Usage {
        let mut usage = Usage::default();
        for i in 0..25 * 7200 {
            usage.push(NOON + i * 500, Sample::new(i % 100, 4096 * i, 1024 * i));
        }
        usage
    }

    #[test]
    fn what_is_read_is_what_was_written_and_goes_on_as_if_nothing_had_been() {
        let mut usage = full();
        let bytes = usage.to_bytes();
        assert_eq!(bytes.len(), MAX_BYTES);
        assert!(bytes.len() <= 24 * 1024, "{} bytes", bytes.len());
        let mut read = Usage::from_bytes(&bytes).expect("read");
        // The average that is under way goes on too.
        for i in 0..1_200 {
            let sample = Sample::new(7, i, i);
            usage.push(NOON + 90_000_000 + i * 500, sample);
            read.push(NOON + 90_000_000 + i * 500, sample);
        }
        for range_sec in [600, 7_200, 86_400] {
            let points: Vec<_> = usage.last(range_sec).collect();
            assert!(!points.is_empty() && points == read.last(range_sec).collect::<Vec<_>>(), "{range_sec}");
        }
        let nothing = Usage::from_bytes(&Usage::default().to_bytes()).expect("read");
        assert_eq!(nothing.last(86_400).count(), 0);
    }

    #[test]
    fn nothing_else_is_read() {
        let mut usage = Usage::default();
        for i in 0..5 {
            usage.push(NOON + i * 500, Sample::new(i, i, i));
        }
        let bytes = usage.to_bytes();
        for at in 0..bytes.len() {
            assert!(Usage::from_bytes(&bytes[..at]).is_err(), "{at}");
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(Usage::from_bytes(&bad).is_err(), "{at}");
        }
        let mut later = bytes.clone();
        later[7] += 1;
        assert_eq!(Usage::from_bytes(&later).map(|_| ()), Err(FormError::Version(2)));
        assert!(Usage::from_bytes(&[&bytes[..], b"x"].concat()).is_err());
        // More samples than a ring has, though the check is right.
        let body =
            [&[0; 36][..], &1_201u32.to_be_bytes(), &[0; 1_201 * SAMPLE_BYTES + 2 * RING_BYTES]].concat();
        let long = [&MAGIC[..], &VERSION.to_be_bytes(), &check(&body), &body].concat();
        assert_eq!(Usage::from_bytes(&long).map(|_| ()), Err(FormError::Damaged));
    }
}
