"""`remus-ckpt mount`: any moment of a history as files, for programs that know nothing of it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from services import until
from store_support import PAGES, fill, memory_at

from remus_ckpt import Backup, open_store, protect
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.store import Retention, Store

COMMAND = [sys.executable, "-m", "remus_ckpt"]

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def fuse() -> None:
    pytest.importorskip("mfusepy", reason="mfusepy or libfuse is not there", exc_type=(ImportError, OSError))
    if not os.path.exists("/dev/fuse"):
        pytest.skip("there is no /dev/fuse")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with Store(tmp_path / "store").writer("orders", compact_bytes=None) as writer:
        source = fill(writer, 20)
        writer.compact(wait=True)
        fill(writer, 5, source)
    return tmp_path / "store"


@contextmanager
def mounted(store: Path, end: int | str = signal.SIGTERM) -> Iterator[Path]:
    """A mounted history; how it ends: by a signal, or by what unmounts it. It must end well, and leave nothing."""
    where = store.parent / "mnt"
    log = store.parent / "mount.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, "mount", f"store:{store}/orders", str(where)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 60
        while not os.path.ismount(where):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield where
        if isinstance(end, int):
            process.send_signal(end)
        else:
            subprocess.run([end, *([] if end == "umount" else ["-u"]), str(where)], check=True)
        assert process.wait(60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        with suppress(OSError):
            if os.path.ismount(where):
                subprocess.run(["umount", "-l", str(where)], check=False)
    assert not where.exists()


def test_every_epoch(store: Path) -> None:
    with mounted(store) as where:
        assert sorted(os.listdir(where)) == ["by-epoch", "by-time", "newest"]
        assert sorted(map(int, os.listdir(where / "by-epoch"))) == list(range(25))
        for epoch in range(25):
            path = where / "by-epoch" / str(epoch)
            assert sorted(os.listdir(path)) == ["device_state", "memory"]
            assert (path / "memory").read_bytes() == memory_at(epoch).tobytes()
            assert (path / "device_state").read_bytes() == b"dev%d" % epoch
            assert (path / "memory").stat().st_mtime == epoch
            assert (path / "memory").stat().st_size == PAGES * PAGE_SIZE
        assert os.readlink(where / "newest") == "by-epoch/24"
        assert (where / "newest" / "memory").read_bytes() == memory_at(24).tobytes()


def test_by_time(store: Path) -> None:
    with mounted(store) as where:
        names = sorted(os.listdir(where / "by-time"))
        assert names[:2] == ["1970-01-01T00:00:00Z", "1970-01-01T00:00:01Z"] and len(names) == 25
        for epoch, name in enumerate(names):
            assert os.readlink(where / "by-time" / name) == f"../by-epoch/{epoch}"
        local = datetime.fromtimestamp(7.5, UTC).astimezone().replace(tzinfo=None).isoformat()
        assert (where / "by-time" / local / "memory").read_bytes() == memory_at(7).tobytes()
        for missing in ("1969-01-01", "yesterday"):
            assert not (where / "by-time" / missing).exists()


def test_what_is_not_there(store: Path) -> None:
    with mounted(store) as where:
        for path in ("by-epoch/99", "by-epoch/99/memory", "by-epoch/007", "by-epoch/1/other", "other", "by-epoch/x/y"):
            assert not os.path.lexists(where / path), path
        for path in (where / "new", where / "by-epoch" / "1" / "memory"):
            with pytest.raises(OSError) as caught:
                path.write_bytes(b"1")
            assert caught.value.errno in {errno.EROFS, errno.EACCES}


def test_other_programs(store: Path) -> None:
    with mounted(store) as where:
        one, other = (str(where / "by-epoch" / str(epoch) / "memory") for epoch in (3, 4))
        assert subprocess.run(["cmp", "-s", one, one], check=False).returncode == 0
        assert subprocess.run(["cmp", "-s", one, other], check=False).returncode == 1
        if shutil.which("gdb"):
            # One word of memory, mapped by gdb as a binary file.
            ran = subprocess.run(
                ["gdb", "-batch", "-ex", f"restore {one} binary", "-ex", "quit"], capture_output=True, check=False
            )
            assert b"No such file" not in ran.stderr
        mapped = np.memmap(one, dtype=np.uint8, mode="r")
        assert np.array_equal(mapped, memory_at(3).reshape(-1))
        del mapped


def test_arrays_by_name(tmp_path: Path) -> None:
    prices = np.arange(3000, dtype=np.float64)
    odd = np.arange(7, dtype=np.int16)
    with (
        Backup(tmp_path / "store", [f"unix:{tmp_path}/socket"]) as backup,
        protect({"prices": prices, "a/b%": odd}, to=backup.addresses[0], name="orders") as protection,
    ):
        for number in range(3):
            prices[5] = number
            protection.checkpoint(wait=True)
        with mounted(tmp_path / "store") as where:
            for number in range(3):
                path = where / "by-epoch" / str(number)
                assert sorted(os.listdir(path / "arrays")) == ["a%2Fb%25", "prices"]
                assert np.fromfile(path / "arrays" / "prices")[5] == number
                assert np.array_equal(np.fromfile(path / "arrays" / "a%2Fb%25", dtype=np.int16), odd)
            # It goes on meanwhile.
            prices[5] = 77
            epoch = protection.checkpoint(wait=True)
            deadline = time.monotonic() + 30
            while os.readlink(where / "newest") != f"by-epoch/{epoch}":
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert np.fromfile(where / "newest" / "arrays" / "prices")[5] == 77


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, "umount", "fusermount", "fusermount3"])
def test_how_it_ends(store: Path, end: int | str) -> None:
    if isinstance(end, str) and not shutil.which(end):
        pytest.skip(f"there is no {end}")
    with mounted(store, end) as where:
        assert (where / "newest" / "memory").read_bytes() == memory_at(24).tobytes()


def test_it_ends_while_a_file_is_open(store: Path) -> None:
    with mounted(store) as where:
        file = (where / "newest" / "memory").open("rb")
        assert file.read(10) == memory_at(24).tobytes()[:10]
    with suppress(OSError):  # what it belongs to is gone
        file.close()


def test_a_changed_page_is_an_io_error(store: Path) -> None:
    history = open_store(store)["orders"]
    history.moment(18).close()
    path = history.path_of(history.find(3).segment)
    data = bytearray(path.read_bytes())
    data[data.find(memory_at(0)[3].tobytes()) + 1000] ^= 1
    path.write_bytes(data)
    with mounted(store) as where, (where / "by-epoch" / "3" / "memory").open("rb", buffering=0) as file:
        for page in range(0, PAGES, 4):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            file.seek(page * PAGE_SIZE)
            if page == 3:
                continue
            with suppress(OSError):  # a neighbour that is read ahead may be the bad one
                assert file.read(PAGE_SIZE) == memory_at(3)[page].tobytes()
        file.seek(3 * PAGE_SIZE)
        with pytest.raises(OSError) as caught:
            file.read(PAGE_SIZE)
        assert caught.value.errno == errno.EIO


def test_a_pruned_checkpoint_stays_for_whoever_has_it_open(store: Path) -> None:
    with mounted(store) as where, (where / "by-epoch" / "3" / "memory").open("rb") as file:
        with Store(store).writer("orders") as writer:
            assert writer.prune(Retention(count=1))
        assert file.read() == memory_at(3).tobytes()
        until(lambda: sorted(map(int, os.listdir(where / "by-epoch"))) == list(range(19, 25)))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, env=env)


def test_refusals(store: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    ran = run("mount", f"store:{store}/orders", str(full))
    assert ran.returncode == 1 and "not empty" in ran.stderr
    ran = run("mount", f"unix:{tmp_path}/socket/orders", str(tmp_path / "mnt"))
    assert ran.returncode == 2 and "on this machine" in " ".join(ran.stderr.split())
    ran = run("mount", f"store:{store}/none", str(tmp_path / "mnt"))
    assert ran.returncode == 1 and not (tmp_path / "mnt").exists()


def test_what_to_install(store: Path, tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "mfusepy.py").write_text("raise OSError('Unable to find libfuse')")
    ran = run("mount", f"store:{store}/orders", str(tmp_path / "mnt"), PYTHONPATH=str(tmp_path / "without"))
    assert ran.returncode == 1 and "pip install" in ran.stderr and "fuse3" in ran.stderr
    assert not (tmp_path / "mnt").exists()
