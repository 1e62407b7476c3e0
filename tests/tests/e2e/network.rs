//! What a real guest reaches: nothing, what its policy allows, never the host or its neighbours; and what it
//! is seen to use.
//!
//! "The internet" is a network namespace behind this machine with a small server on two public addresses.

use crate::{Context, Outcome, Test, ensure};
use serde_json::{Value, json};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use wrenn_tests::http::Answer;
use wrenn_tests::process::{Background, run, wait_until};
use wrenn_tests::{Context as _, Failure, Result};

pub const TESTS: &[Test] = &[
    ("a_guest_reaches_what_its_policy_allows", a_guest_reaches_what_its_policy_allows),
    ("a_changed_policy_cuts_connections", a_changed_policy_cuts_connections),
    ("a_guest_never_reaches_host_or_neighbours", a_guest_never_reaches_host_or_neighbours),
    ("spoofed_packets_do_not_leave_a_guest", spoofed_packets_do_not_leave_a_guest),
    ("bandwidth_and_packets_are_limited", bandwidth_and_packets_are_limited),
    ("bad_network_policies_are_refused", bad_network_policies_are_refused),
    ("a_policy_outlives_a_pause", a_policy_outlives_a_pause),
    ("what_a_capsule_uses_is_told", what_a_capsule_uses_is_told),
];

const NAMESPACE: &str = "wrenn-e2e-inet";
const UPLINK: &str = "wre2e-uplink";
/// The host's own address on the way to the internet, a public one.
const HOST: &str = "93.184.216.1";
const SERVER: &str = "93.184.216.34";
const OTHER: &str = "93.184.216.35";
/// Small enough to come in one burst of the slowest limit, and one that does not.
const SMALL: usize = 10;
const LARGE: usize = 1_000_000;
const LIMIT: Duration = Duration::from_secs(30);

/// Serves /N with N bytes and /stream with a line each 50 ms, and takes uploads without end, on two ports of all
/// addresses; notes from where datagrams come.
const PROGRAM: &str = r#"
import http.server, socket, sys, threading, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/stream":
            try:
                while True:
                    self.wfile.write(b"line\n")
                    time.sleep(0.05)
            except OSError:
                return
        else:
            self.wfile.write(b"x" * int(self.path[1:]))
    def do_PUT(self):
        self.send_response(100)
        self.end_headers()
        while self.rfile.read1(65536):
            pass
    def log_message(self, *args):
        pass
def datagrams():
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.bind(("0.0.0.0", 5353))
    while True:
        data, sender = s.recvfrom(2048)
        print("datagram", data.decode("latin-1").strip()[:20], "from", sender[0], flush=True)
        s.sendto(b"pong\n", sender)
threading.Thread(target=datagrams, daemon=True).start()
servers = [http.server.ThreadingHTTPServer(("0.0.0.0", port), Handler) for port in (80, 8080)]
print("ready", flush=True)
threading.Thread(target=servers[0].serve_forever, daemon=True).start()
servers[1].serve_forever()
"#;

/// The internet of one test. It goes when it is dropped.
struct Internet {
    server: Option<Background>,
    log: PathBuf,
}

fn ip(arguments: &str) -> Result<String> {
    run(Command::new("ip").args(arguments.split(' ')), None).context(format!("ip {arguments}"))
}

impl Internet {
    fn make(directory: &Path) -> Result<Internet> {
        let mut internet = Internet { server: None, log: directory.join("internet.log") };
        let _ = std::fs::remove_file(&internet.log);
        ip(&format!("netns add {NAMESPACE}"))?;
        ip(&format!("link add {UPLINK} type veth peer name public netns {NAMESPACE}"))?;
        ip(&format!("address add {HOST}/24 dev {UPLINK}"))?;
        ip(&format!("link set {UPLINK} up"))?;
        for address in [SERVER, OTHER] {
            ip(&format!("-n {NAMESPACE} address add {address}/24 dev public"))?;
        }
        ip(&format!("-n {NAMESPACE} link set public up"))?;
        let mut command = Command::new("ip");
        command.args(["netns", "exec", NAMESPACE, "python3", "-c", PROGRAM]);
        internet.server = Some(Background::start(command, None, &internet.log, None)?);
        wait_until("the server's start", LIMIT, || internet.has_logged("ready"))?;
        Ok(internet)
    }

