"""A checkpoint that is walked as a whole: byte for byte what the parsers make of it, in whatever pieces it comes."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import many
from hypothesis import given, settings
from hypothesis import strategies as st
from sessions import Heap, joined
from wholes import COUNT, SHAPES, Talk, begun, hear, talk, walked

from remus_ckpt import extensions
from remus_ckpt.errors import StreamError
from remus_ckpt.restorer import Restorer
from remus_ckpt.session import incoming, outgoing
from remus_ckpt.session.incoming import CheckpointReceived
from remus_ckpt.session.messages import LEVELS, Ack, Commit, Error, Goodbye, Heartbeat
from remus_ckpt.wire.record import Position
from remus_ckpt.wire.xen.whole import HAS_NATIVE, Walker, receive, write_early

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the extension was not built")

PATH = next(name for name in extensions.SOURCES if name.startswith("wire"))
TALKS = {name: talk(name) for name in SHAPES} if HAS_NATIVE else {}


@pytest.mark.parametrize("name", SHAPES)
def test_a_whole_checkpoint_is_one_event(name: str) -> None:
    data = TALKS[name].first[0] + b"".join(TALKS[name].behind)
    plain = hear(begun(TALKS[name])[1], data)
    walked = hear(begun(TALKS[name], walks=True)[1], data)
    assert walked[:2] == plain[:2]
    assert (plain[2], walked[2]) == (0, 3)
    assert len(walked[1]) == 4


@settings(max_examples=many(60, 2000), deadline=None)
@given(data=st.data())
def test_any_split_gives_the_same(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TALKS)))
    steps = data.draw(st.lists(st.integers(1, 9000), max_size=40))
    room = data.draw(st.sampled_from([1 << 20, 70_000, 1000]))
    sent = TALKS[name].first[0] + b"".join(TALKS[name].behind)
    plain = hear(begun(TALKS[name], room=room)[1], sent)
    assert hear(begun(TALKS[name], walks=True, room=room)[1], sent, steps)[:2] == plain[:2]


@pytest.mark.parametrize("name", SHAPES)
def test_a_flipped_bit_gives_the_same(name: str) -> None:
    of, random = TALKS[name], np.random.default_rng(8)
    whole = bytearray(of.behind[0])
    _, plain = begun(of)
    hear(plain, of.first[0])
    edges = [*range(8 * 80), *range(8 * (len(whole) - 560), 8 * len(whole))]
    inner = random.integers(0, 8 * len(whole), many(50, 1500)).tolist()
    for bit in (*edges[:: many(11, 1)], *inner):
        whole[bit // 8] ^= 1 << bit % 8
        found = []
        for walks in (False, True):
            _, server = begun(of, walks=walks)
            hear(server, of.first[0])
            found.append(hear(server, bytes(whole))[:2])
        assert found[0] == found[1], bit
        whole[bit // 8] ^= 1 << bit % 8


def test_what_is_not_a_whole_checkpoint_goes_the_other_way() -> None:
    of = TALKS["delta"]
    client, server = begun(of, walks=True)
    hear(server, of.first[0])
    beat = joined(client.send(Heartbeat(number=1, status={})))
    _, messages, wholes = hear(server, beat + of.behind[0] + beat + of.behind[1][:-1])
    assert [type(message) for message in messages] == [Heartbeat, Commit, Heartbeat] and wholes == 1
    _, messages, wholes = hear(server, of.behind[1][-1:] + of.behind[2])
    assert [type(message) for message in messages] == [Commit, Commit] and wholes == 1
    # A checkpoint that does not follow: its COMMIT is refused, as ever.
    _, server = begun(of, walks=True)
    hear(server, of.first[0])
    _, messages, wholes = hear(server, of.behind[1])
    assert wholes == 0 and messages[-1][2] == "session.md §5"


def test_how_much_is_missing() -> None:
    of = TALKS["delta"]
    _, server = begun(of, walks=True)
    hear(server, of.first[0])
    sent, there = of.behind[0], 0
    while there < len(sent):
        missing = server.incoming.missing if there else 1
        assert 0 < missing <= len(sent) - there
        room = server.get_buffer()
        room[:missing] = sent[there : there + missing]
        server.buffer_updated(missing)
        there += missing
    assert server.incoming.missing == 0
    assert isinstance(server.next_event(), CheckpointReceived)
    assert begun(of)[1].incoming.missing == 0


def test_without_the_extension_the_parsers_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "HAS_NATIVE", False)
    of = TALKS["delta"]
    data = of.first[0] + b"".join(of.behind)
    assert hear(begun(of, walks=True)[1], data)[2] == 0


def test_an_acknowledgement_is_what_the_parser_makes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every bit flipped, cut anywhere, and behind others: the same messages, the same errors."""
    made = [Position(epoch, bytes([epoch % 251]) * 32) for epoch in (1, 200, 70_000, 1 << 33)]
    acks = [Ack(level=level, position=position) for position in made for level in LEVELS]
    of = TALKS["delta"]

    def heard(data: bytes, step: int) -> list[Any]:
        client, _ = begun(of)
        client.lender = Heap(1)  # which nobody fills
        client.common.made.update(dict.fromkeys(made))
        return hear(client, data, [step] * len(data))[1]

    _, server = begun(of)
    server.common.made.update(dict.fromkeys(made))
    frames = [joined(server.send(ack)) for ack in acks]
    changed = [b"".join(frames)]
    for frame in frames[1::3]:
        for bit in range(0, 8 * len(frame), many(7, 1)):
            one = bytearray(frame)
            one[bit // 8] ^= 1 << bit % 8
            changed.append(bytes(one) + frames[0])
    stranger = Position(5, bytes(32))
    server.common.made[stranger] = None
    changed.append(joined(server.send(Ack(level="durable", position=stranger))))
    quick = [heard(data, step) for data in changed for step in (1000, 40)]
    assert quick[0] == acks
    monkeypatch.setattr(incoming, "HAS_NATIVE", False)
    assert quick == [heard(data, step) for data in changed for step in (1000, 40)]


LENGTHS = [[1], [100], [3, 200, 5], [1 << 16, 7], [(1 << 22) - 3, 3], [(1 << 22) + 1], []]


@settings(max_examples=many(60, 1000), deadline=None)
@given(
    lengths=st.sampled_from(LENGTHS),
    early=st.sampled_from([[], [5], [1 << 22, 1]]),
    epoch=st.sampled_from([0, 1, 126, 127, 254, 255, 65_534, 65_535, (1 << 32) - 2, (1 << 32) - 1, (1 << 62) - 2]),
    pages=st.sampled_from([0, 1, 128, 328, 65_536, 1 << 33]),
    agreed=st.sampled_from([None, "blake3"]),
    compression=st.sampled_from(["none", "lz4"]),
    error=st.sampled_from(["", "", "", "bytes", "before", "after", "over", "refused"]),
    is_native=st.booleans(),
)
def test_the_end_of_a_checkpoint_is_what_its_frames_are(
    lengths: list[int],
    early: list[int],
    epoch: int,
    pages: int,
    agreed: str | None,
    compression: Any,
    error: str,
    is_native: bool,
) -> None:
    """A DATA frame and a COMMIT frame composed in one step, beside `send_data` and `send`; and the same errors."""
    talks = Talk(replace(TALKS["delta"].hello, compressions=("lz4",)), replace(TALKS["delta"].welcome, digest=agreed))
    talks.welcome = replace(talks.welcome, compressions=("lz4",))
    before, after = Position(epoch, b"\x0b" * 32), Position(epoch + 1, b"\x0a" * 32)
    buffers: list[Any] = [memoryview(bytes([length % 251]) * length) for length in lengths]
    total = sum(lengths) + sum(early) + (error == "bytes")
    made: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outgoing, "HAS_NATIVE", is_native)
        for in_one_step in (True, False):
            client, _ = begun(talks)
            client.send_data([b"\0"])
            client.send(Commit(position=before, before=None, stream_bytes=1, pages=0))
            out = list(client.send_data([bytes(length) for length in early]))
            if error == "over":
                client.send(Goodbye(reason="enough"))
            if error == "refused":
                client.common.ended["server"] = Error(code="store", message="full")
            fields: Any = {"position": after, "before": before, "stream_bytes": total, "pages": pages}
            if error == "before":
                fields["before"] = Position(epoch, bytes(32))
            if error == "after":
                fields["position"] = Position(epoch + 2, bytes(32))
            try:
                if in_one_step:
                    out += client.outgoing.send_end(buffers, compression, **fields)
                else:
                    out += client.send_data(buffers, compression) if buffers else []
                    out += client.send(Commit(**fields))
            except ValueError as refusal:
                made.append(str(refusal))
                continue
            made.append((joined(out), client.state, client.common.made, client.outgoing.sent_bytes))
            assert not error
    assert made[0] == made[1]


