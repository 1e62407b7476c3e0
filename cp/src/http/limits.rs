//! Every bound of the HTTP server, with its reason.

/// Client connections. Each takes a descriptor and, while a request comes in, some KiB.
pub const MAX_CONNECTIONS: usize = 2048;
/// Buffered bodies of all connections together, in bytes: those of requests, and those of responses over
/// [`OUTPUT_HIGH_WATER`] until their clients have read them.
pub const MAX_BUFFERED_BODIES: usize = 128 * 1024 * 1024;
/// Requests, background work and streams that are under way.
pub const MAX_TASKS: usize = 8192;
/// Time for a request's head from its first byte (and for the first byte of a connection), in
/// milliseconds. A slow network sends 32 KiB in that; a slow-loris does not matter after it.
pub const HEAD_TIMEOUT_MS: u64 = 10_000;
/// How long a connection may wait for its next request, in milliseconds. Longer than the 60 s that
/// proxies use, so that they close first.
pub const IDLE_TIMEOUT_MS: u64 = 75_000;
/// Time that a request's body has besides what its size allows, in milliseconds.
pub const BODY_GRACE_MS: u64 = 15_000;
/// The slowest body that is taken, in bytes a millisecond (16 KB/s).
pub const MIN_BODY_RATE: u64 = 16;
/// How long a client may take nothing of what is sent to it, in milliseconds.
pub const WRITE_STALL_MS: u64 = 30_000;
/// How long a streamed body may stand still while it could go on, in milliseconds.
pub const UPLOAD_STALL_MS: u64 = 60_000;
/// Output of a connection above which nothing more is produced for it, in bytes.
pub const OUTPUT_HIGH_WATER: usize = 256 * 1024;
/// Time for reading what a client still sends after its connection's last response, in milliseconds:
/// closing at once would let the kernel throw the response away (RFC 9112 section 9.6).
pub const LINGER_MS: u64 = 2_000;
/// Bytes that are read and dropped in that time.
pub const LINGER_BYTES: usize = 32 * 1024 * 1024;
/// Requests that are served on one connection before it is closed, so that connections behind a
/// balancer move now and then.
pub const MAX_REQUESTS_PER_CONNECTION: u32 = 10_000;
/// The longest WebSocket message from a client, in bytes.
pub const MAX_WEBSOCKET_MESSAGE: usize = 1024 * 1024;
/// Silence after which a WebSocket is asked for a sign of life, in milliseconds.
pub const WEBSOCKET_PING_MS: u64 = 30_000;
/// Silence after which a WebSocket is taken for dead, in milliseconds.
pub const WEBSOCKET_DEAD_MS: u64 = 90_000;
/// Time for a WebSocket's first message, in milliseconds.
pub const FIRST_MESSAGE_MS: u64 = 30_000;
/// Time for connecting to a service in a capsule, in milliseconds: through the host and into the guest.
pub const PROXY_CONNECT_MS: u64 = 10_000;
/// Silence of both sides after which a request to a service in a capsule, or a WebSocket to one, is given
/// up, in milliseconds.
pub const PROXY_SILENCE_MS: u64 = 600_000;
/// Time for what is under way when the program is told to end, in milliseconds.
pub const SHUTDOWN_MS: u64 = 10_000;
/// How long no connection is taken after the kernel had no descriptor for one, in milliseconds.
pub const ACCEPT_PAUSE_MS: u64 = 100;
/// Connections taken in one turn of the loop.
pub const ACCEPTS_PER_TURN: usize = 64;
/// Turns of events and writing for one wire client before others have theirs.
pub const WIRE_ROUNDS: usize = 16;
/// Reads of one connection in one turn of the loop.
pub const READS_PER_TURN: usize = 4;

/// How much of an uploaded file is held until its path is known, in bytes; also part of
/// [`MAX_BUFFERED_BODIES`].
pub const MAX_HELD_FILE: usize = 1024 * 1024;
