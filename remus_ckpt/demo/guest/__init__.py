"""The guest of the demo and the tests: a Debian kernel, and an initramfs whose only program is init.c.

The kernel comes from the package linux-image-cloud-amd64, which apt-get downloads once and does not install; if apt-get
does not have it, a kernel in /boot with its modules will do. The initramfs is built here, with gcc. Whatever is missing
is made and kept in a folder; several processes may ask at once.

It imports only the standard library, so that any Python can build the guest.
"""

from __future__ import annotations

import fcntl
import gzip
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = "linux-image-cloud-amd64"
DRIVERS = [
    "virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "failover", "net_failover",
    "virtio_net", "virtio_blk",
]  # fmt: skip
"""The drivers that the guest loads unless its kernel has them built in; their dependencies differ between kernels."""


def cache() -> Path:
    """Where the user's guest is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "remus-ckpt" / "vm_guest"


def build(folder: Path, root: Path = Path("/")) -> Path:
    """Build whatever a guest lacks; its `kernel` and `initramfs` are then in the folder. Returns the folder.

    root: where /boot and /lib/modules are looked for
    Raises OSError, which says what to do, if no kernel is available or a tool is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernel, initramfs = folder / "kernel", folder / "initramfs"
        try:
            if not kernel.exists():
                get_kernel(folder, root)
            newest = max((HERE / name).stat().st_mtime for name in ("init.c", "__init__.py"))
            if not initramfs.exists() or newest > initramfs.stat().st_mtime:
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    _pack(folder, Path(scratch))
        except subprocess.CalledProcessError as error:
            raise OSError(f"`{error.cmd[0]}` fails: {_last(error.stderr)}") from error
        except FileNotFoundError as error:
            if error.filename == "gcc":
                raise OSError("gcc is needed for the guest's only program: apt install gcc libc6-dev") from error
            raise
    return folder


def _last(said: bytes | None) -> str:
    return (said or b"").decode(errors="replace").strip().rpartition("\n")[2]


def get_kernel(folder: Path, root: Path = Path("/"), drivers: Sequence[str] = DRIVERS) -> None:
    """Put a kernel into a folder, as `kernel`, and those of the drivers that are not built into it, as `modules`.

    Raises like `build`, and CalledProcessError.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _get_kernel(folder, Path(scratch), root, drivers)


def _get_kernel(folder: Path, scratch: Path, root: Path, drivers: Sequence[str]) -> None:
    try:
        found, release = _download(scratch), "*"
    except (OSError, subprocess.CalledProcessError) as error:
        why = _last(error.stderr) if isinstance(error, subprocess.CalledProcessError) else str(error)
        kernels = sorted((root / "boot").glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
        release = kernels[-1].name.removeprefix("vmlinuz-") if kernels else ""
        if not kernels or not (root / "lib" / "modules" / release).is_dir():
            raise OSError(
                f"no kernel for the guest: apt-get has no {PACKAGE} ({why}), and no kernel in {root / 'boot'} has its "
                "modules: run `apt-get update`, or copy a kernel and its modules there"
            ) from error
        found = root
    modules = folder / "modules"
    modules.mkdir(exist_ok=True)
    (libraries,) = (found / "lib" / "modules").glob(release)
    built_in = (libraries / "modules.builtin").read_text() if (libraries / "modules.builtin").exists() else ""
    for name in drivers:
        files = list(libraries.rglob(f"{name}.ko*"))
        if files:
            (modules / f"{name}.ko").write_bytes(_unpacked(files[0]))
        elif f"/{name}.ko" not in built_in and name in ("virtio_pci", "virtio_net", "virtio_blk"):
            raise OSError(f"{libraries}: the kernel has no {name}, which the guest needs")
    (image,) = (found / "boot").glob(f"vmlinuz-{release}")
    shutil.copyfile(image, scratch / "kernel")
    (scratch / "kernel").rename(folder / "kernel")  # last: it says that all is there


def _download(scratch: Path) -> Path:
    """The kernel's package, unpacked. Raises OSError, CalledProcessError."""
    told = subprocess.run(["apt-cache", "depends", PACKAGE], check=True, capture_output=True, text=True).stdout
    found = re.search(r"Depends: (linux-image-\S+)", told)
    if found is None:
        raise OSError("no such package")
    subprocess.run(["apt-get", "-q", "download", found[1]], check=True, cwd=scratch, capture_output=True)
    (package,) = scratch.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, scratch / "all"], check=True, capture_output=True)
    return scratch / "all"


def _unpacked(driver: Path) -> bytes:
    data = driver.read_bytes()
    if driver.suffix == ".xz":
        return lzma.decompress(data)
    if driver.suffix == ".gz":
        return gzip.decompress(data)
    if driver.suffix == ".zst":
        return subprocess.run(["zstd", "-qdc", driver], check=True, capture_output=True).stdout
    return data


def in_order(modules: Path) -> list[str]:
    """The drivers of a folder, each after those that it needs, according to their own files."""
    order: list[str] = []

    def add(name: str) -> None:
        path = modules / f"{name}.ko"
        if name in order or not path.exists():
            return
        found = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for needed in found[1].decode().split(",") if found and found[1] else ():
            add(needed)
        order.append(name)

    for path in sorted(modules.glob("*.ko")):
        add(path.stem)
    return order


def _pack(folder: Path, scratch: Path) -> None:
    init = scratch / "init"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-static", "-pthread", "-s"]
    subprocess.run(["gcc", *flags, HERE / "init.c", "-o", init], check=True, capture_output=True)
    order = in_order(folder / "modules")
    files = {"init": init.read_bytes(), "modules/order": "".join(f"{name}.ko\n" for name in order).encode()}
    files |= {f"modules/{name}.ko": (folder / "modules" / f"{name}.ko").read_bytes() for name in order}
    (scratch / "initramfs").write_bytes(archive(files))
    (scratch / "initramfs").rename(folder / "initramfs")


def archive(files: dict[str, bytes]) -> bytes:
    """An initramfs of these files, and a folder `modules`."""
    return gzip.compress(b"".join(_archive(files)), 1)


def _archive(files: dict[str, bytes]) -> Iterator[bytes]:
    """A cpio archive as the kernel reads it (its Documentation/driver-api/early-userspace/buffer-format.rst)."""
    entries = [("modules", 0o40755, b""), *((name, 0o100755, data) for name, data in sorted(files.items()))]
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        yield head + bytes(-len(head) % 4)
        yield data + bytes(-len(data) % 4)
