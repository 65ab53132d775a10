"""Xen v2 streams put together by hand, from the format and not by the code under test."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from streams import XL, page, xl_header

NOTAB, L1, XALLOC, XTAB = 0, 1, 0xE, 0xF
END, PAGE_DATA, PV_INFO, P2M_FRAMES, BASIC, EXTENDED, XSAVE, SHARED_INFO, TSC, CONTEXT, PARAMS, TOOLSTACK = range(12)
MSRS, VERIFY, CHECKPOINT, DIRTY, STATIC_END, CPUID, MSR = range(12, 19)
LIBXL_END, LIBXC, XENSTORE, EMULATOR, CHECKPOINT_END, CHECKPOINT_STATE = range(6)


def record(kind: int, body: bytes = b"", *, pad: bytes = b"\0") -> bytes:
    return struct.pack("<II", kind, len(body)) + body + pad * (-len(body) % 8)


def image_header(version: int = 2, options: int = 0) -> bytes:
    return b"\xff" * 8 + b"XENF" + struct.pack(">IHHI", version, options, 0, 0)


def domain_header(kind: int = 2, shift: int = 12, major: int = 4, minor: int = 6) -> bytes:
    return struct.pack("<IHHII", kind, shift, 0, major, minor)


def head(version: int = 2, kind: int = 2) -> bytes:
    return image_header(version) + domain_header(kind)


def libxl_header(version: int = 2, options: int = 0) -> bytes:
    return b"LibxlFmt" + struct.pack(">II", version, options)


def entry(pfn: int, kind: int = NOTAB) -> int:
    return pfn | kind << 60


def page_data(entries: list[int], *pages: bytes) -> bytes:
    body = struct.pack("<II", len(entries), 0) + struct.pack(f"<{len(entries)}Q", *entries) + b"".join(pages)
    return record(PAGE_DATA, body)


def params(*values: tuple[int, int]) -> bytes:
    return record(PARAMS, struct.pack("<II", len(values), 0) + b"".join(struct.pack("<QQ", *each) for each in values))


def tsc(mode: int = 1, khz: int = 2, nsec: int = 3, incarnation: int = 4) -> bytes:
    return record(TSC, struct.pack("<IIQII", mode, khz, nsec, incarnation, 0))


def vcpu(kind: int, number: int, data: bytes) -> bytes:
    return record(kind, struct.pack("<II", number, 0) + data)


def emulator(kind: int, data: bytes, which: int = 0) -> bytes:
    return record(kind, struct.pack("<II", which, 0) + data)


def hvm_state(context: bytes = b"context") -> bytes:
    return tsc() + params((5, 0xFEFC), (6, 0xFEFD), (1, 0xFEFE), (12, 0xFEFF), (4, 1)) + record(CONTEXT, context)


HVM_PAGES = page_data([entry(0), entry(1), entry(2, XALLOC), entry(3), entry(5, XTAB)], page(1), page(2), page(3))
HVM = head() + HVM_PAGES + hvm_state() + record(END) + XL + struct.pack("<I", 5) + b"QEVM!"
"""One checkpoint of a guest of six pages, without libxl's layer."""

SERIES = (
    head()
    + HVM_PAGES
    + hvm_state()
    + record(CHECKPOINT)
    + page_data([entry(1), entry(2)], page(7), page(8))
    + hvm_state(b"context 2")
    + record(CHECKPOINT)
    + record(END)
)
"""Two checkpoints of it."""

LIBXL = (
    libxl_header()
    + record(LIBXC)
    + head(3)
    + record(CPUID, bytes(48))
    + record(MSR, bytes(16))
    + record(STATIC_END)
    + HVM_PAGES
    + hvm_state()
    + record(0x80000042, b"optional")
    + record(END)
    + emulator(XENSTORE, b"physmap/f0/start_addr\0f0\0physmap/f0/size\x0010\0physmap/f0/name\0vga\0")
    + emulator(EMULATOR, b"QEVM state", 2)
    + record(LIBXL_END)
)
"""The same guest in libxl's layer, of version 3."""

LIBXL_SERIES = (
    libxl_header()
    + record(LIBXC)
    + head()
    + HVM_PAGES
    + hvm_state()
    + record(CHECKPOINT)
    + emulator(EMULATOR, b"QEVM 1")
    + record(CHECKPOINT_END)
    + page_data([entry(1), entry(2)], page(7), page(8))
    + hvm_state(b"context 2")
    + record(CHECKPOINT)
    + emulator(EMULATOR, b"QEVM 2")
    + record(CHECKPOINT_END)
    + record(END)
    + record(LIBXL_END)
)
"""Two checkpoints as Remus sends them through libxl."""

