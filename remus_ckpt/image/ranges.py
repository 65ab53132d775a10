"""Where a guest's memory lies in its physical addresses, and which pieces of it are there (specs/formats.md §6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from remus_ckpt.limits import GIB

_ABOVE_4G = 4 * GIB


class Range(NamedTuple):
    """A piece of memory.

    address: of its first byte in the guest's physical memory
    start, stop: its bytes in the block
    """

    address: int
    start: int
    stop: int


class Layout(NamedTuple):
    """Where machines put their memory.

    prefixes: how their names begin
    base: the address of its first byte
    low: so much of it lies there, and the rest from 4 GiB on …
    most: … if memory has at least so much; 0: all of it lies there
    elf_machine: the number of the processor in ELF
    """

    prefixes: tuple[str, ...]
    base: int = 0
    low: int = 0
    most: int = 0
    elf_machine: int = 62


X86_64, AARCH64, ARM, S390, PPC64, ALPHA = 62, 183, 40, 22, 21, 0x9026
PROCESSORS = {3: "x86", X86_64: "x86-64", AARCH64: "arm64", ARM: "arm", S390: "s390x", PPC64: "ppc64", 243: "riscv"}
"""Names of processors by their numbers in ELF."""

LAYOUTS = (
    Layout(("pc-q35", "q35"), low=2 * GIB, most=0xB0000000),
    Layout(("pc-i440fx", "pc-", "pc_", "isapc", "xenfv"), low=3 * GIB, most=0xE0000000),
    Layout(("microvm",), low=3 * GIB, most=3 * GIB),
    Layout(("virt-",), base=GIB, elf_machine=AARCH64),
    Layout(("versatile",), elf_machine=ARM),
    Layout(("s390-ccw-virtio",), elf_machine=S390),
    Layout(("pseries",), elf_machine=PPC64),
    Layout(("clipper",), elf_machine=ALPHA),
)
"""As QEMU's boards have it by default. The first row whose prefix fits counts."""


def layout_of(machine: str | None) -> Layout | None:
    """The row of a machine; None if it is not known."""
    return next((row for row in LAYOUTS if (machine or "").startswith(row.prefixes)), None)


def placed(size: int, layout: Layout | None) -> list[Range]:
    """Where the bytes of a memory of that size lie; without a layout, each at its own offset."""
    if layout is None:
        return [Range(0, 0, size)]
    if not layout.most or size < layout.most:
        return [Range(layout.base, 0, size)]
    return [Range(layout.base, 0, layout.low), Range(_ABOVE_4G, layout.low, size)]


def present(came: NDArray[np.bool_], page_size: int, places: Iterable[Range]) -> Iterator[Range]:
    """The runs of pages that are there, ascending, each within one of the places.

    came: bool[pages]
    """
    edges = np.flatnonzero(np.diff(came, prepend=False, append=False)).reshape(-1, 2) * page_size
    for place in places:
        inside = edges[(edges[:, 1] > place.start) & (edges[:, 0] < place.stop)]
        for start, stop in np.clip(inside, place.start, place.stop).tolist():
            yield Range(place.address + start - place.start, start, stop)
