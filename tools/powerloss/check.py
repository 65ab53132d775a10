"""What must be true of a disk after a loss of power: everything that anybody was told before it."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import remus_ckpt.store.hand_over as hand_over_module
from remus_ckpt import Backup, Store, arrays_of, protect, read_checkpoints
from remus_ckpt.errors import BadCheckpoint, RemusError, StreamError
from remus_ckpt.image import Image
from remus_ckpt.memory import zeros
from remus_ckpt.pages import PAGE_SIZE, pages_for
from remus_ckpt.restorer import Checkpoint
from remus_ckpt.store.segments import scan
from remus_ckpt.wire.parts import Parts

PROMOTED = 1


@dataclass
class Told:
    """Of one name: what was said to anybody so far.

    committed: epochs
    version: of the memory that was committed last, counted by the harness
    term, role: the highest
    position: that was promoted
    expects_primary: None where either would be right
    """

    committed: set[int] = field(default_factory=set)
    version: int = 0
    term: tuple[int, int] = (0, 0)
    position: str | None = None
    expects_primary: bool | None = None

    def take(self, event: dict[str, Any]) -> None:
        """One more event."""
        match event["kind"]:
            case "committed":
                self.committed.add(event["epoch"])
                self.term = max(self.term, (event.get("term", 0), 0))
                if "version" in event:
                    self.version = max(self.version, event["version"])
                    self.expects_primary = True
            case "asked":
                self.expects_primary = None
            case "promoted":
                if (event["term"], PROMOTED) >= self.term:
                    self.term, self.position = (event["term"], PROMOTED), event["position"]
                    self.expects_primary = None
            case "takeover":
                self.term = max(self.term, (event["term"], PROMOTED))


def content(checkpoint: Any) -> tuple[int, str]:
    """The version that a checkpoint says it holds, and the hash of what it does hold."""
    arrays, state = arrays_of(checkpoint)
    return int.from_bytes(state, "little"), digest(arrays)


def digest(arrays: Mapping[str, Any]) -> str:
    """Of named arrays."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        found.update(np.ascontiguousarray(arrays[name]))
    return found.hexdigest()


