"""The disks of a guest on the side where it runs: copied to the backup once, then written there with each checkpoint
(specs/disk.md).

    a copy         QEMU mirrors each write to a disk server from now on; the disk is read through QEMU and compared with
                   what the backup has, block by block; what differs is sent, and then what was written meanwhile
    a checkpoint   mark, in the pause; logs, behind it; forget, when it is committed

As long as a mirror misses anything, or the backup's image is not where the log begins, `check` fails: no checkpoint is
taken, and the guest's output stays held.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remus_ckpt.disk import guarding, replace_file, sync_directory
from remus_ckpt.errors import LinkError, RemusError, VmError
from remus_ckpt.limits import KIB, MIB
from remus_ckpt.link.connection import Connection
from remus_ckpt.link.control import Requests, ask
from remus_ckpt.loop import StopSignal
from remus_ckpt.memory import keep_freed
from remus_ckpt.observe.log import log
from remus_ckpt.pages import Buffer
from remus_ckpt.service.primary import Primary
from remus_ckpt.vm.command_line import Disk
from remus_ckpt.vm.disk_image import BLOCK_BYTES, DIGEST_BYTES, MAX_BLOCKS, MAX_READ_BYTES, digests
from remus_ckpt.vm.disk_log import pack_write, writes
from remus_ckpt.vm.disk_server import DiskServer
from remus_ckpt.vm.mirror import DiskMirror, Monitor, disk_of, reading
from remus_ckpt.vm.part import SEED_BYTES, DiskPart

_ANSWER_S = 60.0
_BEGIN_S = 3600.0
"""The backup may have to copy an earlier image."""
_SPAN_BYTES = 16 * MIB
"""Of the disk, compared at a time."""
_REQUEST_BYTES = 900 * KIB
"""Of writes; a request has at most 1 MiB (session.md §2.2)."""
_CATCH_UP_BYTES = 1 * MIB
_CATCH_UPS = 20
_ZEROES = bytes(BLOCK_BYTES)


@dataclass
class _Mirrored:
    """A disk, its mirror, and where its checkpoints end.

    base: the position at which the backup stood when the link began
    ends: of each checkpoint of this link that is not committed, and of the last that is
    """

    disk: Disk
    size: int
    seed: bytes
    server: DiskServer
    mirror: DiskMirror
    base: int = 0
    ends: dict[int, int] = field(default_factory=dict)

    def close(self) -> None:
        with suppress(VmError):  # QEMU has ended, or the server has: no command may wait for one that hangs
            if not self.server.status().trouble:
                self.mirror.end()
        self.server.close()
        with suppress(VmError):  # QEMU has ended
            self.mirror.end()

    @property
    def arguments(self) -> dict[str, Any]:
        return {"disk": self.disk.ident, "seed": self.seed, "size": self.size}


class GuestDisks:
    """The disks that a guest writes to. One thread takes checkpoints; any may call `committed` and `status`.

    monitor: of its QEMU
    folder: for sockets
    """

    def __init__(self, monitor: Monitor, disks: Sequence[Disk], folder: Path) -> None:
        self._monitor, self._disks, self._folder = monitor, disks, folder
        self._mirrored: dict[str, _Mirrored] = {}
        self._primary: Primary | None = None
        self._checked = -1  # the link for which the backup has been asked
        self._epoch = 0
        self._trouble = "not copied yet"
        self._copied_bytes = self._sent_bytes = self._copies = self._held_bytes = 0
        keep_freed()  # what the guest writes goes through this process

    # Checkpoints

    def check(self) -> None:
        """Raise VmError if no checkpoint may be taken. Before each stop: a server that hangs would hold it up."""
        held = 0
        try:
            if len(self._mirrored) < len(self._disks):
                raise VmError("the guest's disks are not copied to the backup")
            for one in self._mirrored.values():
                found = one.server.status()
                if found.trouble:
                    raise VmError(f"the mirror of {one.disk.path} misses writes: {found.trouble}")
                held += found.held_bytes
            if self._primary is not None and self._primary.links != self._checked:
                self._ask_backup(self._primary)
        except VmError as error:
            self._trouble = str(error)
            raise
        finally:
            self._held_bytes = held

    def end_what_hangs(self) -> None:
        """QEMU does not stop: end each server that does not answer, which then holds nothing up."""
        for one in self._mirrored.values():
            with suppress(VmError):
                one.server.status()

    def _ask_backup(self, primary: Primary) -> None:
        """On a new link: begin where the backup's images stand. Raises VmError if they are others."""
        links = primary.links
        try:
            found = ask(primary.dial(), "disk-state", {"name": primary.name}, timeout_s=_ANSWER_S)["disks"]
            stands = {(one["disk"], one["seed"]): int(one["position"]) for one in found}
        except (RemusError, KeyError, TypeError, ValueError) as error:
            raise VmError(f"the backup does not say where the guest's disks stand: {error}") from error
        for one in self._mirrored.values():
            position = stands.get((one.disk.ident, one.seed))
            if position is None or not one.base <= position <= one.server.status().end:
                self._drop(one)
                raise VmError(f"the backup has no copy of {one.disk.path}, or not this one")
            one.base, one.ends = position, {}
        self._checked = links

    def mark(self, epoch: int) -> None:
        """The guest is stopped: what it has written until now belongs to this checkpoint. Raises VmError."""
        self._epoch = epoch
        for one in self._mirrored.values():
            end = one.server.mark()
            one.ends = {before: at for before, at in one.ends.items() if before < epoch} | {epoch: end}

    def parts(self) -> list[DiskPart]:
        """What the checkpoint that was marked last says of the disks."""
        return [DiskPart(one.disk.ident, one.seed, one.size, *self._range(one)) for one in self._mirrored.values()]

    def logs(self) -> list[Buffer]:
        """What was written to each for that checkpoint. Raises VmError."""
        return [one.server.read(*self._range(one)) for one in self._mirrored.values()]

    def _range(self, one: _Mirrored) -> tuple[int, int]:
        return one.ends.get(self._epoch - 1, one.base), one.ends[self._epoch]

    def committed(self, epoch: int) -> None:
        """This checkpoint is committed: what belongs to it need not be kept. Any thread may call this."""
        for one in list(self._mirrored.values()):
            ends = one.ends
            if (end := max((at for before, at in ends.items() if before <= epoch), default=None)) is None:
                continue
            with suppress(VmError):  # the next `check` tells
                one.server.forget(end)

    def status(self) -> dict[str, Any]:
        """disk_trouble: why no checkpoint is taken; None if the disks are in sync
        disk_copied: how much of a copy under way is done, None without one
        disk_held_bytes: of writes that wait for commits
        disk_copies: how many there were; disk_sent_bytes: what they had to send
        """
        size = sum(one.size for one in list(self._mirrored.values()))
        return {
            "disk_trouble": self._trouble or None,
            "disk_copied": round(self._copied_bytes / size, 4) if size and self._copied_bytes else None,
            "disk_held_bytes": self._held_bytes,
            "disk_copies": self._copies,
            "disk_sent_bytes": self._sent_bytes,
        }

    # Copies

    def copy(self, primary: Primary, stop: StopSignal, on_turn: Callable[[], None]) -> None:
        """Copy to the backup what it lacks. Raises VmError; then it must be called again.

        stop: ends it; on_turn: called often
        """
        self._primary = primary

        def turn() -> None:
            on_turn()
            if stop.is_set:
                raise VmError("stopped while a disk was copied")

        for disk in self._disks:
            known = self._mirrored.get(disk.ident)
            if known is not None and self._is_whole(known):
                continue
            if known is not None:
                self._drop(known)
            try:
                self._copy(disk, primary, turn)
            except RemusError as error:
                if (begun := self._mirrored.get(disk.ident)) is not None:
                    self._drop(begun)
                self._trouble = f"{disk.path}: {error}"
                raise VmError(f"{disk.path} is not copied to the backup: {error}") from error
            finally:
                self._copied_bytes = 0
        self._trouble = ""

    @staticmethod
    def _is_whole(one: _Mirrored) -> bool:
        with suppress(VmError):
            one.mirror.check()
            return not one.server.status().trouble
        return False

    def _drop(self, one: _Mirrored) -> None:
        del self._mirrored[one.disk.ident]
        one.close()

    def _copy(self, disk: Disk, primary: Primary, turn: Callable[[], None]) -> None:
        begin_s = time.monotonic()
        self._trouble = f"{disk.path} is being copied"
        with Requests(primary.dial(), "control", timeout_s=_ANSWER_S) as requests:
            node, size = disk_of(self._monitor, disk.ident)
            server = DiskServer(size, self._folder / f"{disk.ident}.nbd")
            try:
                mirror = DiskMirror(self._monitor, disk.ident, server)
            except BaseException:
                server.close()
                raise
            one = self._mirrored[disk.ident] = _Mirrored(disk, size, os.urandom(SEED_BYTES), server, mirror)
            log("copying a disk", name=primary.name, disk=disk.path, bytes=size)
            target = _Target(requests, {"name": primary.name} | one.arguments)
            is_empty = requests.field(target.ask("disk-begin", {}, _BEGIN_S), "is_empty", bool)
            with reading(self._monitor, node, self._folder / "copy.nbd") as reader:
                for start in range(0, size, _SPAN_BYTES):
                    turn()
                    data = reader.read(start, min(_SPAN_BYTES, size - start))
                    target.send_differing(start, data, is_empty)
                    self._copied_bytes += len(data)
            # What was written meanwhile. The rest goes with the next checkpoint.
            for _ in range(_CATCH_UPS):
                turn()
                end = server.status().end
                target.send_log(server.read(one.base, end), size)
                behind, one.base = end - one.base, end
                server.forget(end)
                if behind < _CATCH_UP_BYTES:
                    break
            target.ask("disk-done", {"position": one.base}, _BEGIN_S)
        self._copies += 1
        self._sent_bytes += target.sent_bytes
        self._checked = -1
        took = f"{time.monotonic() - begin_s:.1f} s"
        log("disk copied", name=primary.name, disk=disk.path, sent=target.sent_bytes, took=took)

    def close(self) -> None:
        """End the mirrors; the guest runs on without."""
        for one in list(self._mirrored.values()):
            self._drop(one)


