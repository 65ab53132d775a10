"""Puts memory back to a committed checkpoint, in place: between two checkpoints, and only pages that differ."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from remus_ckpt.errors import NoCheckpoint, RemusError
from remus_ckpt.pages import Pages
from remus_ckpt.restorer import Checkpoint
from remus_ckpt.sender import Sender
from remus_ckpt.service.primary import Primary
from remus_ckpt.source.own_memory import OwnMemory

T = TypeVar("T")


@dataclass(eq=False)
class _Request(Generic[T]):
    work: Callable[[], T]
    is_done: threading.Event = field(default_factory=threading.Event)
    result: T | None = None
    error: BaseException | None = None


class Between:
    """Runs work between two checkpoints, in the thread that takes them. Any thread may call `run`.

    Whoever has the thread calls `serve` before each pause, and `end` when it has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[_Request[object]] = []
        self._has_ended = False

    def run(self, work: Callable[[], T], deadline: float) -> T:
        """Have work done; returns its result, or raises its error. Raises RemusError if its turn does not come."""
        request = _Request(work)
        with self._lock:
            if self._has_ended:
                raise RemusError("the thread that takes checkpoints has ended: nothing is put back")
            self._waiting.append(request)  # type: ignore[arg-type]
        if not request.is_done.wait(min(max(deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX)):
            with self._lock:
                is_waiting = request in self._waiting
                if is_waiting:
                    self._waiting.remove(request)  # type: ignore[arg-type]
            if is_waiting:
                raise RemusError("no checkpoint came to its end in that time, so nothing was put back: try again")
            request.is_done.wait()  # it is being done
        if request.error is not None:
            raise request.error
        return request.result  # type: ignore[return-value]

    def serve(self) -> None:
        """Do what is waiting; its errors go to those who wait."""
        with self._lock:
            requests, self._waiting = self._waiting, []
        for request in requests:
            try:
                request.result = request.work()
            except BaseException as error:
                request.error = error
            finally:
                request.is_done.set()

    def end(self) -> None:
        """The thread has ended: refuse what is waiting."""
        with self._lock:
            self._has_ended = True
            requests, self._waiting = self._waiting, []
        for request in requests:
            request.error = RemusError("the thread that takes checkpoints has ended: nothing was put back")
            request.is_done.set()


def newest_held(primary: Primary, epoch: int | None, deadline: float) -> tuple[int, Pages] | None:
    """The newest checkpoint that was sent, once it is committed: its epoch, and the sender's copy of it.

    epoch: the one that is wanted; None: whichever is the newest. Returns None if the sender's copy is of another one.
    Called between two checkpoints. Raises NoCheckpoint if nothing has been sent or the epoch is yet to come, LinkError
    if it is not committed in time.
    """
    sender = primary.sender
    sent = None if sender is None else sender.sent
    if sender is None or sent is None or sent.position is None:
        if epoch is None:
            raise NoCheckpoint("no checkpoint has been taken yet: there is nothing to go back to")
        return None
    if epoch is not None and epoch > sent.epoch:
        raise NoCheckpoint(f"checkpoint {epoch} has not been taken yet; the newest is {sent.epoch}")
    if epoch not in (None, sent.epoch) or not _is_whole(sender):
        if epoch is None:
            raise NoCheckpoint(
                f"the link broke while a checkpoint was sent, so this side has no copy of {sent.epoch}: name the epoch "
                "to have it fetched, or take a checkpoint first"
            )
        return None
    primary.drain(max(deadline - time.monotonic(), 0.0))
    return sent.epoch, sender.reference.pages


def _is_whole(sender: Sender) -> bool:
    """Whether the reference is the last checkpoint that was sent, and nothing else."""
    assert sender.sent is not None
    is_torn = sender.unfinished and len(sender.carried) > 0
    return not is_torn and not len(sender.owed) and sender.position == sender.sent.position


def put_back_newest(source: OwnMemory, memory: Pages) -> None:
    """Put back what was written since the last checkpoint. memory: the sender's copy of that"""

    def work() -> None:
        # Whatever interrupts this, the tracker still names what was written, by others or here.
        source.memory.write(source.tracker.peek(), memory)
        source.tracker.written()
        source.tracker.taken()  # all of memory is what the last checkpoint holds

    _paused(source, work)


def put_back(source: OwnMemory, checkpoint: Checkpoint) -> None:
    """Put back any checkpoint. Raises NoCheckpoint if it is of other memory."""
    if checkpoint.parts.manifest != source.memory.manifest.pack():
        raise NoCheckpoint(
            f"checkpoint {checkpoint.epoch} holds other arrays than those under protection, or none by name: "
            "restore it, and copy what you need"
        )
    memory = checkpoint.memory
    _paused(source, lambda: source.memory.write(source.memory.differing(memory), memory))


def _paused(source: OwnMemory, work: Callable[[], None]) -> None:
    """Do something while nobody writes. Raises SourceError."""
    try:
        source.stopper.stop()
        source.memory.check()
        work()
        source.stopper.check_stopped()
    finally:
        source.stopper.resume()