    fn has_logged(&self, text: &str) -> bool {
        std::fs::read_to_string(&self.log).is_ok_and(|log| log.contains(text))
    }
}

impl Drop for Internet {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take()
            && let Err(e) = server.end(libc::SIGKILL)
        {
            eprintln!("{e}");
        }
        for command in [format!("link delete {UPLINK}"), format!("netns delete {NAMESPACE}")] {
            if let Err(e) = ip(&command) {
                eprintln!("{e}");
            }
        }
    }
}

/// Makes the internet and a capsule, runs a test in them and takes both away.
fn with_capsule(
    context: &mut Context,
    network: &Value,
    test: impl FnOnce(&Context, &Internet, &str) -> Result<()>,
) -> Result<Outcome> {
    let internet = Internet::make(&context.stack.data())?;
    let id = context.create(&json!({"memory_mb": 256, "network": network}))?;
    let tested = test(context, &internet, &id);
    let destroyed = context.destroy(&id);
    tested.and(destroyed).map(|()| Outcome::Passed)
}

impl Context {
    fn patch(&self, id: &str, network: &Value) -> Result<Answer> {
        let path = format!("/v1/capsules/{id}/network");
        let body = network.to_string();
        self.stack.client().request("PATCH", &path, Some(("application/json", body.as_bytes())))
    }

    fn set_network(&self, id: &str, network: &Value) -> Result<Value> {
        let answer = self.patch(id, network)?;
        ensure!(answer.status == 200, "{network}: {} {}", answer.status, answer.json());
        Ok(answer.json())
    }

    /// Whether the guest gets an answer from a URL.
    fn reaches(&self, id: &str, url: &str) -> Result<bool> {
        let command = format!("curl -s -m 5 -o /dev/null -w '%{{http_code}}' http://{url} || true");
        let code = self.shell(id, &command)?;
        ensure!(code == "200" || code == "000", "{url}: {code}");
        Ok(code == "200")
    }

    fn expect_reach(&self, id: &str, when: &str, expected: &[(&str, bool)]) -> Result<()> {
        for (url, wanted) in expected {
            let got = self.reaches(id, url)?;
            ensure!(got == *wanted, "{when}: {url} is {}reached", if got { "" } else { "not " });
        }
        Ok(())
    }
}

fn a_guest_reaches_what_its_policy_allows(context: &mut Context) -> Result<Outcome> {
    let one_port = json!({"allow": [{"cidr": SERVER, "protocol": "tcp", "ports": 80}]});
    with_capsule(context, &one_port, |context, internet, id| {
        let (web, high, other) =
            (format!("{SERVER}:80/10"), format!("{SERVER}:8080/10"), format!("{OTHER}:80/10"));
        let expect = |when, wanted: [bool; 3]| {
            context.expect_reach(id, when, &[(&web, wanted[0]), (&high, wanted[1]), (&other, wanted[2])])
        };
        let ask = format!("echo ping | socat -t 2 - UDP:{SERVER}:5353 2>/dev/null || true");
        expect("from the start", [true, false, false])?;
        ensure!(context.shell(id, &ask)? != "pong", "UDP passes a rule for TCP");
        ensure!(!internet.has_logged("datagram"), "a datagram came");

        context.set_network(id, &json!({"allow": [{"cidr": format!("{SERVER}/32"), "protocol": "udp"}]}))?;
        ensure!(context.shell(id, &ask)? == "pong", "UDP is allowed and does not pass");
        expect("UDP only", [false, false, false])?;

        context.set_network(id, &json!({"allow": ["93.184.216.0/24"], "deny": [{"ports": "8000-9000"}]}))?;
        expect("a network without some ports", [true, false, true])?;

        let told = context.set_network(id, &json!({"allow": [], "allow_internet": true, "deny": [OTHER]}))?;
        expect("all but one address", [true, true, false])?;
        let read = context.stack.client().get(&format!("/v1/capsules/{id}/network"))?.json();
        ensure!(read == told && read["deny"][0]["cidr"] == format!("{OTHER}/32"), "{read} and {told}");

        context.set_network(id, &json!({"allow_internet": false}))?;
        let began = Instant::now();
        expect("nothing", [false, false, false])?;
        ensure!(began.elapsed() < Duration::from_secs(10), "a refusal takes a timeout");
        ensure!(context.shell(id, "echo here")? == "here", "the way to the guest is cut as well");
        Ok(())
    })
}

