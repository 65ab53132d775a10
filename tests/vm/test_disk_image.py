"""The images of a guest's disks on its backup: at each commit, and whatever dies or lies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from remus_ckpt.errors import RemusError, StoreError, StreamError
from remus_ckpt.vm import disk_image
from remus_ckpt.vm.disk_image import BLOCK_BYTES, DIGEST_BYTES, DiskImages, digests, is_used
from remus_ckpt.vm.disk_log import pack_write
from remus_ckpt.vm.part import DiskPart, Machine, VmPart

MACHINE = Machine("qemu-system-x86_64", (7, 2, 22), (), 64 << 20)
SIZE = 4 * BLOCK_BYTES
SEED = b"s" * 16


def copied(images: DiskImages, data: bytes = b"", *, seed: bytes = SEED, position: int = 0) -> dict[str, Any]:
    """A whole copy of a disk that begins with these bytes."""
    name = {"disk": "d", "seed": seed, "size": SIZE}
    begun = images.answer("disk-begin", name)
    if data:
        images.answer("disk-write", name | {"log": pack_write(0, len(data), data)})
    images.answer("disk-done", name | {"position": position})
    assert begun is not None
    return begun


def part(start: int, *logs: bytes, seed: bytes = SEED, stop: int | None = None) -> VmPart:
    log = b"".join(logs)
    return VmPart(MACHINE, b"state", True, ((DiskPart("d", seed, SIZE, start, start + len(log)), log),))


def image(images: DiskImages, seed: bytes = SEED) -> bytes:
    return (images.folder / f"d.{seed.hex()}.raw").read_bytes()


def commit(images: DiskImages, one: VmPart) -> int:
    """As the backup does; returns where the next checkpoint begins."""
    images.admit(one.pack())
    images.follow(one)
    return one.disks[0][0].stop


@pytest.fixture
def images(tmp_path: Path) -> DiskImages:
    return DiskImages(tmp_path / "disks")


def test_it_stands_at_each_commit(images: DiskImages) -> None:
    copied(images, b"a" * 1024, position=100)
    at = commit(images, part(100, pack_write(512, 512, b"b" * 512), pack_write(4096, 8192, b"c" * 8192)))
    expected = b"a" * 512 + b"b" * 512 + bytes(3072) + b"c" * 8192
    assert image(images) == expected + bytes(SIZE - len(expected))
    at = commit(images, part(at))
    commit(images, part(at, pack_write(0, 8192, None), pack_write(0, 512, b"d" * 512)))
    expected = b"d" * 512 + bytes(7680) + b"c" * 4096
    assert image(images) == expected + bytes(SIZE - len(expected))


def test_a_death_at_any_write_is_made_good_by_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backup dies: what has written to the image has no more to say, and another reads the checkpoint again."""
    writes = [pack_write(at * 1024, 1024, bytes([at + 1]) * 1024) for at in range(8)] + [pack_write(0, 2048, None)]
    pwrite, deaths = os.pwrite, 0
    for dies_at in range(12):
        images = DiskImages(tmp_path / str(dies_at))
        copied(images, b"x" * 4096)
        at = commit(images, part(0, pack_write(0, 512, b"y" * 512)))
        left = [dies_at]

        def dying(fd: int, data: bytes, offset: int, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(5, "the machine is gone")
            return pwrite(fd, data[: max(len(data) // 2, 1)], offset)

        newest = part(at, *writes)
        images.admit(newest.pack())  # it is durable from here on
        monkeypatch.setattr(disk_image.os, "pwrite", dying)
        try:
            images.follow(newest)
        except StoreError:
            deaths += 1
        monkeypatch.setattr(disk_image.os, "pwrite", pwrite)
        again = DiskImages(tmp_path / str(dies_at))
        again.follow(newest)
        expected = bytes(2048) + b"".join(bytes([at + 1]) * 1024 for at in range(2, 8))
        assert image(again) == expected + bytes(SIZE - len(expected))
        commit(again, part(newest.disks[0][0].stop, pack_write(0, 512, b"z" * 512)))
    assert deaths > 5


def test_what_does_not_continue_is_refused_before_it_is_stored(images: DiskImages) -> None:
    with pytest.raises(StoreError):
        images.admit(part(0).pack())
    copied(images)
    at = commit(images, part(0, pack_write(0, 512, None)))
    for wrong in (part(0), part(at + 1), part(at, seed=b"t" * 16)):
        with pytest.raises(StoreError):
            images.admit(wrong.pack())
    torn = bytearray(part(at, pack_write(0, 512, b"x" * 512)).pack())
    torn[-20] ^= 1
    with pytest.raises(StreamError):
        images.admit(bytes(torn))
    images.admit(part(at).pack())


def test_an_image_that_is_ahead_of_its_history_is_not_used(images: DiskImages) -> None:
    copied(images)
    first = part(0, pack_write(0, 512, b"a" * 512))
    at = commit(images, first)
    commit(images, part(at, pack_write(0, 512, b"b" * 512)))
    again = DiskImages(images.folder)
    again.follow(first)  # the newest checkpoint is lost
    with pytest.raises(StoreError):
        again.paths([first.disks[0][0]])
    with pytest.raises(StoreError):
        again.admit(part(at).pack())


def test_a_guest_runs_on_an_image_once(images: DiskImages) -> None:
    copied(images)
    newest = part(0, pack_write(0, 512, b"a" * 512))
    commit(images, newest)
    disks = [newest.disks[0][0]]
    assert images.newest(disks) == images.paths(disks) == {"d": images.folder / f"d.{SEED.hex()}.raw"}
    images.hand_over(disks)
    for one in (images, DiskImages(images.folder)):
        one.follow(newest)
        with pytest.raises(StoreError, match="has run"):
            one.paths(disks)
    with pytest.raises(RemusError, match="of its own"):
        copied(images, b"z" * 512)
    assert not copied(images, seed=b"t" * 16)["is_empty"]
    commit(images, part(0, seed=b"t" * 16))
    assert image(images) == image(images, b"t" * 16), "what a guest has run on is kept"


def test_only_what_differs_has_to_be_sent_again(images: DiskImages) -> None:
    assert copied(images, os.urandom(BLOCK_BYTES))["is_empty"]
    commit(images, part(0))
    old, new = image(images), {"disk": "d", "seed": b"t" * 16, "size": SIZE}
    begun, first = images.answer("disk-begin", new), DiskPart("d", SEED, SIZE, 0, 0)
    found = images.answer("disk-digests", new | {"offset": 0, "count": 4})
    assert begun == {"is_empty": False} and found == {"digests": b"".join(digests(old))}
    assert len(found["digests"]) == 4 * DIGEST_BYTES
    images.answer("disk-write", new | {"log": pack_write(BLOCK_BYTES, 512, b"n" * 512)})
    assert images.paths([first]), "until a checkpoint names the copy, the old image is the guest's"
    images.answer("disk-done", new | {"position": 7})
    assert images.answer("disk-state", {}) == {
        "disks": [{"disk": "d", "seed": SEED, "position": 0}, {"disk": "d", "seed": b"t" * 16, "position": 7}]
    }
    commit(images, part(7, seed=b"t" * 16))
    assert image(images, b"t" * 16) == old[:BLOCK_BYTES] + b"n" * 512 + old[BLOCK_BYTES + 512 :]
    assert not (images.folder / f"d.{SEED.hex()}.raw").exists()


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("disk-begin", {"disk": "../x"}), ("disk-begin", {"disk": 7}), ("disk-begin", {"seed": b"short"}),
        ("disk-begin", {"size": 513}), ("disk-begin", {"size": 1 << 60}), ("disk-begin", {"size": True}),
        ("disk-write", {"log": b"garbage"}), ("disk-write", {"log": pack_write(SIZE, 512, None)}), ("disk-write", {}),
        ("disk-write", {"size": SIZE * 2, "log": b""}), ("disk-write", {"seed": b"t" * 16, "log": b""}),
        ("disk-digests", {"offset": 0, "count": 1 << 40}), ("disk-digests", {"offset": -1, "count": 1}),
        ("disk-read", {"offset": 0, "length": 1 << 40}), ("disk-read", {"offset": "0", "length": 512}),
        ("disk-done", {"position": None}), ("disk-done", {"seed": b"t" * 16, "position": 0}),
    ],
)  # fmt: skip
def test_requests_that_lie_change_nothing(images: DiskImages, method: str, wrong: dict[str, Any]) -> None:
    good = {"disk": "d", "seed": SEED, "size": SIZE}
    images.answer("disk-begin", good)
    with pytest.raises(RemusError):
        images.answer(method, good | wrong)
    images.answer("disk-done", good | {"position": 0})
    assert image(images) == bytes(SIZE)
    assert images.answer("disk-format", good) is None


def test_the_locks_of_qemu_are_seen(tmp_path: Path) -> None:
    import subprocess

    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    assert not is_used(path)
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)  # its prompt: it has the disk open
        try:
            assert is_used(path)
        finally:
            process.kill()
            process.wait()
    assert not is_used(path)
