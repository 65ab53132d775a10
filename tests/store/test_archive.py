"""Archives: a history comes back from them byte for byte, and what is wrong with an object is found and named."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from conftest import many
from power import Power
from store_support import Source, commit, fill, memory_at

from remus_ckpt.errors import NothingToRestore, RemusError, StoreError
from remus_ckpt.store import History, Store, archiver
from remus_ckpt.store.archive import Archive, Archived, fetch, line_of
from remus_ckpt.store.segments import list_segments

pytest.importorskip("obstore", reason="needs the extra [archive]")


@pytest.fixture
def history(tmp_path: Path) -> History:
    """Four segments, with checkpoints 0 to 19."""
    with Store(tmp_path / "store").writer("orders") as writer:
        source = None
        for number in range(4):
            source = fill(writer, 5, source)
            if number < 3:
                writer.compact(wait=True)
    return Store(tmp_path / "store")["orders"]


def archive_in(tmp_path: Path, **options: Path) -> Archive:
    return Archive(f"file://{tmp_path}/archive", create=True, **options)


def archived(history: History, archive: Archive) -> list[Archived]:
    return [one for one in archiver.push(archive, history, "orders", archive.segments("orders")) if one is not None]


def test_all_comes_back_but_what_still_grows(history: History, tmp_path: Path) -> None:
    archive = archive_in(tmp_path)
    put = archived(history, archive)
    assert len(put) == 3
    assert archived(history, archive) == []  # they are there
    assert archive.names() == ["orders"]
    found = fetch(archive, "orders", tmp_path / "other" / "orders")
    assert [one.epochs for one in found] == [one.epochs for one in put]
    rebuilt = Store(tmp_path / "other")["orders"]
    assert not rebuilt.verify().bad
    last = put[-1].epochs[-1]
    assert rebuilt.newest().epoch == last  # type: ignore[union-attr]
    for epoch in range(last + 1):
        assert np.array_equal(rebuilt.memory(epoch), history.memory(epoch))
    # A backup continues it.
    with Store(tmp_path / "other").writer("orders") as writer:
        assert writer.history.newest().position == history.find(last).position  # type: ignore[union-attr]


def test_one_checkpoint_by_epoch_or_time(history: History, tmp_path: Path) -> None:
    archive = archive_in(tmp_path)
    put = archived(history, archive)
    for epoch in (0, 7, put[-1].epochs[-1]):
        found = fetch(archive, "orders", tmp_path / f"at-{epoch}" / "orders", at=epoch)
        assert len(found) == 1
        assert np.array_equal(Store(tmp_path / f"at-{epoch}")["orders"].memory(epoch), history.memory(epoch))
    with pytest.raises(NothingToRestore, match="checkpoint 1000 is not archived"):
        fetch(archive, "orders", tmp_path / "at" / "orders", at=1000)
    with pytest.raises(StoreError, match="there is no such directory"):
        Archive(f"file://{tmp_path}/nowhere")
    with pytest.raises(NothingToRestore, match="nothing is archived"):
        fetch(archive, "others", tmp_path / "at" / "others")
    with pytest.raises(StoreError, match="exists already"):
        fetch(archive, "orders", tmp_path / "at-0" / "orders")


def test_by_a_time_comes_what_the_history_itself_has_for_it(tmp_path: Path) -> None:
    """A key says when the last checkpoint was taken, and only to the second; the first may be much later than the last
    of the segment before."""
    begun = datetime(2026, 1, 31, 12, tzinfo=UTC)
    offsets_ms = [0, 250, 500, 750, 1000, 1250, 1500, 60_000, 60_250]
    with Store(tmp_path / "store").writer("orders") as writer:
        source = Source()
        writer.begin(full=True)
        for number, offset_ms in enumerate(offsets_ms):
            if number == 7:  # another primary begins anew
                source = Source(position=writer.position)
                writer.begin(full=True)
            time_ns = int(begun.timestamp()) * 10**9 + offset_ms * 10**6
            commit(writer, source.checkpoint(time_ns), source.position)
            if number in (2, 4, 8):
                writer.compact(wait=True)
    history = Store(tmp_path / "store")["orders"]
    archive = archive_in(tmp_path)
    assert len(archived(history, archive)) == 4
    for number, at_ms in enumerate([0, 10, 510, 760, 990, 1010, 1999, 30_000, 60_100, 90_000]):
        at = begun + timedelta(milliseconds=at_ms)
        fetch(archive, "orders", tmp_path / f"{number}" / "orders", at=at)
        assert Store(tmp_path / f"{number}")["orders"].at(at).position == history.at(at).position
    with pytest.raises(NothingToRestore, match="no checkpoint was taken by"):
        fetch(archive, "orders", tmp_path / "before" / "orders", at=begun - timedelta(milliseconds=1))


def test_what_is_encrypted_needs_the_identity(history: History, tmp_path: Path) -> None:
    pyrage = pytest.importorskip("pyrage")
    key = pyrage.x25519.Identity.generate()
    (tmp_path / "key").write_text(f"# made for a test\n{key}\n")
    (tmp_path / "recipients").write_text(f"{key.to_public()}\n")
    (tmp_path / "wrong").write_text(f"{pyrage.x25519.Identity.generate()}\n")
    url = f"file://{tmp_path}/archive"
    put = archived(history, archive_in(tmp_path, recipients=tmp_path / "recipients"))
    assert all(one.key.endswith(".age") for one in put)
    secret = (tmp_path / "archive" / "orders" / put[0].key).read_bytes()
    assert secret.startswith(b"age-encryption.org/v1")
    assert b"LinuxGuestRecord" not in secret
    with pytest.raises(StoreError, match="--identity"):
        fetch(Archive(url), "orders", tmp_path / "other" / "orders")
    with pytest.raises(StoreError, match="cannot be decrypted"):
        fetch(Archive(url, identity=tmp_path / "wrong"), "orders", tmp_path / "other" / "orders")
    fetch(Archive(url, identity=tmp_path / "key"), "orders", tmp_path / "other" / "orders")
    assert np.array_equal(Store(tmp_path / "other")["orders"].memory(3), memory_at(3).reshape(-1))
    with pytest.raises(StoreError, match="age1"):
        Archive(url, recipients=tmp_path / "key")


def test_whatever_changes_in_an_object_is_found_and_named(history: History, tmp_path: Path) -> None:
    archive = archive_in(tmp_path)
    put = archived(history, archive)
    path = tmp_path / "archive" / "orders" / put[1].key
    good = path.read_bytes()
    dice = random.Random(7)
    for _ in range(many(20, 400)):
        bad = bytearray(good)
        kind = dice.randrange(3)
        if kind == 0:
            bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        elif kind == 1:
            del bad[dice.randrange(len(bad)) :]
        else:
            bad += dice.randbytes(dice.randrange(1, 5000))
        path.write_bytes(bad)
        with pytest.raises(StoreError, match=put[1].digest):
            fetch(archive, "orders", tmp_path / "other" / "orders")
        assert not (tmp_path / "other" / "orders").exists()
    path.write_bytes((tmp_path / "archive" / "orders" / put[0].key).read_bytes())
    with pytest.raises(StoreError, match="other checkpoints than its key says"):
        fetch(archive, "orders", tmp_path / "other" / "orders")
    path.write_bytes(good)
    fetch(archive, "orders", tmp_path / "other" / "orders")  # continues with what has come
    assert not Store(tmp_path / "other")["orders"].verify().bad
    path.unlink()
    fetch(archive, "orders", tmp_path / "gap" / "orders")
    with_gap = Store(tmp_path / "gap")["orders"]
    assert not with_gap.survey().lost
    with pytest.raises(RemusError):
        with_gap.memory(put[1].epochs[2])


MOTO = os.environ.get("REMUS_CKPT_MOTO")


@pytest.mark.skipif(not MOTO, reason="no S3 server: REMUS_CKPT_MOTO names moto_server")
def test_an_s3_server(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto speaks S3: what is there, what is missing, and a server that is gone."""
    import obstore
    import obstore.store

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    with subprocess.Popen([str(MOTO), "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 60
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert time.monotonic() < deadline
                time.sleep(0.1)
            request = urllib.request.Request(f"http://127.0.0.1:{port}/checkpoints", method="PUT")
            urllib.request.urlopen(request, timeout=30).close()
            archive = Archive("s3://checkpoints/site-a")
            assert archive.names() == []
            put = archived(history, archive)
            assert archive.names() == ["orders"]
            assert [one.key for one in archive.segments("orders")] == [one.key for one in put]
            fetch(archive, "orders", tmp_path / "other" / "orders")
            assert not Store(tmp_path / "other")["orders"].verify().bad
            obstore.put(obstore.store.from_url(archive.url), f"orders/{put[0].key}", b"something else")
            with pytest.raises(StoreError, match=put[0].digest):
                fetch(archive, "orders", tmp_path / "bad" / "orders")
            archive.remove("orders", [put[0]])
            with pytest.raises(StoreError, match="no such object"):
                archive.get("orders", put[0], tmp_path / "gone")
        finally:
            server.kill()
    with pytest.raises(StoreError, match="s3://checkpoints/site-a"):
        monkeypatch.setenv("AWS_MAX_RETRIES", "0")
        archive.segments("orders")


def test_of_two_lines_the_last_one_is_taken() -> None:
    """What a later backup replaced is left out; what it continued is not."""

    def segment(first: int, last: int) -> Archived:
        return Archived(range(first, last + 1), None, f"{first:032}{last:032}", False)

    one = [segment(0, 9), segment(9, 20), segment(20, 31)]
    assert line_of(one) == one
    other = segment(15, 18)
    assert line_of([*one, other]) == [one[0], other]
    assert line_of([*one, segment(0, 3)]) == [segment(0, 3)]
    assert line_of([]) == []


@pytest.mark.parametrize(
    "key",
    [
        "0-1-no-time-00.remus",
        f"{5:020}-{4:020}-no-time-{'0' * 64}.remus",
        f"{0:020}-{10**20 - 1:020}-no-time-{'0' * 64}.remus",
        f"{0:020}-{4:020}-20261341T000000Z-{'0' * 64}.remus",
        f"{0:020}-{4:020}-no-time-{'0' * 64}.remus#1",
    ],
)
def test_other_keys_are_none_of_ours(key: str) -> None:
    assert Archived.parse(key, 1, None) is None


@contextmanager
def archiving(store: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "remus_ckpt.store.archiver", str(store), url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


class _Killed(BaseException):
    """As by SIGKILL: it is nobody's error."""


def killed_at_sync(patch: pytest.MonkeyPatch, below: Path, number: int) -> None:
    """The sync of that number, of something below a directory, is never made."""
    real, count = os.fsync, itertools.count()

    def sync(fd: int) -> None:
        if below in Path(os.readlink(f"/proc/self/fd/{fd}")).parents and next(count) == number:
            raise _Killed
        real(fd)

    patch.setattr(os, "fsync", sync)


@pytest.mark.parametrize("number", range(8))
def test_what_counts_as_archived_is_there_after_a_loss_of_power(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Also if who put it there was killed: the next one does not put it there again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    Archive(f"file://{disk}/archive", create=True)
    power = Power(monkeypatch, disk)
    with monkeypatch.context() as patch:
        killed_at_sync(patch, disk, number)
        with suppress(_Killed):
            archived(history, Archive(f"file://{disk}/archive"))
    counts = Archive(f"file://{disk}/archive").segments("orders")
    left = Archive(f"file://{power.lose(tmp_path / 'after')}/archive")
    assert [one.key for one in left.segments("orders")] == [one.key for one in counts]
    for one in counts:
        left.get("orders", one, tmp_path / one.key)
    assert len(archived(history, Archive(f"file://{disk}/archive"))) == 3 - len(counts)
    assert not [path for path in (disk / "archive" / "orders").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("number", range(6))
def test_a_history_that_was_fetched_is_there_after_a_loss_of_power(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Also if the first try was killed with all of a segment written, and none of it synced."""
    disk = tmp_path / "disk"
    disk.mkdir()
    archive = archive_in(tmp_path)
    archived(history, archive)
    power = Power(monkeypatch, disk)
    with monkeypatch.context() as patch:
        killed_at_sync(patch, disk, number)
        with suppress(_Killed):
            fetch(archive, "orders", disk / "orders")
    if not (disk / "orders").exists():
        fetch(archive, "orders", disk / "orders")
    assert not Store(power.lose(tmp_path / "after"))["orders"].verify().bad


def test_what_is_pruned_meanwhile_is_no_fault(history: History, tmp_path: Path) -> None:
    archive = archive_in(tmp_path)
    steps = archiver.push(archive, history, "orders", [])
    next(steps)
    history.path_of(list_segments(history.directory)[0]).unlink()
    assert len([one for one in steps if one is not None]) == 2


def test_a_name_that_cannot_be_read_keeps_no_other_from_being_archived(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        with Store(tmp_path / "store").writer(name) as writer:
            source = fill(writer, 3)
            writer.compact(wait=True)
            fill(writer, 2, source)
    (tmp_path / "store" / "a" / "store.json").unlink()
    (tmp_path / "store" / "c" / "store.json").write_text("{}")
    end, stop = os.pipe()
    told: dict[str, archiver.Lag] = {}

    def tell(lag: archiver.Lag) -> None:
        told[lag.name] = lag
        if len(told) == 3:
            os.write(stop, b"x")

    archiver.keep_archiving(Store(tmp_path / "store"), archive_in(tmp_path), end, tell)
    os.close(end)
    os.close(stop)
    assert told["b"] == archiver.Lag("b", 2, 0, 0)
    assert "is lost" in str(told["a"].error)
    assert "cannot be read" in str(told["c"].error)


def test_the_process_says_how_far_it_is(history: History, tmp_path: Path) -> None:
    with archiving(tmp_path / "store", f"file://{tmp_path}/archive") as process:
        assert process.stdin is not None and process.stdout is not None
        lag = json.loads(process.stdout.readline())
        put = archive_in(tmp_path).segments("orders")
        assert lag == {
            "name": "orders",
            "newest": put[-1].epochs[-1],
            "waiting": 0,
            "waiting_bytes": 0,
            "error": None,
        }
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.kill
def test_killed_at_any_instant_nothing_half_is_there(history: History, tmp_path: Path) -> None:
    dice = random.Random(3)
    archive = archive_in(tmp_path)
    kills = 0
    while len(archive.segments("orders")) < len(list_segments(history.directory)) - 1 or kills < 5:
        with archiving(tmp_path / "store", archive.url) as process:
            time.sleep(dice.uniform(0.2, 1 + kills))  # it takes a second or more to start
            os.kill(process.pid, signal.SIGKILL)
        kills += 1
        for one in archive.segments("orders"):
            archive.get("orders", one, tmp_path / "got")
            (tmp_path / "got").unlink()
    fetch(archive, "orders", tmp_path / "other" / "orders")
    assert not Store(tmp_path / "other")["orders"].verify().bad
