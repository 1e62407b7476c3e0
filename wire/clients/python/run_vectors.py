#!/usr/bin/env python3
"""Runs every vector of wire/vectors against wrenn_wire.py; a server's handshake vectors are not for it."""

import json
import os
import sys

import wrenn_wire as w

DIRECTORY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "vectors")


def load(name):
    with open(os.path.join(DIRECTORY, name), encoding="utf-8") as file:
        return json.load(file)


def plain(value):
    """As the vectors write it: bytes in hex, pairs as lists."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def message(vector):
    body = bytes.fromhex(vector["hex"])
    try:
        name, fields = w.decode_message(vector["kind"], body)
    except w.DecodeError as e:
        return {"error": e.args[0]}
    again = w.encode_message(name, **fields)[2:]
    if again != body and "unknown field" not in vector["name"]:
        return {"error": "encodes otherwise"}
    return {"decoded": plain(fields)}


def frame(vector):
    try:
        length, stream, frame_type, flags = w.decode_header(bytes.fromhex(vector["hex"]))
    except ValueError as e:
        return {"error": e.args[0]}
    return {"decoded": {"length": length, "stream": stream, "type": frame_type, "fin": bool(flags)}}


def handshake(vector):
    session = w.Session(
        vector["identity"], bytes.fromhex(vector["secret"]), vector["program"], bytes.fromhex(vector["nonce"])
    )
    fed = [bytes.fromhex(h) for h in vector["before"] + [vector["hex"]]]
    try:
        for part in fed:
            if part:
                session.output.clear()
                session.receive(part)
    except w.SessionError as e:
        return {"error": e.kind}
    return {"output": session.output.hex()}


def main():
    ran, failed = 0, 0
    handshakes = [v for v in load("handshake.json") if v["side"] == "client"]
    for run, vectors in ((message, load("messages.json")), (frame, load("frames.json")), (handshake, handshakes)):
        for vector in vectors:
            ran += 1
            result = run(vector)
            if any(vector.get(key) != result.get(key) for key in ("decoded", "error", "output")):
                failed += 1
                print(f"{vector['name']}: {result}, not {vector.get('error', vector.get('decoded'))}")
    print(f"python: {ran} vectors, {failed} failed")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
