"""A client for the Wrenn wire protocol, version 1 (wire/PROTOCOL.md): standard library only.

    client = Client("127.0.0.1", 8080, identity="key-id", secret=b"wrn_...")
    info = client.request("CapsuleCreate", template="minimal", vcpus=1, memory_mb=256)
    stream = client.open_in(info["capsule_id"], "ProcessStart", fin=True, argv=[b"uname", b"-a"])
    for event in stream:
        print(event)

`bytes` fields are `bytes`, `text` fields are `str`, lists are lists, pairs are tuples, an absent option is
None. Fields that are not given are empty or zero. `Session` does the protocol and no I/O; `Client` is the
socket around it. One thread may use a client at a time.
"""

import base64
import hashlib
import hmac
import os
import re
import socket
import struct
import time

VERSION = 1
PREAMBLE = b"\0WRENN\r\n"
HEADER_LEN = 12
MAC_LEN = 16
MAX_PAYLOAD = 65536
MAX_HANDSHAKE_PAYLOAD = 1200
MAX_AUTH_MESSAGE = 1024
MAX_DATA = 32768
MAX_REASON = 1024
MAX_EXTENSIONS = 64
MAX_NAME = 128
FRAME_CHARGE = 32
MIN_WINDOW = 131136
MAX_WINDOW = 1 << 30
STREAM_WINDOW = 256 * 1024
CONNECTION_WINDOW = 2 * 1024 * 1024
MIN_ROUNDS, MAX_ROUNDS = 4096, 16384
PING_AFTER, DEAD_AFTER = 15.0, 45.0
GS2_HEADER = "p=wrenn-hello-sha256,,"

HELLO, AUTH, OPEN, MESSAGE, DATA, CREDIT, RESET = 0x01, 0x02, 0x10, 0x11, 0x12, 0x13, 0x14
PING, PONG, GOAWAY = 0x20, 0x21, 0x22
FRAME_TYPES = (HELLO, AUTH, OPEN, MESSAGE, DATA, CREDIT, RESET, PING, PONG, GOAWAY)
FIN = 0x01

STDIN, STDOUT, STDERR, TERMINAL, FILE = 0, 1, 2, 3, 4

CODES = {
    1: "cancelled", 2: "invalid_request", 3: "not_found", 4: "already_exists", 5: "invalid_state",
    6: "permission_denied", 7: "unauthenticated", 8: "resource_exhausted", 9: "unavailable",
    10: "deadline_exceeded", 11: "unimplemented", 12: "internal", 13: "protocol", 14: "integrity",
    15: "shutting_down",
}
STATES = (
    "pending", "starting", "running", "pausing", "paused", "resuming", "snapshotting", "hibernated",
    "stopping", "stopped", "missing", "error",
)