# The guest's own disks


def _mark_of(path: str) -> Path:
    return Path(f"{path}.remus-ckpt")


def mark_own(disks: Sequence[Disk], name: str, to: str) -> list[Disk]:
    """Note beside each disk that a guest writes to it under protection: from now on it may be ahead of what a survivor
    has. Durable when this returns. Returns those that had no such note. Raises StoreError."""
    fresh = [disk for disk in disks if not _mark_of(disk.path).exists()]
    for disk in disks:
        path = _mark_of(disk.path)
        if os.path.exists(disk.path) and not os.path.isfile(disk.path):
            raise VmError(f"{disk.path} is no file: nothing can be noted beside it that would outlive a loss of power")
        with guarding(path, "output"):
            replace_file(path, json.dumps({"name": name, "to": to, "disk": disk.ident}).encode())
    return fresh


def unmark_own(disks: Sequence[Disk]) -> None:
    """The guest has ended here, and goes on nowhere else. Raises StoreError."""
    for disk in disks:
        path = _mark_of(disk.path)
        with guarding(path):
            path.unlink(missing_ok=True)
            sync_directory(path.parent)


def own_mark(path: Path) -> dict[str, Any]:
    """What is noted beside a disk: name, to, disk; nothing if there is no note that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads(_mark_of(str(path)).read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def check_own(disks: Sequence[Disk], name: str, term: int | None, dial: Callable[[], Connection]) -> None:
    """Before a guest is started: whether its disks are the newest. Raises VmError if it has gone on elsewhere, or may.

    term: given if the user continues after a failover
    """
    if not disks:
        return
    marked = [disk.path for disk in disks if _mark_of(disk.path).exists()]
    paths = ", ".join(marked or [disk.path for disk in disks])
    way_out = (
        "bring it back with `remus-ckpt vm disk-back`, or remove the file .remus-ckpt beside it if you are certain "
        "that the guest has gone on nowhere else"
    )
    try:
        role = ask(dial(), "status", {}, timeout_s=_ANSWER_S)["names"].get(name, {}).get("role")
    except LinkError as error:
        if not marked:
            return
        raise VmError(
            f"{paths}: its guest did not end in order, and the backup does not say whether it has taken over "
            f"({error}): {way_out}"
        ) from error
    if role == "promoted" and (marked or term is None):
        raise VmError(f"{paths}: the backup has taken over, and this disk is ahead of what it went on from: {way_out}")


class _Target:
    """A copy that comes in on the backup. arguments: that name it"""

    def __init__(self, requests: Requests, arguments: dict[str, Any]) -> None:
        self._requests, self._arguments = requests, arguments
        self._log: list[bytes] = []
        self._size = 0
        self.sent_bytes = 0

    def ask(self, method: str, arguments: dict[str, Any], timeout_s: float = _ANSWER_S) -> dict[str, Any]:
        self._requests.post(method, self._arguments | arguments, timeout_s)
        return self._requests.answer(timeout_s)

    def send_differing(self, start: int, data: bytes, is_empty: bool) -> None:
        """Send the blocks that the other side does not have already. is_empty: it has zeroes"""
        there: list[bytes] = []
        if not is_empty:
            count = -(-len(data) // BLOCK_BYTES)
            assert count <= MAX_BLOCKS
            found = self._requests.field(self.ask("disk-digests", {"offset": start, "count": count}), "digests", bytes)
            there = [found[at : at + DIGEST_BYTES] for at in range(0, len(found), DIGEST_BYTES)]
            if there == digests(data):
                return
        for number, at in enumerate(range(0, len(data), BLOCK_BYTES)):
            block = data[at : at + BLOCK_BYTES]
            is_zero = block == _ZEROES[: len(block)]
            if is_empty and is_zero:
                continue
            if not is_empty and digests(block) == there[number : number + 1]:
                continue
            self._put(pack_write(start + at, len(block), None if is_zero else block))
        self._flush()

    def send_log(self, log: Buffer, disk_bytes: int) -> None:
        """Send what the guest has written."""
        for write in writes(log, disk_bytes):
            if write.data is None:
                self._put(pack_write(write.offset, write.length, None))
                continue
            for at in range(0, write.length, MAX_READ_BYTES):
                data = write.data[at : at + MAX_READ_BYTES]
                self._put(pack_write(write.offset + at, len(data), data))
        self._flush()

    def _put(self, write: bytes) -> None:
        if self._size + len(write) > _REQUEST_BYTES:
            self._flush()
        self._log.append(write)
        self._size += len(write)

    def _flush(self) -> None:
        if log := b"".join(self._log):
            self.ask("disk-write", {"log": log})
            self.sent_bytes += len(log)
        self._log.clear()
        self._size = 0
