"""What other programs make of the files that `convert` writes: gdb, volatility3, and Xen's own verifier.

volatility3 may be installed here, or in the environment whose Python REMUS_CKPT_VOLATILITY names; Xen's Python
package (xen-utils of Debian, unpacked or installed) is looked for where REMUS_CKPT_XEN_UTILS says.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import streams as s
import v2_streams as v
from services import until
from shared import XEN_IDS, needs_xen, xen_manifest, xen_stream
from support import Command
from vm_qemu import QEMU, Qmp, guest_files

from remus_ckpt.files import read_checkpoints
from remus_ckpt.memory import memory_sha256
from remus_ckpt.pages import PAGE_SIZE

GDB = shutil.which("gdb")
VOLATILITY = os.environ.get("REMUS_CKPT_VOLATILITY") or (
    sys.executable if importlib.util.find_spec("volatility3") else None
)
XEN_UTILS = Path(os.environ.get("REMUS_CKPT_XEN_UTILS") or "/usr/lib/xen-4.17")
VERIFY = XEN_UTILS / "bin" / "verify-stream-v2"
needs_volatility = pytest.mark.skipif(VOLATILITY is None, reason="no volatility3: see the top of this file")
needs_verify = pytest.mark.skipif(not VERIFY.exists(), reason="no verify-stream-v2: see the top of this file")

READ_LAYERS = """
import json, pathlib, sys
from volatility3.framework import contexts
from volatility3.framework.layers import elf, lime, physical, qemu
from volatility3.plugins import banners
context = contexts.Context()
context.config["base.location"] = pathlib.Path(sys.argv[2]).absolute().as_uri()
context.add_layer(physical.FileLayer(context, "base", "base"))
stacker = {"elf": elf.Elf64Stacker, "lime": lime.LimeStacker, "qemu": qemu.QemuStacker}[sys.argv[1]]
layer = stacker.stack(context, "base")
context.add_layer(layer)
found = {}
for address in json.loads(sys.argv[3]):
    try:
        found[address] = layer.read(address, 64).hex()
    except Exception as error:
        found[address] = type(error).__name__
if sys.argv[4:]:
    found["banners"] = [text for _, text in banners.Banners.locate_banners(context, layer.name)]
print(json.dumps(found))
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


def a_guest(path: Path) -> bytes:
    """A stream of a guest with holes and unlike pages. Returns its memory."""
    pfns = [*range(40), *range(100, 140), 255]
    pages = [os.urandom(PAGE_SIZE) for _ in pfns]
    body = s.hvm_header(8, 256) + s.batch(8, [s.entry(pfn) for pfn in pfns], *pages)
    path.write_bytes(body + s.LAST_CHECKPOINT + s.END + s.hvm_tail(b"context"))
    memory = bytearray(256 * PAGE_SIZE)
    for pfn, data in zip(pfns, pages, strict=True):
        memory[pfn * PAGE_SIZE : (pfn + 1) * PAGE_SIZE] = data
    return bytes(memory)


def volatility_reads(to: str, path: Path, addresses: list[int], *more: str) -> dict[str, Any]:
    """What volatility3 finds at these physical addresses. more: anything, for the kernel's banners too"""
    assert VOLATILITY is not None
    run = [VOLATILITY, "-c", READ_LAYERS, to, str(path), json.dumps(addresses), *more]
    found: dict[str, Any] = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    return found


@needs_volatility
@pytest.mark.parametrize("to", ["elf", "lime", "qemu"])
def test_volatility_reads_the_same_bytes_at_the_same_addresses(to: str, tmp_path: Path, command: Command) -> None:
    memory = a_guest(tmp_path / "in")
    assert command("convert", tmp_path / "in", tmp_path / "out", "--to", to).code == 0
    here = [0, 5 * PAGE_SIZE + 100, 39 * PAGE_SIZE, 100 * PAGE_SIZE, 139 * PAGE_SIZE + 4000, 255 * PAGE_SIZE + 4032]
    holes = [40 * PAGE_SIZE, 99 * PAGE_SIZE, 200 * PAGE_SIZE]
    found = volatility_reads(to, tmp_path / "out", here + holes)
    for address in here:
        assert found[str(address)] == memory[address : address + 64].hex(), hex(address)
    for address in holes:
        assert found[str(address)] == "InvalidAddressException"


