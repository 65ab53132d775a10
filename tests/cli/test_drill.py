"""`remus-ckpt drill`: the newest checkpoint is proven good, or not, and nothing in the store changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from services import until
from store_support import fill
from support import Command

from remus_ckpt.memory import memory_sha256
from remus_ckpt.store import Store


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    with Store(tmp_path / "store").writer("orders") as writer:
        fill(writer, 4)
        writer.set_state(term=3)
    return tmp_path / "store"


def snapshot(store: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time and contents; without those by which readers of the index find its writer."""
    files = [path for path in store.rglob("*") if path.is_file() and not path.name.startswith("index.sqlite-")]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(files)}


def test_a_good_name(store: Path, command: Command, tmp_path: Path) -> None:
    before = snapshot(store)
    seen = tmp_path / "seen"
    check = f'cat "$REMUS_IMAGE" > {seen}; stat -c %a "$REMUS_IMAGE"; env | grep ^REMUS_ > {seen}.env'
    room = tmp_path / "room"
    room.mkdir()
    args = ("--command", check, "--directory", str(room), "--json")
    code, out, _ = command("drill", f"store:{store}/orders", *args)
    report = json.loads(out)
    newest = Store(store)["orders"][-1].restore()
    assert code == 0 and report["good"] and report["fault"] is None
    assert (report["epoch"], report["memory_bytes"]) == (3, newest.memory_bytes)
    assert report["memory_sha256"] == memory_sha256(newest.image)
    assert report["age_s"] > 0 and report["command_status"] == 0
    assert seen.read_bytes() == newest.image.tobytes()
    given = dict(line.split("=", 1) for line in Path(f"{seen}.env").read_text().splitlines())
    assert (given["REMUS_NAME"], given["REMUS_TERM"], given["REMUS_EPOCH"], given["REMUS_DRILL"]) == (
        "orders",
        "3",
        "3",
        "1",
    )
    assert given["REMUS_POSITION"] == report["position"]
    assert not any(room.iterdir())
    assert snapshot(store) == before


def test_a_command_that_refuses_it(store: Path, command: Command) -> None:
    code, out, err = command("drill", f"store:{store}/orders", "--command", "exit 7")
    assert code == 1 and "7" in err and "accepts" not in out
    code, out, _ = command("drill", f"store:{store}/orders", "--command", "sleep 60", "--timeout", "100ms", "--json")
    report = json.loads(out)
    assert code == 1 and not report["good"] and report["command_status"] is None


def test_a_bad_newest_checkpoint(store: Path, command: Command) -> None:
    entry = Store(store)["orders"].find(3)
    path = store / "orders" / "segments" / entry.segment
    data = bytearray(path.read_bytes())
    data[entry.start + 40] ^= 1
    path.write_bytes(data)
    code, out, _ = command("drill", f"store:{store}/orders", "--command", 'test "$REMUS_EPOCH" = 2', "--json")
    report = json.loads(out)
    assert code == 20 and report["epoch"] == 2 and report["fault"] and report["command_status"] == 0
    assert not report["good"]


def test_nothing_to_restore(tmp_path: Path, command: Command) -> None:
    with Store(tmp_path / "store").writer("empty"):
        pass
    assert command("drill", f"store:{tmp_path}/store/empty")[0] == 20


def test_ctrl_c_ends_the_command_and_removes_the_image(store: Path, tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    marker = tmp_path / "pid"
    drill = subprocess.Popen(
        [
            *(sys.executable, "-m", "remus_ckpt", "drill", f"store:{store}/orders", "--directory", str(room)),
            *("--command", f"echo $$ > {marker}.new; mv {marker}.new {marker}; sleep 60"),
        ],
        stderr=subprocess.PIPE,
    )
    until(marker.exists)
    drill.send_signal(signal.SIGINT)
    began = time.monotonic()
    _, err = drill.communicate(timeout=30)
    assert drill.returncode == 1 and b"interrupted" in err and time.monotonic() - began < 20
    assert not any(room.iterdir())
    assert not os.path.exists(f"/proc/{int(marker.read_text())}")
