"""A scripted history of one store while calls fail, and what must be true of it afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from faults.shim import Shim
from remus_ckpt import read_checkpoints
from remus_ckpt.errors import RemusError, StoreError
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import Pages, batches
from remus_ckpt.sender import Sender
from remus_ckpt.store import HistoryWriter, Retention, Store, ahead
from remus_ckpt.store.state import load_state
from remus_ckpt.wire.record import Position

NAME = "orders"
PAGES = 16
TRIES = 4


def memory_at(version: int) -> Pages:
    """It follows from the number alone."""
    memory = np.zeros((PAGES, 4096), dtype=np.uint8)
    words = memory.view("<u4")
    used = np.arange(PAGES // 2)
    words[used, 0] = used + 1
    words[used, 10 + version % 50] = version
    words[version % len(used)] = version
    return memory


@dataclass
class Story:
    """What the history has said, for whoever judges it.

    truth: position → hash of the memory there, of all that was ever sent
    acknowledged: positions
    states: (term, role) that the store may be in: the last one that was said, and those that were tried since
    wrong: what was wrong while it went
    errors: how many were refused
    """

    truth: dict[str, str] = field(default_factory=dict)
    acknowledged: list[str] = field(default_factory=list)
    states: list[tuple[int, str]] = field(default_factory=lambda: [(0, "standby")])
    wrong: list[str] = field(default_factory=list)
    errors: int = 0
    full_copies: int = 0
    reopened: int = 0

    @property
    def newest(self) -> int:
        """The highest epoch that was acknowledged, −1 for none."""
        return max((epoch_of(position) for position in self.acknowledged), default=-1)


def epoch_of(position: str) -> int:
    """The number in a position as it is written."""
    return int(position.partition(":")[0])


def text_of(position: Position) -> str:
    """All of a position."""
    return f"{position.epoch}:{position.digest.hex()}"


class Life:
    """A backup's use of one store, in which any call may fail: it is tried again, as the service would.

    insists: on a promotion that failed; otherwise whoever asked was told no, and protection goes on
    """

    def __init__(self, store: Store, shim: Shim, story: Story, *, insists: bool) -> None:
        self._store, self._shim, self.story, self._insists = store, shim, story, insists
        self._writer: HistoryWriter | None = None
        self._sender: Sender | None = None
        self._version = 0
        self._must_begin = True

    def play(self) -> None:
        """The history."""
        self.commit(3)
        self._compact()
        self.commit(2)
        self.close()
        self.commit(2)
        self.close()
        self._be_killed()
        self.commit(2)
        self._sender = None  # another primary
        self.commit(2)
        self._try(lambda writer: writer.prune(Retention(count=3)))
        self._promote()
        self.commit(3)

    def settle(self) -> None:
        """Calls do not fail any more: the same process must go on."""
        self.commit(2)
        writer = self.writer
        if writer.position is None or writer.memory is None:
            self.story.wrong.append("the process that survived holds nothing")
        elif memory_sha256(writer.memory) != self.story.truth.get(text_of(writer.position)):
            self.story.wrong.append(f"the memory of the process that survived is not that of {writer.position}")
        self._agree("at the end")

    @property
    def writer(self) -> HistoryWriter:
        """Open. Raises StoreError."""
        if self._writer is None:
            self._writer = self._store.writer(NAME, compact_bytes=None, ahead_bytes=ahead.LEAST_BYTES)
            self._must_begin = True
        return self._writer

    def close(self) -> None:
        """Let go of it in an orderly way."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _try(self, what: Callable[[HistoryWriter], Any]) -> bool:
        for _ in range(TRIES):
            try:
                what(self.writer)
                return True
            except StoreError:
                self._failed()
        return False

    def _failed(self) -> None:
        self.story.errors += 1
        self._must_begin = True
        if self._writer is not None:
            with suppress(StoreError):
                self._writer.abandon()

    def commit(self, count: int) -> None:
        """So many checkpoints, each with its own contents, or as many as can be had."""
        for _ in range(count):
            self._version += 1
            if not self._try(self._commit):
                # Somebody starts the backup anew.
                self.close()
                self.story.reopened += 1
                self._try(self._commit)

    def _commit(self, writer: HistoryWriter) -> None:
        story = self.story
        position = writer.position
        sender = self._sender
        is_full = sender is None or writer.stream is None or position is None or sender.position != position
        if is_full:
            story.full_copies += 1
            before = None
            if writer.highest_epoch >= 0:
                before = Position(writer.highest_epoch, bytes(32) if position is None else position.digest)
            sender = Sender(PAGES, position=before)
        assert sender is not None
        if is_full or self._must_begin:
            writer.begin(full=is_full)
            self._must_begin = False
        # One that fails leaves no sender that knows what the store holds; the next begins in full.
        self._sender = None
        data = self._encode(sender)
        assert sender.position is not None
        came = text_of(sender.position)
        for attempt in range(2):
            try:
                writer.feed(data)
                writer.check(sender.position)
                writer.store()
                break
            except StoreError:
                self._failed()
                if attempt or is_full or writer.stream is None or writer.position != position:
                    raise
                # The store says that the stream goes on behind the last one: then the same bytes fit again.
                writer.begin(full=False)
                self._must_begin = False
        story.acknowledged.append(came)
        self._agree(f"as {sender.position} is acknowledged")
        writer.apply()
        self._sender = sender

    def _agree(self, when: str) -> None:
        """Memory and disk tell one story."""
        writer = self.writer
        with self._shim.unseen():
            on_disk = load_state(writer.directory)
        if on_disk != writer.state:
            self.story.wrong.append(f"{when} the disk says {_brief(on_disk)}, the process {_brief(writer.state)}")

    def _compact(self) -> None:
        self._try(lambda writer: writer.compact(wait=True) if writer.stream is not None else None)

    def _be_killed(self) -> None:
        """A backup has received all of a checkpoint, and is killed before it has synced it; it is started anew."""
        sender, position = self._sender, None
        self._version += 1
        data = b""
        if sender is not None:
            position = sender.position
            data = self._encode(sender)
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                if self.writer.position == position and self.writer.stream is not None:
                    self.writer.begin(full=False)
                    self.writer.feed(data)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        if sender is not None and sender.position is not None and self._try(lambda writer: None):
            if self.writer.position == sender.position:
                self.story.acknowledged.append(text_of(sender.position))  # a welcome says so
            else:
                self._sender = None

    def _encode(self, sender: Sender) -> bytes:
        """The next checkpoint, with the memory of this version."""
        memory = memory_at(self._version)
        groups = sender.checkpoint(batches(np.arange(PAGES), memory))
        data = b"".join(bytes(buffer) for group in groups for buffer in group)
        assert sender.position is not None
        self.story.truth[text_of(sender.position)] = memory_sha256(memory)
        return data

    def _promote(self) -> None:
        if not self._try(lambda writer: None):
            return
        term = self.writer.state.term + 1
        self._set_state(term, "promoted", TRIES if self._insists else 1)
        if self.writer.state.role == "promoted":  # else it was refused, and this is a standby still
            self._try(lambda writer: writer.hand_out())
            self._sender = None
            self._set_state(term + 1, "standby", TRIES)

    def _set_state(self, term: int, role: Any, tries: int) -> bool:
        """Whether it was done; while it is not known whether it was, either may be."""
        story = self.story
        for _ in range(tries):
            story.states.append((term, role))
            try:
                self.writer.set_state(term=term, role=role, expects_primary=role == "standby")
            except StoreError:
                story.errors += 1
            else:
                story.states[:] = [(term, role)]
                return True
        return False


