"""Backups that lie to readers, and readers that lie to backups: clear errors, nothing kept, nobody else harmed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from liars import Liar, Peer
from store_support import fill, memory_at

from remus_ckpt import Backup, Policy, Remote, protect
from remus_ckpt.errors import BadCheckpoint, LinkError, NoCheckpoint, Refused, RemusError, StoreError
from remus_ckpt.limits import Limits
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import Requests
from remus_ckpt.link.dial import connect
from remus_ckpt.service.reader import Readers
from remus_ckpt.session import frames, messages
from remus_ckpt.session.messages import READ_BYTES
from remus_ckpt.store import Store

Twist = Callable[[str, dict[str, Any], dict[str, Any]], dict[str, Any] | None]
"""What a liar makes of the right result of a method with its arguments; None: it does not answer."""
TIMEOUT_S = 0.5


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    with store.writer("orders") as writer:
        source = fill(writer, 4)
        writer.compact(wait=True)
        fill(writer, 3, source)
    return store


def liar(store: Store, twist: Twist, before: Callable[[Peer], None] = lambda peer: None) -> Liar:
    """A backup with a good store, and a reader's answers that are twisted."""
    readers = Readers(store, Policy(), Limits(), lambda name: None)

    def serve(peer: Peer) -> None:
        peer.welcome()
        with readers.lend("peer") as reader:
            while isinstance(request := peer.hear(), messages.Request):
                before(peer)
                result = reader.answer(request.method, request.arguments)
                assert result is not None
                twisted = twist(request.method, request.arguments, result)
                if twisted is not None:
                    peer.say(messages.Reply(number=request.number, result=twisted))

    return Liar(serve)


def changing(method: str, change: Callable[[Any], Any], key: str) -> Twist:
    """Changes one key of the results of one method."""
    return lambda asked, _, result: result | {key: change(result[key])} if asked == method else result


def row(number: int, value: Any) -> Callable[[Any], Any]:
    """Changes one field of the newest checkpoint of the last segment."""

    def change(segments: list[Any]) -> list[Any]:
        segments[-1][2][number] = value
        return segments

    return change


def dropping(method: str) -> Twist:
    return lambda asked, _, result: None if asked == method else result


LIES: dict[str, tuple[Twist, type[RemusError]]] = {
    "a changed byte": (
        changing("read", lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:], "data"),
        BadCheckpoint,
    ),
    "zeros": (changing("read", lambda data: bytes(len(data)), "data"), BadCheckpoint),
    "the last byte changed": (changing("read", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "data"), BadCheckpoint),
    "a byte too few": (changing("read", lambda data: data[:-1], "data"), LinkError),
    "a byte too many": (changing("read", lambda data: data + b"x", "data"), LinkError),
    "no bytes": (changing("read", lambda data: b"", "data"), LinkError),
    "a text for bytes": (changing("read", lambda data: "x" * len(data), "data"), LinkError),
    "nothing for bytes": (changing("read", lambda data: None, "data"), LinkError),
    "no answer to read": (dropping("read"), LinkError),
    "no answer to survey": (dropping("survey"), LinkError),
    "a store that fails": (lambda asked, _, result: {"error": "disk", "code": "store"}, StoreError),
    "a segment that goes": (
        lambda asked, _, result: {"error": "gone", "code": "gone"} if asked == "read" else result,
        NoCheckpoint,
    ),
    "an error of no kind": (lambda asked, _, result: {"error": 1, "code": [1]}, RemusError),
    "an empty result": (lambda asked, _, result: {}, LinkError),
    "another digest": (changing("survey", row(1, bytes(32)), "segments"), BadCheckpoint),
    "a short digest": (changing("survey", row(1, bytes(31)), "segments"), LinkError),
    "another epoch": (changing("survey", row(0, 7), "segments"), BadCheckpoint),
    "an epoch below the first": (changing("survey", row(0, 1), "segments"), LinkError),
    "a negative epoch": (changing("survey", row(0, -1), "segments"), LinkError),
    "an end before the start": (changing("survey", row(4, 1), "segments"), LinkError),
    "an end far behind the bytes": (changing("survey", row(4, (1 << 63) - 1), "segments"), RemusError),
    "an earlier end": (
        lambda asked, _, result: result
        | {"segments": [*result["segments"][:-1], _shorter(result["segments"][-1])]}
        if asked == "survey"
        else result,
        BadCheckpoint,
    ),
    "a time that is a text": (changing("survey", row(2, "now"), "segments"), LinkError),
    "a segment elsewhere": (
        changing("survey", lambda rows: [["../../etc/passwd", *rows[0][1:]]], "segments"),
        LinkError,
    ),
    "segments backwards": (changing("survey", lambda rows: rows[::-1], "segments"), LinkError),
    "a segment twice": (changing("survey", lambda rows: [rows[0], rows[0]], "segments"), LinkError),
    "a row too short": (changing("survey", lambda rows: [rows[0][:2]], "segments"), LinkError),
    "no rows": (changing("survey", lambda rows: "x", "segments"), LinkError),
    "a survey without end": (changing("survey", lambda more: True, "more"), LinkError),
    "another role": (changing("survey", lambda role: "king", "role"), LinkError),
    "a negative term": (changing("survey", lambda term: -1, "term"), LinkError),
    "a loss of all": (
        changing("survey", lambda lost: [["00000000000000000003-000001.remus", 0, "x" * 301, 0, 9, None]], "lost"),
        LinkError,
    ),
    "damage of no segment": (changing("survey", lambda damaged: [["x", "y"]], "damaged"), LinkError),
}  # fmt: skip


