//! A host as control planes see it: it decodes the real messages, checks that they make sense, and
//! answers with real ones.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use wire::message::{
    CHANNEL_STDERR, CHANNEL_STDOUT, CapsuleCreate, CapsuleDestroy, CapsuleInfo, CapsuleList, CapsuleMetrics,
    CapsuleMetricsReply, CapsuleNetwork, CapsulePause, CapsulePing, CapsuleResume, CapsuleSnapshot,
    CapsuleState, Code, Done, Error, Forward, HostStatus, HostStatusReply, Message, ProcessExited,
    ProcessList, ProcessListReply, ProcessSignal, ProcessStart, ProcessStarted, SnapshotDelete, SnapshotInfo,
    SnapshotList,
};
use wrenn_cp::http::handler::{HostCall, HostError, Reply};

/// One host.
#[derive(Debug)]
pub struct FakeHost {
    pub address: String,
    pub capsules: BTreeMap<String, CapsuleInfo>,
    /// The network policies that it was told, in order.
    pub networks: Vec<CapsuleNetwork>,
    /// The names of its snapshots.
    pub snapshots: BTreeSet<String>,
    /// What the next calls fail with, before they are carried out.
    pub failures: VecDeque<HostError>,
    /// What the next create, change or snapshot fails with, after it was carried out.
    pub lost_answers: VecDeque<HostError>,
    /// What commands print and end with.
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exited: ProcessExited,
    /// Bytes of output that did not fit into the reply.
    pub dropped_bytes: u64,
    /// The commands that were started.
    pub started: Vec<ProcessStart>,
    /// The kinds of the calls' first messages.
    pub calls: Vec<u16>,
}

fn decode<M: Message>(message: &[u8]) -> M {
    let (kind, body) = message.split_at(2);
    assert_eq!(kind, M::KIND.to_be_bytes(), "a {}", M::NAME);
    M::decode(body).expect("a whole message")
}

fn kind(message: &[u8]) -> u16 {
    u16::from_be_bytes([message[0], message[1]])
}

fn push<M: Message>(reply: &mut Reply, message: &M) {
    let mut body = Vec::new();
    message.encode(&mut body);
    reply.messages.push((M::KIND, body));
}

fn just<M: Message>(message: &M) -> Result<Reply, HostError> {
    let mut reply = Reply::default();
    push(&mut reply, message);
    Ok(reply)
}

fn not_found(what: &str) -> HostError {
    HostError::Remote(Error::new(Code::NotFound, format!("this host has no {what}")))
}

impl FakeHost {
    pub fn new(address: &str) -> FakeHost {
        FakeHost {
            address: address.to_string(),
            capsules: BTreeMap::new(),
            networks: Vec::new(),
            snapshots: BTreeSet::new(),
            failures: VecDeque::new(),
            lost_answers: VecDeque::new(),
            stdout: Vec::new(),
            stderr: Vec::new(),
            exited: ProcessExited { duration_ms: 5, ..ProcessExited::default() },
            dropped_bytes: 0,
            started: Vec::new(),
            calls: Vec::new(),
        }
    }

    /// Carries a call out.
    pub fn answer(&mut self, call: &HostCall) -> Result<Reply, HostError> {
        let first = call.messages.first().expect("a call has a message");
        self.calls.push(kind(first));
        assert!(call.timeout_ms > 0 && call.host_id.starts_with("host-"), "{}", call.host_id);
        for message in &call.messages {
            assert!(message.len() <= 65_536, "a message is one frame");
        }
        if let Some(failure) = self.failures.pop_front() {
            return Err(failure);
        }
        match kind(first) {
            CapsuleCreate::KIND => self.create(call, decode(first)),
            CapsuleNetwork::KIND => {
                let network = decode::<CapsuleNetwork>(first);
                let id = network.capsule_id.clone();
                self.networks.push(network);
                match call.messages.get(1) {
                    Some(create) if id.is_empty() => self.create(call, decode(create)),
                    _ if self.capsules.contains_key(&id) => {
                        self.lost_answers.pop_front().map_or_else(|| just(&Done {}), Err)
                    }
                    _ => Err(not_found("such capsule")),
                }
            }
            CapsuleMetrics::KIND => {
                let asked = decode::<CapsuleMetrics>(first);
                assert!(self.capsules.contains_key(&asked.capsule_id));
                let (times, cpu) = (vec![u64::from(asked.range_sec)], vec![1_250]);
                just(&CapsuleMetricsReply { times, cpu, memory: vec![4096], disk: vec![512] })
            }
            CapsuleDestroy::KIND => {
                assert!(call.is_detached || call.timeout_ms <= 20_000, "a client's leaving must not stop it");
                let id = decode::<CapsuleDestroy>(first).capsule_id;
                self.capsules.remove(&id).map(|_| Reply::default()).ok_or_else(|| not_found("such capsule"))
            }
            CapsuleList::KIND => {
                let mut reply = Reply::default();
                self.capsules.values().for_each(|info| push(&mut reply, info));
                push(&mut reply, &Done {});
                Ok(reply)
            }
            CapsulePause::KIND => {
                assert!(call.is_detached, "a client's leaving must not stop it");
                self.change(&decode::<CapsulePause>(first).capsule_id, CapsuleState::Paused)
            }
            CapsuleResume::KIND => {
                let wanted: CapsuleResume = decode(first);
                assert!(u64::from(wanted.deadline_ms) < call.timeout_ms, "the host gives up first");
                self.change(&wanted.capsule_id, CapsuleState::Running)
            }
            CapsuleSnapshot::KIND => {
                let wanted: CapsuleSnapshot = decode(first);
                assert!(call.is_detached, "a client's leaving must not stop it");
                let info = self.capsules.get(&wanted.capsule_id).ok_or_else(|| not_found("such capsule"))?;
                assert!(self.snapshots.insert(wanted.name.clone()), "a name of its own each");
                if let Some(lost) = self.lost_answers.pop_front() {
                    return Err(lost);
                }
                just(&SnapshotInfo {
                    name: wanted.name,
                    vcpus: info.vcpus,
                    memory_mb: info.memory_mb,
                    disk_size_mb: 2048,
                    size_bytes: 1 << 20,
                    created_us: 1,
                })
            }
            SnapshotList::KIND => {
                let mut reply = Reply::default();
                for name in &self.snapshots {
                    push(&mut reply, &SnapshotInfo { name: name.clone(), ..SnapshotInfo::default() });
                }
                push(&mut reply, &Done {});
                Ok(reply)
            }
            SnapshotDelete::KIND => {
                let name = decode::<SnapshotDelete>(first).name;
                if self.snapshots.remove(&name) { just(&Done {}) } else { Err(not_found("such snapshot")) }
            }
            CapsulePing::KIND => {
                assert!(self.capsules.contains_key(&decode::<CapsulePing>(first).capsule_id));
                just(&Done {})
            }
            HostStatus::KIND => just(&HostStatusReply {
                templates: vec!["minimal".into()],
                memory_mb: 4096,
                ..HostStatusReply::default()
            }),
            Forward::KIND => {
                let id = decode::<Forward>(first).capsule_id;
                if !self.capsules.contains_key(&id) {
                    return Err(not_found("such capsule"));
                }
                self.in_capsule(call, &call.messages[1])
            }
            other => panic!("a host does not know {other:#06x}"),
        }
    }

