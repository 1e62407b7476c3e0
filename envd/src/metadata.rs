//! What a capsule is told about itself by the metadata service at 169.254.169.254 (version 2: a token,
//! then the document), as a machine of bytes: the shell owns the socket and the clock.

use crate::json;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use wire::auth::Verifier;

/// Seconds that the token is asked to live: long enough for the request after it.
const TOKEN_TTL_SEC: u32 = 60;
/// The longest answer, head and body.
const MAX_ANSWER: usize = 24 * 1024;
/// The longest token.
const MAX_TOKEN: usize = 1024;

/// The document. Everything but the two ids may be missing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// The capsule's id.
    pub instance_id: String,
    /// The template's id.
    pub env_id: String,
    /// Where the host wants its logs.
    pub address: Option<String>,
    /// What proves the agent to envd.
    pub verifier: Option<Verifier>,
}

/// Why there is no document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetadataError {
    /// The answer is not HTTP as it is expected here.
    BadAnswer,
    /// The service refused, with this status.
    Status(u16),
    /// The connection ended too early.
    Closed,
    /// The document is not JSON, or lacks an id.
    BadDocument,
    /// `accessTokenHash` is not a SCRAM verifier.
    BadVerifier,
}

impl MetadataError {
    /// For the log.
    pub fn text(&self) -> &'static str {
        match self {
            MetadataError::BadAnswer => "the answer is not understood",
            MetadataError::Status(_) => "the service refused the request",
            MetadataError::Closed => "the connection ended early",
            MetadataError::BadDocument => "the document is not an object with instanceID and envID",
            MetadataError::BadVerifier => "accessTokenHash is not a SCRAM-SHA-256 verifier",
        }
    }
}

/// Reads the document.
pub fn parse_document(text: &[u8]) -> Result<Metadata, MetadataError> {
    let mut metadata = Metadata::default();
    for (name, value) in json::string_members(text).map_err(|_| MetadataError::BadDocument)? {
        match name.as_str() {
            "instanceID" => metadata.instance_id = value,
            "envID" => metadata.env_id = value,
            "address" => metadata.address = Some(value),
            "accessTokenHash" => {
                metadata.verifier = Some(Verifier::parse(&value).ok_or(MetadataError::BadVerifier)?);
            }
            _ => {}
        }
    }
    if metadata.instance_id.is_empty() || metadata.env_id.is_empty() {
        return Err(MetadataError::BadDocument);
    }
    Ok(metadata)
}

/// What the shell does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Wait for more bytes.
    Read,
    /// Send these on the same connection.
    Send(Vec<u8>),
    /// It is done.
    Done(Metadata),
}

/// Fetches the document over one connection.
#[derive(Debug, Default)]
pub struct Fetch {
    input: Vec<u8>,
    has_token: bool,
}

impl Fetch {
    /// Starts: the fetch and the first bytes to send.
    pub fn start() -> (Fetch, Vec<u8>) {
        let request = format!(
            "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\n\
             X-metadata-token-ttl-seconds: {TOKEN_TTL_SEC}\r\nContent-Length: 0\r\n\r\n"
        );
        (Fetch::default(), request.into_bytes())
    }

    /// Takes bytes of the answer; none means that the connection ended.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<Step, MetadataError> {
        if bytes.is_empty() {
            return Err(MetadataError::Closed);
        }
        if self.input.len() + bytes.len() > MAX_ANSWER {
            return Err(MetadataError::BadAnswer);
        }
        self.input.extend_from_slice(bytes);
        let Some((body, used)) = parse_answer(&self.input)? else { return Ok(Step::Read) };
        if self.has_token {
            return parse_document(body).map(Step::Done);
        }
        let token = core::str::from_utf8(body)
            .ok()
            .filter(|t| (1..=MAX_TOKEN).contains(&t.len()) && t.bytes().all(|b| b.is_ascii_graphic()))
            .ok_or(MetadataError::BadAnswer)?;
        let request = format!(
            "GET / HTTP/1.1\r\nHost: 169.254.169.254\r\nX-metadata-token: {token}\r\n\
             Accept: application/json\r\nConnection: close\r\n\r\n"
        );
        self.input.drain(..used);
        self.has_token = true;
        Ok(Step::Send(request.into_bytes()))
    }
}

