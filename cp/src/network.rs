//! A capsule's network policy: as requests say it, as the database keeps it, as hosts are told. Pure.
//!
//! Whatever it says, a capsule never reaches its host, other capsules, private networks or metadata
//! addresses. For the public internet a rule of `deny` that matches decides, then one of `allow`, then
//! `allow_internet`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use wire::message::CapsuleNetwork;
use wire::network::{MAX_KBIT, MAX_PACKETS, MAX_RULES, MIN_KBIT, NOT_INTERNET, network_of};

/// The longest part of a bad value that is told back, in characters.
const MAX_SHOWN: usize = 60;

/// What a capsule may reach.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Whether it may reach what no rule speaks of.
    pub allow_internet: bool,
    /// What it may reach even so.
    pub allow: Vec<Rule>,
    /// What it may not reach in any case.
    pub deny: Vec<Rule>,
    /// How much may pass.
    pub limits: Limits,
}

/// One destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// `ADDRESS/PREFIX`.
    pub cidr: String,
    /// `any`, `tcp`, `udp` or `icmp`.
    pub protocol: String,
    /// `PORT` or `FIRST-LAST`; `None` for all.
    pub ports: Option<String>,
}

/// How much may pass between the capsule and the internet; 0 for no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Kilobits (1,000 bits) a second out of the capsule.
    pub egress_kbit: u32,
    /// Packets a second out of the capsule.
    pub egress_packets: u32,
    /// Kilobits a second into the capsule.
    pub ingress_kbit: u32,
    /// Packets a second into the capsule.
    pub ingress_packets: u32,
}

/// What is wrong with a request's policy: the field, and what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadNetwork {
    field: String,
    why: String,
}

impl fmt::Display for BadNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.field, self.why)
    }
}

impl std::error::Error for BadNetwork {}

fn bad<T>(field: &str, why: impl Into<String>) -> Result<T, BadNetwork> {
    Err(BadNetwork { field: field.to_string(), why: why.into() })
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    let end = text.char_indices().nth(MAX_SHOWN).map_or(text.len(), |(at, _)| at);
    if end < text.len() { format!("{}…", &text[..end]) } else { text }
}

/// The fields that a policy has.
const FIELDS: [&str; 4] = ["allow_internet", "allow", "deny", "limits"];

impl Network {
    /// This policy with what `fields` say in place of what it said. `path` is where they are in the request,
    /// with a dot at its end, for messages. A field that is null is as if it were not there. A name that is
    /// none is refused: a rule that is spelled wrong must not be taken for one that holds.
    ///
    /// # Errors
    /// The first field that makes no sense.
    pub fn with(mut self, path: &str, fields: &Map<String, Value>) -> Result<Network, BadNetwork> {
        for (name, value) in fields {
            let field = format!("{path}{name}");
            match (name.as_str(), value) {
                (name, _) if !FIELDS.contains(&name) => {
                    return bad(&field, format!("is not known; there are {}", FIELDS.join(", ")));
                }
                (_, Value::Null) => {}
                ("allow_internet", Value::Bool(allow)) => self.allow_internet = *allow,
                ("allow_internet", other) => {
                    return bad(&field, format!("must be true or false, not {}", shown(other)));
                }
                ("allow", list) => self.allow = rules(&field, list, true)?,
                ("deny", list) => self.deny = rules(&field, list, false)?,
                (_, limits) => self.limits = self.limits.with(&field, limits)?,
            }
        }
        Ok(self)
    }

    /// Whether more has to be said than whether the internet may be reached.
    pub fn is_detailed(&self) -> bool {
        let plain = Network { allow_internet: self.allow_internet, ..Network::default() };
        *self != plain
    }

    /// As a host is told; `capsule_id` is empty for one that the next message makes.
    pub fn message(&self, capsule_id: &str, revision: u64) -> CapsuleNetwork {
        let texts = |rules: &[Rule]| rules.iter().map(Rule::text).collect();
        CapsuleNetwork {
            capsule_id: capsule_id.to_string(),
            revision,
            allow_internet: self.allow_internet,
            allow: texts(&self.allow),
            deny: texts(&self.deny),
            egress_kbit: self.limits.egress_kbit,
            egress_packets: self.limits.egress_packets,
            ingress_kbit: self.limits.ingress_kbit,
            ingress_packets: self.limits.ingress_packets,
        }
    }
}