fn a_changed_policy_cuts_connections(context: &mut Context) -> Result<Outcome> {
    with_capsule(context, &json!({"allow_internet": true}), |context, _, id| {
        let start = format!(
            "for a in {SERVER} {OTHER}; do curl -sN -m 60 http://$a/stream > /tmp/$a 2> /dev/null & done; \
             (while echo x; do sleep 0.1; done | curl -sN -m 60 -T - http://{SERVER}:8080/; \
             echo $? > /tmp/upload.end) > /dev/null 2>&1 &"
        );
        context.shell(id, &start)?;
        let size = |address: &str| -> u64 {
            let size = context.shell(id, &format!("stat -c %s /tmp/{address} 2>/dev/null || echo 0"));
            size.ok().and_then(|s| s.parse().ok()).unwrap_or(0)
        };
        let flowing = |address: &str| {
            let before = size(address);
            wait_until(&format!("data from {address}"), LIMIT, || size(address) > before + 10)
        };
        flowing(SERVER)?;
        flowing(OTHER)?;
        context.set_network(id, &json!({"deny": [SERVER]}))?;
        // One that sends is told at once, with a reset.
        let began = Instant::now();
        wait_until("the end of the denied upload", LIMIT, || {
            context.shell(id, "cat /tmp/upload.end").is_ok_and(|code| code == "55" || code == "56")
        })?;
        ensure!(began.elapsed() < Duration::from_secs(20), "the upload ends after {:?}", began.elapsed());
        let after = size(SERVER);
        flowing(OTHER)?;
        ensure!(size(SERVER) == after, "data still comes from what is denied");
        context.shell(id, "pkill curl || kill $(pidof curl) || true")?;
        Ok(())
    })
}

fn a_guest_never_reaches_host_or_neighbours(context: &mut Context) -> Result<Outcome> {
    let listener = TcpListener::bind(("0.0.0.0", 0)).context("listen on the host")?;
    listener.set_nonblocking(true).context("listen on the host")?;
    let port = listener.local_addr().context("listen on the host")?.port();
    let neighbour = context.capsule()?;
    let addresses = context.stack.client().get(&format!("/v1/capsules/{neighbour}"))?.json();
    let neighbour = addresses["host_ip"].as_str().unwrap_or_default().to_string();
    let open = json!({"allow_internet": true, "allow": ["0.0.0.0/0", {"protocol": "tcp"}]});
    with_capsule(context, &open, |context, _, id| {
        ensure!(context.reaches(id, &format!("{SERVER}/10"))?, "nothing is reached at all");
        let own = context.stack.client().get(&format!("/v1/capsules/{id}"))?.json();
        let own = own["host_ip"].as_str().unwrap_or_default().to_string();
        let slot: u32 = own.parse::<std::net::Ipv4Addr>().context("host_ip")?.to_bits() & 0xffff;
        let link = |offset| std::net::Ipv4Addr::from_bits(0x0a0c_0000 + 2 * slot + offset).to_string();
        let hosts = [HOST.to_string(), link(0), link(1), "10.11.0.1".into(), "127.0.0.1".into()];
        for host in hosts.iter().chain([&"169.254.0.22".to_string(), &"169.254.169.254".to_string()]) {
            let url = format!("{host}:{port}/");
            ensure!(!context.reaches(id, &url)?, "the guest reached its host at {url}");
        }
        // The guest daemon listens on this port in every capsule.
        let command = format!(
            "timeout 5 bash -c 'echo > /dev/tcp/{neighbour}/49983' 2>/dev/null && echo reached || echo no"
        );
        ensure!(context.shell(id, &command)? == "no", "the guest reached its neighbour {neighbour}");
        for private in ["10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.1.1"] {
            ensure!(!context.reaches(id, &format!("{private}/"))?, "the guest reached {private}");
        }
        ensure!(listener.accept().is_err(), "a connection to the host came through");
        Ok(())
    })
}

