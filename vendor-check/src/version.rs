//! Versions (Semantic Versioning 2.0.0) and Cargo's version requirements.

use std::cmp::Ordering;
use std::fmt;

/// A version; build metadata is kept but takes no part in the order (SemVer, 10).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Version {
    /// Major, minor, patch.
    pub core: [u64; 3],
    /// The pre-release identifiers, empty for a release.
    pub pre: Vec<String>,
    /// The build metadata.
    pub build: String,
}

fn identifiers(text: &str) -> Option<Vec<String>> {
    text.split('.')
        .map(|part| {
            let valid = !part.is_empty() && part.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-');
            valid.then(|| part.to_owned())
        })
        .collect()
}

fn number(text: &str) -> Option<u64> {
    let canonical = text == "0" || !text.starts_with('0');
    if canonical && text.bytes().all(|c| c.is_ascii_digit()) { text.parse().ok() } else { None }
}

impl Version {
    /// Parses a full version; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (text, build) = text.split_once('+').map_or((text, ""), |(text, build)| (text, build));
        if !build.is_empty() {
            identifiers(build)?;
        }
        let (core, pre) = text.split_once('-').map_or((text, None), |(core, pre)| (core, Some(pre)));
        let pre = pre.map_or(Some(Vec::new()), identifiers)?;
        if pre.iter().any(|part| part.bytes().all(|c| c.is_ascii_digit()) && number(part).is_none()) {
            return None;
        }
        let parts = core.split('.').map(number).collect::<Option<Vec<_>>>()?;
        Some(Self { core: parts.try_into().ok()?, pre, build: build.to_owned() })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.core;
        write!(f, "{major}.{minor}.{patch}")?;
        if !self.pre.is_empty() {
            write!(f, "-{}", self.pre.join("."))?;
        }
        if self.build.is_empty() { Ok(()) } else { write!(f, "+{}", self.build) }
    }
}

/// SemVer, 11: numbers by value and below words, fewer identifiers below more.
fn compare_pre(a: &[String], b: &[String]) -> Ordering {
    match (a.is_empty(), b.is_empty()) {
        (true, true) => return Ordering::Equal,
        (true, false) => return Ordering::Greater,
        (false, true) => return Ordering::Less,
        (false, false) => {}
    }
    for (left, right) in a.iter().zip(b) {
        let order = match (number(left), number(right)) {
            (Some(left), Some(right)) => left.cmp(&right),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => left.cmp(right),
        };
        if order != Ordering::Equal {
            return order;
        }
    }
    a.len().cmp(&b.len())
}

impl Version {
    /// The precedence of SemVer, 11 (build metadata does not count).
    pub fn precedence(&self, other: &Self) -> Ordering {
        self.core.cmp(&other.core).then_with(|| compare_pre(&self.pre, &other.pre))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Exact,
    Greater,
    GreaterEqual,
    Less,
    LessEqual,
    Tilde,
    Caret,
}

/// One comparator: an operator and a version of which minor and patch may be missing.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Comparator {
    operator: Operator,
    major: u64,
    minor: Option<u64>,
    patch: Option<u64>,
    pre: Vec<String>,
}

/// A version requirement as in Cargo.toml: comparators that must all hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    comparators: Vec<Comparator>,
}

impl Comparator {
    fn parse(text: &str) -> Option<Option<Self>> {
        let text = text.trim();
        if matches!(text, "*" | "x" | "X") {
            return Some(None);
        }
        let (operator, rest) = [
            (">=", Operator::GreaterEqual),
            ("<=", Operator::LessEqual),
            (">", Operator::Greater),
            ("<", Operator::Less),
            ("=", Operator::Exact),
            ("~", Operator::Tilde),
            ("^", Operator::Caret),
        ]
        .into_iter()
        .find_map(|(sign, operator)| text.strip_prefix(sign).map(|rest| (operator, rest.trim_start())))
        .unwrap_or((Operator::Caret, text));
        let rest = rest.split_once('+').map_or(rest, |(rest, _)| rest);
        let (core, pre) = rest.split_once('-').map_or((rest, None), |(core, pre)| (core, Some(pre)));
        let mut parts = core.split('.');
        let major = number(parts.next()?)?;
        let mut wildcard = false;
        let mut part = || match parts.next() {
            None => Some(None),
            Some("*" | "x" | "X") => {
                wildcard = true;
                Some(None)
            }
            Some(text) => number(text).map(Some),
        };
        let minor = part()?;
        let patch = part()?;
        if parts.next().is_some()
            || (minor.is_none() && patch.is_some())
            || (pre.is_some() && patch.is_none())
        {
            return None;
        }
        // "1.*" is "=1" and "1.2.*" is "=1.2".
        let operator = if wildcard && operator == Operator::Caret { Operator::Exact } else { operator };
        let pre = pre.map_or(Some(Vec::new()), identifiers)?;
        Some(Some(Self { operator, major, minor, patch, pre }))
    }

    /// The least version of the comparator's text, missing parts as zero.
    fn floor(&self) -> Version {
        let core = [self.major, self.minor.unwrap_or(0), self.patch.unwrap_or(0)];
        Version { core, pre: self.pre.clone(), build: String::new() }
    }

