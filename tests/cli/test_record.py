"""`remus-ckpt record` on real processes, and how it ends."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support import Command, process_state, writer_process
from tracking import needs_tracking

from remus_ckpt import read_checkpoints
from remus_ckpt.cli import live
from remus_ckpt.files import StreamWriter
from remus_ckpt.loop import CheckpointLoop
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.sender import Sender
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile

PAGES = 64


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(b"\1" * (PAGES * PAGE_SIZE))
    return path


@pytest.fixture
def worker(memory: Path) -> Iterator[subprocess.Popen[bytes]]:
    with writer_process(memory, pages=8, threads=2) as process:
        yield process


@contextmanager
def record(memory: Path, pid: int, stream: Path, *more: str, **keywords: Any) -> Iterator[subprocess.Popen[str]]:
    """A recorder, which ends with the block: a test that fails does not wait for it."""
    command = [sys.executable, "-m", "remus_ckpt", "record", str(memory), "--pid", str(pid), "-o", str(stream)]
    with subprocess.Popen(
        [*command, "--json", *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_bytes(stream: Path, size: int) -> None:
    deadline = time.monotonic() + 20
    while not stream.exists() or stream.stat().st_size < size:
        assert time.monotonic() < deadline, "nothing was recorded"
        time.sleep(0.01)


def is_whole(stream: Path) -> int:
    """Every checkpoint can be restored; returns how many there are."""
    epochs = [checkpoint.epoch for checkpoint in read_checkpoints(stream, strict=True)]
    assert epochs == list(range(len(epochs)))
    return len(epochs)


@pytest.mark.parametrize(
    "options", [[], ["--codec", "rle"], ["--bounded"], ["--max-pause", "0s"], ["--digest", "sha256"]]
)
def test_duration(memory: Path, worker: subprocess.Popen[bytes], tmp_path: Path, options: list[str]) -> None:
    stream = tmp_path / "stream"
    with record(memory, worker.pid, stream, "--duration", "400ms", "--interval", "10ms", *options) as recorder:
        out, err = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, err
    report = json.loads(out)
    assert report["ended"] == "duration"
    assert report["checkpoints"] == is_whole(stream) > 0
    digests = {one.record.digest for one in read_checkpoints(stream) if one.record is not None}
    assert digests == {"sha256" if "--digest" in options else "blake3"}
    assert report["encoded_in_pause"] <= report["checkpoints"] - 1
    if "--max-pause" in options:
        assert not report["encoded_in_pause"]
    if "--bounded" in options:
        assert report["encoded_in_pause"] == report["checkpoints"] - 1
    assert stream.stat().st_mode & 0o777 == 0o600
    assert process_state(worker.pid) != "T"


@needs_tracking
@pytest.mark.parametrize("tracking", ["auto", "kernel", "compare"])
def test_how_pages_are_found_is_chosen_and_said(
    memory: Path, worker: subprocess.Popen[bytes], tmp_path: Path, tracking: str
) -> None:
    options = ["--duration", "400ms", "--interval", "10ms", "--tracking", tracking, "--audit", "1"]
    with record(memory, worker.pid, tmp_path / "stream", *options) as recorder:
        out, err = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, err
    report = json.loads(out)
    assert report["tracking"] == ("compare" if tracking == "compare" else "kernel"), report["tracking_why"]
    assert report["missed_pages"] == 0
    assert report["checkpoints"] == is_whole(tmp_path / "stream") > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_ends_with_a_whole_checkpoint(
    memory: Path, worker: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals
) -> None:
    stream = tmp_path / "stream"
    with record(memory, worker.pid, stream, "--interval", "5ms") as recorder:
        wait_for_bytes(stream, 340_000)
        recorder.send_signal(number)
        out, err = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, err
    assert json.loads(out)["ended"] == "stopped"
    assert is_whole(stream) == json.loads(out)["checkpoints"]
    assert process_state(worker.pid) != "T"


@pytest.mark.parametrize(
    ("dirty", "said"),
    [
        ([0, 0, 0, 0, 0, 0], [3]),  # once, at the first pause a second behind the first one
        ([5, 0, 0, 0, 0, 0], []),
        ([0, 0, 1, 0, 0, 0], []),
        ([0, 0, 0, 0, 1, 0], [3]),
    ],
)
def test_stillness(dirty: list[int], said: list[int]) -> None:
    stillness = live.Stillness()
    assert [number for number, pages in enumerate(dirty) if stillness.lasts(pages, 100 + 0.4 * number)] == said


IDLE = """
import mmap, sys, time
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 0)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_recording_in_which_nothing_changes_says_so_once(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    with subprocess.Popen([sys.executable, "-c", IDLE, str(memory)], stdout=subprocess.PIPE) as idle:
        assert idle.stdout is not None and idle.stdout.readline() == b"ready\n"
        try:
            words = ["--pid", idle.pid, "-o", tmp_path / "stream", "--duration", "1200ms", "--interval", "20ms"]
            ran = Command(monkeypatch, capfdbinary)("record", memory, *words, "--json")
        finally:
            idle.kill()
    assert ran.code == 0 and json.loads(ran.out)["checkpoints"] > 1
    assert ran.err.count("no page has changed") == 1


def test_death_of_the_worker_ends_it(memory: Path, worker: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stream = tmp_path / "stream"
    with record(memory, worker.pid, stream, "--interval", "5ms") as recorder:
        wait_for_bytes(stream, 340_000)
        worker.kill()
        out, err = recorder.communicate(timeout=30)
    assert recorder.returncode == 0, err
    assert json.loads(out)["ended"] == "source gone"
    assert is_whole(stream) == json.loads(out)["checkpoints"]


def test_death_of_the_recorder_leaves_the_worker_running_and_a_stream_to_restore(
    memory: Path, worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    for number in range(3):
        stream = tmp_path / f"stream{number}"
        with record(memory, worker.pid, stream, "--interval", "1ms") as recorder:
            wait_for_bytes(stream, 340_000 + 2_000 * number)  # the first checkpoint is behind it
            recorder.kill()
            recorder.communicate(timeout=30)
        assert [checkpoint.epoch for checkpoint in read_checkpoints(stream)][-1] >= 0
        deadline = time.monotonic() + 5
        while process_state(worker.pid) == "T":
            assert time.monotonic() < deadline, "the worker stays stopped"
            time.sleep(0.005)


def no_space(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_no_room_for_the_stream(memory: Path, worker: subprocess.Popen[bytes], tmp_path: Path) -> None:
    stream = tmp_path / "stream"
    with record(memory, worker.pid, stream, "--interval", "1ms", preexec_fn=lambda: no_space(400_000)) as recorder:
        _, err = recorder.communicate(timeout=60)
    assert recorder.returncode == 1
    assert "the stream ends with checkpoint" in err
    assert 0 < stream.stat().st_size <= 400_000
    count = is_whole(stream)
    assert f"checkpoint {count - 1}" in err
    assert process_state(worker.pid) != "T"


@pytest.mark.root
def test_full_disk(memory: Path, worker: subprocess.Popen[bytes], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], check=True)
    try:
        with record(memory, worker.pid, disk / "stream", "--interval", "1ms") as recorder:
            _, err = recorder.communicate(timeout=60)
        assert recorder.returncode == 1
        count = is_whole(disk / "stream")
        assert f"checkpoint {count - 1}" in err
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_stream_that_is_there_is_not_replaced_by_accident(
    memory: Path, worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    stream = tmp_path / "stream"
    stream.write_bytes(b"all that is left")
    with record(memory, worker.pid, stream, "--duration", "20ms") as recorder:
        recorder.communicate(timeout=30)
    assert recorder.returncode == 1
    assert stream.read_bytes() == b"all that is left"
    with record(memory, worker.pid, stream, "--duration", "20ms", "--overwrite") as recorder:
        recorder.communicate(timeout=30)
    assert recorder.returncode == 0
    assert is_whole(stream) > 0


def test_the_memory_itself_is_no_place_for_the_stream(
    memory: Path, worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    (tmp_path / "link").hardlink_to(memory)
    for output in (memory, tmp_path / "link"):
        with record(memory, worker.pid, output, "--duration", "20ms", "--overwrite") as recorder:
            recorder.communicate(timeout=30)
        assert recorder.returncode == 2
    assert memory.stat().st_size == PAGES * PAGE_SIZE
    assert worker.poll() is None


def test_bad_arguments(memory: Path, tmp_path: Path) -> None:
    with record(memory, 2**22 + 1, tmp_path / "stream") as recorder:
        _, err = recorder.communicate(timeout=30)
    assert recorder.returncode == 1
    assert "no process" in err


@pytest.mark.parametrize("bounded", [False, True])
def test_what_is_recorded_is_what_was_there_in_the_pause(
    memory: Path, worker: subprocess.Popen[bytes], tmp_path: Path, bounded: bool
) -> None:
    seen: dict[int, bytes] = {}
    source = SharedFile(memory, Processes([worker.pid]))
    output = StreamWriter(tmp_path / "stream")
    sender = Sender(source.memory.pages, reference=source.tracker.reference, buffer_pages=3)
    loop = CheckpointLoop(
        source,
        sender,
        output,
        interval_s=0.003,
        bounded=bounded,
        on_paused=lambda epoch: seen.update({epoch: memory.read_bytes()}),
    )
    taken = list(islice(loop.run(), 10))
    output.close()
    source.close()
    if bounded:
        # Three pages fill the buffer, so that encoding and writing fall into the pause, which is reported.
        assert any(one.blocked_s > 0 for one in taken)
    else:
        assert all(one.blocked_s == 0 for one in taken)
    for checkpoint in read_checkpoints(tmp_path / "stream", strict=True):
        assert checkpoint.memory.tobytes() == seen[checkpoint.epoch]
    # All of memory was copied while the worker ran; the first pause had to take only what it writes to.
    assert taken[0].dirty_pages <= 16
    assert os.path.getsize(tmp_path / "stream") == sum(one.sent.stream_bytes for one in taken)