PV = (
    head(kind=1)
    + record(PV_INFO, struct.pack("<BBHI", 8, 4, 0, 0))
    + record(P2M_FRAMES, struct.pack("<II", 0, 5) + struct.pack("<Q", 4))
    + page_data([entry(0), entry(1, L1), entry(4, 4 | 8)], page(1), page(2), page(3))
    + tsc()
    + vcpu(BASIC, 0, b"b" * 5168)
    + vcpu(EXTENDED, 0, b"e" * 128)
    + vcpu(XSAVE, 0, bytes(8) + b"\7" + bytes(55))
    + vcpu(MSRS, 0, b"m" * 16)
    + record(SHARED_INFO, page(0x5A))
    + record(END)
)
"""A 64-bit PV guest of six pages."""


def suspend(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("<2Q", kind, len(body)) + body


SUSPENDED = (
    b"XenSavedDomv2-\n"
    + suspend(0xF, b"((word_size 64))")
    + suspend(0xF0)
    + head()
    + HVM_PAGES
    + hvm_state()
    + record(END)
    + suspend(0xF01, b"QEVM state")
    + suspend(0xF11, b"variables")
    + suspend(0xFFFF)
)
"""The HVM guest in a suspend image of XenServer's."""

ALL = {"hvm": HVM, "series": SERIES, "libxl": LIBXL, "libxl-series": LIBXL_SERIES, "pv": PV}
MEMORY = {
    "hvm": [page(1) + page(2) + page(0) + page(3) + page(0) * 2],
    "libxl": [page(1) + page(2) + page(0) + page(3) + page(0) * 2],
    "pv": [page(1) + page(2) + page(0) * 2 + page(3) + page(0)],
}
MEMORY["series"] = [*MEMORY["hvm"], page(1) + page(7) + page(8) + page(3) + page(0) * 2]
MEMORY["libxl-series"] = MEMORY["series"]
"""Memory after each checkpoint."""


def hostile() -> Iterator[tuple[str, bytes, str, int, str]]:
    """What breaks a rule: a name, the bytes, the kind of error, its offset and the section of xen-v2.md."""
    for name, data, kind, offset, section in _hostile():
        yield name, data + bytes(64), kind, offset, section


def _hostile() -> Iterator[tuple[str, bytes, str, int, str]]:
    hvm, pv = head(), head(kind=1)
    after = len(hvm)
    pv_front = pv + record(PV_INFO, struct.pack("<BBHI", 8, 4, 0, 0))
    yield "version 1", image_header(1) + domain_header(), "UnknownFormat", 12, "§3.1"
    yield "version 4", image_header(4) + domain_header(), "UnknownFormat", 12, "§3.1"
    yield "big-endian", image_header(options=1) + domain_header(), "UnknownFormat", 16, "§3.1"
    yield "image options", image_header(options=2) + domain_header(), "Malformed", 16, "§3.1"
    yield "guest 3", image_header() + domain_header(3), "UnknownFormat", 24, "§3.2"
    yield "page shift", image_header() + domain_header(shift=13), "UnknownFormat", 28, "§3.2"
    yield "unknown record", hvm + record(0x42), "Malformed", after, "§4.1"
    yield "padding", hvm + record(CONTEXT, b"abc", pad=b"\1"), "Malformed", after, "§4"
    yield "END with a body", hvm + record(END, b"12345678"), "Malformed", after, "§5.12"
    yield "page type 8", hvm + page_data([entry(0, 8)], page(1)), "Malformed", after, "§5.1"
    yield "page type 5", hvm + page_data([entry(0, 5)], page(1)), "Malformed", after, "§5.1"
    yield "reserved bits", hvm + page_data([entry(0) | 1 << 55], page(1)), "Malformed", after, "§5.1"
    yield "a page too few", hvm + page_data([0, 1], page(1)), "Malformed", after, "§5.1"
    yield "a page too many", hvm + page_data([0], page(1), page(2)), "Malformed", after, "§5.1"
    yield "no entries", hvm + record(PAGE_DATA, struct.pack("<IIQ", 0, 0, 0)), "Malformed", after, "§5.1"
    yield "count beyond", hvm + record(PAGE_DATA, struct.pack("<IIQ", 1 << 31, 0, 0)), "Malformed", after, "§5.1"
    yield "empty context", hvm + record(CONTEXT), "Malformed", after, "§5.7"
    yield "params short", hvm + record(PARAMS, struct.pack("<II", 2, 0) + bytes(16)), "Malformed", after, "§5.8"
    yield "params head", hvm + record(PARAMS, b"1234"), "Malformed", after, "§5.8"
    yield "tsc short", hvm + record(TSC, bytes(16)), "Malformed", after, "§5.6"
    yield "dirty list", hvm + record(DIRTY, bytes(8)), "UnknownFormat", after, "§5.13"
    yield "static end in 2", hvm + record(STATIC_END), "Malformed", after, "§5.10"
    yield "policy size", head(3) + record(CPUID, bytes(25)), "Malformed", after, "§5.10"
    yield "policy empty", head(3) + record(MSR), "Malformed", after, "§5.10"
    yield "HVM record in PV", pv + record(CONTEXT, b"12345678"), "Malformed", after, "§5.7"
    yield "PV record in HVM", hvm + vcpu(BASIC, 0, b"x"), "Malformed", after, "§5.4"
    yield "PV pages first", pv + page_data([0], page(1)), "Malformed", after, "§5.1"
    yield "frames first", pv + record(P2M_FRAMES, struct.pack("<IIQ", 0, 5, 4)), "Malformed", after, "§5.3"
    yield "width", pv + record(PV_INFO, struct.pack("<BBHI", 8, 3, 0, 0)), "Malformed", after, "§5.2"
    yield "frames", pv_front + record(P2M_FRAMES, struct.pack("<II", 6, 5)), "Malformed", len(pv_front), "§5.3"
    framed = pv_front + record(P2M_FRAMES, struct.pack("<IIQ", 0, 5, 4))
    yield "PFN of PV", framed + page_data([6], page(1)), "Malformed", len(framed), "§5.1"
    yield "shared info", framed + record(SHARED_INFO, bytes(8)), "Malformed", len(framed), "§5.5"
    yield "vcpu head", framed + record(BASIC, b"1234"), "Malformed", len(framed), "§5.4"
    dropped = SERIES[: -len(record(END))] + tsc()
    yield "records before END", dropped + record(END), "Malformed", len(dropped), "§5.12"
    libxl = libxl_header()
    yield "libxl version", libxl_header(3), "UnknownFormat", 8, "§2"
    yield "libxl big-endian", libxl_header(options=1), "UnknownFormat", 12, "§2"
    yield "libxl options", libxl_header(options=4), "Malformed", 12, "§2"
    yield "libxl unknown", libxl + record(9), "Malformed", 16, "§4.1"
    yield "libxl END first", libxl + record(LIBXL_END), "Malformed", 16, "§6"
    yield "emulator first", libxl + emulator(EMULATOR, b"x"), "Malformed", 16, "§6"
    yield "COLO", libxl + record(CHECKPOINT_STATE, bytes(8)), "UnknownFormat", 16, "§6.4"
    inner = libxl + record(LIBXC) + hvm + HVM_PAGES + hvm_state()
    twice = inner + record(END)
    yield "two contexts", twice + record(LIBXC), "Malformed", len(twice), "§6"
    yield "no CHECKPOINT", twice + record(CHECKPOINT_END), "Malformed", len(twice), "§6.3"
    yield "emulator 3", twice + emulator(EMULATOR, b"x", 3), "Malformed", len(twice), "§6.2"
    halfway = inner + record(CHECKPOINT)
    yield "END in CHECKPOINT", halfway + record(LIBXL_END), "Malformed", len(halfway), "§6"
    image = SUSPENDED[:15]
    yield "suspend type", image + suspend(0x77), "Malformed", 15, "§2.1"
    yield "suspend libxl", image + suspend(0xF1), "UnknownFormat", 15, "§2.1"
    yield "suspend empty", image + suspend(0xFFFF), "Malformed", 15, "§2.1"
    yield "suspend twice", SUSPENDED[:-16] + suspend(0xF0), "Malformed", len(SUSPENDED) - 16, "§2.1"
    yield "xl's flags", xl_header(b"", mandatory=6), "UnknownFormat", 36, "§2"
    yield "not libxc behind", libxl + record(LIBXC) + bytes(24), "UnknownFormat", 24, "§3.1"
