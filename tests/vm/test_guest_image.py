"""The guest of the demo, built where its kernel comes from this machine, and where there is none."""

from __future__ import annotations

import gzip
import lzma
import shutil
from pathlib import Path

import pytest
from vm_qemu import guest_files

from remus_ckpt.demo import guest

pytestmark = pytest.mark.qemu


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """The guest of all tests, with an initramfs of its own: other trees may share theirs."""
    files, made = guest_files(), tmp_path / "before"
    shutil.copytree(files / "modules", made / "modules")
    shutil.copyfile(files / "kernel", made / "kernel")
    return guest.build(made)


@pytest.fixture
def no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the compiler can be found."""
    (tmp_path / "bin").mkdir()
    for name in ("gcc", "as", "ld"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz"])
def test_a_kernel_of_this_machine(tmp_path: Path, before: Path, no_apt: None, suffix: str) -> None:
    """The same guest comes out as from the package."""
    root = tmp_path / "root"
    libraries = root / "lib" / "modules" / "6.1.0-1"
    (root / "boot").mkdir(parents=True)
    libraries.mkdir(parents=True)
    shutil.copyfile(before / "kernel", root / "boot" / "vmlinuz-6.1.0-1")
    pack = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[suffix]
    for module in (before / "modules").iterdir():
        (libraries / f"{module.name}{suffix}").write_bytes(pack(module.read_bytes()))
    made = guest.build(tmp_path / "guest", root)
    assert (made / "kernel").read_bytes() == (before / "kernel").read_bytes()
    initramfs = [gzip.decompress((folder / "initramfs").read_bytes()) for folder in (before, made)]
    assert initramfs[0] == initramfs[1] and b"init" in initramfs[0]


def test_what_is_built_in_needs_no_file(tmp_path: Path, no_apt: None) -> None:
    libraries = tmp_path / "root" / "lib" / "modules" / "7"
    libraries.mkdir(parents=True)
    (tmp_path / "root" / "boot").mkdir()
    (tmp_path / "root" / "boot" / "vmlinuz-7").write_bytes(b"kernel")
    with pytest.raises(OSError, match="the kernel has no virtio_pci"):
        guest.build(tmp_path / "guest", tmp_path / "root")
    names = "".join(f"kernel/drivers/{name}.ko\n" for name in guest.DRIVERS)
    (libraries / "modules.builtin").write_text(names)
    made = guest.build(tmp_path / "guest", tmp_path / "root")
    assert b"modules/virtio.ko" not in gzip.decompress((made / "initramfs").read_bytes())


def test_no_kernel_anywhere(tmp_path: Path, no_apt: None) -> None:
    with pytest.raises(OSError, match="apt-get update"):
        guest.build(tmp_path / "guest", tmp_path / "root")