    /// Whether the version has the parts that the text gives, and nothing is said of the others.
    fn same_parts(&self, version: &Version) -> bool {
        let [major, minor, patch] = version.core;
        major == self.major
            && self.minor.is_none_or(|wanted| wanted == minor)
            && self.patch.is_none_or(|wanted| wanted == patch)
            && (self.patch.is_none() || compare_pre(&version.pre, &self.pre) == Ordering::Equal)
    }

    fn matches(&self, version: &Version) -> bool {
        let against_floor = version.precedence(&self.floor());
        let [major, minor, patch] = version.core;
        match self.operator {
            Operator::Exact => self.same_parts(version),
            Operator::GreaterEqual => against_floor != Ordering::Less,
            Operator::Greater => against_floor == Ordering::Greater && !self.same_parts(version),
            Operator::Less => against_floor == Ordering::Less,
            Operator::LessEqual => against_floor == Ordering::Less || self.same_parts(version),
            Operator::Tilde => {
                against_floor != Ordering::Less
                    && major == self.major
                    && self.minor.is_none_or(|wanted| wanted == minor)
            }
            Operator::Caret => {
                let wanted_minor = self.minor.unwrap_or(0);
                let compatible = if self.major > 0 || self.minor.is_none() {
                    major == self.major
                } else if wanted_minor > 0 || self.patch.is_none() {
                    (major, minor) == (0, wanted_minor)
                } else {
                    (major, minor) == (0, 0) && Some(patch) == self.patch
                };
                compatible && against_floor != Ordering::Less
            }
        }
    }
}

impl Requirement {
    /// Parses a requirement; `None` for anything that Cargo would not take.
    pub fn parse(text: &str) -> Option<Self> {
        let comparators = text.split(',').map(Comparator::parse).collect::<Option<Vec<_>>>()?;
        Some(Self { comparators: comparators.into_iter().flatten().collect() })
    }

    /// Cargo's rule: all comparators hold, and a pre-release is taken only where a comparator
    /// names a pre-release of the same core version.
    pub fn matches(&self, version: &Version) -> bool {
        let named = version.pre.is_empty()
            || self.comparators.iter().any(|one| !one.pre.is_empty() && one.floor().core == version.core);
        named && self.contains(version)
    }

    /// The plain range, pre-releases in it as SemVer orders them: what an advisory means. A
    /// pre-release of the first fixed version is not fixed, and one inside a range is in it.
    pub fn contains(&self, version: &Version) -> bool {
        self.comparators.iter().all(|one| one.matches(version))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        Version::parse(text).unwrap_or_else(|| panic!("{text}"))
    }

    fn matches(requirement: &str, text: &str) -> bool {
        Requirement::parse(requirement).unwrap_or_else(|| panic!("{requirement}")).matches(&version(text))
    }

    #[test]
    fn the_order_of_semver_11() {
        let ordered = [
            "1.0.0-alpha",
            "1.0.0-alpha.1",
            "1.0.0-alpha.beta",
            "1.0.0-beta",
            "1.0.0-beta.2",
            "1.0.0-beta.11",
            "1.0.0-rc.1",
            "1.0.0",
            "1.0.1-0",
            "1.9.0",
            "1.10.0",
        ];
        for pair in ordered.windows(2) {
            assert_eq!(version(pair[0]).precedence(&version(pair[1])), Ordering::Less, "{pair:?}");
        }
        assert_eq!(version("1.0.0+a").precedence(&version("1.0.0+b")), Ordering::Equal);
        for wrong in ["1", "1.2", "01.2.3", "1.2.3-", "1.2.3-01", "1.2.3.4", "a.b.c", "1.2.3-a..b", ""] {
            assert_eq!(Version::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn requirements_as_cargo_reads_them() {
        for (requirement, yes, no) in [
            ("1.2.3", &["1.2.3", "1.9.0"][..], &["1.2.2", "2.0.0", "1.3.0-rc.1"][..]),
            ("0.2", &["0.2.0", "0.2.9"], &["0.3.0", "0.1.9"]),
            ("0.0.3", &["0.0.3"], &["0.0.4"]),
            ("0", &["0.9.1"], &["1.0.0"]),
            ("~1.2", &["1.2.9"], &["1.3.0"]),
            ("~1", &["1.9.0"], &["2.0.0"]),
            ("=1.2", &["1.2.7"], &["1.3.0"]),
            ("1.*", &["1.5.0"], &["2.0.0"]),
            ("*", &["3.0.0"], &["3.0.0-a"]),
            (">=1.0, <1.5", &["1.4.9"], &["1.5.0", "0.9.0", "1.5.0-a"]),
            (">1.2", &["1.3.0"], &["1.2.5"]),
            ("<=1.2", &["1.2.5"], &["1.3.0"]),
            ("^1.0.0-rc.1", &["1.0.0-rc.2", "1.0.0"], &["1.0.0-alpha", "1.1.0-rc.1"]),
        ] {
            for text in yes {
                assert!(matches(requirement, text), "{requirement} takes {text}");
            }
            for text in no {
                assert!(!matches(requirement, text), "{requirement} refuses {text}");
            }
        }
        for wrong in ["", ">", "1.2.3.4", "a", "1,,2", "1-a"] {
            assert_eq!(Requirement::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_prerelease_of_the_fixed_version_is_not_fixed() {
        let patched = Requirement::parse(">=1.2.3").expect("parses");
        assert!(!patched.contains(&version("1.2.3-rc.1")));
        assert!(patched.contains(&version("1.2.4-rc.1")));
    }
}