impl Limits {
    fn with(mut self, path: &str, value: &Value) -> Result<Limits, BadNetwork> {
        let Value::Object(fields) = value else {
            return bad(path, format!("must be an object, not {}", shown(value)));
        };
        for (name, value) in fields {
            let (limit, min, max) = match name.as_str() {
                "egress_kbit" => (&mut self.egress_kbit, MIN_KBIT, MAX_KBIT),
                "ingress_kbit" => (&mut self.ingress_kbit, MIN_KBIT, MAX_KBIT),
                "egress_packets" => (&mut self.egress_packets, 1, MAX_PACKETS),
                "ingress_packets" => (&mut self.ingress_packets, 1, MAX_PACKETS),
                _ => {
                    let known = "egress_kbit, egress_packets, ingress_kbit, ingress_packets";
                    return bad(&format!("{path}.{name}"), format!("is not known; there are {known}"));
                }
            };
            if value.is_null() {
                continue;
            }
            let number = value.as_u64().and_then(|n| u32::try_from(n).ok());
            match number.filter(|n| *n == 0 || (min..=max).contains(n)) {
                Some(number) => *limit = number,
                None => {
                    let range = format!("an integer from {min} to {max}, or 0 for no limit");
                    return bad(&format!("{path}.{name}"), format!("must be {range}, not {}", shown(value)));
                }
            }
        }
        Ok(self)
    }
}

fn rules(path: &str, value: &Value, is_allow: bool) -> Result<Vec<Rule>, BadNetwork> {
    let Value::Array(items) = value else {
        return bad(path, format!("must be an array of rules, not {}", shown(value)));
    };
    let mut rules = Vec::new();
    for (index, item) in items.iter().enumerate().take(MAX_RULES + 1) {
        rules.extend(rule(&format!("{path}[{index}]"), item, is_allow)?);
        if rules.len() > MAX_RULES {
            return bad(path, format!("may have {MAX_RULES} rules, each port or range counted as one"));
        }
    }
    Ok(rules)
}

/// The rules that one entry stands for: one for each of its ports or ranges.
fn rule(path: &str, value: &Value, is_allow: bool) -> Result<Vec<Rule>, BadNetwork> {
    let fields = match value {
        // A network alone is all of it.
        Value::String(_) => &Map::from_iter([("cidr".to_string(), value.clone())]),
        Value::Object(fields) => fields,
        other => return bad(path, format!("must be a CIDR or an object with one, not {}", shown(other))),
    };
    let known = ["cidr", "protocol", "ports"];
    if let Some(name) = fields.keys().find(|name| !known.contains(&name.as_str())) {
        return bad(&format!("{path}.{name}"), format!("is not known; there are {}", known.join(", ")));
    }
    let get = |name: &str| fields.get(name).filter(|value| !value.is_null());
    let (address, prefix) = match get("cidr") {
        None => (Ipv4Addr::UNSPECIFIED, 0),
        Some(value) => cidr(&format!("{path}.cidr"), value)?,
    };
    // An allow rule for a part of one could only mislead.
    let never = NOT_INTERNET
        .iter()
        .find(|(network, length)| prefix >= *length && network_of(address, *length) == *network);
    if let (true, Some((network, length))) = (is_allow, never) {
        let why = format!(
            "lies in {network}/{length}, which is not public: no capsule reaches it, so it cannot be allowed"
        );
        return bad(&format!("{path}.cidr"), why);
    }
    let protocol = match get("protocol") {
        None => "any",
        Some(Value::String(name)) if ["any", "tcp", "udp", "icmp"].contains(&name.as_str()) => name,
        Some(other) => {
            let why = format!("must be \"any\", \"tcp\", \"udp\" or \"icmp\", not {}", shown(other));
            return bad(&format!("{path}.protocol"), why);
        }
    };
    let ports: Vec<Option<String>> = match get("ports") {
        None => vec![None],
        Some(_) if protocol == "icmp" => {
            return bad(&format!("{path}.ports"), "makes no sense: icmp has none");
        }
        Some(Value::Array(items)) if items.is_empty() => {
            return bad(&format!("{path}.ports"), "is empty; leave it out for all ports");
        }
        Some(Value::Array(items)) => {
            let port = |(i, item)| port_range(&format!("{path}.ports[{i}]"), item).map(Some);
            items.iter().take(MAX_RULES + 1).enumerate().map(port).collect::<Result<_, _>>()?
        }
        Some(one) => vec![Some(port_range(&format!("{path}.ports"), one)?)],
    };
    let (cidr, protocol) = (format!("{address}/{prefix}"), protocol.to_string());
    let rule = |ports| Rule { cidr: cidr.clone(), protocol: protocol.clone(), ports };
    Ok(ports.into_iter().map(rule).collect())
}

