"""What of this host a guest depends on: the files that QEMU reads, the CPU, KVM."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from remus_ckpt.errors import VmError
from remus_ckpt.vm.command_line import CommandLine
from remus_ckpt.vm.part import Machine

_CPUINFO = Path("/proc/cpuinfo")
_KVM = "/dev/kvm"
_CHUNK = 1 << 20

_digests: dict[tuple[int, ...], bytes] = {}
"""SHA-256 of files already read, by what changes when they do."""


def machine_of(line: CommandLine, version: tuple[int, int, int], *, may_miss: bool = False) -> Machine:
    """The machine of a command line on this host, as it travels.

    version: of its QEMU
    may_miss: leave out files that cannot be read; otherwise VmError is raised
    """
    files = {}
    for path in line.files:
        try:
            files[path] = _read(path)
        except OSError as error:
            if not may_miss:
                raise VmError(f"{path}: {error.strerror or error}") from None
    return Machine(
        line.qemu,
        version,
        line.portable,
        line.memory_bytes,
        _cpu() if line.host_cpu and line.kvm else "",
        line.kvm and os.access(_KVM, os.R_OK | os.W_OK),
        files,
    )


def _read(path: str) -> tuple[int, bytes]:
    """Size and digest of a file. Raises OSError, VmError."""
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise VmError(f"{path} is not a regular file: QEMU must find the same contents on both hosts")
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if (known := _digests.get(key)) is None:
            digest = hashlib.sha256()
            while data := file.read(_CHUNK):
                digest.update(data)
            known = _digests[key] = digest.digest()
        return status.st_size, known


def _cpu() -> str:
    """Model and flags of the CPU, one word each."""
    found = dict[str, str]()
    for line in _CPUINFO.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
        if not line:
            break
    model = [
        f"{key.replace(' ', '-')}={found.get(key, '')}" for key in ("vendor_id", "cpu family", "model", "stepping")
    ]
    return " ".join([*model, *sorted(found.get("flags", "").split())])