@pytest.mark.skipif(GDB is None, reason="no gdb")
def test_gdb_opens_the_core(tmp_path: Path, command: Command) -> None:
    memory = a_guest(tmp_path / "in")
    assert command("convert", tmp_path / "in", tmp_path / "out", "--to", "elf").code == 0
    addresses = [0x10, 101 * PAGE_SIZE + 8, 255 * PAGE_SIZE]
    words = [option for address in addresses for option in ("-ex", f"x/1xg {address:#x}")]
    hole = ["-ex", f"x/1xg {60 * PAGE_SIZE:#x}"]
    assert GDB is not None
    run = [GDB, "-nx", "-batch", "-c", str(tmp_path / "out"), *words, *hole]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    for address in addresses:
        value = int.from_bytes(memory[address : address + 8], "little")
        assert f"{address:#x}:\t0x{value:016x}" in done.stdout
    assert f"Cannot access memory at address {60 * PAGE_SIZE:#x}" in done.stderr


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of a guest that runs Linux, as QEMU has saved it."""
    folder = tmp_path_factory.mktemp("linux")
    files, path = guest_files(), folder / "saved"
    words = ["-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-m", "96M", "-accel", "tcg"]
    words += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off", "-serial", f"file:{folder}/console"]
    words += ["-kernel", str(files / "kernel"), "-initrd", str(files / "initramfs")]
    process = subprocess.Popen([QEMU, *words, "-append", "console=ttyS0 panic=-1 no_timer_check"])
    try:
        with closing(Qmp(folder / "qmp", process)) as qmp:
            until(lambda: b"guest is ready" in (folder / "console").read_bytes())
            qmp.ask("stop")
            qmp.ask("migrate", uri=f"exec:cat > {path}")
            until(lambda: qmp.ask("query-migrate").get("status") == "completed")
    finally:
        process.kill()
        process.wait()
    return path


@pytest.mark.qemu
@needs_volatility
@pytest.mark.parametrize("to", ["elf", "lime", "qemu"])
def test_volatility_knows_the_kernel_of_a_guest(to: str, linux: Path, tmp_path: Path, command: Command) -> None:
    assert command("restore", linux, "-o", tmp_path / "image").code == 0
    memory = (tmp_path / "image").read_bytes()
    assert command("convert", linux, tmp_path / "out", "--to", to).code == 0
    banner = re.search(rb"Linux version [0-9.]+[ -~]+ SMP [ -~]+(?=\n\0)", memory)
    assert banner is not None
    addresses = [0x7C00, banner.start() & ~0xFFF, banner.start(), len(memory) - 64]
    found = volatility_reads(to, tmp_path / "out", addresses, "banners")
    for address in addresses:
        assert found[str(address)] == memory[address : address + 64].hex(), hex(address)
    assert banner[0].decode() in found["banners"]


@pytest.mark.qemu
@pytest.mark.skipif(GDB is None, reason="no gdb")
def test_gdb_finds_the_kernel_of_a_guest(linux: Path, tmp_path: Path, command: Command) -> None:
    assert command("convert", linux, tmp_path / "out", "--to", "elf").code == 0
    assert GDB is not None
    words = ["-ex", "find 0, +96*1024*1024, 'L', 'i', 'n', 'u', 'x', ' ', 'v', 'e', 'r', 's', 'i', 'o', 'n', ' '"]
    run = [GDB, "-nx", "-batch", "-c", str(tmp_path / "out"), *words, "-ex", "x/s $_"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert re.search(r'^0x[0-9a-f]+:\t"Linux version \d+\.\d+', done.stdout, re.MULTILINE), done.stdout + done.stderr


def xens_verifier(path: Path, layers: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(XEN_UTILS / "lib" / "python")}
    run: Sequence[str | Path] = ["python3", VERIFY, "-i", path, "-f", layers, *options]
    return subprocess.run(run, capture_output=True, text=True, check=False, env=environment)


@needs_verify
@pytest.mark.parametrize("name", ["hvm", "series", "pv"])
def test_the_streams_of_these_tests_are_xens(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(v.ALL[name])
    done = xens_verifier(tmp_path / "in", "libxc")
    assert done.returncode == 0, done.stderr


@needs_verify
@needs_xen
@pytest.mark.parametrize("libxl", [False, True])
@pytest.mark.parametrize("name", XEN_IDS)
def test_what_xen_wrote_becomes_what_xen_reads_today(name: str, libxl: bool, tmp_path: Path, command: Command) -> None:
    (tmp_path / "in").write_bytes(xen_stream(name))
    options = ["--libxl"] if libxl else []
    ran = command("convert", tmp_path / "in", tmp_path / "out", "--to", "xen-v2", *options)
    assert ran.code == 0, ran.err
    done = xens_verifier(tmp_path / "out", "libxl" if libxl else "libxc")
    assert done.returncode == 0, done.stderr
    wanted = xen_manifest()[name]["memory_sha256"]
    found = [memory_sha256(checkpoint.memory) for checkpoint in read_checkpoints(tmp_path / "out")]
    assert found == (wanted[-1:] if libxl else wanted)


@needs_verify
def test_xens_own_converter_takes_a_stream_for_xen(tmp_path: Path, command: Command) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(5 * PAGE_SIZE) + bytes(3 * PAGE_SIZE) + os.urandom(PAGE_SIZE))
    assert command("encode", image, "-o", tmp_path / "in", "--for", "xen").code == 0
    environment = {**os.environ, "PYTHONPATH": str(XEN_UTILS / "lib" / "python")}
    run = ["python3", XEN_UTILS / "bin" / "convert-legacy-stream", "-i", tmp_path / "in", "-o", tmp_path / "out"]
    done = subprocess.run(
        [*run, "-w", "64", "-g", "hvm", "-f", "libxl"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert xens_verifier(tmp_path / "out", "libxl").returncode == 0
    (held,) = read_checkpoints(tmp_path / "out")
    assert held.memory.tobytes() == image.read_bytes() + bytes(3 * PAGE_SIZE)