def _shorter(segment: list[Any]) -> list[Any]:
    name, first, last = segment
    return [name, first, [*last[:4], last[4] - 1, last[5]]]


@pytest.mark.parametrize("lie", LIES)
def test_a_backup_that_lies(store: Store, tmp_path: Path, lie: str) -> None:
    twist, kind = LIES[lie]
    image = tmp_path / "images" / "orders"
    image.parent.mkdir()
    image.write_bytes(b"before")
    with liar(store, twist) as there:
        history = Remote(f"{there.address}/orders", timeout_s=TIMEOUT_S)
        begin = time.monotonic()
        with pytest.raises(kind) as caught:
            history.restore_image(image)
        assert time.monotonic() - begin < 20
        if kind is LinkError:
            assert there.address in str(caught.value)
        with pytest.raises(RemusError):
            history.export(image)
        assert [path.name for path in image.parent.iterdir()] == ["orders"] and image.read_bytes() == b"before"


def test_an_honest_backup_behind_the_same_door(store: Store, tmp_path: Path) -> None:
    """The lies are the lies: what is not twisted is restored."""
    with liar(store, lambda asked, arguments, result: result) as there:
        Remote(f"{there.address}/orders").restore_image(tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == memory_at(6).tobytes()


ENTRY_LIES: dict[str, Callable[[Any], Any]] = {
    "none": lambda rows: None,
    "too many": lambda rows: rows * 2,
    "another": lambda rows: [[row[0] + 1, *row[1:]] for row in rows],
    "no row": lambda rows: [1],
}


@pytest.mark.parametrize("lie", ENTRY_LIES)
def test_checkpoints_that_were_not_asked_for(store: Store, lie: str) -> None:
    with liar(store, changing("entries", ENTRY_LIES[lie], "entries")) as there:
        history = Remote(f"{there.address}/orders", timeout_s=TIMEOUT_S)
        for ask in (lambda: history.find(5), history.entries):
            with pytest.raises(LinkError):
                ask()


@pytest.mark.parametrize("lie", [[], ["b", "a"], ["a", "a"], [1], "ab", None])
def test_names_that_are_none(store: Store, lie: Any) -> None:
    with liar(store, lambda *_: {"names": lie, "more": True}) as there, pytest.raises(LinkError):
        Remote(there.address, timeout_s=TIMEOUT_S).names()


def spanning(name: str, first: int, last: int) -> list[Any]:
    """A segment with so many checkpoints that nobody could count two of them."""
    size = last - first
    edges = (first, 0, 1), (last, size, size + 1)
    return [name, *([epoch, bytes(32), None, start, end, 1] for epoch, start, end in edges)]


def test_more_checkpoints_than_there_are_numbers(store: Store) -> None:
    last = (1 << 63) - 1
    found = [spanning(f"{0:020}-000000.remus", 0, last // 2), spanning(f"{7:020}-000001.remus", last // 2 + 1, last)]
    with liar(store, changing("survey", lambda _: found, "segments")) as there:
        history = Remote(f"{there.address}/orders", timeout_s=TIMEOUT_S)
        for ask in (history.__len__, history.survey, lambda: history.find(1 << 63)):
            with pytest.raises(LinkError):
                ask()


def test_verify_believes_nobody(store: Store) -> None:
    """A listing that does not fit the bytes is found, wherever it lies."""
    for twist in (changing("survey", row(1, bytes(32)), "segments"), LIES["a changed byte"][0]):
        with liar(store, twist) as there:
            report = Remote(f"{there.address}/orders", timeout_s=TIMEOUT_S).verify()
            assert not report.is_good


def ending(how: Callable[[Peer], None], after: int) -> Callable[[Peer], None]:
    """Ends the session at a request."""
    count = 0

    def end(peer: Peer) -> None:
        nonlocal count
        count += 1
        if count > after:
            how(peer)
            peer.wait()
            raise LinkError("it has hung up")

    return end


def _beat(peer: Peer) -> None:
    for number in itertools.count():
        peer.say(messages.Heartbeat(number=number, status={}))


ENDS: dict[str, tuple[Callable[[Peer], None], type[RemusError]]] = {
    "hangs up": (lambda peer: peer.socket.close(), LinkError),
    "says goodbye": (lambda peer: peer.say(messages.Goodbye(reason="tired")), LinkError),
    "refuses": (lambda peer: peer.say(messages.Error(code="busy", message="later")), Refused),
    "garbles": (lambda peer: peer.force(b"\xff" * 64), LinkError),
    "answers what was not asked": (lambda peer: peer.say(messages.Reply(number=77, result={})), LinkError),
    "only beats": (_beat, LinkError),
    "sends half a frame": (lambda peer: peer.force(b"\x0b\x00\x00"), LinkError),
}  # fmt: skip


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("end", ENDS)
def test_a_backup_that_ends_it(store: Store, tmp_path: Path, end: str, after: int) -> None:
    how, kind = ENDS[end]
    with liar(store, lambda asked, arguments, result: result, ending(how, after)) as there:
        with pytest.raises(kind):
            Remote(f"{there.address}/orders", timeout_s=TIMEOUT_S).restore_image(tmp_path / "image")
        assert not (tmp_path / "image").exists()


@pytest.mark.parametrize("numbers", [[2, 1], [1, 1], [1, 3], [0]])
def test_answers_in_another_order(numbers: list[int]) -> None:
    def serve(peer: Peer) -> None:
        peer.welcome()
        peer.hear()
        for number in numbers:
            peer.say(messages.Reply(number=number, result={}))
        peer.wait()

    with Liar(serve) as there, Requests(connect(Address.parse(there.address)), "reader", timeout_s=10.0) as requests:
        for _ in range(2):
            requests.post("names", {"after": ""}, 10.0)
        with pytest.raises(LinkError):
            for _ in range(2):
                requests.answer(10.0)


def test_no_backup_at_all(tmp_path: Path) -> None:
    with Liar(lambda peer: peer.force(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as there, pytest.raises(LinkError):
        Remote(there.address, timeout_s=TIMEOUT_S).names()
    with Liar(lambda peer: peer.wait()) as there, pytest.raises(LinkError):
        Remote(there.address, timeout_s=TIMEOUT_S).names()


# Readers that lie

SEGMENT = "00000000000000000000-000000.remus"
GOOD = {"name": "orders", "segment": SEGMENT, "start": 0, "size": 1}
BAD_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("read", GOOD | change)
    for change in (
        {"name": "../orders"}, {"name": ""}, {"name": None}, {"name": "x" * 5000}, {"name": "nobody"},
        {"segment": "../../../etc/passwd"}, {"segment": "/etc/passwd"}, {"segment": "../store.json"}, {"segment": None},
        {"segment": "00000000000000000009-000009.remus"}, {"segment": "\0"},
        {"start": -1}, {"start": None}, {"start": True}, {"start": 1.0}, {"start": (1 << 63) - 1}, {"start": 1 << 40},
        {"size": 0}, {"size": -1}, {"size": READ_BYTES + 1}, {"size": (1 << 63) - 1}, {"size": "1"}, {"size": None},
    )
] + [
    ("read", {}),
    ("survey", {"name": "orders", "start": -1}),
    ("survey", {"name": "orders"}),
    ("survey", {"name": ["orders"], "start": 0}),
    ("survey", {"name": "..", "start": 0}),
    ("entries", {"name": "orders", "segment": SEGMENT, "epoch": 0}),
    ("entries", {"name": "orders", "segment": "x", "epoch": 0, "count": 1}),
    ("entries", {"name": "orders", "segment": SEGMENT, "epoch": -1, "count": 1}),
    ("until", {"name": "orders", "segment": SEGMENT, "time_ns": None}),
    ("names", {}),
    ("names", {"after": 7}),
    ("failover", {"name": "orders"}),
    ("status", {}),
    ("dance", {}),
]  # fmt: skip


@pytest.fixture
def backup(store: Store, tmp_path: Path) -> Iterator[Backup]:
    with Backup(store, [f"unix:{tmp_path}/socket"]) as backup:
        yield backup


def test_a_reader_that_lies(backup: Backup) -> None:
    """Each is told what is wrong, in a session that goes on; a primary beside it commits."""
    array = np.zeros(4096)
    address = backup.addresses[0]
    with (
        protect({"array": array}, to=address, name="desk") as protection,
        Requests(connect(Address.parse(address)), "reader", timeout_s=10.0) as requests,
    ):
        for number, (method, arguments) in enumerate(BAD_REQUESTS):
            requests.post(method, arguments, 10.0)
            with pytest.raises(RemusError, match=r"."):
                requests.answer(10.0)
            requests.post("read", GOOD, 10.0)
            assert len(requests.answer(10.0)["data"]) == 1
            array[number] += 1
            protection.checkpoint(wait=True)
        for start in (7, (1 << 63) - 1):
            requests.post("survey", {"name": "orders", "start": start}, 10.0)
            assert requests.answer(10.0)["segments"] == []
        requests.post("entries", GOOD | {"epoch": 0, "count": (1 << 63) - 1, "backward": 7}, 10.0)
        assert len(requests.answer(10.0)["entries"]) == 4
    assert backup.status()["names"]["orders"]["role"] == "standby"


def test_a_control_session_reads_nothing(backup: Backup) -> None:
    with Requests(connect(Address.parse(backup.addresses[0])), "control", timeout_s=10.0) as requests:
        for method in ("names", "survey", "entries", "until", "read"):
            requests.post(method, GOOD, 10.0)
            with pytest.raises(RemusError, match=method):
                requests.answer(10.0)


@pytest.mark.parametrize(
    "message",
    [
        messages.Begin(mode="full", term=0),
        messages.Reply(number=1, result={}),
        messages.Hello(program="again", role="reader"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_reader_that_breaks_the_session_is_ended(backup: Backup, message: messages.Message) -> None:
    address = Address.parse(backup.addresses[0])
    with (
        Requests(connect(address), "reader", timeout_s=10.0) as requests,
        Requests(connect(address), "reader", timeout_s=10.0) as other,
    ):
        requests.post("names", {"after": ""}, 10.0)
        assert requests.answer(10.0)["names"] == ["orders"]
        requests._connection.send([_frame(message)], 10.0)
        with pytest.raises(Refused) as caught:
            requests.answer(10.0)
        assert caught.value.code == "malformed"
        other.post("names", {"after": ""}, 10.0)
        assert other.answer(10.0)["names"] == ["orders"]


def _frame(message: messages.Message) -> bytes:
    payload = frames.pack(message)
    return frames.head(frames.TYPES[type(message)], 0, len(payload), frames.extend(0, payload)) + payload
