"""Rounds of pages to a QEMU stream: what the reader makes of them is memory, and the statistics are what it counts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from conftest import many
from hypothesis import given
from hypothesis import strategies as st
from qemu_support import read_all

from remus_ckpt.blocks import Blocks
from remus_ckpt.pages import PAGE_SIZE, Pages
from remus_ckpt.qemu_sender import CALL_PAGES, Part, QemuSender
from remus_ckpt.restorer import Anonymous
from remus_ckpt.wire.qemu import events
from remus_ckpt.wire.qemu.reader import Reader

MACHINE = events.Configuration(machine="pc-i440fx-7.2")
DEVICES = events.DeviceState(data=b"\x04" + bytes(20) + b"\x7e\0\0\0\1")


def blocks(**pages: int) -> list[events.RamBlock]:
    return [events.RamBlock(name=name, size=count * PAGE_SIZE, page_size=PAGE_SIZE) for name, count in pages.items()]


def received(data: bytes) -> tuple[Blocks, events.DeviceState | None]:
    reader = Reader(page_size=PAGE_SIZE)
    taken = Blocks(lambda _: Anonymous(), reader.fail)
    reader.feed(data)
    reader.feed_eof()
    devices = None
    while not isinstance(event := reader.next_event(), events.EndOfStream):
        if event is not None:
            taken.take(event)
        if isinstance(event, events.DeviceState):
            devices = event
    assert event.complete and taken.is_whole
    return taken, devices


def joined(buffers: Iterable[object]) -> bytes:
    """Each is copied before the next is asked for."""
    return b"".join(bytes(buffer) for buffer in buffers)  # type: ignore[call-overload]


def noise(pages: int, seed: int = 0) -> Pages:
    return np.random.default_rng(seed).integers(1, 256, (pages, PAGE_SIZE), dtype=np.uint8)


@pytest.mark.parametrize("kernel", [None, "numpy"])
def test_what_is_sent_is_what_arrives(kernel: str | None) -> None:
    random = np.random.default_rng(4)
    memory = {"ram": noise(40), "other": noise(12)}
    memory["ram"][3:9] = 0
    numbers = {name: np.arange(len(pages)) for name, pages in memory.items()}
    with QemuSender(blocks(ram=40, other=12), configuration=MACHINE, kernel=kernel) as sender:
        data = bytes(sender.begin())
        for count in range(many(6, 40)):
            data += joined(sender.round([Part(name, numbers[name], memory[name], numbers[name]) for name in numbers]))
            for name, pages in memory.items():
                numbers[name] = np.flatnonzero(random.random(len(pages)) < 0.4)
                for number in numbers[name][count % 2 :: 2]:
                    pages[number, random.integers(0, PAGE_SIZE, 9)] = random.integers(0, 256)
        data += joined(
            sender.end(DEVICES, [Part(name, numbers[name], memory[name][numbers[name]]) for name in numbers])
        )
        counted = sender.statistics()
    taken, devices = received(data)
    for name, pages in memory.items():
        assert (taken.named[name].image == pages.reshape(-1)).all()
    assert devices is not None and devices.data == DEVICES.data
    spelled = [one for one in read_all(data) if isinstance(one, tuple)]
    encoded = [one for one in spelled if one[1] == "encoded"]
    whole = [one for one in spelled if one[1] not in ("encoded", "zero")]
    cache = counted["xbzrle-cache"]
    assert len(encoded) > 10
    assert cache["bytes"] == sum(len(one[4]) for one in encoded) + PAGE_SIZE * cache["overflow"]
    assert cache["pages"] > len(encoded) + cache["overflow"]  # those that have not changed are not sent
    assert counted["normal"] == len(whole) and counted["duplicate"] == len(spelled) - len(whole) - len(encoded)


def test_the_first_round_fills_the_cache_and_encodes_nothing() -> None:
    memory, numbers = noise(10), np.arange(10)
    with QemuSender(blocks(ram=10)) as sender:
        first = joined(sender.round([Part("ram", numbers, memory)]))
        assert len(first) == 5 + 10 * (8 + PAGE_SIZE) + len(b"\3ram") + 13
        memory[4, 7] ^= 1
        second = joined(sender.round([Part("ram", numbers, memory)]))
        # One page of ten has changed: a word with its block's name, a frame of a gap, a length and a byte.
        assert len(second) == 5 + 8 + len(b"\3ram") + 3 + 3 + 13
        assert sender.statistics()["xbzrle-cache"]["pages"] == 10
        assert sender.statistics()["xbzrle-cache"]["cache-miss"] == 0


def test_a_page_that_overflows_goes_whole() -> None:
    memory = noise(1)
    with QemuSender(blocks(ram=1)) as sender:
        joined(sender.round([Part("ram", np.arange(1), memory)]))
        memory += np.uint8(1)
        memory[0, 1::2] -= np.uint8(1)
        sent = joined(sender.round([Part("ram", np.arange(1), memory)]))
        assert memory.tobytes() in sent
        assert sender.statistics()["xbzrle-cache"]["overflow"] == 1
        assert sender.statistics()["xbzrle-cache"]["encoding-rate"] == 1.0


def test_it_has_ended_however_it_ended() -> None:
    part = Part("ram", np.arange(2 * CALL_PAGES), noise(2 * CALL_PAGES))

    def broken() -> Iterable[Part]:
        yield part
        raise RuntimeError("the source has died")

    def ended(sender: QemuSender) -> None:
        assert sender.cache is None and not len(sender.out)
        with pytest.raises(ValueError, match="has ended"):
            joined(sender.round([part]))
        sender.close()

    for way in ("source", "cancelled", "complete", "with"):
        with QemuSender(blocks(ram=2 * CALL_PAGES)) as sender:
            match way:
                case "source":
                    with pytest.raises(RuntimeError):
                        joined(sender.round(broken()))
                case "cancelled":
                    buffers = sender.round([part])
                    next(buffers), next(buffers)
                    buffers.close()  # type: ignore[attr-defined]
                case "complete":
                    joined(sender.end(None, [part]))
            if way != "with":
                ended(sender)
        ended(sender)
        assert sender.statistics()["normal"] >= (0 if way == "with" else 1)


def test_pages_that_the_block_has_not() -> None:
    for number in (-1, 4):
        with QemuSender(blocks(ram=4)) as sender, pytest.raises(ValueError, match="which has 4"):
            joined(sender.round([Part("ram", np.array([number]), noise(1))]))
    with pytest.raises(ValueError, match="not made of pages"):
        QemuSender([events.RamBlock(name="ram", size=8192, page_size=8192)])


def test_what_it_holds_does_not_grow_with_memory() -> None:
    with QemuSender(blocks(ram=1 << 20), cache_bytes=1 << 20) as sender:
        assert sender.cache is not None and sender.cache.pages.nbytes == 1 << 20
        joined(sender.round([Part("ram", np.arange(600), noise(600))]))
        sizes = [len(bytes(one)) for one in sender.round([Part("ram", np.arange(600), noise(600, 1))])]
        assert max(sizes) <= CALL_PAGES * (8 + 3 + PAGE_SIZE)


def test_a_link_that_is_faster_than_the_coding_gets_pages_as_they_are() -> None:
    memory, numbers = noise(CALL_PAGES), np.arange(CALL_PAGES)
    part = [Part("ram", numbers, memory)]
    for link, encodes in ((1e12, False), (1e8, True)):
        with QemuSender(blocks(ram=CALL_PAGES)) as sender:
            sender.link_bytes_s = link
            sender.coding_s = 0.0001
            joined(sender.round(part))
            assert sender.choice.encodes, "nothing is known of it yet"
            memory[:, 9] += 1
            sender.coding_s = 0.001
            joined(sender.round(part))
            assert sender.choice.encodes == encodes
            assert "encode" in sender.statistics()["reasons"][0]
            memory[:, 9] += 1
            size = len(joined(sender.round(part)))
            assert (size < CALL_PAGES * 100) == encodes


def test_the_cache_grows_while_pages_are_not_in_it() -> None:
    pages = 1 << 15  # 128 MiB: twice what it begins with
    with QemuSender(blocks(ram=pages)) as sender:
        sizes = []
        numbers = np.arange(0, pages, 64)
        source = noise(len(numbers))
        for _ in range(4):
            joined(sender.round([Part("ram", numbers, source)]))
            source[:, 3] += 1
            sizes.append(sender.choice.slots)
        assert sizes == [1 << 14, 1 << 15, 1 << 15, 1 << 15]
        assert sender.statistics()["xbzrle-cache"]["cache-miss-rate"] == 0


@given(st.data())
def test_any_writes_in_any_rounds(data: st.DataObject) -> None:
    """Memory as a list of small writes; a cache that is far too small; what arrives is what was there last."""
    memory = np.zeros((12, PAGE_SIZE), dtype=np.uint8)
    with QemuSender(blocks(ram=12), cache_bytes=4 * PAGE_SIZE, is_fixed=data.draw(st.booleans())) as sender:
        sent = bytes(sender.begin()) + joined(sender.round([Part("ram", np.arange(12), memory)]))
        for _ in range(data.draw(st.integers(1, 5))):
            written = data.draw(
                st.lists(
                    st.tuples(st.integers(0, 11), st.integers(0, PAGE_SIZE - 1), st.binary(max_size=40)), max_size=8
                )
            )
            for page, at, value in written:
                memory[page, at : at + len(value)] = np.frombuffer(value, dtype=np.uint8)[: PAGE_SIZE - at]
            numbers = np.unique(np.array([page for page, _, _ in written], dtype=np.int64))
            sent += joined(sender.round([Part("ram", numbers, memory, numbers)]))
        sent += joined(sender.end(None))
    taken, _ = received(sent)
    assert (taken.named["ram"].image == memory.reshape(-1)).all()
