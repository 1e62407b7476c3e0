"""Runs the public Python SDK against a control plane, as a user of it would.

WRENN_API_KEY and WRENN_BASE_URL name the control plane. Prints "SDK check passed" at the end.
"""

import os

from wrenn import Capsule, WrennAuthenticationError, WrennNotFoundError

ACCESS = {"api_key": os.environ["WRENN_API_KEY"], "base_url": os.environ["WRENN_BASE_URL"]}


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