# What a restorer makes of it


def restorers(of: Talk) -> tuple[Restorer, Restorer]:
    """Two that hold the full copy and the checkpoint behind it, of which the codec can be told."""
    made = []
    for _ in range(2):
        _, server = begun(of)
        restorer = Restorer()
        restorer.feed(hear(server, of.first[0] + of.behind[0])[0])
        assert len(list(restorer.checkpoints())) == 2
        made.append(restorer)
    return made[0], made[1]


@pytest.mark.parametrize("name", SHAPES)
def test_a_restorer_holds_the_same(name: str) -> None:
    plain, quick = restorers(TALKS[name])
    for number in (1, 2):
        whole = walked(TALKS[name], number).whole
        plain.feed(bytes(whole.data))
        expected = plain.next_checkpoint()
        assert quick.fits(whole)
        quick.reserve(whole)
        got = quick.stage_whole(whole)
        assert expected is not None and got is quick.next_checkpoint()
        for key in ("epoch", "start", "end", "batches", "entries", "page_count", "compressed_chunks"):
            assert getattr(got, key) == getattr(expected, key), key
        assert (got.record, got.compressed_bytes) == (expected.record, expected.compressed_bytes)
        assert got.tail is not None and expected.tail is not None
        assert (got.tail.offset, got.tail.end) == (expected.tail.offset, expected.tail.end)
        assert got.pfns.tolist() == expected.pfns.tolist()
        plain.commit()
        quick.commit()
        assert (plain.memory == quick.memory).all()
        assert replace(plain.boundary, course=quick.boundary.course) == quick.boundary
        assert vars(plain.boundary.course) == vars(quick.boundary.course)
    # Both go on in either way.
    for restorer in (plain, quick):
        restorer.feed(b"\xff\xff\xff\x7f")
        with pytest.raises(StreamError) as caught:
            restorer.next_checkpoint()
        assert caught.value.offset == plain.boundary.offset