/// The body of an answer and the length of the whole, once it is all there.
fn parse_answer(input: &[u8]) -> Result<Option<(&[u8], usize)>, MetadataError> {
    let Some(head_len) = input.windows(4).position(|w| w == b"\r\n\r\n") else { return Ok(None) };
    let head = core::str::from_utf8(&input[..head_len]).map_err(|_| MetadataError::BadAnswer)?;
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.strip_prefix("HTTP/1."))
        .and_then(|line| line.get(2..5))
        .and_then(|code| code.parse().ok())
        .ok_or(MetadataError::BadAnswer)?;
    if status != 200 {
        return Err(MetadataError::Status(status));
    }
    let mut length = None;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse::<usize>().ok();
        }
    }
    let length = length.filter(|n| *n <= MAX_ANSWER).ok_or(MetadataError::BadAnswer)?;
    let end = head_len + 4 + length;
    Ok(input.get(head_len + 4..end).map(|body| (body, end)))
}

/// The files that tell programs in the guest where they are: name in `/run/wrenn` and content.
pub fn identity_files(metadata: &Metadata) -> [(&'static str, String); 2] {
    [
        (".WRENN_SANDBOX_ID", metadata.instance_id.to_string()),
        (".WRENN_TEMPLATE_ID", metadata.env_id.to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERIFIER: &str = "SCRAM-SHA-256$4096:AwMDAwMDAwMDAwMDAwMDAw==$AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";

    fn answer(body: &str) -> Vec<u8> {
        format!("HTTP/1.1 200 OK\r\nServer: x\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
    }

    #[test]
    fn token_then_document_byte_by_byte() {
        let (mut fetch, first) = Fetch::start();
        assert!(first.starts_with(b"PUT /latest/api/token HTTP/1.1\r\n"));
        let mut sent = Vec::new();
        for byte in answer("tok==") {
            if let Step::Send(bytes) = fetch.receive(&[byte]).expect("well-formed") {
                sent = bytes;
            }
        }
        let sent = String::from_utf8(sent).expect("ascii");
        assert!(sent.starts_with("GET / HTTP/1.1\r\n") && sent.contains("X-metadata-token: tok==\r\n"));
        let document = format!(
            "{{\"instanceID\":\"cl-1\",\"envID\":\"minimal\",\"accessTokenHash\":\"{VERIFIER}\",\"more\":[1]}}"
        );
        let Ok(Step::Done(metadata)) = fetch.receive(&answer(&document)) else { panic!("not done") };
        assert_eq!((metadata.instance_id.as_str(), metadata.env_id.as_str()), ("cl-1", "minimal"));
        assert!(metadata.verifier.is_some() && metadata.address.is_none());
        assert_eq!(identity_files(&metadata)[1], (".WRENN_TEMPLATE_ID", "minimal".to_string()));
    }

    #[test]
    fn failures_are_told_apart() {
        let fail = |bytes: &[u8]| Fetch::start().0.receive(bytes).expect_err("refused");
        assert_eq!(fail(b""), MetadataError::Closed);
        assert_eq!(fail(b"HTTP/1.1 401 Unauthorized\r\n\r\n"), MetadataError::Status(401));
        assert_eq!(fail(b"SSH-2.0\r\n\r\n"), MetadataError::BadAnswer);
        assert_eq!(fail(&answer("")), MetadataError::BadAnswer);
        assert_eq!(fail(&answer("to\r\nken")), MetadataError::BadAnswer);
        assert_eq!(fail(&alloc::vec![b'x'; MAX_ANSWER + 1]), MetadataError::BadAnswer);
        assert_eq!(parse_document(b"{\"instanceID\":\"x\"}"), Err(MetadataError::BadDocument));
        assert_eq!(
            parse_document(b"{\"instanceID\":\"x\",\"envID\":\"y\",\"accessTokenHash\":\"z\"}"),
            Err(MetadataError::BadVerifier)
        );
    }
}
