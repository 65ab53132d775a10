"""A disk whose guest has gone on elsewhere is brought back to the survivor's (specs/disk.md §6)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from remus_ckpt.disk import guarding
from remus_ckpt.errors import RemusError, StoreError
from remus_ckpt.limits import MIB
from remus_ckpt.link.control import Requests
from remus_ckpt.service.guest_disks import own_mark, unmark_own
from remus_ckpt.vm.command_line import Disk
from remus_ckpt.vm.disk_image import BLOCK_BYTES, DIGEST_BYTES, digests, is_used

_ANSWER_S = 60.0
_SPAN_BYTES = 16 * MIB
_QCOW2 = b"QFI\xfb"


def bring_back(
    path: Path, requests: Requests, name: str | None, ident: str | None, on_span: Callable[[int, int], None]
) -> tuple[int, int]:
    """Copy from the backup that took over what differs; then the disk may be used again.

    path: of a raw disk that no QEMU uses
    name, ident: of the guest and of its -drive; None for those under which it was protected
    on_span: called with the bytes compared so far, and all of them
    Returns the bytes of the disk, and how many were copied. Whatever goes wrong, the disk stays marked, and the call
    may be repeated. Raises RemusError.
    """
    path = path.absolute()
    noted = own_mark(path)
    name = name or str(noted.get("name", ""))
    ident = ident or str(noted.get("disk", ""))
    if not name or not ident:
        raise StoreError(f"{path} has no note of the guest that used it: give its --name and --disk")

    def ask(method: str, **arguments: Any) -> dict[str, Any]:
        requests.post(method, {"name": name} | arguments, _ANSWER_S)
        return requests.answer(_ANSWER_S)

    field = requests.field
    disks = field(ask("disk-survivor"), "disks", list)
    there = next((one for one in disks if field(one, "disk", str) == ident), None)
    if there is None:
        raise RemusError(f"{requests.peer}: no guest has run there on a disk {ident} of {name!r}")
    if field(there, "is_used", bool):
        raise RemusError(f"{requests.peer}: the guest runs there, on that disk: switch it off first")
    disk = {"disk": ident, "seed": field(there, "seed", bytes), "size": field(there, "size", int)}
    copied = 0
    with guarding(path, "output"), open(path, "r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) == _QCOW2:
            raise StoreError(f"{path} is no raw disk: copy the image from there with qemu-img convert instead")
        if size != disk["size"]:
            raise StoreError(f"{path} has {size:,} bytes, and the survivor's disk {disk['size']:,}: is it the same?")
        if is_used(path):
            raise StoreError(f"{path}: a QEMU uses it; end that one first")
        for start in range(0, size, _SPAN_BYTES):
            here = os.pread(file.fileno(), min(_SPAN_BYTES, size - start), start)
            count = -(-len(here) // BLOCK_BYTES)
            found = field(ask("disk-digests", **disk, offset=start, count=count), "digests", bytes)
            for number, digest in enumerate(digests(here)):
                if digest == found[number * DIGEST_BYTES :][:DIGEST_BYTES]:
                    continue
                at = start + number * BLOCK_BYTES
                length = min(BLOCK_BYTES, size - at)
                data = field(ask("disk-read", **disk, offset=at, length=length), "data", bytes)
                if len(data) != length:
                    raise RemusError(f"{requests.peer} has sent something else than {length} bytes at {at}")
                os.pwrite(file.fileno(), data, at)
                copied += length
            on_span(start + len(here), size)
        os.fsync(file.fileno())
    unmark_own([Disk(ident, str(path))])
    return size, copied
