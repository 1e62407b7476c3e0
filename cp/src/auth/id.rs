//! Ids: 128 random bits in base 36, 25 digits, behind a prefix that says what they name.

use super::random;

/// Digits after the prefix: 36^25 > 2^128 > 36^24.
pub const DIGITS: usize = 25;

const ALPHABET: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// What an id names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `cl-`
    Capsule,
    /// `usr-`
    User,
    /// `team-`
    Team,
    /// `key-`
    ApiKey,
    /// `host-`
    Host,
    /// `log-`
    AuditEntry,
    /// `htok-`
    RegistrationToken,
    /// `hrt-`
    RefreshToken,
    /// `snap-`, by which its host knows a snapshot
    Snapshot,
}

impl Kind {
    /// The prefix with its hyphen.
    pub fn prefix(self) -> &'static str {
        match self {
            Kind::Capsule => "cl-",
            Kind::User => "usr-",
            Kind::Team => "team-",
            Kind::ApiKey => "key-",
            Kind::Host => "host-",
            Kind::AuditEntry => "log-",
            Kind::RegistrationToken => "htok-",
            Kind::RefreshToken => "hrt-",
            Kind::Snapshot => "snap-",
        }
    }

    /// A new id, never seen before but with probability 2^-64 after 2^32 of them.
    pub fn new_id(self) -> String {
        format(self, u128::from_be_bytes(random::bytes()))
    }

    /// Whether `text` has the form of an id of this kind. What has not cannot exist, and need not be
    /// looked up.
    pub fn accepts(self, text: &str) -> bool {
        text.strip_prefix(self.prefix()).is_some_and(|digits| {
            digits.len() == DIGITS && digits.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase())
        })
    }
}

fn format(kind: Kind, mut number: u128) -> String {
    let mut digits = [b'0'; DIGITS];
    for digit in digits.iter_mut().rev() {
        *digit = ALPHABET[(number % 36) as usize];
        number /= 36;
    }
    assert_eq!(number, 0, "25 base-36 digits hold 128 bits");
    let mut text = String::with_capacity(kind.prefix().len() + DIGITS);
    text.push_str(kind.prefix());
    text.extend(digits.iter().map(|b| char::from(*b)));
    text
}

/// A new team slug: `xxxxxx-yyyyyy`, hexadecimal.
pub fn new_slug() -> String {
    let digits = random::hex(&random::bytes::<6>());
    format!("{}-{}", &digits[..6], &digits[6..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_25_digits_whatever_the_number() {
        assert_eq!(format(Kind::Capsule, 0), "cl-0000000000000000000000000");
        assert_eq!(format(Kind::Host, 35), "host-000000000000000000000000z");
        assert_eq!(format(Kind::User, 36), "usr-0000000000000000000000010");
        // 2^128 - 1 in base 36, by `python3 -c` of the same division.
        assert_eq!(format(Kind::Team, u128::MAX), "team-f5lxx1zz5pnorynqglhzmsp33");
    }

    #[test]
    fn only_the_own_form_is_accepted() {
        for kind in [Kind::Capsule, Kind::User, Kind::Team, Kind::ApiKey, Kind::Host, Kind::AuditEntry] {
            let id = kind.new_id();
            assert!(kind.accepts(&id), "{id}");
            assert!(!Kind::RefreshToken.accepts(&id));
        }
        for bad in ["", "cl-", "cl-000000000000000000000000", "cl-000000000000000000000000Z", "CL-"] {
            assert!(!Kind::Capsule.accepts(bad), "{bad}");
        }
        assert!(!Kind::Capsule.accepts("cl-00000000000000000000000é"));
    }

    #[test]
    fn slugs_are_two_groups_of_six() {
        let slug = new_slug();
        assert_eq!((slug.len(), slug.as_bytes()[6]), (13, b'-'));
    }
}