/// `ADDRESS/PREFIX`, or an address alone.
fn cidr(path: &str, value: &Value) -> Result<(Ipv4Addr, u8), BadNetwork> {
    let wanted = "must be an IPv4 network such as \"93.184.216.0/24\", or an IPv4 address";
    let Value::String(text) = value else { return bad(path, format!("{wanted}, not {}", shown(value))) };
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, number(prefix).and_then(|p| u8::try_from(p).ok())),
        None => (text.as_str(), Some(32)),
    };
    match (address.parse::<IpAddr>(), prefix.filter(|p| *p <= 32)) {
        (Ok(IpAddr::V6(_)), _) => bad(path, format!("{wanted}; capsules have no IPv6: {}", shown(value))),
        (Ok(IpAddr::V4(address)), Some(prefix)) => {
            let network = network_of(address, prefix);
            if network == address {
                return Ok((address, prefix));
            }
            bad(
                path,
                format!(
                    "is not a network: {address} has bits beyond the prefix; {network}/{prefix} has none"
                ),
            )
        }
        _ => bad(path, format!("{wanted}, not {}", shown(value))),
    }
}

/// `PORT` or `FIRST-LAST`, each 1 to 65,535.
fn port_range(path: &str, value: &Value) -> Result<String, BadNetwork> {
    let range = match value {
        Value::Number(port) => port.as_u64().and_then(|p| u16::try_from(p).ok()).map(|p| (p, p)),
        Value::String(text) => match text.split_once('-') {
            Some((first, last)) => number(first.trim()).zip(number(last.trim())),
            None => number(text).map(|p| (p, p)),
        },
        _ => None,
    };
    match range.filter(|(first, last)| *first > 0 && first <= last) {
        Some((first, last)) if first == last => Ok(first.to_string()),
        Some((first, last)) => Ok(format!("{first}-{last}")),
        None => {
            let wanted = "a port from 1 to 65535 or a range such as \"8000-8100\"";
            bad(path, format!("must be {wanted}, not {}", shown(value)))
        }
    }
}

