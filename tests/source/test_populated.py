"""The first copy maps the pages that later pauses read, and fills no hole."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.source.compare import Compare
from remus_ckpt.source.shared_file import MappedFile

_PAGES = 4096


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    path = Path("/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) / f"remus-populated-{os.getpid()}"
    yield path
    path.unlink()


def test_a_pause_after_the_first_copy_takes_no_faults(path: Path) -> None:
    path.write_bytes(b"\1" * (_PAGES * PAGE_SIZE))
    memory = MappedFile(path)
    for _ in Compare(memory).copy_live():
        pass
    pfns = np.arange(0, _PAGES, 2)
    out = np.ones((len(pfns), PAGE_SIZE), dtype=np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory.read(pfns, out)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert (out == 1).all()
    memory.close()
    assert faults < len(pfns) // 16  # a fault maps 16 pages at most


def test_holes_stay_holes(path: Path) -> None:
    with open(path, "wb") as file:
        for at in (3, 1000, 1001, _PAGES - 1):
            os.pwrite(file.fileno(), b"\1" * PAGE_SIZE, at * PAGE_SIZE)
    used = path.stat().st_blocks
    memory = MappedFile(path)
    found = np.concatenate([pfns for pfns, _ in Compare(memory).copy_live()])
    assert path.stat().st_blocks == used
    memory.close()
    assert len(found) == 4  # the sender, which would have put them into the copy, is not here
