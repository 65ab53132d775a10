"""Continuous, compressed checkpoints of live memory, in the Xen legacy save stream.

Your own arrays, DataFrames and mmaps:

    protect, Protection     keeps them, by name, on a backup while the program changes them
    Committed               what `on_commit` gets
    arrays_of               the arrays and DataFrames of a checkpoint: new ones, or copied into existing ones

Memory that other processes write:

    SharedFile              a file that they have mapped, as a source
    Processes, CgroupFreezer, PauseCommands     ways to stop them

The backup and its store:

    Backup, Policy          keeps the checkpoints of primaries, and takes over
    open_store, Store, History, Stored, Retention     checkpoints on disk: list, restore, verify
    Remote                  the same on another machine, through its backup

Streams:

    Sender, PageBatch, PageType, batches        pages to a stream
    Restorer, Checkpoint, Position, Limits      a stream to memory, always at the last complete checkpoint
    read_checkpoints, Dialect                   the checkpoints of a file

Errors are in `remus_ckpt.errors`, codecs in `remus_ckpt.codec`. The command is `remus-ckpt`; `specs/` has the formats.
Names are loaded on first use, so importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from remus_ckpt.version import __version__ as __version__

if TYPE_CHECKING:
    from remus_ckpt.files import read_checkpoints as read_checkpoints
    from remus_ckpt.limits import Limits as Limits
    from remus_ckpt.pages import PageBatch as PageBatch
    from remus_ckpt.pages import PageType as PageType
    from remus_ckpt.pages import batches as batches
    from remus_ckpt.restorer import Checkpoint as Checkpoint
    from remus_ckpt.restorer import Restorer as Restorer
    from remus_ckpt.sender import Sender as Sender
    from remus_ckpt.service.backup import Backup as Backup
    from remus_ckpt.service.protect import Protection as Protection
    from remus_ckpt.service.protect import protect as protect
    from remus_ckpt.service.release import Committed as Committed
    from remus_ckpt.service.standby import Policy as Policy
    from remus_ckpt.source.cgroup import CgroupFreezer as CgroupFreezer
    from remus_ckpt.source.commands import PauseCommands as PauseCommands
    from remus_ckpt.source.manifest import arrays_of as arrays_of
    from remus_ckpt.source.processes import Processes as Processes
    from remus_ckpt.source.shared_file import SharedFile as SharedFile
    from remus_ckpt.store import History as History
    from remus_ckpt.store import Retention as Retention
    from remus_ckpt.store import Store as Store
    from remus_ckpt.store import Stored as Stored
    from remus_ckpt.store import open_store as open_store
    from remus_ckpt.store.remote import Remote as Remote
    from remus_ckpt.wire.record import Position as Position
    from remus_ckpt.wire.xen.dialect import Dialect as Dialect

_HOMES = {
    "files": ("read_checkpoints",),
    "limits": ("Limits",),
    "pages": ("PageBatch", "PageType", "batches"),
    "restorer": ("Checkpoint", "Restorer"),
    "sender": ("Sender",),
    "service.backup": ("Backup",),
    "service.release": ("Committed",),
    "service.protect": ("Protection", "protect"),
    "source.manifest": ("arrays_of",),
    "service.standby": ("Policy",),
    "source.cgroup": ("CgroupFreezer",),
    "source.commands": ("PauseCommands",),
    "source.processes": ("Processes",),
    "source.shared_file": ("SharedFile",),
    "store": ("History", "Retention", "Store", "Stored", "open_store"),
    "store.remote": ("Remote",),
    "wire.xen.dialect": ("Dialect",),
    "wire.record": ("Position",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