class Check:
    """Looks at one disk, mounted at `mounted`; `faults` says what was wrong there.

    A file may have got its length before its bytes: the end of the newest segment, behind all that was acknowledged,
    may be anything, and the store may call it damage (store.md §9.2).
    """

    def __init__(self, mounted: Path, told: Mapping[str, Told], truth: Mapping[str, Mapping[int, str]]) -> None:
        self.faults: list[str] = []
        self._told = told
        self._truth = truth
        self._torn: dict[str, Path] = {}
        self._store = Store(mounted / "store")
        self._address = f"unix:{mounted}/socket"
        # The machine was started anew: nothing that was handed out before may be given again.
        hand_over_module._boot_id = lambda: f"after the loss on {mounted}"
        try:
            self._look()
        except Exception as error:  # whatever it is: nobody can go on from there
            where = "" if isinstance(error, RemusError) else "".join(traceback.format_tb(error.__traceback__)[-3:])
            self.faults.append(f"{type(error).__name__}: {error}\n{where}".rstrip())

    def _wrong(self, name: str, what: str) -> None:
        self.faults.append(f"{name}: {what}")

    def _look(self) -> None:
        due = {name: told for name, told in self._told.items() if told.committed}
        if not due and not self._store.directory.exists():
            return
        for name, told in due.items():
            self._look_for_a_torn_end(name, told)
            newest = self._store.history(name).newest()
            if newest is None or newest.epoch < max(told.committed):
                self._wrong(name, f"a reader finds {newest and newest.epoch}; {max(told.committed)} was committed")
            else:
                self._compare(name, "a reader", self._newest_good(name, max(told.committed)))
        with Backup(self._store, [self._address], warm="disk") as backup:
            status = backup.status()["names"]
            for name, told in self._told.items():
                self._look_at_status(name, told, status.get(name))
            for name, told in due.items():
                given = backup.failover(name)
                if told.position and told.term[0] == given["term"] and told.position != given["position"]:
                    self._wrong(name, f"promoted at {given['position']}; {told.position} was said")
                with Image(given["image"]) as image:
                    memory = zeros(pages_for(image.size))
                    image.read(0, memory)
                device_state = Path(given["device_state"]).read_bytes()
                handed_out = SimpleNamespace(memory=memory, parts=Parts.unpack(device_state))
                self._compare(name, "what is handed out", handed_out)
                self._go_on(name, given["term"] + 1)
        for name, told in due.items():
            self._read_all(name, told)

    def _look_for_a_torn_end(self, name: str, told: Told) -> None:
        """Whether the newest segment has all that was committed, and behind it what was never acknowledged, torn."""
        segment = max((self._store.directory / name / "segments").glob("*.remus"), key=lambda path: path.name[21:])
        held = scan(segment)
        if held.fault is not None and held.last is not None and held.last.epoch >= max(told.committed):
            self._torn[name] = segment

    def _newest_good(self, name: str, committed: int) -> Checkpoint:
        """What a reader gets; a torn tail that nobody was told of may be taken for one that was (store.md §9.2)."""
        history = self._store.history(name)
        try:
            return history.restore()
        except BadCheckpoint as error:
            if name not in self._torn or error.good is None or error.good < committed:
                raise
            return history.restore(error.good)

    def _look_at_status(self, name: str, told: Told, found: dict[str, Any] | None) -> None:
        if found is None:
            if told.committed or told.term > (0, 0):
                self._wrong(name, "the backup does not know it")
            return
        if found["term"] is None:
            self._wrong(name, f"the backup cannot say what it is: {found['trouble']}")
            return
        if (found["term"], int(found["role"] == "promoted")) < told.term:
            self._wrong(name, f"{found['role']} of term {found['term']}; {told.term} was said")
        newest = max(told.committed, default=-1)
        if (-1 if found["epoch"] is None else found["epoch"]) < newest:
            self._wrong(name, f"recovery finds {found['epoch']}; {newest} was committed")
        if found["warnings"] and name not in self._torn:
            self._wrong(name, f"nothing is lost, and yet: {found['warnings']}")
        state = self._store.history(name).state.more
        if told.expects_primary and not state.get("expects_primary") and found["role"] != "promoted":
            self._wrong(name, "it does not expect the primary that it has")

    def _compare(self, name: str, who: str, checkpoint: Any) -> None:
        version, found = content(checkpoint)
        if version < self._told[name].version:
            self._wrong(name, f"{who} gives version {version}; {self._told[name].version} was committed")
        if found != self._truth[name].get(version):
            self._wrong(name, f"{who} gives another memory than version {version} had")

    def _go_on(self, name: str, term: int) -> None:
        """Somebody protects there what went on; the version is none that was."""
        with protect(
            {"after": np.full(3 * PAGE_SIZE, 7, np.uint8)}, to=self._address, name=name, term=term
        ) as protection:
            epoch = protection.checkpoint(wait=True)
        found = self._store.history(name).restore()
        if found.epoch != epoch or not (arrays_of(found)[0]["after"] == 7).all():
            self._wrong(name, f"what was committed as {epoch} after the loss is not there")

    def _read_all(self, name: str, told: Told) -> None:
        """Of everything that is there: it is right, and nothing that was committed lacks in between."""
        history = self._store.history(name)
        held = set()
        for segment in sorted((history.directory / "segments").iterdir()):
            try:
                for one in read_checkpoints(segment, strict=True):
                    held.add(one.epoch)
                    version, found = content(one)
                    if version and found != self._truth[name].get(version):
                        self._wrong(name, f"{segment.name}, epoch {one.epoch}: not what version {version} was")
            except StreamError as error:
                if segment != self._torn.get(name):
                    self._wrong(name, f"{segment.name}: {error}")
        missing = {epoch for epoch in told.committed if epoch >= min(held, default=0)} - held
        if missing:
            self._wrong(name, f"committed, not pruned and not there: {sorted(missing)}")
        if name not in self._torn and not history.verify().is_good:
            self._wrong(name, "the store does not verify")
