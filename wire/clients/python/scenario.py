#!/usr/bin/env python3
"""What a client does, against a live control plane.

    WRENN_API_KEY=wrn_... scenario.py HOST PORT KEY_ID [TEMPLATE]

Makes a capsule, streams a command, sends a file both ways, holds a terminal session, cancels, and destroys
the capsule. The key is taken from the environment so that it is in no process list.
"""

import os
import sys
import time

import wrenn_wire as w

FILE_BYTES = 3_000_000


def step(text):
    print(f"python: {text}", flush=True)


def collect(stream, channel):
    """All bytes of a channel, and the last message."""
    out, last = bytearray(), None
    for event in stream:
        if event[0] == "data" and event[1] == channel:
            out += event[2]
        elif event[0] == "message":
            last = event
    return bytes(out), last


def command(client, capsule):
    stream = client.open_in(
        capsule, "ProcessStart", fin=True, argv=[b"/bin/sh", b"-c", b"for i in 1 2 3; do echo line $i; done; exit 7"]
    )
    stream.message("ProcessStarted")
    out, last = collect(stream, w.STDOUT)
    assert out == b"line 1\nline 2\nline 3\n", out
    assert last[1] == "ProcessExited" and last[2]["exit_code"] == 7, last
    step("streamed a command")


def files(client, capsule):
    content = bytes(i * 7 % 251 for i in range(FILE_BYTES))
    stream = client.open_in(capsule, "FileWrite", path=b"/tmp/wire-python", mode=0o644)
    stream.send_data(w.FILE, content)
    stream.finish()
    assert stream.message("FileEntry")["size"] == len(content)
    stream = client.open_in(capsule, "FileRead", fin=True, path=b"/tmp/wire-python")
    assert stream.message("FileEntry")["size"] == len(content)
    back, last = collect(stream, w.FILE)
    assert back == content, f"{len(back)} bytes came back"
    assert last[1] == "Done", last
    step(f"sent a file of {len(content)} bytes both ways")


def terminal(client, capsule):
    stream = client.open_in(
        capsule, "ProcessStart", argv=[b"/bin/sh"], terminal_columns=80, terminal_rows=24, stdin=True
    )
    stream.message("ProcessStarted")
    stream.send("TerminalResize", columns=100, rows=40)
    stream.send_data(w.TERMINAL, b"stty size; exit\n")
    out, last = collect(stream, w.TERMINAL)
    assert b"40 100" in out, out
    assert last[1] == "ProcessExited", last
    step("held a terminal session")


def cancel(client, capsule):
    stream = client.open_in(capsule, "ProcessStart", fin=True, argv=[b"/bin/sleep", b"1000"])
    pid = stream.message("ProcessStarted")["pid"]
    stream.cancel("enough")
    for _ in range(100):
        listing = client.open_in(capsule, "ProcessList", fin=True)
        alive = [p for event in listing for p in event[2]["processes"]]
        if all(entry[0][0] != pid for entry in alive):
            step("cancelled a process")
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} outlives its stream")


def main():
    host, port, identity = sys.argv[1:4]
    template = sys.argv[4] if len(sys.argv) > 4 else "minimal"
    try:
        w.Client(host, int(port), identity, b"wrn_" + b"0" * 32)
        raise AssertionError("a wrong key was let in")
    except w.SessionError as e:
        assert e.kind == "by_peer", e
        step("a wrong key is refused")
    with w.Client(host, int(port), identity, os.environ["WRENN_API_KEY"].encode(), timeout=120) as client:
        step(f"authenticated to {client.peer_name}")
        info = client.request("CapsuleCreate", "CapsuleInfo", template=template, vcpus=1, memory_mb=256)
        capsule = info["capsule_id"]
        step(f"created {capsule}")
        try:
            command(client, capsule)
            files(client, capsule)
            terminal(client, capsule)
            cancel(client, capsule)
        finally:
            client.request("CapsuleDestroy", "Done", capsule_id=capsule)
            step("destroyed it")


if __name__ == "__main__":
    main()
