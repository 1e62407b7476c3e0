//! Firewall rules: text for `nft -f -`, one transaction each, and the running of it.
//!
//! Two layers, so that neither alone is trusted:
//!
//! - In each capsule's namespace, a `netdev` table lets nothing into `tap0` but IPv4 and ARP from the
//!   guest's own addresses, and an `ip` table denies everything except the metadata address, the host's
//!   connections to the guest, and, where the policy says so, the internet without any private network.
//!   Both go when the namespace goes.
//! - On the host, one table for all capsules: nothing that comes from a capsule's link reaches the host
//!   itself or another capsule, and only links in the set `internet` are forwarded and masqueraded.
//!
//! Every packet of a connection to the internet, in either direction, is judged by the policy as it is now
//! and by where the connection was opened to, not as it was when the connection began: a policy that is
//! narrowed cuts what it forbids.
//!
//! A capsule may have [`MAX_CONNECTIONS`] at once, counted in its namespace and once more on the host: the kernel's
//! table of connections is one for all, and when it is full nobody gets a new one, the host itself included.
//!
//! Limits are tokens that packets take (nft's `limit rate over ... drop`), in the same transaction as the
//! rules. The kernel's bucket holds one second's worth beside the burst, so the first second may bring twice
//! as much; after that TCP gets within 3 % of the limit. A queue (tc's tbf) gets 3 to 23 % less, and would
//! slow down the host's own way to the guest as well: that goes through the same links.

use super::policy::{Limit, Policy, Protocol, Rule};
use super::slot::{HOST_LINK_PREFIX, Slot};
use super::{GUEST_ADDRESS, GUEST_LINK_NAME, METADATA_ADDRESS, METADATA_PORT, tap};
use crate::sys::memfd::Capture;
use crate::sys::pidfd::{Exit, Process};
use crate::sys::spawn::{Confinement, spawn};
use std::fmt;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::process::{Command, Stdio};
use wire::network::NOT_INTERNET;

/// The table's name, in the host's namespace (family `inet`) and in each capsule's (`netdev` and `ip`).
pub const TABLE: &str = "wrenn";

/// Connections to the internet that a capsule may have at once, those that ended in the last minutes included: the
/// kernel remembers them for two minutes (TCP) or half a minute (UDP). A 32nd of what its table has on a host of
/// 4 GiB and more.
pub const MAX_CONNECTIONS: u32 = 8_192;
/// What the host counts them in, by link; and for how many links.
const CONNECTIONS: &str = "connections";
const MAX_LINKS: u32 = 65_535;

/// The program that takes the rules.
const NFT: &str = "nft";
/// Where it may be: a service's PATH need not have the system directories.
const NFT_PATH: &str = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin:/usr/local/bin";
/// A transaction takes milliseconds; another program that holds the kernel's lock may take longer.
const NFT_TIMEOUT_MS: i32 = 5_000;
/// How much of what nft says is kept for the error message.
const NFT_MESSAGE_BYTES: u64 = 4_096;
/// Most rules in one transaction: less than a pipe holds, so writing them never blocks.
const MAX_RULES_BYTES: usize = 32 * 1024;

/// A limit's burst is this part of a second's worth,
const BURST_DIVISOR: u32 = 10;
/// but not less than a few large packets: the kernel puts several segments into one.
const MIN_BURST_BYTES: u64 = 65_536;
const MIN_BURST_PACKETS: u32 = 5;
const BYTES_PER_KBIT: u64 = 125;

/// What an internet-enabled guest still may not reach, as elements of a set of nft's.
fn not_internet() -> String {
    NOT_INTERNET.map(|(address, prefix)| format!("{address}/{prefix}")).join(", ")
}

/// Why rules are not in place.
#[derive(Debug)]
pub enum FirewallError {
    /// There is no `nft` program.
    NftMissing,
    /// It could not be run.
    Run(io::Error),
    /// It did not finish in time and was killed.
    TimedOut,
    /// It refused the rules.
    Refused {
        /// How it ended.
        exit: Exit,
        /// What it said.
        message: String,
    },
}

