"""What a stream does not say about itself, and how to detect it from the bytes (specs/stream.md §1.2)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

from remus_ckpt.errors import UnknownFormat
from remus_ckpt.limits import MAX_BATCH_ENTRIES
from remus_ckpt.wire import formats
from remus_ckpt.wire.xen.chunks import LOWEST_CHUNK_ID, MAX_P2M_SIZE

Word = Literal[4, 8]
Guest = Literal["hvm", "pv"]
StreamCodec = Literal["delta", "rle"]
STREAM_CODECS: tuple[StreamCodec, ...] = get_args(StreamCodec)

V2_MAGIC = b"\xff" * 8 + b"XENF"


class Front(NamedTuple):
    """The first bytes of a file header, and the section that describes it."""

    magic: bytes
    section: str


FRONTS: dict[str, Front] = {
    "xl": Front(b"Xen saved domain, xl format\n \0 \r", "stream.md §2.1"),
    "xend": Front(b"LinuxGuestRecord", "stream.md §2.2"),
    "libvirt": Front(b"libvirt-xml\n \0 \r", "stream.md §2.4"),
    "xenserver": Front(b"XenSavedDomain\n", "stream.md §2.5"),
}
"""Toolstack → its file header."""
FRONT_BYTES = 12
"""Enough bytes to tell a file header from the others, and from a stream."""
DETECT_BYTES = 16
"""Bytes of the header that the detection looks at."""
CODEC_BYTES = 6
_ONES = 0xFFFFFFFFFFFFFFFF
_DELTA_OPENINGS = (b"\x9c\xff\0\0\0\0", b"\x9b\xff\0\0\0\0")


@dataclass(frozen=True, slots=True)
class Dialect:
    """The toolstack's word, the kind of guest and the page codec; None: detect it.

    word: bytes of the toolstack's unsigned long, 8 or 4
    guest: "hvm" or "pv"
    codec: "delta" or "rle"
    """

    word: Word | None = None
    guest: Guest | None = None
    codec: StreamCodec | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("word", (8, 4)), ("guest", ("hvm", "pv")), ("codec", STREAM_CODECS)):
            if getattr(self, name) not in (None, *allowed):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {allowed}, or None to detect it")


def detect_header(dialect: Dialect, front: bytes, offset: int) -> Dialect:
    """Fill in word and guest from the first bytes of the header.

    front: its first `DETECT_BYTES` bytes, fewer only if the stream ends there
    offset: of the header in the stream
    Raises UnknownFormat if no legacy stream can begin with these bytes.
    """
    front = bytes(front)
    first = int.from_bytes(front[:4], "little")
    word: Word = dialect.word or (8 if front[4:8] == b"\0\0\0\0" else 4)
    next_word = int.from_bytes(front[word : 2 * word], "little")
    guest: Guest = dialect.guest or ("pv" if next_word == _ONES >> (64 - 8 * word) else "hvm")
    chunk_id = int.from_bytes(front[word : word + 4], "little", signed=True)
    if dialect.word is None or dialect.guest is None:
        # An explicit dialect is trusted; a guess has to make sense.
        plausible = 0 < first <= MAX_P2M_SIZE and (guest == "pv" or LOWEST_CHUNK_ID <= chunk_id <= MAX_BATCH_ENTRIES)
        if not plausible:
            # Only now: gzip's two-byte magic may also be the size of a memory.
            found = formats.find(front)
            if found is not None:
                what = f"this is {found.title}, not a legacy save stream"
            else:
                what = (
                    f"no known format begins with {front.hex(' ')}; if this is a memory image, `convert --from "
                    "raw` reads it; if it is a legacy save stream, give its --word and --guest"
                )
            raise UnknownFormat(what, offset=offset, section="stream.md §1.2")
    return replace(dialect, word=word, guest=guest)


def detect_codec(opening: bytes) -> StreamCodec:
    """The codec of a compressed payload, from its first `CODEC_BYTES` bytes, or fewer if it is shorter."""
    return "delta" if opening in _DELTA_OPENINGS else "rle"
