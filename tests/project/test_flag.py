"""The flag that a poll can see."""

from __future__ import annotations

import gc
import os
import select
import warnings

from remus_ckpt.flag import Flag


def is_readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


def test_it_is_seen_until_it_is_cleared() -> None:
    flag = Flag()
    assert not is_readable(flag.fileno())
    flag.set()
    flag.set()
    assert is_readable(flag.fileno())
    flag.clear()
    flag.clear()
    assert not is_readable(flag.fileno())
    flag.close()


def test_after_its_end_nothing_happens_to_whoever_has_its_number() -> None:
    flag = Flag()
    number = flag.fileno()
    flag.close()
    flag.close()
    ours, theirs = os.pipe()
    assert number in (ours, theirs)
    flag.set()
    flag.clear()
    assert flag.fileno() == -1
    assert not is_readable(ours)
    os.close(ours)
    os.close(theirs)


def test_one_without_references_frees_its_descriptor_and_says_nothing() -> None:
    before = descriptors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Flag().set()
        gc.collect()
    assert descriptors() == before
