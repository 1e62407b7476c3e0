//! The blocking client against a server on loopback.

mod common;

use std::time::Duration;
use wire::client::{Client, ClientError, Identity, Incoming};
use wire::message::{Code, Done, Health, HealthReply, HostStatus};
use wire::session::{Limits, SessionError};

const WAIT: Duration = Duration::from_secs(20);

fn identity(secret: &'static [u8]) -> Identity<'static> {
    Identity { name: "key", secret, program: "test/1" }
}

fn connect() -> Client {
    let address = common::serve(Limits::default());
    Client::connect(address, identity(common::SECRET), WAIT).expect("connect")
}

#[test]
fn a_request_is_answered() {
    let mut client = connect();
    assert_eq!(client.peer_name(), "echo/1");
    for _ in 0..3 {
        let reply: HealthReply = client.request(&Health {}).expect("answer");
        assert_eq!(reply, HealthReply { version: "echo".into(), uptime_ms: 7 });
    }
    client.close().expect("close");
}

#[test]
fn errors_come_as_errors() {
    let mut client = connect();
    let stream = client.open_in("cl-none", &Health {}, true).expect("open");
    match client.next_message::<HealthReply>(stream) {
        Err(ClientError::Refused(e)) => assert_eq!(e.code(), Code::NotFound),
        other => panic!("{other:?}"),
    }
    let stream = client.open(&HostStatus {}, true).expect("open");
    match client.next_message::<HealthReply>(stream) {
        Err(ClientError::Reset { code, .. }) => assert_eq!(Code::from_number(code), Code::Unimplemented),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_wrong_secret_is_refused() {
    let address = common::serve(Limits::default());
    for (name, secret) in [("key", &b"guess"[..]), ("nobody", common::SECRET)] {
        let identity = Identity { name, secret, program: "test/1" };
        match Client::connect(address, identity, WAIT) {
            Err(ClientError::Session(SessionError::ByPeer(code, _))) => {
                assert_eq!(Code::from_number(code), Code::Unauthenticated);
            }
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("let in"),
        }
    }
}

#[test]
fn many_windows_of_data_come_back_beside_other_streams() {
    let mut client = connect();
    let bulk = client.open(&Done {}, false).expect("open");
    let all: Vec<u8> = (0..2_000_000u32).map(|i| (i % 251) as u8).collect();
    let mut back = Vec::new();
    // The echo stops reading when the way back is full: less than a window is sent before it is read.
    for part in all.chunks(100_000) {
        client.send_data(bulk, 1, part).expect("send");
        let reply: HealthReply = client.request(&Health {}).expect("answer");
        assert_eq!(reply.uptime_ms, 7);
        while back.len() < part.len() {
            match client.next(bulk).expect("echo") {
                Incoming::Data { channel: 1, bytes } => back.extend_from_slice(&bytes),
                other => panic!("{other:?}"),
            }
        }
        assert!(back == part);
        back.clear();
    }
    client.finish(bulk).expect("finish");
    assert_eq!(client.next(bulk).expect("end"), Incoming::Finished);
}

#[test]
fn a_cancelled_stream_is_gone_and_the_rest_goes_on() {
    let mut client = connect();
    let stream = client.open(&Done {}, false).expect("open");
    client.send_data(stream, 1, &[1; 50_000]).expect("send");
    client.cancel(stream, "enough").expect("cancel");
    assert!(client.next(stream).is_err());
    let reply: HealthReply = client.request(&Health {}).expect("answer");
    assert_eq!(reply.uptime_ms, 7);
    client.idle(Duration::from_millis(10)).expect("idle");
}