impl fmt::Display for FirewallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FirewallError::NftMissing => {
                f.write_str("no `nft` program in the system directories: install nftables")
            }
            FirewallError::Run(error) => write!(f, "running nft: {error}"),
            FirewallError::TimedOut => {
                write!(f, "nft did not finish within {NFT_TIMEOUT_MS} ms and was killed")
            }
            FirewallError::Refused { exit, message } => write!(f, "nft {exit}: {message}"),
        }
    }
}

impl std::error::Error for FirewallError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            FirewallError::Run(error) => Some(error),
            _ => None,
        }
    }
}

/// The rules inside a capsule's namespace. Loading them again replaces them.
pub fn capsule_rules(slot: Slot, policy: &Policy) -> String {
    let mut rules = Rules::default();
    guard_rules(&mut rules, slot);
    for command in ["add", "delete", "add"] {
        rules.line(format_args!("{command} table ip {TABLE}"));
    }
    input_rules(&mut rules);
    forward_rules(&mut rules, slot, policy);
    nat_rules(&mut rules, slot, policy);
    rules.0
}

/// Anti-spoofing, before anything else looks at a frame.
fn guard_rules(rules: &mut Rules, slot: Slot) {
    let (tap, mac) = (tap::NAME, slot.guest_mac());
    for command in ["add", "delete", "add"] {
        rules.line(format_args!("{command} table netdev {TABLE}"));
    }
    rules.line(format_args!(
        "add chain netdev {TABLE} guard {{ type filter hook ingress device \"{tap}\" priority -500; \
         policy drop; }}"
    ));
    let mut guard =
        |rule: fmt::Arguments<'_>| rules.line(format_args!("add rule netdev {TABLE} guard {rule}"));
    guard(format_args!("ether saddr != {mac} drop"));
    guard(format_args!(
        "ether type arp arp htype 1 arp ptype ip arp operation {{ request, reply }} arp saddr ether {mac} \
         arp saddr ip {GUEST_ADDRESS} accept"
    ));
    guard(format_args!("ether type ip ip saddr {GUEST_ADDRESS} accept"));
}

/// What reaches the namespace itself: the metadata service, and answers to the agent's own connections.
fn input_rules(rules: &mut Rules) {
    let tap = tap::NAME;
    rules.chain("input", "filter hook input priority filter; policy drop;");
    rules.rule("input", format_args!("iifname \"lo\" accept"));
    rules.rule(
        "input",
        format_args!("iifname \"{tap}\" ip daddr {METADATA_ADDRESS} tcp dport {METADATA_PORT} accept"),
    );
    rules.rule(
        "input",
        format_args!("iifname \"{tap}\" ct direction reply ct state established,related accept"),
    );
    reject_rest(rules, "input");
    rules.chain("output", "filter hook output priority filter; policy drop;");
    rules.rule("output", format_args!("oifname {{ \"lo\", \"{tap}\" }} accept"));
}

/// What goes through it: the host's connections to the guest, and the guest's to the internet.
fn forward_rules(rules: &mut Rules, slot: Slot, policy: &Policy) {
    let (tap, link, host) = (tap::NAME, GUEST_LINK_NAME, slot.host_link());
    let answers = "ct direction reply ct state established,related accept";
    rules.chain("forward", "filter hook forward priority filter; policy drop;");
    rules.rule("forward", format_args!("ct state invalid drop"));
    rules.rule(
        "forward",
        format_args!("iifname \"{link}\" oifname \"{tap}\" ip saddr {host} ct status dnat accept"),
    );
    rules.rule("forward", format_args!("iifname \"{tap}\" oifname \"{link}\" {answers}"));
    if policy.lets_out() {
        for (chain, limit) in [("egress", policy.egress), ("ingress", policy.ingress)] {
            rules.line(format_args!("add chain ip {TABLE} {chain}"));
            if chain == "egress" {
                let over = format_args!("ct state new ct count over {MAX_CONNECTIONS} drop");
                rules.rule(chain, over);
            }
            limit_rules(rules, chain, limit);
        }
        policy_rules(rules, policy);
        rules.rule("forward", format_args!("iifname \"{tap}\" oifname \"{link}\" jump judge"));
        let answers = "ct direction reply ct state established,related";
        rules.rule("forward", format_args!("iifname \"{link}\" oifname \"{tap}\" {answers} jump judge"));
    }
    reject_rest(rules, "forward");
}

