//! Services in a capsule, reached from outside by the Host header.

use crate::{Context, Outcome, Test, ensure};
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};
use wrenn_tests::http::{Answer, Client};
use wrenn_tests::process::{run, wait_until};
use wrenn_tests::stack::project_root;
use wrenn_tests::{Context as _, Result};

pub const TESTS: &[Test] = &[
    ("a_service_on_the_guests_loopback_is_reached", a_service_on_the_guests_loopback_is_reached),
    ("strangers_and_closed_ports_are_told_so", strangers_and_closed_ports_are_told_so),
    ("a_large_response_streams_out_of_a_capsule", a_large_response_streams_out_of_a_capsule),
    ("a_websocket_reaches_a_service", a_websocket_reaches_a_service),
    ("the_sdk_names_ports_as_they_are_served", the_sdk_names_ports_as_they_are_served),
];

const PORT: u16 = 8080;
/// Bytes of the large response.
const LARGE: usize = 32 << 20;
/// How long a service may take to listen.
const START_LIMIT: Duration = Duration::from_secs(20);
/// What answers: the request's head in lines that end with `|`, a large body, or an echo after an upgrade.
const SERVICE: &str = r#"
while IFS= read -r line; do
  line=${line%?}
  [ -z "$line" ] && break
  head="$head$line|"
done
case $head in
"GET /large"*)
  printf 'HTTP/1.1 200 OK\r\nContent-Length: 33554432\r\n\r\n'
  head -c 33554432 /dev/zero ;;
*"upgrade: websocket"*)
  printf 'HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n'
  exec cat ;;
*)
  printf 'HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s' "${#head}" "$head" ;;
esac
"#;

/// The shared capsule with the service in it, on loopback only.
fn served(context: &mut Context) -> Result<String> {
    let id = context.capsule()?;
    if fetch(context, &id, PORT, "/").is_ok_and(|a| a.status == 200) {
        return Ok(id);
    }
    context.shell(&id, &format!("cat >/tmp/service <<'END'\n{SERVICE}\nEND"))?;
    let listen = format!("TCP4-LISTEN:{PORT},bind=127.0.0.1,fork,reuseaddr");
    let started = context.exec(
        &id,
        &json!({"cmd": "socat", "args": [listen, "EXEC:/bin/sh /tmp/service"], "background": true}),
    )?;
    ensure!(started.status < 300, "socat: {} {}", started.status, started.json());
    wait_until("the service to listen", START_LIMIT, || {
        fetch(context, &id, PORT, "/").is_ok_and(|a| a.status == 200)
    })?;
    Ok(id)
}

fn head(context: &Context, id: &str, port: u16, path: &str, more: &str) -> Vec<u8> {
    let key = &context.stack.api_key;
    format!("GET {path} HTTP/1.1\r\nHost: {port}-{id}.example.com\r\nX-API-Key: {key}\r\n{more}\r\n")
        .into_bytes()
}

fn fetch(context: &Context, id: &str, port: u16, path: &str) -> Result<Answer> {
    context.stack.anonymous().raw(&head(context, id, port, path, "Connection: close\r\n"))
}

fn a_service_on_the_guests_loopback_is_reached(context: &mut Context) -> Result<Outcome> {
    let id = served(context)?;
    let answer = fetch(context, &id, PORT, "/a?b=c")?;
    let got = String::from_utf8_lossy(&answer.body).into_owned();
    ensure!(got.starts_with("GET /a?b=c HTTP/1.1|"), "{got}");
    ensure!(got.contains("x-forwarded-for: 127.0.0.1|"), "{got}");
    ensure!(!got.contains(&context.stack.api_key), "the service sees the credential: {got}");
    let began = Instant::now();
    const ROUNDS: u32 = 20;
    for _ in 0..ROUNDS {
        ensure!(fetch(context, &id, PORT, "/")?.status == 200, "a request failed");
    }
    println!("    a request and its response: {:?}", began.elapsed() / ROUNDS);
    Ok(Outcome::Passed)
}

fn strangers_and_closed_ports_are_told_so(context: &mut Context) -> Result<Outcome> {
    let id = served(context)?;
    let client: Client = context.stack.anonymous();
    let anonymous = client.raw(
        format!("GET / HTTP/1.1\r\nHost: {PORT}-{id}.example.com\r\nConnection: close\r\n\r\n").as_bytes(),
    )?;
    ensure!(anonymous.status == 401, "without a key: {}", anonymous.status);
    let closed = fetch(context, &id, 9, "/")?;
    ensure!(
        closed.status == 502 && closed.error_message().contains("port 9"),
        "{} {}",
        closed.status,
        closed.json()
    );
    Ok(Outcome::Passed)
}

fn a_large_response_streams_out_of_a_capsule(context: &mut Context) -> Result<Outcome> {
    let id = served(context)?;
    let began = Instant::now();
    let answer = fetch(context, &id, PORT, "/large")?;
    ensure!(answer.status == 200 && answer.body.len() == LARGE, "{} {}", answer.status, answer.body.len());
    let seconds = began.elapsed().as_secs_f64();
    println!("    {:.1} MB/s out of a service", LARGE as f64 / 1e6 / seconds);
    Ok(Outcome::Passed)
}

fn a_websocket_reaches_a_service(context: &mut Context) -> Result<Outcome> {
    let id = served(context)?;
    let mut stream = TcpStream::connect(&context.stack.cp_address).context("connect")?;
    stream.set_read_timeout(Some(START_LIMIT)).context("set a timeout")?;
    let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    stream.write_all(&head(context, &id, PORT, "/ws", upgrade)).context("send")?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).context("read the head")?;
        answer.push(byte[0]);
    }
    let answer = String::from_utf8_lossy(&answer).into_owned();
    ensure!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    for message in [b"hello".as_slice(), &[7; 100_000]] {
        stream.write_all(message).context("send")?;
        let mut echo = vec![0; message.len()];
        stream.read_exact(&mut echo).context("read the echo")?;
        ensure!(echo == message, "the echo differs");
    }
    stream.shutdown(std::net::Shutdown::Write).context("end")?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).context("read to the end")?;
    ensure!(rest.is_empty(), "{} bytes more", rest.len());
    Ok(Outcome::Passed)
}

fn the_sdk_names_ports_as_they_are_served(context: &mut Context) -> Result<Outcome> {
    let python = project_root().join("builds/sdk-venv/bin/python");
    if !python.exists() {
        return Ok(Outcome::Skipped("the SDK is not installed yet: its own test does that".into()));
    }
    let id = served(context)?;
    let script = format!(
        "import os, wrenn\n\
         access = dict(api_key=os.environ['WRENN_API_KEY'], base_url=os.environ['WRENN_BASE_URL'])\n\
         print(wrenn.Capsule.connect({id:?}, **access).get_url({PORT}))"
    );
    let url = run(
        Command::new(python)
            .args(["-c", &script])
            .env("WRENN_API_KEY", &context.stack.api_key)
            .env("WRENN_BASE_URL", format!("http://{}", context.stack.cp_address)),
        None,
    )?;
    let host = url.trim().strip_prefix("http://").unwrap_or_default().trim_end_matches('/');
    ensure!(host.starts_with(&format!("{PORT}-{id}.")), "{url}");
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nX-API-Key: {}\r\nConnection: close\r\n\r\n",
        context.stack.api_key
    );
    let answer = context.stack.anonymous().raw(request.as_bytes())?;
    ensure!(answer.status == 200, "{url}: {} {}", answer.status, answer.json());
    Ok(Outcome::Passed)
}