    fn create(&mut self, call: &HostCall, wanted: CapsuleCreate) -> Result<Reply, HostError> {
        assert!(u64::from(wanted.deadline_ms) < call.timeout_ms, "the host gives up first");
        assert!(call.last_kinds.contains(&CapsuleInfo::KIND));
        assert!(!self.capsules.contains_key(&wanted.capsule_id), "every capsule has its own id");
        if wanted.template != "minimal" && !self.snapshots.contains(&wanted.template) {
            return Err(not_found("such template"));
        }
        let info = CapsuleInfo {
            capsule_id: wanted.capsule_id.clone(),
            state: CapsuleState::Running,
            template: wanted.template,
            vcpus: wanted.vcpus,
            memory_mb: wanted.memory_mb,
            disk_size_mb: 2048,
            disk_used_mb: 3,
            guest_ip: "169.254.0.21".into(),
            host_ip: "10.11.0.2".into(),
            metadata: vec![("agent_version".into(), "0.1.0".into())],
        };
        self.capsules.insert(wanted.capsule_id, info.clone());
        match self.lost_answers.pop_front() {
            Some(error) => Err(error),
            None => just(&info),
        }
    }

    fn change(&mut self, id: &str, state: CapsuleState) -> Result<Reply, HostError> {
        let info = self.capsules.get_mut(id).ok_or_else(|| not_found("such capsule"))?;
        assert_ne!(info.state, state, "asked for what is so already");
        info.state = state;
        match self.lost_answers.pop_front() {
            Some(error) => Err(error),
            None => just(info),
        }
    }

    fn in_capsule(&mut self, call: &HostCall, message: &[u8]) -> Result<Reply, HostError> {
        match kind(message) {
            ProcessStart::KIND => {
                let wanted: ProcessStart = decode(message);
                if wanted.argv[0].lossy() == "no-such-program" {
                    let text = "command not found: no-such-program";
                    return Err(HostError::Remote(Error::with_errno(Code::NotFound, libc::ENOENT, text)));
                }
                let mut reply = Reply::default();
                push(&mut reply, &ProcessStarted { pid: 42, tag: wanted.tag.clone() });
                if !wanted.detached {
                    reply.channels.insert(CHANNEL_STDOUT, self.stdout.clone());
                    reply.channels.insert(CHANNEL_STDERR, self.stderr.clone());
                    reply.dropped_bytes = self.dropped_bytes;
                    push(&mut reply, &self.exited);
                }
                assert_eq!(
                    call.last_kinds,
                    [if wanted.detached { ProcessStarted::KIND } else { ProcessExited::KIND }]
                );
                self.started.push(wanted);
                Ok(reply)
            }
            ProcessList::KIND => just(&ProcessListReply {
                processes: vec![((42, "web".into()), vec!["sleep".into(), "9".into()])],
            }),
            ProcessSignal::KIND => match decode::<ProcessSignal>(message) {
                ProcessSignal { selector, signal: 9 | 15 } if selector == "42" || selector == "web" => {
                    just(&Done {})
                }
                _ => Err(not_found("such process")),
            },
            other => panic!("a guest does not know {other:#06x}"),
        }
    }
}
