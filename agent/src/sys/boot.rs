//! Which run of this host's kernel it is, random(4): numbers of processes and their start times begin anew with each.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::io;

const PATH: &str = "/proc/sys/kernel/random/boot_id";
/// As the kernel writes it: 32 hexadecimal digits in five groups.
const DIGITS: usize = 32;

/// One run of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BootId(u128);

impl BootId {
    /// The present one.
    ///
    /// # Errors
    /// The kernel's file cannot be read, or is not as random(4) has it.
    pub fn current() -> io::Result<BootId> {
        BootId::try_from(fs::read_to_string(PATH)?.trim().to_string()).map_err(io::Error::other)
    }
}

impl TryFrom<String> for BootId {
    type Error = String;

    fn try_from(text: String) -> Result<BootId, String> {
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        let number = u128::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == DIGITS);
        number.map(BootId).ok_or_else(|| format!("{text:?} is no boot id"))
    }
}

impl From<BootId> for String {
    fn from(id: BootId) -> String {
        id.to_string()
    }
}

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:032x}", self.0);
        let groups = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
        f.write_str(&groups.join("-"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_as_the_kernel_does_and_nothing_else_is_read() {
        let text = fs::read_to_string(PATH).expect("read");
        let id = BootId::current().expect("known");
        assert_eq!(id.to_string(), text.trim());
        assert_eq!(BootId::try_from(id.to_string()), Ok(id));
        for bad in ["", "0", "zz", &"0".repeat(31), &"0".repeat(33), &"+".repeat(32)] {
            assert!(BootId::try_from(bad.to_string()).is_err(), "{bad}");
        }
    }
}
