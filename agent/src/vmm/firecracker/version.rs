//! Which versions of Firecracker are used.

use std::fmt;

/// The oldest that is used: virtio devices on PCI, which is what guests have drivers for before their root
/// is there, and `track_dirty_pages` at a restore, and neither of the faults below.
const OLDEST: Version = Version([1, 14, 4]);

/// First and last versions that are not used, and why.
const BAD: [(Version, Version, &str); 2] = [
    (Version([1, 13, 0]), Version([1, 14, 3]), PCI_FAULT),
    (Version([1, 15, 0]), Version([1, 15, 0]), PCI_FAULT),
];
const PCI_FAULT: &str = "a guest can make its virtio-pci devices write outside of their memory";

/// A version: major, minor, patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version([u32; 3]);

impl Version {
    /// `1.16.1` of `Firecracker v1.16.1`, the first line of what `--version` prints. What follows the numbers
    /// (`-dev`) is of no account. The jailer calls itself `Jailer`.
    pub fn parse(says: &str, name: &str) -> Option<Version> {
        let text = says.lines().next()?.strip_prefix(name)?.strip_prefix(" v")?;
        let text = text.split(|c: char| c != '.' && !c.is_ascii_digit()).next()?;
        let mut numbers = [0; 3];
        let mut parts = text.split('.');
        for number in &mut numbers {
            *number = parts.next()?.parse().ok()?;
        }
        parts.next().is_none().then_some(Version(numbers))
    }

    /// Why this version is not used; `None` when it is.
    pub fn refusal(self) -> Option<String> {
        if let Some((_, _, why)) = BAD.iter().find(|(first, last, _)| (*first..=*last).contains(&self)) {
            return Some(format!(
                "Firecracker {self} is not safe: {why}; use {OLDEST} or a later 1.14, or 1.15.1 or later"
            ));
        }
        (self < OLDEST)
            .then(|| format!("Firecracker {self} is too old: use {OLDEST} or later, but not 1.15.0"))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.0;
        write!(f, "{major}.{minor}.{patch}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        let parse = |says| Version::parse(says, "Firecracker").map(|v| v.to_string());
        let says = "Firecracker v1.17.0-dev\n\nSupported snapshot data format versions: v8.0.0";
        assert_eq!(parse(says).as_deref(), Some("1.17.0"));
        assert_eq!(parse("Firecracker v1.16.1").as_deref(), Some("1.16.1"));
        for bad in
            ["", "Firecracker", "Firecracker v1.16", "Firecracker v1.2.3.4", "Jailer v1.16.1", "v1.2.3"]
        {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
        assert!(Version::parse("Jailer v1.16.1\n", "Jailer").is_some());
    }

    #[test]
    fn versions_that_are_unsafe_or_too_old_are_refused_with_the_reason() {
        let refusal = |major, minor, patch| Version([major, minor, patch]).refusal();
        for (minor, patch) in [(13, 0), (13, 2), (14, 0), (14, 3), (15, 0)] {
            assert!(refusal(1, minor, patch).is_some_and(|why| why.contains("not safe")), "{minor}.{patch}");
        }
        for (minor, patch) in [(0, 0), (7, 0), (12, 1)] {
            assert!(refusal(1, minor, patch).is_some_and(|why| why.contains("too old")), "{minor}.{patch}");
        }
        for good in [(1, 14, 4), (1, 14, 9), (1, 15, 1), (1, 16, 0), (1, 17, 0), (2, 0, 0)] {
            assert_eq!(refusal(good.0, good.1, good.2), None, "{good:?}");
        }
    }
}
