//! What a capsule's guest may reach of the internet, and how much: as the control plane sends it, as the
//! capsule's directory keeps it, checked.
//!
//! A destination that is not the public internet ([`wire::network::NOT_INTERNET`]) is never reached, and
//! no rule changes that. For the rest a deny rule that matches decides first, then an allow rule, and then
//! [`Policy::allow_internet`].

use crate::whole_file;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::str::FromStr;
use wire::message::CapsuleNetwork as Order;
use wire::network::{MAX_KBIT, MAX_PACKETS, MAX_RULES, MIN_KBIT, network_of};

/// Name of the file in a capsule's directory.
const FILE_NAME: &str = "network.json";
/// The longest file that is read, in bytes.
const MAX_FILE_BYTES: u64 = 65_536;

/// What a capsule's guest may reach.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Policy {
    /// Which of two changes is the newer one; as the control plane counts.
    #[serde(default)]
    pub revision: u64,
    /// Whether it may open connections to the public internet where no rule says otherwise.
    pub allow_internet: bool,
    /// What it may reach even so.
    #[serde(default)]
    pub allow: Vec<Rule>,
    /// What it may not reach whatever else is said.
    #[serde(default)]
    pub deny: Vec<Rule>,
    /// What it may send to the internet.
    #[serde(default)]
    pub egress: Limit,
    /// What may come to it from the internet.
    #[serde(default)]
    pub ingress: Limit,
}

/// How much may pass in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Limit {
    /// Kilobits (1,000 bits) a second of IP packets; 0 for no limit.
    pub kbit: u32,
    /// Packets a second; 0 for no limit.
    pub packets: u32,
}

/// The protocols that a rule may be about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// All of them; with ports, those that have ports.
    Any,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP, which has no ports.
    Icmp,
}

const PROTOCOLS: [(Protocol, &str); 4] =
    [(Protocol::Any, "any"), (Protocol::Tcp, "tcp"), (Protocol::Udp, "udp"), (Protocol::Icmp, "icmp")];

/// One line of a list: `PROTOCOL CIDR` or `PROTOCOL CIDR FIRST-LAST`, such as `tcp 93.184.216.0/24 80-443`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rule {
    /// Which protocol.
    pub protocol: Protocol,
    /// The network's address; the bits beyond the prefix are zero.
    pub address: Ipv4Addr,
    /// The length of its prefix, 0 to 32.
    pub prefix: u8,
    /// The first and the last destination port; `None` for all.
    pub ports: Option<(u16, u16)>,
}

/// Why a policy cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PolicyError {
    /// A rule is none.
    BadRule {
        /// The rule.
        rule: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There are too many.
    TooManyRules {
        /// Of which list.
        list: &'static str,
        /// How many.
        count: usize,
    },
    /// A limit is out of its range.
    BadLimit {
        /// Which.
        field: &'static str,
        /// Its value.
        value: u32,
        /// The least, besides 0 for none.
        min: u32,
        /// The most.
        max: u32,
    },
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PolicyError::BadRule { rule, why } => {
                let shown: String = rule.chars().take(80).collect();
                write!(f, "{shown:?} is not a rule of a network policy: {why}")
            }
            PolicyError::TooManyRules { list, count } => {
                write!(f, "the {list} list has {count} rules, at most {MAX_RULES} are allowed")
            }
            PolicyError::BadLimit { field, value, min, max } => {
                write!(f, "{field} is {value}, but may be {min} to {max}, or 0 for no limit")
            }
        }
    }
}

impl std::error::Error for PolicyError {}

impl Policy {
    /// Nothing at all.
    pub const CLOSED: Policy = Policy::internet(false);
    /// The whole public internet.
    pub const OPEN: Policy = Policy::internet(true);

    /// The whole public internet, or nothing at all.
    pub const fn internet(allow_internet: bool) -> Policy {
        Policy {
            revision: 0,
            allow_internet,
            allow: Vec::new(),
            deny: Vec::new(),
            egress: Limit { kbit: 0, packets: 0 },
            ingress: Limit { kbit: 0, packets: 0 },
        }
    }