/// Accepts what the policy allows and returns from the rest. By the connection's own destination, so that it
/// fits answers, and ICMP errors about it, as well.
fn policy_rules(rules: &mut Rules, policy: &Policy) {
    let (tap, link) = (tap::NAME, GUEST_LINK_NAME);
    // What is allowed passes the limits of its direction, which drop or accept it.
    rules.line(format_args!("add chain ip {TABLE} pass"));
    rules.rule("pass", format_args!("iifname \"{tap}\" goto egress"));
    rules.rule("pass", format_args!("iifname \"{link}\" goto ingress"));
    rules.line(format_args!("add chain ip {TABLE} judge"));
    let never = not_internet();
    rules.rule("judge", format_args!("ct original ip daddr {{ {never} }} return"));
    // Nothing rewrites the guest's destinations; were that to change, they would still be looked at.
    rules.rule("judge", format_args!("iifname \"{tap}\" ip daddr {{ {never} }} return"));
    for rule in &policy.deny {
        rules.rule("judge", format_args!("{}return", condition(rule)));
    }
    for rule in &policy.allow {
        rules.rule("judge", format_args!("{}goto pass", condition(rule)));
    }
    if policy.allow_internet {
        rules.rule("judge", format_args!("goto pass"));
    }
}

/// What of a connection a rule looks at, followed by a space where it is anything.
fn condition(rule: &Rule) -> String {
    let mut text = String::new();
    if rule.prefix > 0 {
        text.push_str(&format!("ct original ip daddr {}/{} ", rule.address, rule.prefix));
    }
    match (rule.protocol, rule.ports) {
        (Protocol::Any, None) => {}
        (Protocol::Any, Some(_)) => text.push_str("ct original protocol { tcp, udp } "),
        (Protocol::Tcp, _) => text.push_str("ct original protocol tcp "),
        (Protocol::Udp, _) => text.push_str("ct original protocol udp "),
        (Protocol::Icmp, _) => text.push_str("ct original protocol icmp "),
    }
    match rule.ports {
        None => {}
        Some((first, last)) if first == last => text.push_str(&format!("ct original proto-dst {first} ")),
        Some((first, last)) => text.push_str(&format!("ct original proto-dst {first}-{last} ")),
    }
    text
}

/// Drops what is over a limit and accepts the rest.
fn limit_rules(rules: &mut Rules, chain: &str, limit: Limit) {
    if limit.packets > 0 {
        let (rate, burst) = (limit.packets, (limit.packets / BURST_DIVISOR).max(MIN_BURST_PACKETS));
        let over = format_args!("limit rate over {rate}/second burst {burst} packets drop");
        rules.rule(chain, over);
    }
    if limit.kbit > 0 {
        let rate = u64::from(limit.kbit) * BYTES_PER_KBIT;
        let burst = (rate / u64::from(BURST_DIVISOR)).max(MIN_BURST_BYTES);
        let over = format_args!("limit rate over {rate} bytes/second burst {burst} bytes drop");
        rules.rule(chain, over);
    }
    rules.rule(chain, format_args!("accept"));
}

/// A guest is told at once that it may not, instead of waiting for a timeout.
fn reject_rest(rules: &mut Rules, chain: &str) {
    let tap = tap::NAME;
    rules.rule(chain, format_args!("iifname \"{tap}\" meta l4proto tcp reject with tcp reset"));
    rules.rule(chain, format_args!("iifname \"{tap}\" reject with icmp type admin-prohibited"));
}

