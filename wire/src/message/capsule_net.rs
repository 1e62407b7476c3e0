//! Messages between control plane and host agent: what a capsule may reach of the internet, and what it
//! uses of its host.

use super::messages;
use alloc::string::String;
use alloc::vec::Vec;

messages! {
    /// Sets what a running capsule's guest may reach, in place of all that was said before, for connections
    /// that exist as well. Destinations that are not the public internet are never reached. For the others
    /// a rule of `deny` that matches decides, then one of `allow`, then `allow_internet`. A rule is
    /// `PROTOCOL CIDR` or `PROTOCOL CIDR FIRST-LAST` with destination ports; the protocol is any, tcp, udp
    /// or icmp: `tcp 93.184.216.0/24 80-443`. Answered by `Done` once it holds, or `Error` and then what
    /// was said before holds. With an empty capsule id it is the first message of a stream that goes on
    /// with `CapsuleCreate`, and holds for that capsule from its first packet on.
    CapsuleNetwork = 0x0140 {
        /// The capsule's id; empty for the one that the stream's next message creates.
        capsule_id: String,
        /// Counts the changes of a capsule's network. One that is older than what holds is `invalid_state`.
        revision: u64,
        /// Whether the guest may reach what no rule speaks of.
        allow_internet: bool,
        /// What it may reach even so; at most 64 rules.
        allow: Vec<String>,
        /// What it may not reach in any case; at most 64 rules.
        deny: Vec<String>,
        /// The most kilobits a second that it sends to the internet, 16 to 100,000,000; 0 for no limit.
        egress_kbit: u32,
        /// The most packets a second that it sends to the internet, up to 100,000,000; 0 for no limit.
        egress_packets: u32,
        /// The most kilobits a second that come to it from the internet, as for `egress_kbit`.
        ingress_kbit: u32,
        /// The most packets a second that come to it from the internet, as for `egress_packets`.
        ingress_packets: u32,
    }

    /// Asks what a capsule has used of its host. Answered by `CapsuleMetricsReply`.
    CapsuleMetrics = 0x0141 {
        /// The capsule's id.
        capsule_id: String,
        /// How far back, in seconds, 1 to 86,400. Up to 600 the samples are 0.5 s apart, up to 7,200 they
        /// are averages of 30 s, beyond that of 5 minutes.
        range_sec: u32,
    }

    /// What a capsule has used of its host: one value a list for each point in time, the oldest first.
    CapsuleMetricsReply = 0x0142 {
        /// When, in seconds since the epoch.
        times: Vec<u64>,
        /// Time of its virtual CPUs, in hundredths of a percent of all that it has: 0 to 10,000.
        cpu: Vec<u32>,
        /// Resident memory of its VMM, in bytes.
        memory: Vec<u64>,
        /// Space that its disk takes, in bytes.
        disk: Vec<u64>,
    }
}
