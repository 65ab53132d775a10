"""What a checkpoint holds besides memory, and its form in our record (specs/manifest.md §1).

The record has one field for all of it, the device state (specs/stream.md §9.2); the position is computed from the bytes
of that field.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from remus_ckpt.errors import LimitExceeded, Malformed, UnknownFormat
from remus_ckpt.limits import Limits
from remus_ckpt.pages import Buffer

MAGIC = b"\x89REMUSm\n"
VERSION = 1
HEAD = struct.Struct("<8sII")
"""Magic, version, bytes of the map (specs/manifest.md §1)."""
_SECTION = "manifest.md §1"
_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a checkpoint besides memory.

    device_state: the user's own bytes, or a device model's
    manifest: the map that names what is in memory (specs/manifest.md §2), None if there is none
    late: gives what follows the device state, in pieces; called once, when the checkpoint is packed
    """

    device_state: bytes = b""
    manifest: bytes | None = None
    late: Callable[[], Sequence[Buffer]] | None = None

    def pack(self) -> bytes:
        """Their bytes in the record; `unpack` reads them back."""
        late = () if self.late is None else self.late()
        if self.manifest is None:
            return b"".join((self.device_state, *late)) if late else self.device_state
        return b"".join((HEAD.pack(MAGIC, VERSION, len(self.manifest)), self.manifest, self.device_state, *late))

    @classmethod
    def unpack(cls, data: Buffer, *, limits: Limits = _LIMITS) -> Parts:
        """Read what `pack` wrote, from an untrusted source. A device state alone must not begin like a manifest.

        Raises Malformed, LimitExceeded, or UnknownFormat for an unknown version.
        """
        view = memoryview(data).cast("B")
        if view[: len(MAGIC)] != MAGIC:
            return cls(bytes(view))
        if len(view) < HEAD.size:
            raise Malformed(f"{len(view)} bytes hold no manifest's head", offset=0, section=_SECTION)
        _, version, size = HEAD.unpack_from(view)
        if version != VERSION:
            raise UnknownFormat(
                f"the manifest has version {version}; this program reads {VERSION}: restore it with a newer remus_ckpt",
                offset=8,
                section=_SECTION,
            )
        if size > limits.manifest_bytes:
            raise LimitExceeded(
                f"a map of {size} bytes exceeds {limits.manifest_bytes}",
                limit="manifest_bytes",
                offset=12,
                section=_SECTION,
            )
        if size > len(view) - HEAD.size:
            raise Malformed(
                f"a map of {size} bytes exceeds the {len(view) - HEAD.size} left", offset=12, section=_SECTION
            )
        stop = HEAD.size + size
        return cls(bytes(view[stop:]), bytes(view[HEAD.size : stop]))
