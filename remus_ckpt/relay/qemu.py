"""Streams of several checkpoints as a live migration of QEMU: each checkpoint is a round (specs/qemu-ram.md §10).

A QEMU that reads it has most of memory before the last checkpoint comes, and goes on with that one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from remus_ckpt.errors import RemusError
from remus_ckpt.pages import PAGE_SIZE, Buffer
from remus_ckpt.plural import counted
from remus_ckpt.qemu_sender import Part, QemuSender
from remus_ckpt.relay.guest import Head, Losses, Moment, Piece, name_losses
from remus_ckpt.relay.home import LateHome
from remus_ckpt.vm.command_line import RAM_ID
from remus_ckpt.vm.part import VmPart, is_vm
from remus_ckpt.wire.qemu import events
from remus_ckpt.wire.qemu.reader import Reader

_OTHER_RAM = "pc.ram"
"""The name of the block where no machine of QEMU says one."""


class QemuTarget:
    """A migration stream. write: takes the buffers; `run` draws the pieces.

    home: where the source restores its memory
    is_link: whether somebody waits for the bytes; in a file, they shall be few
    clock: in seconds, for what is measured of the link
    """

    def __init__(
        self,
        write: Callable[[list[Buffer]], None],
        home: LateHome,
        losses: Losses,
        *,
        is_link: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.statistics: dict[str, Any] = {}
        """Those of the sender (`QemuSender.statistics`), as of the last round."""
        self._write = write
        self._home = home
        self._losses = losses
        self._is_link = is_link
        self._clock = clock
        self._bytes = 0
        self._writing_s = 0.0

    def run(self, pieces: Iterator[Piece]) -> Iterator[Moment]:
        """Write the stream; yields each moment once it is written."""
        if not isinstance(next(pieces, None), Head):
            return
        self._home.need()
        moments = (piece for piece in pieces if isinstance(piece, Moment))
        first = next(moments, None)
        if first is None:
            return
        guest = is_vm(first.device_state)
        block = events.RamBlock(name=RAM_ID if guest else _OTHER_RAM, size=first.pages * PAGE_SIZE, page_size=PAGE_SIZE)
        # A protected guest's QEMU neither sends nor expects a configuration (specs/vm.md §2).
        configuration = None if guest else events.Configuration(machine="none")
        with QemuSender([block], configuration=configuration) as sender:
            self._write([sender.begin()])
            moment: Moment | None = first
            while moment is not None:
                self._round(sender, moment, block)
                yield moment
                moment = next(moments, None)

    def _round(self, sender: QemuSender, moment: Moment, block: events.RamBlock) -> None:
        if moment.pages * PAGE_SIZE != block.size:
            raise RemusError(
                f"memory has {counted(moment.pages, 'page')} at checkpoint {moment.epoch}, and it had "
                f"{block.size // PAGE_SIZE:,}: QEMU's stream cannot express that. Convert that checkpoint alone, "
                "without --live"
            )
        present = moment.present
        numbers = np.flatnonzero(present) if moment.pfns is None else moment.pfns[present[moment.pfns]]
        parts = [Part(block.name, numbers, moment.memory, numbers)]
        devices = device_sections(moment.device_state)
        name_losses(self._losses, moment, frozenset({"device state"} if devices is not None else ()))
        began = self._clock()
        for buffer in sender.end(devices, parts) if moment.is_last else sender.round(parts):
            sender.coding_s += self._clock() - began
            began = self._clock()
            self._write([buffer])
            self._bytes += len(buffer)
            self._writing_s += self._clock() - began
            if self._is_link:
                sender.link_bytes_s = self._bytes / max(self._writing_s, 1e-9)
            began = self._clock()
        self.statistics = sender.statistics()


def device_sections(state: bytes) -> events.DeviceState | None:
    """The device sections in a checkpoint of a protected guest; None for anything else.

    Raises RemusError for a guest's state that cannot be read.
    """
    if not is_vm(state):
        return None
    reader = Reader()
    reader.feed(VmPart.unpack(state).state)
    reader.feed_eof()
    found = None
    while not isinstance(event := reader.next_event(), events.EndOfStream):
        if isinstance(event, events.DeviceState):
            found = event
    if found is None:
        raise RemusError("the checkpoint's device state has no end: take another checkpoint")
    return found