fn spoofed_packets_do_not_leave_a_guest(context: &mut Context) -> Result<Outcome> {
    with_capsule(context, &json!({"allow_internet": true}), |context, internet, id| {
        // As root, a source address may be any that is not one's own.
        let send = |text: &str, options: &str| {
            let command =
                format!("echo {text} | sudo socat -t 1 - UDP-SENDTO:{SERVER}:5353{options} 2>&1 || true");
            context.shell(id, &command)
        };
        let pong = send("honest", "")?;
        ensure!(pong == "pong", "a datagram with its own address does not pass: {pong}");
        for address in ["169.254.0.20", "169.254.0.22", "93.184.216.99", "10.11.0.1"] {
            send("liar", &format!(",bind={address}:4444,ip-transparent"))?;
        }
        let pong = send("honest-again", "")?;
        ensure!(pong == "pong" && internet.has_logged("honest-again"), "after that: {pong}");
        ensure!(!internet.has_logged("liar"), "a spoofed datagram came out");
        Ok(())
    })
}

fn bandwidth_and_packets_are_limited(context: &mut Context) -> Result<Outcome> {
    with_capsule(context, &json!({"allow_internet": true}), |context, _, id| {
        let fetch = |bytes: usize| -> Result<Duration> {
            let command = format!("curl -s -m 60 -o /tmp/got http://{SERVER}/{bytes} && stat -c %s /tmp/got");
            let began = Instant::now();
            ensure!(context.shell(id, &command)? == bytes.to_string(), "{bytes} bytes did not come whole");
            Ok(began.elapsed())
        };
        let free = fetch(LARGE)?;
        // 100,000 bytes a second: one second's worth and the burst at once, then 8 s for the rest.
        context.set_network(id, &json!({"limits": {"ingress_kbit": 800}}))?;
        let limited = fetch(LARGE)?;
        println!("  {LARGE} bytes took {free:.1?} without a limit, {limited:.1?} with 800 kbit/s");
        ensure!((6..25).contains(&limited.as_secs()), "with a limit of 800 kbit/s it took {limited:?}");
        // What is limited is the internet, not the host's way to the guest.
        let began = Instant::now();
        let output = context.shell(id, "head -c 1000000 /dev/zero | tr '\\0' x")?;
        let exec = began.elapsed();
        ensure!(output.len() == LARGE && exec < limited / 2, "the guest's output took {exec:?}");

        context.set_network(id, &json!({"limits": {"ingress_kbit": 0, "egress_packets": 10}}))?;
        ensure!(fetch(SMALL).is_ok(), "a few packets do not pass");
        let count = "for i in $(seq 200); do echo x; done | socat -u -b 2 - UDP-SENDTO:93.184.216.34:5353";
        context.shell(id, count)?;
        context.set_network(id, &json!({"limits": {"egress_packets": 0}}))?;
        let again = fetch(LARGE)?;
        ensure!(again < limited / 2, "without a limit again it took {again:?}");
        Ok(())
    })?;
    Ok(Outcome::Passed)
}