def test_a_restorer_takes_nothing_that_is_wrong() -> None:
    of = TALKS["delta"]
    good = walked(of, 1)
    for place in range(0, len(good.whole.data), many(97, 3)):
        _, quick = restorers(of)
        data = bytearray(of.behind[1])
        data[16 + place] ^= 4
        event = None
        _, server = begun(of, walks=True)
        hear(server, of.first[0] + of.behind[0])
        room = server.get_buffer()
        room[: len(data)] = data
        server.buffer_updated(len(data))
        try:
            event = server.next_event()
        except StreamError:
            continue
        if isinstance(event, CheckpointReceived):
            assert not quick.fits(event.whole)
        assert quick.staged is None
        quick.feed(bytes(data[16 : 16 + len(good.whole.data)]))
        quick.feed_eof()
        try:
            assert quick.next_checkpoint() is None
        except StreamError:
            assert quick.staged is None


def test_a_restorer_takes_only_what_follows() -> None:
    of = TALKS["delta"]
    _, quick = restorers(of)
    assert not quick.fits(walked(of, 2).whole)
    assert not Restorer().fits(walked(of, 1).whole)
    strict = Restorer(strict=True)
    _, server = begun(of)
    strict.feed(hear(server, of.first[0] + of.behind[0])[0])
    assert len(list(strict.checkpoints())) == 2
    assert not strict.fits(walked(of, 1).whole)
    quick.feed(b"\x01")
    assert quick.next_checkpoint() is None
    assert not quick.fits(walked(of, 1).whole)