    /// The policy that a control plane asks for.
    ///
    /// # Errors
    /// A rule or limit that cannot be used: all of it is refused then.
    pub fn of(order: &Order) -> Result<Policy, PolicyError> {
        let limit = |kbit, packets, names: [&'static str; 2]| {
            in_range(names[0], kbit, MIN_KBIT, MAX_KBIT)?;
            in_range(names[1], packets, 1, MAX_PACKETS)?;
            Ok(Limit { kbit, packets })
        };
        Ok(Policy {
            revision: order.revision,
            allow_internet: order.allow_internet,
            allow: rules("allow", &order.allow)?,
            deny: rules("deny", &order.deny)?,
            egress: limit(order.egress_kbit, order.egress_packets, ["egress_kbit", "egress_packets"])?,
            ingress: limit(order.ingress_kbit, order.ingress_packets, ["ingress_kbit", "ingress_packets"])?,
        })
    }

    /// Whether anything beyond the host may be reached.
    pub fn lets_out(&self) -> bool {
        self.allow_internet || !self.allow.is_empty()
    }

    /// Writes it into a capsule's directory. Blocks until it is on disk.
    pub fn save(&self, directory: &Path) -> io::Result<()> {
        whole_file::replace(&directory.join(FILE_NAME), &serde_json::to_vec(self)?, 0o600)
    }

    /// The policy in a capsule's directory; this one, which is then written there, where there is none yet.
    /// Blocks.
    pub fn load_or_save(self, directory: &Path) -> io::Result<Policy> {
        match Policy::load(directory)? {
            Some(policy) => Ok(policy),
            None => self.save(directory).map(|()| self),
        }
    }

    /// The policy in a capsule's directory; `None` where there is none. Blocks.
    ///
    /// # Errors
    /// It cannot be read; then nobody knows what was allowed, and nothing should be.
    pub fn load(directory: &Path) -> io::Result<Option<Policy>> {
        let text = whole_file::read(&directory.join(FILE_NAME), MAX_FILE_BYTES, "network policy")?;
        Ok(text.map(|text| serde_json::from_slice(&text)).transpose()?)
    }
}

fn rules(list: &'static str, texts: &[String]) -> Result<Vec<Rule>, PolicyError> {
    if texts.len() > MAX_RULES {
        return Err(PolicyError::TooManyRules { list, count: texts.len() });
    }
    texts.iter().map(|text| text.parse()).collect()
}

fn in_range(field: &'static str, value: u32, min: u32, max: u32) -> Result<(), PolicyError> {
    if value == 0 || (min..=max).contains(&value) {
        return Ok(());
    }
    Err(PolicyError::BadLimit { field, value, min, max })
}

impl FromStr for Rule {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Rule, PolicyError> {
        let bad = |why| PolicyError::BadRule { rule: text.to_owned(), why };
        let mut words = text.split(' ');
        let (protocol, network) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let protocol = PROTOCOLS.iter().find(|p| p.1 == protocol).map(|p| p.0);
        let protocol = protocol.ok_or_else(|| bad("it begins with any, tcp, udp or icmp"))?;
        let (address, prefix) =
            network.split_once('/').ok_or_else(|| bad("the network is ADDRESS/PREFIX"))?;
        let address: Ipv4Addr = address.parse().map_err(|_| bad("its address is not an IPv4 address"))?;
        let prefix = number(prefix).and_then(|p| u8::try_from(p).ok()).filter(|p| *p <= 32);
        let prefix = prefix.ok_or_else(|| bad("its prefix is not 0 to 32"))?;
        if network_of(address, prefix) != address {
            return Err(bad("its address has bits beyond the prefix"));
        }
        let ports = match words.next() {
            None => None,
            Some(_) if protocol == Protocol::Icmp => return Err(bad("icmp has no ports")),
            Some(ports) => {
                let (first, last) = ports.split_once('-').ok_or_else(|| bad("the ports are FIRST-LAST"))?;
                let ports = number(first).zip(number(last)).filter(|(first, last)| first <= last);
                Some(ports.ok_or_else(|| bad("its ports are not two numbers of 0 to 65535 in order"))?)
            }
        };
        match words.next() {
            None => Ok(Rule { protocol, address, prefix, ports }),
            Some(_) => Err(bad("there is something after the ports")),
        }
    }
}