# messages: begin (WRENN_BLESS=1 cargo test -p wrenn-wire --test protocol writes them)
MESSAGES = {
    0x0001: ("Error", "code u16; errno u32; text text"),
    0x0002: ("Done", ""),
    0x0010: ("Health", ""),
    0x0011: ("HealthReply", "version text; uptime_ms u64"),
    0x0100: ("CapsuleCreate", "capsule_id text; template text; vcpus u32; memory_mb u32; disk_size_mb u32; timeout_sec u32; deadline_ms u32; allow_internet bool; environment list<pair<bytes, bytes>>"),
    0x0101: ("CapsuleInfo", "capsule_id text; state state; template text; vcpus u32; memory_mb u32; disk_size_mb u32; disk_used_mb u32; guest_ip text; host_ip text; metadata list<pair<text, text>>"),
    0x0102: ("CapsuleDestroy", "capsule_id text"),
    0x0103: ("CapsuleGet", "capsule_id text"),
    0x0104: ("CapsuleList", ""),
    0x0110: ("Forward", "capsule_id text"),
    0x0120: ("HostStatus", ""),
    0x0121: ("HostStatusReply", "version text; arch text; cpu_cores u32; memory_mb u32; memory_reserved_mb u32; vcpus_reserved u32; disk_mb u64; disk_free_mb u64; vmm text; templates list<text>"),
    0x0130: ("CapsulePause", "capsule_id text"),
    0x0131: ("CapsuleResume", "capsule_id text; deadline_ms u32"),
    0x0132: ("CapsulePing", "capsule_id text"),
    0x0133: ("CapsuleSnapshot", "capsule_id text; name text; overwrite bool"),
    0x0134: ("SnapshotInfo", "name text; vcpus u32; memory_mb u32; disk_size_mb u32; size_bytes u64; created_us u64"),
    0x0135: ("SnapshotList", ""),
    0x0136: ("SnapshotDelete", "name text"),
    0x0140: ("CapsuleNetwork", "capsule_id text; revision u64; allow_internet bool; allow list<text>; deny list<text>; egress_kbit u32; egress_packets u32; ingress_kbit u32; ingress_packets u32"),
    0x0141: ("CapsuleMetrics", "capsule_id text; range_sec u32"),
    0x0142: ("CapsuleMetricsReply", "times list<u64>; cpu list<u32>; memory list<u64>; disk list<u64>"),
    0x0200: ("ProcessStart", "argv list<bytes>; environment list<pair<bytes, bytes>>; cwd bytes; user text; tag text; timeout_ms u32; detached bool; stdin bool; terminal_columns u16; terminal_rows u16"),
    0x0201: ("ProcessStarted", "pid u32; tag text"),
    0x0202: ("ProcessExited", "exit_code u32; signal u32; timed_out bool; duration_ms u64"),
    0x0203: ("ProcessSignal", "selector text; signal u32"),
    0x0204: ("ProcessList", ""),
    0x0205: ("ProcessListReply", "processes list<pair<pair<u32, text>, list<bytes>>>"),
    0x0206: ("ProcessAttach", "selector text; from_byte u64"),
    0x0207: ("ProcessAttached", "pid u32; tag text; from_byte u64"),
    0x0208: ("TerminalResize", "columns u16; rows u16"),
    0x0209: ("ProcessEndInput", ""),
    0x0300: ("FileRead", "path bytes; user text; offset u64; length u64"),
    0x0301: ("FileWrite", "path bytes; user text; mode u32"),
    0x0302: ("FileStat", "path bytes; user text"),
    0x0303: ("FileList", "path bytes; user text; depth u32"),
    0x0304: ("FileMakeDirectory", "path bytes; user text; mode u32"),
    0x0305: ("FileMove", "from bytes; to bytes; user text"),
    0x0306: ("FileRemove", "path bytes; user text"),
    0x0310: ("FileEntry", "path bytes; mode u32; size u64; owner text; group text; modified_sec i64; symlink_target bytes"),
    0x0320: ("FileWatch", "path bytes; user text; recursive bool"),
    0x0321: ("FileChange", "change u8; path bytes; from bytes; is_directory bool"),
    0x0400: ("GuestInit", "time_us u64; default_user text; environment list<pair<bytes, bytes>>; entropy bytes"),
    0x0401: ("GuestPrepareSnapshot", ""),
    0x0410: ("GuestMetrics", ""),
    0x0411: ("GuestMetricsReply", "at_ms u64; processors u32; busy_ms u64; idle_ms u64; memory_total_bytes u64; memory_available_bytes u64; disk_total_bytes u64; disk_available_bytes u64; network_received_bytes u64; network_sent_bytes u64; load_1m_thousandths u32; processes u32"),
    0x0412: ("GuestMetricsHistory", "after_ms u64"),
    0x0420: ("PortConnect", "port u16"),
    0x0421: ("PortList", ""),
    0x0422: ("PortListReply", "ports list<pair<u16, bool>>"),
    0x0423: ("PortWatch", ""),
    0x0424: ("PortChange", "port u16; listening bool; loopback_only bool; user u32; pid u32"),
}
# messages: end


class DecodeError(ValueError):
    """Bytes do not decode; `args[0]` is the error's name in the vectors."""


class SessionError(Exception):
    """The connection is over; `kind` is the error's name in the vectors."""

    def __init__(self, kind, text=""):
        super().__init__(f"{kind}: {text}" if text else kind)
        self.kind = kind


class Refused(Exception):
    """The peer answered with `Error`, or ended the stream with RESET."""

    def __init__(self, code, text, errno=0):
        super().__init__(f"{CODES.get(code, 'internal')}: {text}")
        self.code, self.text, self.errno = code, text, errno