fn bad_network_policies_are_refused(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    for (bad, told) in [
        (json!({"allow": ["10.0.0.0/8"]}), "not public"),
        (json!({"allow": [{"cidr": "169.254.169.254"}]}), "not public"),
        (json!({"allow": ["1.2.3.4/8"]}), "bits beyond the prefix"),
        (json!({"deny": ["fd00::/8"]}), "no IPv6"),
        (json!({"limits": {"egress_kbit": 3}}), "limits.egress_kbit"),
        (json!({"allow_internet": "yes"}), "allow_internet"),
        (json!({}), "nothing to change"),
    ] {
        let answer = context.patch(&id, &bad)?;
        ensure!(
            answer.status == 400 && answer.error_message().contains(told),
            "{bad}: {} {}",
            answer.status,
            answer.json()
        );
    }
    let nobody = context.patch("cl-0000000000000000000000000", &json!({"allow_internet": true}))?;
    ensure!(nobody.status == 404, "{}", nobody.status);
    Ok(Outcome::Passed)
}

fn a_policy_outlives_a_pause(context: &mut Context) -> Result<Outcome> {
    with_capsule(context, &json!({"allow_internet": true}), |context, _, id| {
        context.set_network(id, &json!({"deny": [OTHER]}))?;
        let client = context.stack.client();
        for step in ["pause", "resume"] {
            let answer = client.post(&format!("/v1/capsules/{id}/{step}"), &json!({}))?;
            ensure!(answer.status == 200, "{step}: {} {}", answer.status, answer.json());
            if step == "pause" {
                let answer = context.patch(id, &json!({"allow_internet": false}))?;
                ensure!(answer.status == 409, "a change while it is paused: {}", answer.status);
            }
        }
        let (server, other) = (format!("{SERVER}/10"), format!("{OTHER}/10"));
        context.expect_reach(id, "after a pause", &[(&server, true), (&other, false)])?;
        context.set_network(id, &json!({"deny": []}))?;
        context.expect_reach(id, "changed after a pause", &[(&server, true), (&other, true)])
    })
}

fn what_a_capsule_uses_is_told(context: &mut Context) -> Result<Outcome> {
    let id = context.capsule()?;
    context.shell(
        &id,
        "head -c 8000000 /dev/urandom > /var/tmp/used; sync; timeout 3 sh -c 'while :; do :; done' || true",
    )?;
    let client = context.stack.client();
    let path = format!("/v1/capsules/{id}/metrics");
    let metrics = client.get(&path)?.json();
    let points = metrics["points"].as_array().cloned().unwrap_or_default();
    ensure!(metrics["range"] == "10m" && metrics["sandbox_id"] == id.as_str(), "{metrics}");
    ensure!(points.len() >= 5, "{} points", points.len());
    let number =
        |point: &Value, name: &str| point[name].as_f64().ok_or(Failure(format!("{name} in {point}")));
    let mut most_cpu = 0.0_f64;
    for point in &points {
        let cpu = number(point, "cpu_pct")?;
        ensure!((0.0..=100.0).contains(&cpu), "{point}");
        most_cpu = most_cpu.max(cpu);
        ensure!((1.7e9..1e11).contains(&number(point, "timestamp_unix")?), "{point}");
    }
    ensure!((30.0..=100.0).contains(&most_cpu), "a busy loop is seen as {most_cpu} %");
    let last = points.last().ok_or("no point")?;
    let memory = number(last, "mem_bytes")?;
    ensure!((64e6..2e9).contains(&memory), "{memory} bytes of memory");
    // The disk is looked at every few seconds.
    wait_until("the disk's figure", LIMIT, || {
        client.get(&path).is_ok_and(|answer| {
            let points = answer.json()["points"].as_array().cloned().unwrap_or_default();
            points.last().and_then(|p| p["disk_bytes"].as_f64()).is_some_and(|bytes| bytes > 1e6)
        })
    })?;
    for (range, status) in [("5m", 200), ("24h", 200), ("3h", 400)] {
        let answer = client.get(&format!("{path}?range={range}"))?;
        ensure!(answer.status == status, "{range}: {}", answer.status);
    }
    let gone = context.create(&json!({"memory_mb": 256}))?;
    context.destroy(&gone)?;
    let answer = client.get(&format!("/v1/capsules/{gone}/metrics"))?;
    ensure!(answer.status == 404, "metrics of a destroyed capsule: {}", answer.status);
    Ok(Outcome::Passed)
}