# The calls of the extension


@pytest.mark.parametrize("size", [0, 1, 15, 16, 40])
def test_a_walk_over_little(size: int) -> None:
    walker = Walker(8, COUNT, 1000, has_checksums=False)
    assert walker.walk(memoryview(bytes(size))) is None
    data = TALKS["delta"].behind[0]
    commit_at = 16 + int.from_bytes(data[4:8], "little")
    assert walker.wanted(memoryview(data[:size])) == (16 if size < 16 else commit_at + 16)
    assert walker.wanted(memoryview(data)) == len(data)
    assert walker.wanted(memoryview(data[commit_at:])) == 0


def test_receiving() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        room = memoryview(bytearray(10))
        begin = time.monotonic()
        assert receive(ours.fileno(), room, 0.05) is None
        assert 0.04 < time.monotonic() - begin < 5
        assert receive(ours.fileno(), room, 0.0) is None
        theirs.send(b"abc")
        assert receive(ours.fileno(), room, None) == 3 and bytes(room[:3]) == b"abc"
        late = threading.Timer(0.05, theirs.send, [bytes(20)])
        late.start()
        assert receive(ours.fileno(), room, 10) == 10 == receive(ours.fileno(), room, 10)
        late.join()
        theirs.close()
        assert receive(ours.fileno(), room, 10) == 0
    with pytest.raises(OSError):
        receive(-1, room, 0.1)


def test_a_signal_in_a_receive_is_handled_and_the_wait_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    ours, theirs = socket.socketpair()
    try:
        with ours, theirs:
            ours.setblocking(False)
            room = memoryview(bytearray(10))
            timers = [
                threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1]),
                threading.Timer(0.15, theirs.send, [b"x"]),
            ]
            for timer in timers:
                timer.start()
            assert receive(ours.fileno(), room, 20) == 1
            for timer in timers:
                timer.join()
            assert seen == [signal.SIGUSR1]

            def stop(*_: object) -> None:
                raise KeyboardInterrupt

            signal.signal(signal.SIGUSR1, stop)
            timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1])
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                receive(ours.fileno(), room, 20)
            timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_writing_early(tmp_path: Any) -> None:
    path = tmp_path / "segment"
    path.write_bytes(b"." * 30)
    with open(path, "r+b", buffering=0) as file:
        file.seek(10)
        write_early(file.fileno(), memoryview(b"abc"), 10)
        write_early(file.fileno(), memoryview(b""), 13)
        write_early(file.fileno(), memoryview(b"de"), 13)
        assert path.read_bytes() == b"." * 10 + b"abcde" + b"." * 15
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError):
        write_early(full.fileno(), memoryview(b"abc"), 0)
    with pytest.raises(OSError):
        write_early(-1, memoryview(b"abc"), 0)


def test_what_is_composed_refuses_what_does_not_fit() -> None:
    digest, native = bytes(32), extensions.load(PATH)
    for wrong in (
        (digest[1:], digest, 1, 1, 0, 1, 1),
        (digest, digest + b"x", 1, 1, 0, 1, 1),
        (digest, digest, 0, 1, 0, 1, 1),
        (digest, digest, 1 << 63, 1, 0, 1, 1),
        (digest, digest, 1, 1 << 32, 0, 1, 1),
        (digest, digest, 1, 1, 1 << 32, 1, 1),
        (digest, digest, 1, 1, 0, 1 << 63, 1),
        (digest, digest, 1, 1, 0, 1, 1 << 63),
    ):
        with pytest.raises(ValueError):
            native.end_frames(*wrong)
    with pytest.raises(OverflowError):
        native.end_frames(digest, digest, -1, 1, 0, 1, 1)
    with pytest.raises(ValueError):
        native.ack_frame(b"", 1)