/// A decimal number without sign or leading zero.
fn number(text: &str) -> Option<u16> {
    let number: u16 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = PROTOCOLS.iter().find(|p| p.0 == self.protocol).map_or("any", |p| p.1);
        write!(f, "{protocol} {}/{}", self.address, self.prefix)?;
        match self.ports {
            Some((first, last)) => write!(f, " {first}-{last}"),
            None => Ok(()),
        }
    }
}

impl TryFrom<String> for Rule {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Rule, PolicyError> {
        text.parse()
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> String {
        rule.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn rules_are_read_as_they_are_written() {
        for text in [
            "any 0.0.0.0/0",
            "tcp 93.184.216.34/32 443-443",
            "udp 9.9.9.0/24 53-53",
            "icmp 1.1.1.1/32",
            "any 8.0.0.0/7 0-65535",
        ] {
            assert_eq!(text.parse::<Rule>().map(|r| r.to_string()), Ok(text.to_string()));
        }
    }

    #[test]
    fn what_is_no_rule_is_refused_whole() {
        for text in [
            "",
            "any",
            "sctp 1.1.1.1/32",
            "any 1.1.1.1",
            "any 1.1.1.1/33",
            "any 1.1.1.1/-1",
            "any 1.1.1.1/032",
            "any 1.1.1.1/24",
            "any 1.1.1/24",
            "any ::/0",
            "tcp 1.1.1.1/32 80",
            "tcp 1.1.1.1/32 443-80",
            "tcp 1.1.1.1/32 80-65536",
            "tcp 1.1.1.1/32 +80-90",
            "icmp 1.1.1.1/32 1-2",
            "tcp 1.1.1.1/32 1-2 x",
            "tcp  1.1.1.1/32",
            "tcp 1.1.1.1/32\naccept",
            "tcp 1.1.1.1/32 1-2; accept",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn orders_are_bounded() {
        let order = Order { allow: vec!["any 1.1.1.1/32".into(); MAX_RULES], ..Order::default() };
        assert_eq!(Policy::of(&order).map(|p| p.allow.len()), Ok(MAX_RULES));
        let order = Order { deny: vec!["any 1.1.1.1/32".into(); MAX_RULES + 1], ..Order::default() };
        assert_eq!(Policy::of(&order), Err(PolicyError::TooManyRules { list: "deny", count: 65 }));
        for order in [
            Order { egress_kbit: 1, ..Order::default() },
            Order { ingress_kbit: MAX_KBIT + 1, ..Order::default() },
            Order { ingress_packets: MAX_PACKETS + 1, ..Order::default() },
        ] {
            let error = Policy::of(&order).expect_err("out of range").to_string();
            assert!(error.contains("or 0 for no limit"), "{error}");
        }
    }

    #[test]
    fn a_policy_outlives_its_agent_in_the_capsules_directory() {
        let directory = std::env::temp_dir().join(format!("wrenn-policy-{}", std::process::id()));
        fs::create_dir(&directory).expect("made");
        assert_eq!(Policy::load(&directory).expect("none"), None);
        let order = Order {
            revision: 7,
            allow: vec!["tcp 1.1.1.1/32 443-443".into()],
            deny: vec!["any 8.8.0.0/16".into()],
            egress_kbit: 1_000,
            ingress_packets: 50,
            ..Order::default()
        };
        let policy = Policy::of(&order).expect("good");
        assert!(policy.lets_out() && !policy.allow_internet);
        policy.clone().load_or_save(&directory).expect("saved");
        assert_eq!(Policy::OPEN.load_or_save(&directory).expect("loaded"), policy);
        for bad in ["", "{", "{}", "{\"allow_internet\":true,\"allow\":[\"x\"]}"] {
            fs::write(directory.join(FILE_NAME), bad).expect("written");
            assert!(Policy::load(&directory).is_err(), "{bad:?}");
        }
        fs::remove_dir_all(&directory).expect("removed");
    }
}
