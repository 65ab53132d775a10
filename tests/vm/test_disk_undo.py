"""A disk as it was at any checkpoint, while the backup writes on."""

from __future__ import annotations

import os
import random
from contextlib import closing
from pathlib import Path

import pytest
from conftest import many

from remus_ckpt.errors import VmError
from remus_ckpt.vm import disk_undo
from remus_ckpt.vm.disk_image import DiskImages
from remus_ckpt.vm.disk_log import pack_write
from remus_ckpt.vm.disk_undo import DiskMoment
from remus_ckpt.vm.part import DiskPart, Machine, VmPart

SECTOR = 512
SIZE = 40 * 4096 + SECTOR
SEED = b"s" * 16


class Guest:
    """Writes to its disk at random, one checkpoint after another, and remembers what it was."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.images = DiskImages(folder)
        self.folder = folder
        self.dice = random.Random(seed)
        self.image = folder / f"d.{SEED.hex()}.raw"
        self.disk = bytearray(self.dice.randbytes(SIZE // 2).ljust(SIZE, b"\0"))
        self.parts: list[tuple[DiskPart, bytes]] = []
        self.were: list[bytes] = []
        name = {"disk": "d", "seed": SEED, "size": SIZE}
        self.images.answer("disk-begin", name)
        self.images.answer("disk-write", name | {"log": pack_write(0, SIZE, self.disk)})
        self.images.answer("disk-done", name | {"position": 0})

    def write(self) -> None:
        """A checkpoint, which is not in the image yet."""
        log = b""
        for _ in range(self.dice.randrange(4)):
            offset = self.dice.randrange(SIZE // SECTOR) * SECTOR
            length = min(self.dice.randrange(1, 24) * SECTOR, SIZE - offset)
            data = None if self.dice.random() < 0.3 else self.dice.randbytes(length)
            log += pack_write(offset, length, data)
            self.disk[offset : offset + length] = bytes(length) if data is None else data
        start = self.parts[-1][0].stop if self.parts else 0
        self.parts.append((DiskPart("d", SEED, SIZE, start, start + len(log)), log))
        self.were.append(bytes(self.disk))

    def follow(self) -> None:
        self.images.follow(VmPart(Machine("qemu-system-x86_64", (7, 2, 22), (), 1 << 20), b"", True, (self.parts[-1],)))

    def restart(self) -> None:
        """The backup was killed; another takes its place."""
        self.images = DiskImages(self.folder)
        name = {"disk": "d", "seed": SEED, "size": SIZE}
        assert self.images.answer("disk-state", name) == {"disks": []}

    def moment(self, number: int) -> DiskMoment:
        return DiskMoment(self.image, *self.parts[number])


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_undo, "FILE_BYTES", 40_000)


@pytest.mark.parametrize("seed", range(many(3, 20)))
def test_any_moment_is_what_it_was(tmp_path: Path, seed: int) -> None:
    guest = Guest(tmp_path, seed)
    opened: list[tuple[int, DiskMoment]] = []
    for number in range(40):
        guest.write()
        if guest.dice.random() < 0.3:  # a moment whose log the image does not hold yet
            opened.append((number, guest.moment(number)))
        if guest.dice.random() < 0.2:
            guest.restart()
        guest.follow()
        if guest.dice.random() < 0.3:
            which = guest.dice.randrange(number + 1)
            opened.append((which, guest.moment(which)))
    assert len(list(tmp_path.glob("*.undo.*"))) > 2
    opened += [(number, guest.moment(number)) for number in range(40)]
    for number, moment in opened:
        with closing(moment):
            assert moment.read(0, SIZE) == guest.were[number]


def test_a_death_at_any_write_changes_no_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    for deaths in range(60):
        guest = Guest(tmp_path / str(deaths), 7)
        for _ in range(3):
            guest.write()
            guest.follow()
        left = deaths

        def dying(fd: int, data: bytes, at: int) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return pwrite(fd, memoryview(data)[: max(1, len(data) // 2)], at)

        guest.write()
        while not guest.parts[-1][1]:
            guest.follow()
            guest.write()
        monkeypatch.setattr(os, "pwrite", dying)
        try:
            guest.follow()
            is_over = True
        except KeyboardInterrupt:
            is_over = False
        monkeypatch.setattr(os, "pwrite", pwrite)
        for number in range(len(guest.parts)):
            with closing(guest.moment(number)) as moment:
                assert moment.read(0, SIZE) == guest.were[number], (deaths, number)
        guest.restart()
        guest.follow()
        for number in range(len(guest.parts)):
            with closing(guest.moment(number)) as moment:
                assert moment.read(0, SIZE) == guest.were[number], (deaths, number)
        if is_over:
            return
    pytest.fail("it dies before it is done")


def test_what_is_written_to_a_moment_is_its_own(tmp_path: Path) -> None:
    guest = Guest(tmp_path, 3)
    for _ in range(5):
        guest.write()
        guest.follow()
    expected = bytearray(guest.were[2])
    with closing(guest.moment(2)) as moment, closing(guest.moment(2)) as other:
        for offset, length in ((SECTOR, SECTOR), (4096, 8192), (SIZE - SECTOR, SECTOR), (7 * SECTOR, 20 * SECTOR)):
            data = guest.dice.randbytes(length)
            moment.write(offset, data)
            expected[offset : offset + length] = data
            assert moment.read(0, SIZE) == expected
        guest.write()
        guest.follow()
        assert moment.read(0, SIZE) == expected
        assert other.read(0, SIZE) == guest.were[2]
    assert guest.image.read_bytes() == guest.were[-1]


def test_what_is_kept_is_bounded_and_what_is_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_undo, "LEAST_BYTES", SIZE)
    guest = Guest(tmp_path, 4)
    for _ in range(100):
        guest.write()
        guest.follow()
        kept = sum(path.stat().st_size for path in tmp_path.glob("*.undo.*"))
        assert kept < SIZE * 1.5
    with pytest.raises(VmError):
        guest.moment(0)
    early = guest.moment(99)
    with closing(guest.moment(97)) as moment:
        assert moment.read(0, SIZE) == guest.were[97]
    with closing(early):
        for _ in range(100):  # it has not looked, and what it needs is gone
            guest.write()
            guest.follow()
        with pytest.raises(VmError):
            early.read(0, SIZE)


def test_an_image_that_the_guest_runs_on_is_no_moment(tmp_path: Path) -> None:
    guest = Guest(tmp_path, 5)
    for _ in range(5):
        guest.write()
        guest.follow()
    with closing(guest.moment(2)) as moment:
        guest.images.hand_over([guest.parts[-1][0]])
        with pytest.raises(VmError):
            moment.read(0, SECTOR)
    for number in (2, 4):
        with pytest.raises(VmError):
            guest.moment(number)


def test_a_checkpoint_that_overwrites_very_much_ends_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_undo, "MOST_BLOCKS", 6)
    guest = Guest(tmp_path, 6)
    for _ in range(30):
        guest.write()
        guest.follow()
        with closing(guest.moment(-1)) as moment:
            assert moment.read(0, SIZE) == guest.were[-1]
    with pytest.raises(VmError):
        guest.moment(0)