fn nat_rules(rules: &mut Rules, slot: Slot, policy: &Policy) {
    let link = GUEST_LINK_NAME;
    rules.chain("prerouting", "nat hook prerouting priority dstnat;");
    let host_ip = slot.host_ip();
    rules.rule("prerouting", format_args!("iifname \"{link}\" ip daddr {host_ip} dnat to {GUEST_ADDRESS}"));
    if policy.lets_out() {
        let guest_link = slot.guest_link();
        rules.chain("postrouting", "nat hook postrouting priority srcnat;");
        rules.rule(
            "postrouting",
            format_args!("oifname \"{link}\" ip saddr {GUEST_ADDRESS} snat to {guest_link}"),
        );
    }
}

/// The rules of the host itself. Loading them again replaces them and keeps the set of links.
pub fn host_rules() -> String {
    let ours = format!("\"{HOST_LINK_PREFIX}*\"");
    let denied = not_internet();
    // Before the usual priority: another table that accepts does not undo a drop, and ours comes first.
    let priority = "priority filter - 10; policy accept;";
    let mut text = format!(
        "add table inet {TABLE}\n\
         add set inet {TABLE} internet {{ type ifname; }}\n\
         add set inet {TABLE} {CONNECTIONS} {{ type ifname; size {MAX_LINKS}; flags dynamic; }}\n\
         add chain inet {TABLE} input {{ type filter hook input {priority} }}\n\
         add chain inet {TABLE} forward {{ type filter hook forward {priority} }}\n\
         add chain inet {TABLE} postrouting {{ type nat hook postrouting priority srcnat; }}\n"
    );
    for chain in ["input", "forward", "postrouting"] {
        text.push_str(&format!("flush chain inet {TABLE} {chain}\n"));
    }
    let answers = "ct direction reply ct state established,related accept";
    for (chain, rule) in [
        ("input", format!("iifname {ours} {answers}")),
        ("input", format!("iifname {ours} drop")),
        ("forward", format!("iifname {ours} oifname {ours} drop")),
        (
            "forward",
            format!(
                "iifname @internet ct state new add @{CONNECTIONS} {{ iifname ct count over {MAX_CONNECTIONS} }} \
                 drop"
            ),
        ),
        ("forward", format!("iifname @internet ip daddr != {{ {denied} }} accept")),
        ("forward", format!("iifname {ours} drop")),
        ("forward", format!("oifname @internet {answers}")),
        ("forward", format!("oifname {ours} drop")),
        ("postrouting", format!("iifname {ours} oifname != {ours} masquerade")),
    ] {
        text.push_str(&format!("add rule inet {TABLE} {chain} {rule}\n"));
    }
    text
}

/// Takes away what [`host_rules`] made.
pub fn host_removal() -> String {
    format!("delete table inet {TABLE}\n")
}

/// Forwards a capsule's link to the internet, or no longer. Either may be loaded more than once.
pub fn host_element(slot: Slot, lets_out: bool) -> String {
    let element = format!("element inet {TABLE} internet {{ \"{}\" }}\n", slot.host_link_name());
    if lets_out {
        format!("add {element}")
    } else {
        // Deleting what is not there is an error; adding what is there is none.
        format!("add {element}delete {element}")
    }
}

/// Forgets a link that is being removed, wherever it is named.
pub fn host_forgetting(slot: Slot) -> String {
    let link = slot.host_link_name();
    let connections =
        format!("element inet {TABLE} {CONNECTIONS} {{ \"{link}\" ct count over {MAX_CONNECTIONS} }}\n");
    host_element(slot, false) + &format!("add {connections}delete {connections}")
}

/// A question whose answer is an error when [`host_rules`] are not in place.
pub fn host_query() -> String {
    // What the table has had last: one of an earlier version is not in place.
    format!("list set inet {TABLE} {CONNECTIONS}\n")
}

#[derive(Default)]
struct Rules(String);

impl Rules {
    fn line(&mut self, line: fmt::Arguments<'_>) {
        self.0.push_str(&format!("{line}\n"));
    }

    fn chain(&mut self, name: &str, kind: &str) {
        self.line(format_args!("add chain ip {TABLE} {name} {{ type {kind} }}"));
    }

    fn rule(&mut self, chain: &str, rule: fmt::Arguments<'_>) {
        self.line(format_args!("add rule ip {TABLE} {chain} {rule}"));
    }
}