class _Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        if n > len(self.data) - self.at:
            raise DecodeError("unexpected_end")
        self.at += n
        return self.data[self.at - n : self.at]

    def number(self, n):
        return int.from_bytes(self.take(n), "big")

    def finish(self):
        if self.at != len(self.data):
            raise DecodeError("trailing_bytes")


def _split(inner):
    depth = 0
    for i, c in enumerate(inner):
        depth += (c == "<") - (c == ">")
        if c == "," and depth == 0:
            return inner[:i].strip(), inner[i + 1 :].strip()
    raise ValueError(inner)


def _inner(kind):
    return kind[kind.index("<") + 1 : -1]


def _default(kind):
    if kind in ("text", "bytes"):
        return "" if kind == "text" else b""
    if kind.startswith("list<"):
        return []
    if kind.startswith("option<"):
        return None
    if kind.startswith("pair<"):
        return tuple(_default(k) for k in _split(_inner(kind)))
    return 0


def _encode(kind, value):
    if kind[0] in "ui" and kind[1:].isdigit():
        return int(value).to_bytes(int(kind[1:]) // 8, "big", signed=kind[0] == "i")
    if kind in ("bool", "state"):
        return bytes([int(value)])
    if kind in ("text", "bytes"):
        raw = value.encode() if isinstance(value, str) else bytes(value)
        return struct.pack(">I", len(raw)) + raw
    if kind.startswith("list<"):
        return struct.pack(">I", len(value)) + b"".join(_encode(_inner(kind), v) for v in value)
    if kind.startswith("option<"):
        return b"\0" if value is None else b"\1" + _encode(_inner(kind), value)
    a, b = _split(_inner(kind))
    return _encode(a, value[0]) + _encode(b, value[1])


def _decode(kind, r):
    if kind[0] in "ui" and kind[1:].isdigit():
        return int.from_bytes(r.take(int(kind[1:]) // 8), "big", signed=kind[0] == "i")
    if kind == "bool" or kind.startswith("option<"):
        marker = r.number(1)
        if marker > 1:
            raise DecodeError("bad_marker")
        if kind == "bool":
            return bool(marker)
        return _decode(_inner(kind), r) if marker else None
    if kind == "state":
        number = r.number(1)
        if number >= len(STATES):
            raise DecodeError("bad_value")
        return number
    if kind in ("text", "bytes"):
        raw = bytes(r.take(r.number(4)))
        if kind == "bytes":
            return raw
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise DecodeError("not_utf8") from None
    if kind.startswith("list<"):
        count = r.number(4)
        # Every item takes a byte at least: what cannot be there is refused before it is made room for.
        if count > len(r.data) - r.at:
            raise DecodeError("unexpected_end")
        return [_decode(_inner(kind), r) for _ in range(count)]
    a, b = _split(_inner(kind))
    return (_decode(a, r), _decode(b, r))


def _skip_extensions(r):
    count = r.number(2)
    if count > MAX_EXTENSIONS:
        raise DecodeError("too_long")
    for _ in range(count):
        tag = r.number(2)
        r.take(r.number(4))
        if tag >= 0x8000:
            raise DecodeError("unknown_critical_field")
    r.finish()


def _fields(text):
    return [part.split(" ", 1) for part in text.split("; ")] if text else []


def encode_message(name, /, **values):
    """The payload of a message: its number and body."""
    for kind, (known, fields) in MESSAGES.items():
        if known == name:
            body = struct.pack(">H", kind)
            for field, field_type in _fields(fields):
                body += _encode(field_type, values.pop(field, _default(field_type)))
            if values:
                raise TypeError(f"{name} has no field {', '.join(values)}")
            return body + b"\0\0"
    raise TypeError(f"no message is named {name}")


def decode_message(kind, body):
    """A message's name and fields. An unknown number is None and its body."""
    if kind not in MESSAGES:
        return None, body
    name, fields = MESSAGES[kind]
    r = _Reader(body)
    decoded = {field: _decode(field_type, r) for field, field_type in _fields(fields)}
    _skip_extensions(r)
    return name, decoded


def decode_header(raw):
    """(length, stream, type, flags) of 12 bytes, checked; ValueError names what is wrong."""
    length, stream, frame_type, flags, reserved = struct.unpack(">IIBBH", raw)
    if length > MAX_PAYLOAD:
        raise ValueError("too_long")
    if frame_type not in FRAME_TYPES:
        raise ValueError("unknown_type")
    if flags & ~(FIN if frame_type in (OPEN, MESSAGE, DATA) else 0):
        raise ValueError("bad_flags")
    if reserved:
        raise ValueError("bad_reserved")
    if frame_type != CREDIT and (stream == 0) != (frame_type in (HELLO, AUTH, PING, PONG, GOAWAY)):
        raise ValueError("bad_stream")
    return length, stream, frame_type, flags


def _hmac(key, *parts):
    return hmac.new(key, b"".join(parts), hashlib.sha256).digest()


def _unbase64(text):
    try:
        raw = base64.b64decode(text.encode(), validate=True)
    except ValueError:
        raise SessionError("auth_malformed") from None
    if base64.b64encode(raw).decode() != text:
        raise SessionError("auth_malformed")
    return raw


class _Stream:
    def __init__(self, credit):
        self.credit = self.window = credit
        self.owed = 0
        self.left = STREAM_WINDOW
        self.sent_fin = self.got_fin = False


class Session:
    """The dialling side of a connection: bytes in with `receive`, bytes out of `output`, and events.

    Events are tuples: ("ready", peer_name), ("message", stream, kind, body, cost),
    ("data", stream, channel, bytes, cost), ("finished", stream), ("reset", stream, code, reason),
    ("going_away", code, reason). What ends the connection raises SessionError from `receive`.
    """

    def __init__(self, identity, secret, program="wrenn-python/1", nonce=None):
        self.identity, self.secret = identity, secret
        self.nonce = base64.b64encode(nonce or os.urandom(18)).decode()
        self.output, self.input, self.events = bytearray(), bytearray(), []
        self.send_key = self.recv_key = None
        self.send_sequence = self.recv_sequence = 0
        self.streams, self.next_stream, self.last_peer_stream = {}, 1, 0
        self.credit = self.window = 0
        self.left, self.owed = CONNECTION_WINDOW, 0
        self.peer_streams = 0
        self.going_away = False
        self.step = self._on_hello
        name = program.encode()
        hello = struct.pack(">HHQIII", VERSION, VERSION, 0, STREAM_WINDOW, CONNECTION_WINDOW, 4096)
        hello += struct.pack(">I", len(name)) + name + b"\0\0"
        self.output += PREAMBLE
        self._frame(HELLO, 0, hello)
        self.transcript = bytes(self.output)

    def _frame(self, frame_type, stream, payload, flags=0):
        frame = struct.pack(">IIBBH", len(payload), stream, frame_type, flags, 0) + payload
        self.output += frame
        if self.send_key:
            self.output += _hmac(self.send_key, struct.pack(">Q", self.send_sequence), frame)[:MAC_LEN]
            self.send_sequence += 1

    def receive(self, data):
        """Takes bytes from the transport. Raises SessionError when the connection is over."""
        self.input += data
        try:
            while self._one_frame():
                pass
        except DecodeError:
            raise self._fail("payload", 13) from None
        except SessionError as e:
            if e.kind != "by_peer":
                codes = {"integrity": 14}
                self._fail(e.kind, codes.get(e.kind, 7 if e.kind.startswith("auth_") else 13))
            raise

    def _fail(self, kind, code):
        reason = kind.encode()
        self._frame(GOAWAY, 0, struct.pack(">IHI", self.last_peer_stream, code, len(reason)) + reason)
        return SessionError(kind)

    def _one_frame(self):
        if len(self.input) < HEADER_LEN:
            return False
        try:
            length, stream, frame_type, flags = decode_header(bytes(self.input[:HEADER_LEN]))
        except ValueError as e:
            raise SessionError("header", str(e)) from None
        if self.step and length > MAX_HANDSHAKE_PAYLOAD:
            raise SessionError("unexpected", "long frame in the handshake")
        end = HEADER_LEN + length
        mac = MAC_LEN if self.recv_key else 0
        if len(self.input) < end + mac:
            return False
        frame = bytes(self.input[:end])
        if mac:
            expected = _hmac(self.recv_key, struct.pack(">Q", self.recv_sequence), frame)[:MAC_LEN]
            if not hmac.compare_digest(expected, bytes(self.input[end : end + mac])):
                raise SessionError("integrity")
            self.recv_sequence += 1
        del self.input[: end + mac]
        payload = frame[HEADER_LEN:]
        if frame_type == GOAWAY:
            self._on_go_away(payload)
        elif self.step:
            if frame_type != (HELLO if self.step == self._on_hello else AUTH):
                raise SessionError("unexpected", "frame in the handshake")
            self.step(frame, payload)
        else:
            self._on_frame(stream, frame_type, flags, payload)
        return True

    def _on_hello(self, frame, payload):
        r = _Reader(payload)
        low, high, features, stream_window, window, streams = struct.unpack(">HHQIII", r.take(24))
        name = _decode("text", r)
        _skip_extensions(r)
        if low > high or len(name.encode()) > MAX_NAME or re.search(r"[\x00-\x1f\x7f-\x9f]", name):
            raise DecodeError("bad_value")
        if not all(MIN_WINDOW <= w <= MAX_WINDOW for w in (stream_window, window)):
            raise DecodeError("bad_value")
        if not low <= VERSION <= high:
            raise SessionError("no_common_version")
        if low != high or features:
            raise SessionError("unexpected", "choice of version or features")
        self.peer_name, self.stream_window, self.max_streams = name, stream_window, streams
        self.credit = self.window = window
        binding = hashlib.sha256(self.transcript + frame).digest()
        self.binding = base64.b64encode(GS2_HEADER.encode() + binding).decode()
        self.first_bare = f"n={self.identity},r={self.nonce}"
        self._frame(AUTH, 0, (GS2_HEADER + self.first_bare).encode())
        self.step = self._on_challenge

    def _auth_text(self, payload):
        try:
            if len(payload) <= MAX_AUTH_MESSAGE:
                return payload.decode("ascii")
        except UnicodeDecodeError:
            pass
        raise SessionError("auth_malformed")

    def _on_challenge(self, _frame, payload):
        text = self._auth_text(payload)
        match = re.fullmatch(r"r=([!-+\--~]{24,128}),s=([^,]+),i=([^,]*)", text)
        if not match:
            raise SessionError("auth_malformed")
        nonce, salt, rounds = match.groups()
        salt = _unbase64(salt)
        if not nonce.startswith(self.nonce) or len(nonce) < len(self.nonce) + 24:
            raise SessionError("auth_nonce")
        if not re.fullmatch(r"[1-9][0-9]{0,6}", rounds) or not MIN_ROUNDS <= int(rounds) <= MAX_ROUNDS:
            raise SessionError("auth_rounds")
        salted = hashlib.pbkdf2_hmac("sha256", self.secret, salt, int(rounds))
        client_key, server_key = _hmac(salted, b"Client Key"), _hmac(salted, b"Server Key")
        without_proof = f"c={self.binding},r={nonce}"
        auth_message = f"{self.first_bare},{text},{without_proof}".encode()
        signature = _hmac(hashlib.sha256(client_key).digest(), auth_message)
        proof = bytes(a ^ b for a, b in zip(client_key, signature))
        self.expected = _hmac(server_key, auth_message)
        master = _hmac(client_key + server_key, b"wrenn 1 session", hashlib.sha256(auth_message).digest())
        self.keys = _hmac(master, b"client to server"), _hmac(master, b"server to client")
        self._frame(AUTH, 0, f"{without_proof},p={base64.b64encode(proof).decode()}".encode())
        self.step = self._on_proof

    def _on_proof(self, _frame, payload):
        text = self._auth_text(payload)
        if not text.startswith("v="):
            raise SessionError("auth_malformed")
        if not hmac.compare_digest(_unbase64(text[2:]), self.expected):
            raise SessionError("auth_server", "the server does not know the secret")
        self.send_key, self.recv_key = self.keys
        self.secret, self.step = b"", None
        self.events.append(("ready", self.peer_name))

    def _on_go_away(self, payload):
        last, code, reason = _go_away(payload)
        if self.step or code != 15:
            raise SessionError("by_peer", f"{CODES.get(code, 'internal')}: {reason!r}")
        self.going_away = True
        for stream in [s for s in self.streams if s % 2 == 1 and s > last]:
            del self.streams[stream]
            self.events.append(("reset", stream, code, reason))
        self.events.append(("going_away", code, reason))

    def _on_frame(self, stream, frame_type, flags, payload):
        if frame_type in (OPEN, MESSAGE, DATA):
            self._on_stream_frame(stream, frame_type, flags, payload)
        elif frame_type in (PING, PONG):
            if len(payload) != 8:
                raise DecodeError("unexpected_end")
            if frame_type == PING:
                self._frame(PONG, 0, payload)
        elif frame_type == CREDIT:
            if len(payload) != 4:
                raise DecodeError("unexpected_end")
            amount = int.from_bytes(payload, "big")
            target = self if stream == 0 else self.streams.get(stream)
            if target:
                target.credit += amount
            if not amount or (target and target.credit > MAX_WINDOW):
                raise SessionError("unexpected", "amount of credit")
        elif frame_type == RESET:
            r = _Reader(payload)
            code, reason = r.number(2), _decode("text", r)
            r.finish()
            if self.streams.pop(stream, None):
                self.events.append(("reset", stream, code, reason))
        else:
            raise SessionError("unexpected", "second handshake")

    def _on_stream_frame(self, stream, frame_type, flags, payload):
        if not payload and not (frame_type == DATA and flags & FIN):
            raise SessionError("unexpected", "empty frame")
        cost = len(payload) + FRAME_CHARGE if payload else 0
        plenty = self.left >= CONNECTION_WINDOW // 2
        self.left -= cost
        if self.left < 0:
            raise SessionError("credit_exceeded")
        if plenty and self.left < CONNECTION_WINDOW // 2:
            # The peer lets a stream hold little from here on: what it is owed must not hold it back.
            for number in [0, *self.streams]:
                self.release(number, 0)
        if frame_type == OPEN:
            if stream % 2 or stream <= self.last_peer_stream:
                raise SessionError("unexpected", "stream number")
            self.last_peer_stream = stream
            # This client serves nothing.
            self.release(0, cost)
            self._frame(RESET, stream, struct.pack(">HI", 11, 0))
            return
        if (stream >= self.next_stream) if stream % 2 else (stream > self.last_peer_stream):
            raise SessionError("unexpected", "frame on a stream that was never opened")
        s = self.streams.get(stream)
        if not s:
            self.release(0, cost)
            return
        if s.got_fin:
            raise SessionError("unexpected", "frame on a half that has ended")
        s.left -= cost
        if s.left < 0:
            raise SessionError("credit_exceeded")
        if frame_type == MESSAGE:
            if len(payload) < 2:
                raise DecodeError("unexpected_end")
            kind = int.from_bytes(payload[:2], "big")
            self.events.append(("message", stream, kind, payload[2:], cost))
        elif len(payload) == 1:
            raise SessionError("unexpected", "empty frame")
        elif payload:
            self.events.append(("data", stream, payload[0], payload[1:], cost))
        if flags & FIN:
            s.got_fin = True
            self.events.append(("finished", stream))
            self._forget(stream)

    def _forget(self, stream):
        s = self.streams.get(stream)
        if s and s.sent_fin and s.got_fin:
            del self.streams[stream]

    def release(self, stream, cost):
        """Gives back the credit of an event that is dealt with."""
        self.owed += cost
        pressed = self.left < CONNECTION_WINDOW // 2
        if self.owed and (pressed or self.owed >= CONNECTION_WINDOW // 4):
            self._frame(CREDIT, 0, struct.pack(">I", self.owed))
            self.left, self.owed = self.left + self.owed, 0
        s = self.streams.get(stream)
        if s and not s.got_fin:
            s.owed += cost
            if s.owed and (pressed or s.owed >= STREAM_WINDOW // 4):
                self._frame(CREDIT, stream, struct.pack(">I", s.owed))
                s.left, s.owed = s.left + s.owed, 0

    def can_send(self, stream, payload):
        """Whether a message of this length may go now. It raises when the stream is gone."""
        cost = len(payload) + FRAME_CHARGE
        return cost <= self.credit and cost <= self._open(stream).credit

    def open(self, payload, fin=False):
        """Opens a stream; the connection needs credit for `payload` (see `credit`)."""
        if self.going_away:
            raise Refused(15, "the peer is shutting down")
        if len(payload) > MAX_PAYLOAD:
            raise ValueError("the message is longer than a frame")
        if sum(1 for s in self.streams if s % 2) >= self.max_streams:
            raise Refused(8, "too many streams are open")
        stream, self.next_stream = self.next_stream, self.next_stream + 2
        self.credit -= len(payload) + FRAME_CHARGE
        self.streams[stream] = _Stream(self.stream_window)
        self.streams[stream].sent_fin = fin
        self._frame(OPEN, stream, payload, FIN if fin else 0)
        return stream

    def _open(self, stream):
        s = self.streams.get(stream)
        if not s or s.sent_fin:
            raise Refused(5, "the stream has ended")
        return s

    def send(self, stream, payload, fin=False):
        """Sends a message for which `can_send` is true."""
        s = self._open(stream)
        s.credit -= len(payload) + FRAME_CHARGE
        self.credit -= len(payload) + FRAME_CHARGE
        s.sent_fin = fin
        self._frame(MESSAGE, stream, payload, FIN if fin else 0)
        self._forget(stream)

    def send_data(self, stream, channel, data):
        """Sends as much of `data` as credit allows in one frame, and returns how much."""
        s = self._open(stream)
        share = MAX_WINDOW
        for part, most in ((2, 16384), (4, 4096), (8, 1024)):
            if self.credit < self.window // part:
                share = most
        room = min(s.credit, self.credit, share - (s.window - s.credit)) - FRAME_CHARGE - 1
        n = min(room, len(data), MAX_DATA)
        if n <= 0:
            return 0
        s.credit -= n + 1 + FRAME_CHARGE
        self.credit -= n + 1 + FRAME_CHARGE
        self._frame(DATA, stream, bytes([channel]) + bytes(data[:n]))
        return n

    def finish(self, stream):
        """Ends this side's half."""
        self._open(stream).sent_fin = True
        self._frame(DATA, stream, b"", FIN)
        self._forget(stream)

    def reset(self, stream, code=1, reason=""):
        """Ends a stream at once, both halves, and so cancels what it does."""
        if self.streams.pop(stream, None):
            raw = reason.encode()[:MAX_REASON].decode(errors="ignore").encode()
            self._frame(RESET, stream, struct.pack(">HI", code, len(raw)) + raw)

    def ping(self):
        """Asks for a sign of life."""
        self._frame(PING, 0, bytes(8))


def _go_away(payload):
    r = _Reader(payload)
    last, code, reason = r.number(4), r.number(2), _decode("text", r)
    if len(reason.encode()) > MAX_REASON:
        raise DecodeError("too_long")
    r.finish()
    return last, code, reason


class Stream:
    """One stream of a Client. Iterating gives its events up to the peer's end of it:
    ("message", name, fields) and ("data", channel, bytes)."""

    def __init__(self, client, number):
        self.client, self.number, self.waiting, self.ended = client, number, [], False

    def __iter__(self):
        while True:
            event = self.next()
            if event is None:
                return
            yield event

    def next(self):
        """The next event; None when the peer has ended its half. `Error` and RESET raise Refused."""
        client = self.client
        while not self.waiting:
            if self.ended:
                return None
            client._pump()
        event = self.waiting.pop(0)
        if event[0] == "finished":
            self.ended = True
            client._drop_if_over(self)
            return None
        if event[0] == "reset":
            self.ended = True
            client.inboxes.pop(self.number, None)
            raise Refused(event[2], event[3])
        client.session.release(self.number, event[4])
        client._flush()
        if event[0] == "data":
            return "data", event[2], event[3]
        name, fields = decode_message(event[2], event[3])
        if name == "Error":
            # The last message of its half: nothing more is waited for.
            self.cancel()
            raise Refused(fields["code"], fields["text"], fields["errno"])
        return "message", name, fields

    def message(self, name):
        """The fields of the next event, which has to be this message."""
        event = self.next()
        if event is None or event[:2] != ("message", name):
            raise Refused(13, f"{event and event[:2]} came in place of {name}")
        return event[2]

    def send(self, name, /, fin=False, **fields):
        """Sends a message, waiting for credit as it must."""
        payload = encode_message(name, **fields)
        while not self.client.session.can_send(self.number, payload):
            self.client._pump()
        self.client.session.send(self.number, payload, fin)
        self.client._flush()

    def send_data(self, channel, data):
        """Sends all of `data`, waiting for credit as it must."""
        data = memoryview(bytes(data))
        while len(data):
            n = self.client.session.send_data(self.number, channel, data)
            data = data[n:]
            self.client._flush()
            if not n:
                self.client._pump()

    def finish(self):
        """Ends this side's half."""
        self.client.session.finish(self.number)
        self.client._flush()
        self.client._drop_if_over(self)

    def cancel(self, reason=""):
        """Ends the stream at once, and what it does at the far end."""
        self.client.session.reset(self.number, 1, reason)
        self.client.inboxes.pop(self.number, None)
        self.ended = True
        self.client._flush()


class Client:
    """A connection to a control plane, or to any server of the protocol."""

    def __init__(self, host, port, identity, secret, program="wrenn-python/1", timeout=30.0):
        self.timeout, self.inboxes, self.peer_name = timeout, {}, None
        self.session = Session(identity, secret, program)
        self.socket = socket.create_connection((host, port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._flush()
        deadline = time.monotonic() + timeout
        while self.peer_name is None:
            if time.monotonic() > deadline:
                raise SessionError("timed_out", "no end of the handshake")
            self._pump()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the connection."""
        self.socket.close()

    def open(self, name, /, fin=False, **fields):
        """Opens a stream with its first message."""
        payload = encode_message(name, **fields)
        while len(payload) + FRAME_CHARGE > self.session.credit:
            self._pump()
        stream = Stream(self, self.session.open(payload, fin))
        self.inboxes[stream.number] = stream
        self._flush()
        return stream

    def open_in(self, capsule_id, name, /, fin=False, **fields):
        """Opens a stream to a capsule's guest daemon, with the first message for it."""
        stream = self.open("Forward", capsule_id=capsule_id)
        stream.send(name, fin, **fields)
        return stream

    def request(self, name, /, answer=None, **fields):
        """Sends a request and returns the fields of its one answer."""
        stream = self.open(name, fin=True, **fields)
        event = stream.next()
        self.session.reset(stream.number, 1, "answered")
        self.inboxes.pop(stream.number, None)
        self._flush()
        if event is None or event[0] != "message" or (answer and event[1] != answer):
            raise Refused(13, f"no answer to {name}")
        return event[2]

    def _flush(self):
        if self.session.output:
            data, self.session.output = bytes(self.session.output), bytearray()
            self.socket.settimeout(self.timeout)
            self.socket.sendall(data)

    def _drop_if_over(self, stream):
        if stream.ended and stream.number not in self.session.streams:
            self.inboxes.pop(stream.number, None)

    def _pump(self):
        """Reads once and sorts what came; raises when nothing comes in the client's timeout."""
        self._flush()
        began, pinged = time.monotonic(), False
        while True:
            left = began + self.timeout - time.monotonic()
            if left <= 0:
                raise SessionError("timed_out", f"nothing came in {self.timeout} s")
            self.socket.settimeout(min(left, PING_AFTER))
            try:
                data = self.socket.recv(65536)
                break
            except socket.timeout:
                if time.monotonic() - began > DEAD_AFTER:
                    raise SessionError("peer_silent") from None
                if not pinged and not self.session.step:
                    pinged = True
                    self.session.ping()
                    self._flush()
        if not data:
            raise SessionError("transport_closed")
        try:
            self.session.receive(data)
        finally:
            try:
                self._flush()
            except OSError:
                pass
        events, self.session.events = self.session.events, []
        for event in events:
            if event[0] == "ready":
                self.peer_name = event[1]
            elif event[0] != "going_away":
                stream = self.inboxes.get(event[1])
                if stream:
                    stream.waiting.append(event)
                elif event[0] in ("message", "data"):
                    self.session.release(event[1], event[4])
