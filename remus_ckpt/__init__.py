"""Continuous, compressed checkpoints of live memory, in the Xen legacy save stream.

    Sender      page batches to a stream
    Restorer    a stream to memory, always at the last complete checkpoint
    get_codec   the page codecs
    protect     named arrays and mmaps of one's own, kept on a backup
    Backup      keeps the checkpoints of primaries, and takes over
    Store       checkpoints on disk: list, restore, verify

The command is `remus-ckpt`; the format is described in `specs/`.
"""

__version__ = "0.1.0"

from remus_ckpt.codec import get_codec
from remus_ckpt.codec.reference import Lru, Shadow
from remus_ckpt.errors import (
    Fenced,
    KernelUnavailable,
    LimitExceeded,
    LinkError,
    Malformed,
    NoCheckpoint,
    Refused,
    RemusError,
    SourceError,
    StoreError,
    StreamError,
    UnknownFormat,
)
from remus_ckpt.files import read_checkpoints
from remus_ckpt.limits import Limits
from remus_ckpt.pages import PageBatch, PageType, batches
from remus_ckpt.restorer import Checkpoint, Restorer
from remus_ckpt.sender import Sender
from remus_ckpt.service.backup import Backup
from remus_ckpt.service.primary import Committed
from remus_ckpt.service.protect import Protection, arrays_of, protect
from remus_ckpt.service.standby import Policy
from remus_ckpt.store import Retention, Store
from remus_ckpt.wire.dialect import Dialect
from remus_ckpt.wire.record import Position

__all__ = [
    "Backup",
    "Checkpoint",
    "Committed",
    "Dialect",
    "Fenced",
    "KernelUnavailable",
    "LimitExceeded",
    "Limits",
    "LinkError",
    "Lru",
    "Malformed",
    "NoCheckpoint",
    "PageBatch",
    "PageType",
    "Policy",
    "Position",
    "Protection",
    "Refused",
    "RemusError",
    "Restorer",
    "Retention",
    "Sender",
    "Shadow",
    "SourceError",
    "Store",
    "StoreError",
    "StreamError",
    "UnknownFormat",
    "arrays_of",
    "batches",
    "get_codec",
    "protect",
    "read_checkpoints",
]