/// Loads `rules` as one transaction, in `namespace` or in ours. Blocks, at most for five seconds.
pub fn load(rules: &str, namespace: Option<BorrowedFd<'_>>) -> Result<(), FirewallError> {
    assert!(rules.len() <= MAX_RULES_BYTES, "a transaction of {} bytes", rules.len());
    let output = Capture::new(c"nft output", NFT_MESSAGE_BYTES).map_err(FirewallError::Run)?;
    let writer = || output.writer().map(Stdio::from).map_err(FirewallError::Run);
    let mut command = Command::new(NFT);
    command.args(["-f", "-"]).env_clear().env("PATH", NFT_PATH).current_dir("/");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(writer()?);
    let mut child =
        spawn(&mut command, &Confinement { namespace, ..Confinement::default() }).map_err(|e| {
            if e.kind() == io::ErrorKind::NotFound {
                FirewallError::NftMissing
            } else {
                FirewallError::Run(e)
            }
        })?;
    if let Some(mut stdin) = child.stdin.take() {
        // When nft has died early, its exit status says more than the broken pipe.
        let _ = stdin.write_all(rules.as_bytes());
    }
    let mut process = Process::child(child.id()).map_err(FirewallError::Run)?;
    match process.wait(NFT_TIMEOUT_MS).map_err(FirewallError::Run)? {
        Some(Exit::Status(0)) => Ok(()),
        Some(exit) => Err(FirewallError::Refused { exit, message: output.text() }),
        None => {
            process.kill().map_err(FirewallError::Run)?;
            process.wait(NFT_TIMEOUT_MS).map_err(FirewallError::Run)?;
            Err(FirewallError::TimedOut)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::slot;
    use super::*;

    fn rules(allow_internet: bool) -> String {
        capsule_rules(slot::FIRST, &Policy::internet(allow_internet))
    }

    fn accepting(rules: &str, chain: &str) -> usize {
        let start = format!("add rule ip {TABLE} {chain} ");
        rules.lines().filter(|l| l.starts_with(&start) && l.ends_with(" accept")).count()
    }

    #[test]
    fn everything_is_denied_unless_it_is_named() {
        for rules in [rules(false), rules(true)] {
            for chain in ["input", "output", "forward"] {
                let policy = format!(
                    "add chain ip wrenn {chain} {{ type filter hook {chain} priority filter; policy drop; }}"
                );
                assert!(rules.contains(&policy), "{chain}: {rules}");
            }
            assert!(rules.contains("device \"tap0\" priority -500; policy drop;"));
        }
    }

    #[test]
    fn without_internet_there_is_no_way_out_but_answers_to_the_host() {
        let closed = rules(false);
        assert!(!closed.contains("snat"));
        assert!(!closed.contains("goto") && !closed.contains("jump"));
        assert_eq!(accepting(&closed, "forward"), 2);
        assert_eq!(accepting(&closed, "input"), 3);
        let open = rules(true);
        assert_eq!(accepting(&open, "forward"), 2);
        assert!(open.contains("oifname \"eth0\" ip saddr 169.254.0.21 snat to 10.12.0.3"));
    }

    #[test]
    fn private_networks_stay_closed_with_internet() {
        let line = rules(true);
        let line = line.lines().find(|l| l.contains("judge ct original ip daddr")).unwrap_or_default();
        assert!(line.ends_with(" return"), "{line}");
        for (address, prefix) in NOT_INTERNET {
            assert!(line.contains(&format!("{address}/{prefix}")), "{address}/{prefix}");
        }
        assert!(host_rules().contains("iifname @internet ip daddr != { 0.0.0.0/8, 10.0.0.0/8,"));
    }

    #[test]
    fn only_the_guests_own_addresses_leave_the_tap() {
        let rules = rules(false);
        assert!(rules.contains("guard ether saddr != 02:fc:01:00:00:01 drop"));
        assert!(rules.contains("arp saddr ether 02:fc:01:00:00:01 arp saddr ip 169.254.0.21 accept"));
        assert!(rules.contains("guard ether type ip ip saddr 169.254.0.21 accept"));
    }

    #[test]
    fn the_host_drops_what_no_rule_names() {
        let rules = host_rules();
        let forward: Vec<_> =
            rules.lines().filter(|l| l.starts_with("add rule inet wrenn forward")).collect();
        assert!(forward[0].ends_with("iifname \"wrenn-*\" oifname \"wrenn-*\" drop"));
        assert!(forward[1].contains("ct count over 8192 } drop"));
        assert!(forward[3].ends_with("iifname \"wrenn-*\" drop"));
        assert!(forward[5].ends_with("oifname \"wrenn-*\" drop"));
    }

    #[test]
    fn a_link_is_let_out_and_shut_in_again() {
        let slot = slot::FIRST;
        assert_eq!(host_element(slot, true), "add element inet wrenn internet { \"wrenn-1\" }\n");
        assert_eq!(
            host_element(slot, false),
            "add element inet wrenn internet { \"wrenn-1\" }\ndelete element inet wrenn internet { \"wrenn-1\" }\n"
        );
    }

    fn lines_of<'a>(rules: &'a str, chain: &str) -> Vec<&'a str> {
        let start = format!("add rule ip {TABLE} {chain} ");
        rules.lines().filter_map(|l| l.strip_prefix(&start)).collect()
    }

    #[test]
    fn deny_comes_before_allow_and_both_before_the_rest() {
        let list = |rules: &[&str]| rules.iter().map(|r| r.parse().expect("a rule")).collect();
        let policy = Policy {
            deny: list(&["any 8.8.0.0/16", "udp 0.0.0.0/0 53-53"]),
            allow: list(&["tcp 9.0.0.0/8 80-443", "any 1.1.1.1/32 7-7", "icmp 0.0.0.0/0"]),
            ..Policy::OPEN
        };
        let rules = capsule_rules(slot::FIRST, &policy);
        assert_eq!(
            lines_of(&rules, "judge")[2..],
            [
                "ct original ip daddr 8.8.0.0/16 return",
                "ct original protocol udp ct original proto-dst 53 return",
                "ct original ip daddr 9.0.0.0/8 ct original protocol tcp ct original proto-dst 80-443 goto pass",
                "ct original ip daddr 1.1.1.1/32 ct original protocol { tcp, udp } ct original proto-dst 7 goto pass",
                "ct original protocol icmp goto pass",
                "goto pass",
            ]
        );
        let closed = capsule_rules(slot::FIRST, &Policy { allow_internet: false, ..policy });
        assert!(!lines_of(&closed, "judge").contains(&"goto pass"));
    }

    #[test]
    fn limits_are_rates_with_a_burst() {
        let policy = Policy {
            egress: Limit { kbit: 10_000, packets: 0 },
            ingress: Limit { kbit: 16, packets: 1_000 },
            ..Policy::OPEN
        };
        let rules = capsule_rules(slot::FIRST, &policy);
        assert_eq!(
            lines_of(&rules, "egress"),
            [
                "ct state new ct count over 8192 drop",
                "limit rate over 1250000 bytes/second burst 125000 bytes drop",
                "accept"
            ]
        );
        assert_eq!(
            lines_of(&rules, "ingress"),
            [
                "limit rate over 1000/second burst 100 packets drop",
                "limit rate over 2000 bytes/second burst 65536 bytes drop",
                "accept"
            ]
        );
    }

    #[test]
    fn the_largest_policy_is_one_transaction() {
        use wire::network::{MAX_KBIT, MAX_PACKETS, MAX_RULES};
        let rule: Rule = "any 123.123.123.123/32 10000-65535".parse().expect("a rule");
        let limit = Limit { kbit: MAX_KBIT, packets: MAX_PACKETS };
        let policy = Policy {
            allow: vec![rule; MAX_RULES],
            deny: vec![rule; MAX_RULES],
            egress: limit,
            ingress: limit,
            ..Policy::OPEN
        };
        assert!(capsule_rules(slot::LAST, &policy).len() < MAX_RULES_BYTES);
    }
}
