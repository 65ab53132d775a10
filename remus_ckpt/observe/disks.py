"""What the stores take on their disks, measured at each scrape: a disk that hangs holds up no scrape."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import defaultdict
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from remus_ckpt.disk import free_bytes

LOOK_S = 1.0
"""How long a scrape waits, for all disks together."""


def device_of(path: Path) -> int:
    """The number of its file system, −1 if unknown."""
    try:
        return os.stat(path).st_dev
    except OSError:
        return -1


class StoreDisks(Collector):
    """The bytes of each store, and the free bytes of its file system. Any thread may call anything.

    Each file system is measured in its own thread. If one has not answered by the end of the wait, all stores on it
    show NaN, and it is not asked again until it answers.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by it:
        self._places: dict[str, tuple[int, Path]] = {}  # of each name: its device and its segments
        self._looks: dict[int, _Look] = {}  # the last one at each device

    def watch(self, name: str, segments: Path) -> None:
        """Show a store from now on."""
        device = device_of(segments)
        with self._lock:
            self._places[name] = device, segments

    def forget(self, name: str) -> None:
        """Stop showing it."""
        with self._lock:
            self._places.pop(name, None)

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> list[GaugeMetricFamily]:
        size = GaugeMetricFamily("remus_store_bytes", "Bytes of the segments that the backup holds", labels=["name"])
        free = GaugeMetricFamily(
            "remus_store_free_bytes", "Free bytes on the file system that holds them", labels=["name"]
        )
        with self._lock:
            names = list(self._places)
            looks = self._begin()
        deadline = time.monotonic() + LOOK_S
        found: dict[str, tuple[float, float]] = {}
        for look in looks:
            if look.is_over.wait(max(deadline - time.monotonic(), 0.0)):
                found |= look.found
        for name in names:
            for family, value in zip((size, free), found.get(name, (math.nan, math.nan)), strict=True):
                family.add_metric([name], value)
        return [size, free]

    def _begin(self) -> list[_Look]:
        """Start a look at every device that none looks at yet; the lock is held."""
        places: dict[int, dict[str, Path]] = defaultdict(dict)
        for name, (device, segments) in self._places.items():
            places[device][name] = segments
        before, self._looks = self._looks, {}
        for device, there in places.items():
            look = before.get(device)
            self._looks[device] = look if look is not None and not look.is_over.is_set() else _Look(there)
        return list(self._looks.values())


class _Look:
    """One look at the stores of a file system, in its own thread.

    found: their bytes and the free ones, by name; complete once `is_over` is set
    """

    def __init__(self, places: dict[str, Path]) -> None:
        self.is_over = threading.Event()
        self.found: dict[str, tuple[float, float]] = {}
        self._places = places
        try:
            threading.Thread(target=self._run, name="disks", daemon=True).start()
        except RuntimeError:  # no more threads are allowed: nothing is found
            self.is_over.set()

    def _run(self) -> None:
        for name, segments in self._places.items():
            try:
                with os.scandir(segments) as entries:
                    size = sum(entry.stat().st_size for entry in entries if entry.is_file())
                self.found[name] = float(size), float(free_bytes(segments))
            except OSError:
                continue
        self.is_over.set()