/// A decimal number without sign or leading zero.
fn number(text: &str) -> Option<u16> {
    let number: u16 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

impl Rule {
    /// As hosts are told: `PROTOCOL CIDR` and perhaps `FIRST-LAST`.
    fn text(&self) -> String {
        match &self.ports {
            None => format!("{} {}", self.protocol, self.cidr),
            Some(ports) if ports.contains('-') => format!("{} {} {ports}", self.protocol, self.cidr),
            Some(port) => format!("{} {} {port}-{port}", self.protocol, self.cidr),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn with(base: Network, value: Value) -> Result<Network, String> {
        match value {
            Value::Object(fields) => base.with("network.", &fields).map_err(|e| e.to_string()),
            other => Err(format!("{other} is no object")),
        }
    }

    fn refused(value: Value) -> String {
        with(Network::default(), value.clone()).expect_err(&value.to_string())
    }

    #[test]
    fn rules_become_what_hosts_are_told() {
        let network = with(
            Network::default(),
            json!({
                "allow": ["93.184.216.34", {"cidr": "9.9.9.0/24", "protocol": "udp", "ports": 53},
                          {"cidr": "8.0.0.0/7", "protocol": "tcp", "ports": [80, "443", "8000-8100"]},
                          {"protocol": "icmp"}],
                "deny": [{"ports": "25"}],
                "limits": {"egress_kbit": 10_000, "ingress_packets": 500},
            }),
        );
        let network = network.expect("good");
        let message = network.message("cl-x", 3);
        assert_eq!(
            message.allow,
            [
                "any 93.184.216.34/32",
                "udp 9.9.9.0/24 53-53",
                "tcp 8.0.0.0/7 80-80",
                "tcp 8.0.0.0/7 443-443",
                "tcp 8.0.0.0/7 8000-8100",
                "icmp 0.0.0.0/0"
            ]
        );
        assert_eq!(message.deny, ["any 0.0.0.0/0 25-25"]);
        assert_eq!((message.egress_kbit, message.ingress_packets, message.revision), (10_000, 500, 3));
        assert!(!message.allow_internet && network.is_detailed());
        // What the database gives back is the same.
        let stored = serde_json::to_value(&network).expect("JSON");
        assert_eq!(serde_json::from_value::<Network>(stored).expect("read"), network);
        assert_eq!(serde_json::from_value::<Network>(json!({})).expect("read"), Network::default());
    }

    #[test]
    fn a_change_keeps_what_it_does_not_name() {
        let base = with(Network::default(), json!({"allow": ["1.1.1.1"], "limits": {"egress_kbit": 100}}));
        let base = base.expect("good");
        let changed = with(base.clone(), json!({"allow_internet": true, "deny": ["8.8.8.8"], "allow": null}));
        let changed = changed.expect("good");
        assert_eq!((changed.allow.len(), changed.deny.len(), changed.limits), (1, 1, base.limits));
        let cleared = with(changed, json!({"allow": [], "deny": [], "limits": {"egress_kbit": 0}}));
        let cleared = cleared.expect("good");
        assert_eq!(cleared, Network { allow_internet: true, ..Network::default() });
        assert!(!cleared.is_detailed());
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_says_where() {
        for (value, told) in [
            (json!({"alow": []}), "network.alow is not known"),
            (json!({"allow_internet": 1}), "network.allow_internet must be true or false"),
            (json!({"allow": "1.1.1.1"}), "network.allow must be an array"),
            (json!({"allow": [5]}), "network.allow[0] must be a CIDR"),
            (json!({"allow": ["1.1.1.1", "example.org"]}), "network.allow[1].cidr must be an IPv4 network"),
            (json!({"allow": ["::1"]}), "capsules have no IPv6"),
            (json!({"allow": ["1.1.1.1/24"]}), "1.1.1.0/24 has none"),
            (json!({"allow": ["1.1.1.1/33"]}), "must be an IPv4 network"),
            (json!({"allow": ["10.1.0.0/16"]}), "lies in 10.0.0.0/8, which is not public"),
            (json!({"allow": [{"cidr": "169.254.169.254"}]}), "lies in 169.254.0.0/16"),
            (json!({"deny": [{"protocol": "sctp"}]}), "network.deny[0].protocol must be"),
            (json!({"deny": [{"protocol": "icmp", "ports": 1}]}), "icmp has none"),
            (json!({"deny": [{"ports": 0}]}), "network.deny[0].ports must be a port"),
            (json!({"deny": [{"ports": [80, "9-8"]}]}), "network.deny[0].ports[1] must be a port"),
            (json!({"deny": [{"ports": []}]}), "leave it out"),
            (json!({"deny": [{"port": 1}]}), "network.deny[0].port is not known"),
            (json!({"limits": 5}), "network.limits must be an object"),
            (json!({"limits": {"kbit": 5}}), "network.limits.kbit is not known"),
            (json!({"limits": {"egress_kbit": 1}}), "network.limits.egress_kbit must be an integer from 16"),
            (json!({"limits": {"egress_packets": -1}}), "network.limits.egress_packets must be"),
            (json!({"deny": [{"ports": (1..=65).collect::<Vec<_>>()}]}), "network.deny may have 64 rules"),
            (json!({"deny": vec!["1.1.1.1"; 65]}), "network.deny may have 64 rules"),
        ] {
            let why = refused(value.clone());
            assert!(why.contains(told), "{value}: {why}");
        }
        // Everything may be denied, and 0.0.0.0/0 allowed: what is never reached stays so.
        assert!(with(Network::default(), json!({"deny": ["10.0.0.0/8"], "allow": ["0.0.0.0/0"]})).is_ok());
    }
}