def _brief(state: Any) -> str:
    return f"{state.role} of term {state.term}, {state.more}"


def judge(store: Store, story: Story, shim: Shim, *, strict: bool) -> list[str]:
    """What is wrong with what a history has left; nothing fails any more.

    shim: disarmed
    strict: nothing was taken away from the disk, so that nothing may be called damaged
    """
    wrong = list(story.wrong)
    if not (store.directory / NAME).exists():
        return wrong + (["the store is gone"] if story.acknowledged else [])
    descriptors = len(os.listdir("/proc/self/fd"))
    if story.acknowledged:
        newest = store.history(NAME).newest()
        if newest is None or newest.epoch < story.newest:
            wrong.append(f"a reader finds {newest and newest.epoch}; {story.newest} was acknowledged")
    with store.writer(NAME, compact_bytes=None) as writer:
        position = writer.position
        if (-1 if position is None else position.epoch) < story.newest:
            wrong.append(f"recovery finds {position and position.epoch}; {story.newest} was acknowledged")
        if position is not None:
            assert writer.memory is not None
            if memory_sha256(writer.memory) != story.truth.get(text_of(position)):
                wrong.append(f"recovery gives another memory than {position} had")
        if (writer.state.term, writer.state.role) not in story.states:
            wrong.append(f"the store is {_brief(writer.state)}; it can be one of {story.states}")
        if strict and writer.warnings:
            wrong.append(f"nothing is lost, and yet: {writer.warnings}")
        wrong += _read_all(writer.directory / "segments", story)
    again = Life(store, shim, Story(truth=story.truth), insists=True)
    again._version = 1000
    again._try(again._commit)
    directory = again.writer.directory
    again.close()
    with store.writer(NAME) as writer:
        if writer.position is None or text_of(writer.position) not in again.story.acknowledged:
            wrong.append(f"what was acknowledged after the recovery is not there: {again.story.wrong}")
    left = [
        path.name for path in directory.rglob("*") if path.name.endswith((".partial", ".new")) or ".new." in path.name
    ]
    if left:
        wrong.append(f"left behind: {left}")
    if len(os.listdir("/proc/self/fd")) > descriptors:
        wrong.append("descriptors are left open")
    return wrong


def _read_all(segments: Path, story: Story) -> list[str]:
    held, wrong = set(), []
    for path in sorted(segments.iterdir()):
        with suppress(RemusError):
            for one in read_checkpoints(path, strict=True):
                assert one.record is not None
                position = text_of(one.record.after)
                held.add(position)
                if memory_sha256(one.memory) != story.truth.get(position):
                    wrong.append(f"{path.name} holds another memory than {position} had")
    oldest = min(map(epoch_of, held), default=0)
    missing = [position for position in story.acknowledged if epoch_of(position) >= oldest and position not in held]
    if missing:
        wrong.append(f"acknowledged, not pruned and not there: {[epoch_of(one) for one in missing]}")
    return wrong
