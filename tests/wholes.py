"""What the tests of whole checkpoints share: what a client sends in a session, and what comes out of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sessions import HELLO, Heap, joined, push, take_in

from remus_ckpt.errors import StreamError
from remus_ckpt.pages import PAGE_SIZE, batches
from remus_ckpt.sender import Sender
from remus_ckpt.session.incoming import CheckpointReceived, DataReceived
from remus_ckpt.session.machine import Session
from remus_ckpt.session.messages import Begin, Commit, Hello, Welcome

COUNT = 40
SHAPES: dict[str, dict[str, Any]] = {
    "delta": {},
    "rle, word of 4": {"codec": "rle", "word": 4},
    "version 1": {"digest": "sha256"},
    "several chunks": {"buffer_pages": 3},
    "memory within a page": {"memory_bytes": COUNT * PAGE_SIZE - 5},
    "much device state": {"device_state": bytes(300) + b"\xc4\x20" * 200},
    "no time": {"time_ns": None},
    "checksums": {"agreed": None},
}


@dataclass
class Talk:
    """What a client sends in a session, and where its parts begin. first: the full copy; behind: further checkpoints"""

    hello: Hello
    welcome: Welcome
    first: list[bytes] = field(default_factory=list)
    behind: list[bytes] = field(default_factory=list)


def talk(name: str, count: int = 3) -> Talk:
    shape = dict(SHAPES[name])
    memory_bytes, device_state = shape.pop("memory_bytes", None), shape.pop("device_state", b"mine")
    time_ns, agreed = shape.pop("time_ns", 1_700_000_000_000_000_000), shape.pop("agreed", "blake3")
    codec, word = shape.get("codec", "delta"), shape.get("word", 8)
    fields = {key: getattr(HELLO, key) for key in ("program", "role", "name", "run", "page_size")}
    hello = Hello(**fields, memory_pages=COUNT, codec=codec, word=word, digests=("blake3", "sha256"))
    welcome = Welcome(program="b", term=3, limits={}, lease_s=3, digest=agreed)
    made = Talk(hello, welcome)
    client, _ = begun(made)
    sender, random, before = Sender(COUNT, **shape), np.random.default_rng(4), None
    memory = random.integers(0, 256, (COUNT, PAGE_SIZE), dtype=np.uint8)
    memory.reshape(-1)[memory_bytes:] = 0
    for number in range(count + 1):
        chosen = np.arange(COUNT) if not number else np.sort(random.choice(COUNT - 1, 9 * number, replace=False))
        memory[chosen, 8 * number : 8 * number + 5] += 1
        scan = batches(chosen, memory[chosen])
        data = [
            bytes(part)
            for group in sender.checkpoint(scan, device_state=device_state, time_ns=time_ns, memory_bytes=memory_bytes)
            for part in group
        ]
        assert sender.position is not None and sender.sent is not None
        commit = Commit(
            position=sender.position, before=before, stream_bytes=sum(map(len, data)), pages=sender.sent.pages
        )
        (made.behind if number else made.first).append(joined(client.send_data(data) + client.send(commit)))
        before = sender.position
    return made


def begun(of: Talk, *, walks: bool = False, room: int = 1 << 20) -> tuple[Session, Session]:
    client, server = Session("client"), Session("server")
    server.lender = Heap(room)
    push(server, joined(client.send(of.hello)))
    push(client, joined(server.send(of.welcome)))
    push(server, joined(client.send(Begin(mode="full", term=3))))
    if walks:
        server.incoming.walk_whole()
    return client, server


def hear(session: Session, data: bytes, steps: Iterable[int] = ()) -> tuple[bytes, list[Any], int]:
    """What comes out: the stream's bytes, the messages or the error, and how many checkpoints came as a whole."""
    view, sizes, found, wholes = memoryview(data), iter(steps), list[Any](), 0
    lender = session.lender
    assert isinstance(lender, Heap)
    try:
        while view:
            room = session.get_buffer()
            size = min(len(room), len(view), next(sizes, len(view)))
            room[:size] = view[:size]
            session.buffer_updated(size)
            view = view[size:]
            while (event := session.next_event()) is not None:
                if isinstance(event, CheckpointReceived):
                    wholes += 1
                    lender.got += event.whole.data
                    found.append(event.commit)
                elif isinstance(event, DataReceived):
                    take_in(session, event)
                else:
                    found.append(event)
    except StreamError as error:
        found.append((type(error), error.offset, error.section, error.message))
    return bytes(lender.got), found, wholes


def walked(of: Talk, number: int) -> CheckpointReceived:
    _, server = begun(of, walks=True)
    hear(server, of.first[0] + b"".join(of.behind[:number]))
    room, data = server.get_buffer(), of.behind[number]
    room[: len(data)] = data
    server.buffer_updated(len(data))
    event = server.next_event()
    assert isinstance(event, CheckpointReceived)
    return event
