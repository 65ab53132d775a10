"""What `virsh save` writes in front of a QEMU stream (specs/formats.md §3)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from remus_ckpt.errors import LimitExceeded, Malformed, UnknownFormat
from remus_ckpt.limits import Limits

MAGIC, MAGIC_PARTIAL = b"LibvirtQemudSave", b"LibvirtQemudPart"
HEADER_BYTES = 92
COMPRESSIONS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
"""By their number in the header."""
_NEWEST = 2
_WORDS = "5I"


@dataclass(frozen=True, slots=True)
class VirshHeader:
    """The header of a save image.

    compression: one of `COMPRESSIONS`
    was_running: whether the guest ran when it was saved
    xml: the domain's description
    cookie: libvirt's own XML behind it, empty if there is none
    body: where the stream begins in the file, compressed or not
    """

    version: int
    compression: str
    was_running: bool
    xml: str
    cookie: str
    body: int


def read_header(read: Callable[[int], bytes], limits: Limits) -> VirshHeader:
    """The header, and the XML behind it.

    read: the next so many bytes of the file, fewer only at its end
    Raises Malformed or UnknownFormat.
    """
    head = read(HEADER_BYTES)
    if head.startswith(MAGIC_PARTIAL):
        raise UnknownFormat(
            "libvirt has not finished saving this guest: the image is not complete", offset=0, section="formats.md §3"
        )
    if len(head) < HEADER_BYTES:
        raise _malformed(f"the file ends after {len(head)} bytes of a header of {HEADER_BYTES}", len(head))
    order = "<" if struct.unpack_from("<I", head, len(MAGIC))[0] <= _NEWEST else ">"
    version, data_bytes, was_running, number, cookie_at = struct.unpack_from(order + _WORDS, head, len(MAGIC))
    if not 0 < version <= _NEWEST:
        raise UnknownFormat(
            f"version {version:#x} of libvirt's header; 1 and 2 are read", offset=16, section="formats.md §3"
        )
    if data_bytes > limits.file_header_bytes:
        raise LimitExceeded(
            f"the XML's length {data_bytes} exceeds the limit file_header_bytes of {limits.file_header_bytes}",
            limit="file_header_bytes",
            offset=20,
            section="formats.md §3",
        )
    if cookie_at > data_bytes:
        raise _malformed(f"the cookie begins at {cookie_at} of {data_bytes} bytes", 32)
    compression = number if version == _NEWEST else 0
    if compression >= len(COMPRESSIONS):
        raise UnknownFormat(f"libvirt's compression {compression} is not known", offset=28, section="formats.md §3")
    data = read(data_bytes)
    if len(data) < data_bytes:
        raise _malformed(f"the file ends after {len(data)} of {data_bytes} bytes of XML", HEADER_BYTES + len(data))
    split = cookie_at or data_bytes
    return VirshHeader(
        version=version,
        compression=COMPRESSIONS[compression],
        was_running=bool(was_running),
        xml=_text(data[:split]),
        cookie=_text(data[split:]),
        body=HEADER_BYTES + data_bytes,
    )


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "replace")


def _malformed(message: str, offset: int) -> Malformed:
    return Malformed(message, offset=offset, section="formats.md §3")
