//! Literal bytes of RFC 6455 section 5.7, and two sides talking to each other in pieces.

use super::*;

const LIMIT: usize = 1 << 20;

fn server() -> WebSocket {
    WebSocket::new(Role::Server, LIMIT)
}

fn client() -> WebSocket {
    WebSocket::new(Role::Client { mask_seed: 7 }, LIMIT)
}

fn received(socket: &mut WebSocket, bytes: &[u8]) -> Result<Vec<Message>, WebSocketError> {
    socket.receive(bytes)?;
    Ok(std::iter::from_fn(|| socket.poll_message()).collect())
}

#[test]
fn the_accept_value_is_that_of_rfc_6455_section_1_3() {
    assert_eq!(accept_value("dGhlIHNhbXBsZSBub25jZQ==").as_deref(), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    assert_eq!(accept_value("short"), None);
    assert_eq!(accept_value("AAAA"), None);
}

#[test]
fn the_examples_of_rfc_6455_section_5_7() {
    let hello = || vec![Message::Text("Hello".into())];
    let masked = [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
    assert_eq!(received(&mut server(), &masked), Ok(hello()));
    assert_eq!(received(&mut client(), &[0x81, 5, b'H', b'e', b'l', b'l', b'o']), Ok(hello()));
    let fragments = [0x01, 3, b'H', b'e', b'l', 0x80, 2, b'l', b'o'];
    assert_eq!(received(&mut client(), &fragments), Ok(hello()));
    let mut socket = client();
    assert_eq!(received(&mut socket, &[0x89, 5, b'H', b'e', b'l', b'l', b'o']), Ok(vec![]));
    assert_eq!(socket.output()[..2], [0x8a, 0x85], "a ping is answered by a masked pong");
    let mut long = vec![0x82, 0x7e, 0x01, 0x00];
    long.resize(4 + 256, 9);
    assert_eq!(received(&mut client(), &long), Ok(vec![Message::Binary(vec![9; 256])]));
    let mut longer = vec![0x82, 0x7f, 0, 0, 0, 0, 0, 1, 0, 0];
    longer.resize(10 + 65_536, 9);
    assert_eq!(received(&mut client(), &longer), Ok(vec![Message::Binary(vec![9; 65_536])]));
}

#[test]
fn what_breaks_the_protocol_is_closed_with_its_code() {
    let protocol = close_code::PROTOCOL;
    for (name, bytes, code) in [
        ("unmasked from a client", vec![0x81, 1, b'x'], protocol),
        ("reserved bit", vec![0xc1, 0x80, 0, 0, 0, 0], protocol),
        ("unknown opcode", vec![0x83, 0x80, 0, 0, 0, 0], protocol),
        ("fragmented ping", vec![0x09, 0x80, 0, 0, 0, 0], protocol),
        ("long ping", vec![0x89, 0xfe, 0, 126, 0, 0, 0, 0], protocol),
        ("continuation of nothing", vec![0x80, 0x80, 0, 0, 0, 0], protocol),
        ("text inside fragments", vec![0x01, 0x80, 0, 0, 0, 0, 0x81, 0x80, 0, 0, 0, 0], protocol),
        ("length not minimal", vec![0x81, 0xfe, 0, 5, 0, 0, 0, 0], protocol),
        ("close code of one byte", vec![0x88, 0x81, 0, 0, 0, 0, 3], protocol),
        ("close code 1006", vec![0x88, 0x82, 0, 0, 0, 0, 0x03, 0xee], protocol),
        ("not UTF-8", vec![0x81, 0x81, 0, 0, 0, 0, 0xff], close_code::BAD_DATA),
        ("too long", vec![0x82, 0xff, 0, 0, 0, 0, 0, 0x10, 0, 1, 0, 0, 0, 0], close_code::TOO_BIG),
        ("absurdly long", vec![0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], close_code::TOO_BIG),
    ] {
        let mut socket = server();
        let error = socket.receive(&bytes).expect_err(name);
        assert_eq!(error.close_code(), code, "{name}");
        assert_eq!(socket.output()[0], 0x88, "{name}: a close frame is sent");
        assert_eq!(u16::from_be_bytes([socket.output()[2], socket.output()[3]]), code, "{name}");
        assert!(socket.is_finished());
        assert_eq!(socket.receive(b"x"), Err(error), "{name}: nothing more is read");
    }
}

#[test]
fn fragments_count_together_towards_the_limit() {
    let mut socket = WebSocket::new(Role::Client { mask_seed: 1 }, 10);
    assert_eq!(socket.receive(&[0x01, 6, 1, 2, 3, 4, 5, 6]), Ok(()));
    assert_eq!(socket.receive(&[0x80, 5]), Err(WebSocketError::TooBig));
}

#[test]
fn closing_is_answered_once_and_ends_both_sides() {
    let (mut server, mut client) = (server(), client());
    client.send_close(close_code::NORMAL, "done");
    client.send_text("too late");
    let bytes = client.output().to_vec();
    assert_eq!(received(&mut server, &bytes), Ok(vec![Message::Close(1000, "done".into())]));
    assert!(server.is_finished());
    let bytes = server.output().to_vec();
    assert_eq!(received(&mut client, &bytes), Ok(vec![Message::Close(1000, String::new())]));
    assert!(client.is_finished());
}

#[test]
fn messages_of_all_lengths_survive_any_split() {
    for len in [0, 1, 125, 126, 127, 65_535, 65_536, 100_000] {
        let text: String = (0..len).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
        let mut sender = client();
        sender.send_text(&text);
        sender.send_binary(text.as_bytes());
        let bytes = sender.output().to_vec();
        for step in [1, 3, 7, 4096, bytes.len().max(1)] {
            if step == 1 && len > 1000 {
                continue;
            }
            let mut receiver = server();
            let mut got = Vec::new();
            for piece in bytes.chunks(step) {
                got.extend(received(&mut receiver, piece).expect("well-formed"));
            }
            assert!(got == [Message::Text(text.clone()), Message::Binary(text.clone().into_bytes())]);
        }
    }
}
