"""Continuous, compressed checkpoints of live memory, in the Xen legacy save stream.

    Sender      page batches to a stream
    Restorer    a stream to memory, always at the last complete checkpoint
    get_codec   the page codecs

The command is `remus-ckpt`; the format is described in `specs/`.
"""

__version__ = "0.1.0"

from remus_ckpt.codec import get_codec
from remus_ckpt.codec.reference import Lru, Shadow
from remus_ckpt.errors import (
    KernelUnavailable,
    LimitExceeded,
    Malformed,
    NoCheckpoint,
    RemusError,
    SourceError,
    StreamError,
    UnknownFormat,
)
from remus_ckpt.files import read_checkpoints
from remus_ckpt.limits import Limits
from remus_ckpt.pages import PageBatch, PageType, batches
from remus_ckpt.restorer import Checkpoint, Restorer
from remus_ckpt.sender import Sender
from remus_ckpt.wire.dialect import Dialect
from remus_ckpt.wire.record import Position

__all__ = [
    "Checkpoint",
    "Dialect",
    "KernelUnavailable",
    "LimitExceeded",
    "Limits",
    "Lru",
    "Malformed",
    "NoCheckpoint",
    "PageBatch",
    "PageType",
    "Position",
    "RemusError",
    "Restorer",
    "Sender",
    "Shadow",
    "SourceError",
    "StreamError",
    "UnknownFormat",
    "batches",
    "get_codec",
    "read_checkpoints",
]
