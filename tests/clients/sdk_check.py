"""Runs the public Python SDK against a control plane, as a user of it would.

WRENN_API_KEY and WRENN_BASE_URL name the control plane. Prints "SDK check passed" at the end.
"""

import itertools
import os

from wrenn import Capsule, WrennAuthenticationError, WrennClient, WrennNotFoundError

ACCESS = {"api_key": os.environ["WRENN_API_KEY"], "base_url": os.environ["WRENN_BASE_URL"]}


def check_processes(capsule):
    ticker = "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.2; done"
    handle = capsule.commands.run(ticker, background=True, tag="ticker")
    assert (handle.tag, handle.capsule_id) == ("ticker", capsule.capsule_id), handle
    assert handle.pid in [p.pid for p in capsule.commands.list()]
    events = list(itertools.islice(capsule.commands.connect(handle.pid), 3))
    assert [type(e).__name__ for e in events] == ["StreamStartEvent"] + ["StreamStdoutEvent"] * 2, events
    assert "tick" in events[1].data, events[1].data
    capsule.commands.kill(handle.pid)
    assert handle.pid not in [p.pid for p in capsule.commands.list()]

    events = list(capsule.commands.stream("/bin/sh", ["-c", "echo a; sleep 0.1; echo b >&2; exit 4"]))
    names = [type(e).__name__ for e in events]
    assert names == ["StreamStartEvent", "StreamStdoutEvent", "StreamStderrEvent", "StreamExitEvent"], names
    assert (events[1].data, events[2].data, events[3].exit_code) == ("a\n", "b\n", 4), events


def check_files(capsule):
    capsule.files.write("/tmp/sdk/hello.txt", "héllo")
    assert capsule.files.read("/tmp/sdk/hello.txt") == "héllo"
    binary = bytes(range(256)) * 1000
    capsule.files.write("/tmp/sdk/binary", binary)
    assert capsule.files.read_bytes("/tmp/sdk/binary") == binary
    entries = {e.name: e for e in capsule.files.list("/tmp/sdk")}
    assert sorted(entries) == ["binary", "hello.txt"], entries
    assert (entries["binary"].size, entries["binary"].owner) == (len(binary), "user"), entries["binary"]
    assert capsule.files.make_dir("/tmp/sdk/a/b").path == "/tmp/sdk/a/b"
    assert capsule.files.exists("/tmp/sdk/a/b") and not capsule.files.exists("/tmp/sdk/nothing")
    block = os.urandom(65536)
    capsule.files.upload_stream("/tmp/sdk/large", (block for _ in range(128)))
    assert b"".join(capsule.files.download_stream("/tmp/sdk/large")) == block * 128
    capsule.files.remove("/tmp/sdk")
    assert not capsule.files.exists("/tmp/sdk")
    try:
        capsule.files.read("/tmp/sdk/hello.txt")
    except WrennNotFoundError:
        pass
    else:
        raise AssertionError("a file that was removed can be read")


def check_terminal(capsule):
    shown, code = b"", None
    with capsule.pty(cols=100, rows=30) as terminal:
        terminal.write(b"stty size; exit 5\n")
        for event in terminal:
            if event.type == "output":
                shown += event.data or b""
            if event.type == "exit":
                code = event.exit_code
                break
    assert b"30 100" in shown and code == 5, (shown, code)


def check_lifecycle(capsule):
    """Pauses and resumes it, and makes a template of it, from which another starts."""
    capsule.commands.run("echo kept >/dev/shm/kept")
    assert capsule.pause(wait=True).status.value == "paused"
    assert not capsule.is_running()
    assert capsule.resume(wait=True).status.value == "running"
    assert capsule.commands.run("cat /dev/shm/kept").stdout == "kept\n"
    template = capsule.create_snapshot(name="sdk-warm")
    assert (template.name, template.type.value) == ("sdk-warm", "snapshot"), template
    assert capsule.create_snapshot(name="sdk-warm", overwrite=True).name == "sdk-warm"
    client = WrennClient(**ACCESS)
    assert "sdk-warm" in [t.name for t in client.snapshots.list()]
    with Capsule(template="sdk-warm", wait=True, **ACCESS) as other:
        assert other.commands.run("cat /dev/shm/kept").stdout == "kept\n"
    client.snapshots.delete("sdk-warm")
    assert "sdk-warm" not in [t.name for t in client.snapshots.list()]


def main():
    with Capsule(template="minimal", memory_mb=256, wait=True, **ACCESS) as capsule:
        assert capsule.is_running()
        result = capsule.commands.run("echo hello")
        assert result.stdout == "hello\n", result
        assert result.exit_code == 0, result

        result = capsule.commands.run("echo out; echo err >&2; exit 7")
        assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 7), result

        result = capsule.commands.run('echo "$COLOUR in $(pwd)"', envs={"COLOUR": "green"}, cwd="/usr")
        assert result.stdout == "green in /usr\n", result

        result = capsule.commands.run("no-such-command-here")
        assert result.exit_code == 127, result

        check_processes(capsule)
        check_files(capsule)
        check_terminal(capsule)
        check_lifecycle(capsule)

        listed = [c.id for c in Capsule.list(**ACCESS)]
        assert capsule.capsule_id in listed, listed
        capsule.ping()
        gone = capsule.capsule_id

    left = [c.id for c in Capsule.list(**ACCESS) if c.status not in ("stopped", "stopping")]
    assert gone not in left, left

    try:
        Capsule.create(template="no-such-template", **ACCESS)
    except WrennNotFoundError:
        pass
    except Exception as error:  # Any of the SDK's own errors will do, but none may be missing.
        assert type(error).__module__.startswith("wrenn"), error
    else:
        raise AssertionError("an unknown template was accepted")

    try:
        Capsule.list(api_key="wrn_" + "0" * 32, base_url=ACCESS["base_url"])
    except WrennAuthenticationError:
        pass
    else:
        raise AssertionError("a wrong key was accepted")

    print("SDK check passed")


main()
