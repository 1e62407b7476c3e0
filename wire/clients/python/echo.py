#!/usr/bin/env python3
"""Against the echo server of wire/tests: `echo.py PORT`. Bulk data both ways beside requests, and errors."""

import sys

import wrenn_wire as w

SECRET = b"wrn_0123456789abcdef0123456789abcdef"


def main():
    port = int(sys.argv[1])
    try:
        w.Client("127.0.0.1", port, "key", b"guess")
        raise AssertionError("a wrong secret was let in")
    except w.SessionError as e:
        assert e.kind == "by_peer", e
    with w.Client("127.0.0.1", port, "key", SECRET) as client:
        stream = client.open("Done")
        content = bytes(i % 251 for i in range(2_000_000))
        for at in range(0, len(content), 100_000):
            part, back = content[at : at + 100_000], b""
            stream.send_data(1, part)
            assert client.request("Health", "HealthReply")["uptime_ms"] == 7
            while len(back) < len(part):
                back += stream.next()[2]
            assert back == part
        stream.send("Health")
        assert stream.message("Health") == {}
        stream.finish()
        assert stream.next() is None
        stream = client.open("HostStatus", fin=True)
        try:
            stream.next()
            raise AssertionError("no reset")
        except w.Refused as e:
            assert e.code == 11, e
        try:
            client.open_in("cl-none", "Health", fin=True).next()
            raise AssertionError("no error")
        except w.Refused as e:
            assert e.code == 3, e
        stream = client.open("Done")
        stream.send_data(1, bytes(50_000))
        stream.cancel("enough")
        assert client.request("Health", "HealthReply")["version"] == "echo"
        assert not client.inboxes and not client.session.streams
    print("python: echo well")


if __name__ == "__main__":
    main()
