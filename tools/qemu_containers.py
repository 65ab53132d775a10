"""What stands around memory in files, for the vectors: `virsh save`, lzop, qcow2, ELF cores, LiME. It does not use
remus_ckpt.
"""

from __future__ import annotations

import struct
import zlib


def u16(value: int) -> bytes:
    return struct.pack(">H", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def virsh(
    body: bytes,
    *,
    compression: int = 0,
    version: int = 2,
    order: str = "<",
    magic: bytes = b"LibvirtQemudSave",
    cookie: int | None = None,
    xml: str = "<domain type='qemu'><name>vector</name></domain>",
) -> bytes:
    first, second = xml.encode() + b"\0", b"<cookie/>\0"
    at = len(first) if cookie is None else cookie
    data = first + second
    head = magic + struct.pack(order + "5I", version, len(data), 1, compression, at)
    return head.ljust(92, b"\0") + data + body


def qcow2(
    states: dict[str, bytes],
    *,
    bits: int = 9,
    crypt: int = 0,
    features: int = 0,
    disk_bytes: int = 1 << 16,
    extra: bool = True,
    l1_entries: int | None = None,
    far: bool = False,
    compressed: str = "",
    method: int | None = None,
) -> bytes:
    """An image with these snapshots. far: a cluster of the first state is behind the end of the file."""
    if compressed == "zstd":
        features, method = features | 8, 1
    cluster = 1 << bits
    entries = cluster // 8
    first = -(-disk_bytes // (cluster * entries))
    out = bytearray(cluster)

    def add(data: bytes) -> int:
        at = len(out)
        out.extend(data.ljust(-(-len(data) // cluster) * cluster, b"\0"))
        return at

    def place(data: bytes) -> int:
        """The L2 entry of a cluster."""
        if not compressed:
            return add(data) | 1 << 63
        whole = data.ljust(cluster, b"\0")
        if compressed == "zstd":
            packed = zstd_stored(whole)
        else:
            packer = zlib.compressobj(0, zlib.DEFLATED, -12)
            packed = packer.compress(whole) + packer.flush()
        at = len(out)  # not at the beginning of a sector
        out.extend(packed)
        sectors = (at % 512 + len(packed) - 1) // 512
        return at | sectors << 62 - (bits - 8) | 1 << 62

    table = b""
    for number, (name, state) in enumerate(states.items(), 1):
        places = [place(state[at : at + cluster]) for at in range(0, len(state), cluster)]
        if far and number == 1:
            places[-1] = 1 << 40 | 1 << 63
        out.extend(bytes(-len(out) % cluster))
        l2 = [add(b"".join(u64(one) for one in places[at : at + entries])) for at in range(0, len(places), entries)]
        l1 = [0] * first + [one | 1 << 63 for one in l2]
        count = len(l1) if l1_entries is None else l1_entries
        l1_at = add(b"".join(map(u64, l1)))
        more = u64(len(state)) + u64(disk_bytes) + u64(2**64 - 1) if extra else b""
        ident = str(number).encode()
        row = u64(l1_at) + u32(count) + u16(len(ident)) + u16(len(name)) + u32(1_700_000_000) + u32(500_000_000)
        row += u64(12345) + u32(0 if extra else len(state)) + u32(len(more)) + more + ident + name.encode()
        table += row.ljust(-(-len(row) // 8) * 8, b"\0")
    snapshots_at = add(table)
    head = b"QFI\xfb" + u32(3) + u64(0) + u32(0) + u32(bits) + u64(disk_bytes) + u32(crypt) + u32(0) + u64(0) + u64(0)
    head += u32(0) + u32(len(states)) + u64(snapshots_at) + u64(features) + u64(0) * 2 + u32(4)
    head += u32(104) if method is None else u32(112) + bytes([method])
    out[: len(head)] = head
    return bytes(out)


def zstd_stored(data: bytes) -> bytes:
    """A zstd frame of one raw block, with its size in four bytes and no checksum."""
    assert len(data) < 1 << 17
    return b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", len(data)) + struct.pack("<I", 1 | len(data) << 3)[:3] + data


def lzop(data: bytes, *, block: int = 1 << 16) -> bytes:
    """A file of lzop's whose blocks are stored as they are."""
    head = u16(0x1030) + u16(0x20A0) + u16(0x0940) + b"\1\5" + u32(0x03000001) + u32(0o100644) + u32(0) * 2 + b"\0"
    out = b"\x89LZO\0\r\n\x1a\n" + head + u32(zlib.adler32(head))
    for at in range(0, len(data), block):
        part = data[at : at + block]
        out += u32(len(part)) + u32(len(part)) + u32(zlib.adler32(part)) + part
    return out + u32(0)


def elf(
    segments: list[tuple[int, bytes] | tuple[int, int, int, int]],
    *,
    bits: int = 64,
    order: str = "<",
    kind: int = 4,
    processor: int = 62,
    note: bytes = b"",
    is_many: bool = False,
) -> bytes:
    """An ELF file. segments: (physical address, bytes), or (physical address, which earlier segment's bytes, from
    which of them on, how many); is_many: the number of segments is in the first section
    """
    head_bytes, entry_bytes = (64, 56) if bits == 64 else (52, 32)
    word = "Q" if bits == 64 else "I"
    count = len(segments) + bool(note)
    section = bytes(44 if bits == 64 else 28) + struct.pack(order + "I", count)
    section = section.ljust(64 if bits == 64 else 40, b"\0") if is_many else b""
    at = head_bytes + count * entry_bytes + len(section)
    body, rows = b"", []

    def row(type_: int, offset: int, address: int, size: int) -> None:
        # The virtual address is another, as on a machine that runs.
        high = 0xFFFF888000000000 if bits == 64 else 0xC0000000
        places = (offset, (high + address) % (1 << bits), address, size, size)
        if bits == 64:
            rows.append(struct.pack(order + "2I6Q", type_, 7, *places, 0))
        else:
            rows.append(struct.pack(order + "8I", type_, *places, 7, 0))

    if note:
        packed = struct.pack(order + "3I8s", 5, len(note), 1, b"CORE") + note
        row(4, at, 0, len(packed))
        body += packed
    starts: list[int] = []
    for address, *rest in segments:
        if len(rest) == 1:
            starts.append(at + len(body))
            row(1, starts[-1], address, len(rest[0]))
            body += rest[0]
        else:
            row(1, starts[rest[0]] + rest[1], address, rest[2])
    head = struct.pack(
        order + "2HI3" + word + "I6H", kind, processor, 1, 0, head_bytes, at - len(section) if is_many else 0, 0,
        head_bytes, entry_bytes, 0xFFFF if is_many else count, len(section), int(is_many), 0,
    )  # fmt: skip
    ident = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9)
    return ident + head + b"".join(rows) + section + body


def lime(ranges: list[tuple[int, bytes]], *, version: int = 1) -> bytes:
    """A file of LiME's."""
    return b"".join(struct.pack("<2I2Q8x", 0x4C694D45, version, at, at + len(data) - 1) + data for at, data in ranges)
