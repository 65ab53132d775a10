"""Counts and measurements, for Prometheus, for `status`, and for heartbeats."""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from remus_ckpt.observe.disks import StoreDisks
from remus_ckpt.observe.http import HttpServer
from remus_ckpt.pages import PARTS, by_part, ratio
from remus_ckpt.pause import STEPS, Capture

_FAST_BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: from a pause for a few pages to a hanging disk."""
_WINDOW = 1024
"""The percentiles of `status` cover this many of the newest pauses and commits."""


_STAGES = ("raw", "encoded", "wire")
_COMMANDS = ("fence", "takeover")
_TIMES = ("pause", "commit_latency", "output_latency", *STEPS)
_PERCENTILES = ("p50", "p99", "max")


class _Series:
    """Everything counted under one name, for `status`."""

    def __init__(self) -> None:
        self.pauses: deque[float] = deque(maxlen=_WINDOW)
        self.steps: dict[str, deque[float]] = {step: deque(maxlen=_WINDOW) for step in STEPS}
        self.latencies: deque[float] = deque(maxlen=_WINDOW)
        self.changed = np.zeros(PARTS, dtype=np.int64)
        self.both: dict[str, Any] = {
            "committed": 0,
            "raw_bytes": 0,
            "encoded_bytes": 0,
            "wire_bytes": 0,
            "fenced": 0,
            "last_commit_at": None,
        }
        """Counted by both sides."""
        self.primary: dict[str, Any] = {
            "epoch": None,
            "committed_position": None,
            "term": None,
            "connected": False,
            "lag_checkpoints": 0,
            "checkpoints": 0,
            "dirty_pages": 0,
            "dirty_pages_total": 0,
            "reconnects": 0,
            "tracking": None,
            "tracking_why": "",
            "missed_pages": 0,
            "capture": None,
            "capture_why": "",
        }
        """Counted by a primary only; for a backup, the store knows it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a backup shows of a name at each scrape.

    level, state: of its health (specs/operations.md §1)
    base_bytes: received of a full copy that is not durable yet
    unarchived_bytes: of closed segments that the archive lacks; None without one
    """

    level: int
    state: str
    base_bytes: int
    unarchived_bytes: int | None = None


class _Health(Collector):
    """Reads the health of names at each scrape: the state is a label, and an outdated label must not remain."""

    def __init__(self, look: Callable[[], Mapping[str, Seen]]) -> None:
        self._look = look

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> list[GaugeMetricFamily]:
        health = GaugeMetricFamily(
            "remus_health", "0 good, 1 warning, 2 critical; the state says why", labels=["name", "state"]
        )
        base = GaugeMetricFamily(
            "remus_base_received_bytes", "Bytes received of a full copy that is not durable yet", labels=["name"]
        )
        waiting = GaugeMetricFamily(
            "remus_unarchived_bytes", "Bytes of closed segments that are not in the archive yet", labels=["name"]
        )
        for name, seen in self._look().items():
            health.add_metric([name, seen.state], seen.level)
            base.add_metric([name], seen.base_bytes)
            if seen.unarchived_bytes is not None:
                waiting.add_metric([name], seen.unarchived_bytes)
        return [health, base, waiting]


@dataclass(frozen=True, slots=True)
class Output:
    """What a guest has sent to its network since its bridge started.

    held: not committed yet; released: committed, and sent; dropped: never committed
    latency_bounds_s, latency_counts: frames by the time between the guest sending them and the network getting them: up
        to each bound, and over the last one
    """

    held_frames: int
    held_bytes: int
    released_frames: int
    released_bytes: int
    dropped_frames: int
    latency_bounds_s: Sequence[float]
    latency_counts: Sequence[int]
    latency_sum_s: float


class _Outputs(Collector):
    """Asks the bridge at each scrape: the counts are the bridge's, and restart with it."""

    def __init__(self, name: str, look: Callable[[], Output | None]) -> None:
        self._name = name
        self._look = look

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> list[Metric]:
        output = self._look()
        found: list[Metric] = []
        for family, field, text in (
            (GaugeMetricFamily, "held_frames", "Frames of a guest that wait for their commit"),
            (GaugeMetricFamily, "held_bytes", "Bytes of these frames"),
            (CounterMetricFamily, "released_frames", "Frames that have left after their commit"),
            (CounterMetricFamily, "released_bytes", "Bytes of these frames"),
            (CounterMetricFamily, "dropped_frames", "Frames that were never committed, and are lost"),
        ):
            metric = family(f"remus_output_{field}", text, labels=["name"])
            if output is not None:
                metric.add_metric([self._name], getattr(output, field))
            found.append(metric)
        latency = HistogramMetricFamily(
            "remus_output_latency_seconds", "From when the guest sent a frame until it left", labels=["name"]
        )
        if output is not None:
            bounds = [*map(str, output.latency_bounds_s), "+Inf"]
            sums = itertools.accumulate(output.latency_counts)
            latency.add_metric([self._name], list(zip(bounds, sums, strict=True)), output.latency_sum_s)
        return [*found, latency]


class Metrics:
    """Counts what happens to each protected name, for Prometheus and for `status`. Safe to use from any thread.

    registry: where the metrics are registered; by default a new one, so that two objects in one process do not collide
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        if registry is None:
            ProcessCollector(registry=self.registry)
        self.pause = self._histogram("remus_checkpoint_pause_seconds", "How long a checkpoint stopped its source")
        self.step = Histogram(
            "remus_checkpoint_pause_step_seconds",
            "Parts of a pause: stopping the source, finding pages, copying or encoding them, resuming the source",
            ["name", "step"],
            buckets=_FAST_BUCKETS,
            registry=self.registry,
        )
        self.latency = self._histogram(
            "remus_commit_latency_seconds",
            "On the primary: from sending the first byte of a checkpoint to its acknowledgement. On the backup: "
            "from the end of a checkpoint's arrival until it is checked, durable and acknowledged",
        )
        self.dirty_pages = self._counter("remus_dirty_pages", "Pages that checkpoints found changed")
        self.by_kernel = self._gauge(
            "remus_tracking_kernel", "1 if the kernel found the pages of the newest checkpoint, 0 if a comparison did"
        )
        self.by_encoding = self._gauge(
            "remus_capture_encode",
            "1 if the newest checkpoint was encoded in its pause, 0 if it was copied there",
        )
        self.missed_pages = self._counter(
            "remus_missed_pages", "Pages that tracking missed and a comparison found: the run has compared since"
        )
        self.bytes = self._counter(
            "remus_bytes",
            "Bytes of pages (raw), of the save stream (encoded), and of that on the link (wire), "
            "sent by a primary or stored by a backup",
            "stage",
        )
        self.fenced = self._counter("remus_fenced", "Times that this side was fenced or fenced another")
        self.committed_total = self._counter("remus_checkpoints_committed", "Checkpoints committed")
        self.reconnects = self._counter("remus_reconnects", "Links re-established after one broke")
        self.epoch = self._gauge("remus_epoch", "Number of the newest committed checkpoint")
        self.lag = self._gauge("remus_replication_lag_checkpoints", "Checkpoints taken but not committed yet")
        self.committed_at = self._gauge("remus_last_commit_timestamp_seconds", "Unix time of the newest commit")
        self.term = self._gauge("remus_term", "Term of the store: it rises with each failover")
        self.connected = self._gauge("remus_connected", "1 while there is a session with the other side")
        self.promoted = self._gauge("remus_promoted", "1 if this backup has taken over, 0 while it stands by")
        self.store_open = self._gauge("remus_store_open", "1 if the backup serves a name, 0 if its store is refused")
        self.store_errors = self._counter("remus_store_errors", "Times that the backup could not store something")
        self.command_failures = self._counter(
            "remus_command_failures", "Failed runs of the fence or takeover command", "command"
        )
        self.copy_share = self._gauge(
            "remus_first_copy_share", "Share of memory that a first copy has gone over; 1 once it is done"
        )
        self._disks = StoreDisks()
        self.registry.register(self._disks)
        self._health: _Health | None = None
        self._certificate_expiry: Gauge | None = None
        self._expires: Callable[[], datetime] | None = None
        self._lock = threading.Lock()
        self._series: dict[str, _Series] = {}

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["name"], buckets=_FAST_BUCKETS, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ["name", *labels], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["name"], registry=self.registry)

    def _of(self, name: str) -> _Series:
        """The series of a name. The caller holds the lock."""
        series = self._series.get(name)
        if series is None:
            series = self._series[name] = _Series()
            # From now on, its absence would mean something; what only one side counts begins with that side's first.
            self.fenced.labels(name)
            self.committed_total.labels(name)
            for stage in _STAGES:
                self.bytes.labels(name, stage)
        return series

    # Counted by both sides, or by a primary

    def checkpoint(
        self,
        name: str,
        *,
        pause_s: float,
        dirty_pages: int,
        steps_s: Mapping[str, float] | None = None,
        raw_bytes: int = 0,
        encoded_bytes: int = 0,
        wire_bytes: int = 0,
    ) -> None:
        """A primary has taken a checkpoint.

        steps_s: time of each step of the pause, by its name in STEPS
        raw_bytes: of the pages that it carries; encoded_bytes: of its part of the save stream; wire_bytes: of that
            part as sent. Pass what is not yet known to `add_bytes` later.
        """
        with self._lock:
            series = self._of(name)
            self.pause.labels(name).observe(pause_s)
            series.pauses.append(pause_s)
            for step, seconds in (steps_s or {}).items():
                self.step.labels(name, step).observe(seconds)
                series.steps[step].append(seconds)
            self.dirty_pages.labels(name).inc(dirty_pages)
            self.reconnects.labels(name)
            self.copy_share.labels(name).set(1.0)
            series.primary["checkpoints"] += 1
            series.primary["dirty_pages"] = dirty_pages
            series.primary["dirty_pages_total"] += dirty_pages
            self._add_bytes(name, series, raw_bytes, encoded_bytes, wire_bytes)

    def found(self, name: str, way: Literal["kernel", "compare"], why: str, missed_pages: int) -> bool:
        """Record how the pages of a checkpoint were found; returns whether more were missed.

        why: why all memory was compared
        missed_pages: total number of pages found by comparison alone
        """
        with self._lock:
            primary = self._of(name).primary
            self.by_kernel.labels(name).set(way == "kernel")
            self.missed_pages.labels(name).inc(missed_pages - primary["missed_pages"])
            grew: bool = missed_pages > primary["missed_pages"]
            primary |= {"tracking": way, "tracking_why": why, "missed_pages": missed_pages}
            return grew

    def changed(self, name: str, pfns: NDArray[np.int64], pages: int) -> None:
        """Count the changed pages that a checkpoint carries, by part of memory.

        pages: of all memory
        """
        counts = by_part(pfns, pages)
        with self._lock:
            self._of(name).changed += counts

    def changed_by_part(self, name: str) -> list[int]:
        """How many changed pages checkpoints have carried, for each of PARTS parts of memory; [] if none was counted
        for that name."""
        with self._lock:
            series = self._series.get(name)
            return [] if series is None else series.changed.tolist()

    def captured(self, name: str, way: Capture, why: str) -> None:
        """Record what was done to the pages of a checkpoint in its pause.

        why: why they were copied
        """
        with self._lock:
            self._of(name).primary |= {"capture": way, "capture_why": why}
            self.by_encoding.labels(name).set(way == "encode")

    def add_bytes(self, name: str, *, raw: int = 0, encoded: int = 0, wire: int = 0) -> None:
        """Add bytes that were encoded, sent or received."""
        with self._lock:
            self._add_bytes(name, self._of(name), raw, encoded, wire)

    def _add_bytes(self, name: str, series: _Series, *sizes: int) -> None:
        for stage, size in zip(_STAGES, sizes, strict=True):
            if size:
                self.bytes.labels(name, stage).inc(size)
                series.both[f"{stage}_bytes"] += size

    def committed(self, name: str, epoch: int, latency_s: float | None, at: float, digest: bytes | None = None) -> None:
        """Checkpoint `epoch` is committed.

        latency_s: how long that took, None if unknown
        at: Unix time
        digest: of the position, for `status`
        """
        with self._lock:
            series = self._of(name)
            self.committed_total.labels(name).inc()
            self.epoch.labels(name).set(epoch)
            self.committed_at.labels(name).set(at)
            if latency_s is not None:
                self.latency.labels(name).observe(latency_s)
                series.latencies.append(latency_s)
            series.both["committed"] += 1
            series.both["last_commit_at"] = at
            series.primary["epoch"] = epoch
            series.primary["committed_position"] = None if digest is None else f"{epoch}:{digest.hex()}"

    def set_copy_share(self, name: str, share: float) -> None:
        """How much of memory a first copy has gone over, from 0 to 1."""
        with self._lock:
            self._of(name)
            self.copy_share.labels(name).set(share)

    def set_lag(self, name: str, checkpoints: int) -> None:
        """Set how many checkpoints are taken but not committed."""
        with self._lock:
            self._of(name).primary["lag_checkpoints"] = checkpoints
            self.lag.labels(name).set(checkpoints)

    def set_term(self, name: str, term: int) -> None:
        """The term is now known, or has risen."""
        with self._lock:
            self._of(name).primary["term"] = term
            self.term.labels(name).set(term)

    def set_connected(self, name: str, connected: bool) -> None:
        """A session has begun or ended."""
        with self._lock:
            self._of(name).primary["connected"] = connected
            self.connected.labels(name).set(connected)

    def reconnected(self, name: str) -> None:
        """A broken link has been replaced."""
        with self._lock:
            self._of(name).primary["reconnects"] += 1
            self.reconnects.labels(name).inc()

    def fence(self, name: str) -> None:
        """This side has been told that another has taken over."""
        with self._lock:
            self._of(name).both["fenced"] += 1
            self.fenced.labels(name).inc()

    def watch_health(self, look: Callable[[], Mapping[str, Seen]] | None) -> None:
        """Show the health of each name. look: called at each scrape; None: show it no longer"""
        before, self._health = self._health, None if look is None else _Health(look)
        if before is not None:
            self.registry.unregister(before)
        if self._health is not None:
            self.registry.register(self._health)

    def watch_output(self, name: str, look: Callable[[], Output | None]) -> None:
        """Show what a guest sends. look: called at each scrape; returns None while nobody knows"""
        self.registry.register(_Outputs(name, look))

    def watch_certificate(self, expires: Callable[[], datetime]) -> None:
        """Show when this side's certificate expires.

        expires: called at each scrape, since the certificate may be renewed
        """
        if self._certificate_expiry is None:
            self._certificate_expiry = Gauge(
                "remus_certificate_expiry_timestamp_seconds",
                "Unix time at which this side's certificate expires",
                registry=self.registry,
            )
        self._certificate_expiry.set_function(lambda: expires().timestamp())
        self._expires = expires

    # Counted by a backup

    def watch_store(self, name: str, directory: str | Path) -> None:
        """Show the size of a store and the free space on its disk, both looked up at each scrape (disks.py).

        directory: that of the name, with its segments
        """
        self._disks.watch(name, Path(directory) / "segments")
        with self._lock:
            self._of(name)
            self.store_errors.labels(name)
            self.store_open.labels(name).set(1)
            for command in _COMMANDS:
                self.command_failures.labels(name, command)

    def set_promoted(self, name: str, promoted: bool) -> None:
        """The store has taken over, or is a standby (again)."""
        with self._lock:
            self._of(name)
            self.promoted.labels(name).set(promoted)

    def store_refused(self, name: str) -> None:
        """The store of a name cannot be opened, until `watch_store` is called."""
        with self._lock:
            self._of(name)
            self.store_errors.labels(name).inc()
            self.store_open.labels(name).set(0)

    def store_failed(self, name: str) -> None:
        """A write to the store has failed."""
        with self._lock:
            self._of(name)
            self.store_errors.labels(name).inc()

    def command_failed(self, name: str, command: Literal["fence", "takeover"]) -> None:
        """One of the user's commands has failed."""
        with self._lock:
            self._of(name)
            self.command_failures.labels(name, command).inc()

    # For all names

    def forget(self, name: str) -> None:
        """Stop counting and showing a name."""
        self._disks.forget(name)
        with self._lock:
            if self._series.pop(name, None) is None:
                return
            for stage in _STAGES:
                self.bytes.remove(name, stage)
            for step in STEPS:
                self.step.remove(name, step)
            for command in _COMMANDS:
                self.command_failures.remove(name, command)
            for metric in (
                self.pause, self.latency, self.dirty_pages, self.fenced, self.committed_total, self.reconnects,
                self.epoch, self.lag, self.committed_at, self.term, self.connected, self.promoted,
                self.store_errors, self.store_open, self.by_kernel, self.by_encoding, self.missed_pages,
                self.copy_share,
            ):  # fmt: skip
                metric.remove(name)

    def status(self, name: str) -> dict[str, Any]:
        """The figures of one name as plain numbers, strings and dicts; {} if nothing was counted for it.

        certificate_expires: Unix time, None without TLS
        ratio: encoded bytes for each raw byte (`pages.ratio`), None without any
        pause_ms, its steps stop_ms, find_ms, copy_ms and resume_ms, commit_latency_ms: {"p50", "p99", "max"} of the
            newest 1,024, None without any
        """
        status = self._status(name, is_primary=True)
        return status and status | {"certificate_expires": self._expires and self._expires().timestamp()}

    def backup_status(self, name: str) -> dict[str, Any]:
        """The same for a backup, without what only a primary counts.

        changed_by_part: as the method
        """
        status = self._status(name, is_primary=False)
        return status and status | {"changed_by_part": self.changed_by_part(name)}

    def _status(self, name: str, *, is_primary: bool) -> dict[str, Any]:
        with self._lock:
            series = self._series.get(name)
            if series is None:
                return {}
            status = (series.primary if is_primary else {}) | series.both
            pauses, latencies = list(series.pauses), list(series.latencies)
            steps = {f"{step}_ms": list(seconds) for step, seconds in series.steps.items()}
        return (
            status
            | {"ratio": ratio(status["encoded_bytes"], status["raw_bytes"])}
            | ({"pause_ms": _in_ms(summarize(pauses))} if is_primary else {})
            | ({step: _in_ms(summarize(seconds)) for step, seconds in steps.items()} if is_primary else {})
            | {"commit_latency_ms": _in_ms(summarize(latencies))}
        )

    def names(self) -> list[str]:
        """All names that something was counted for."""
        with self._lock:
            return sorted(self._series)

    def serve(self, where: str) -> HttpServer:
        """Serve /metrics over HTTP until the server is closed.

        where: HOST:PORT, or a port alone, which listens on this machine only
        Raises LinkError.
        """
        return HttpServer(where, make_wsgi_app(self.registry), "metrics")


def summarize(values: Sequence[float]) -> dict[str, float] | None:
    """{"p50", "p99", "max"} by nearest rank; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    rank = {quantile: ordered[math.ceil(quantile / 100 * len(ordered)) - 1] for quantile in (50, 99)}
    return {"p50": rank[50], "p99": rank[99], "max": ordered[-1]}


def _in_ms(seconds: dict[str, float] | None) -> dict[str, float] | None:
    return None if seconds is None else {key: value * 1e3 for key, value in seconds.items()}


def flatten(status: dict[str, Any]) -> dict[str, Any]:
    """Flatten a status for a heartbeat, which holds no nested maps: pause_ms.p50 becomes pause_p50_ms."""
    flat = {key: value for key, value in status.items() if not isinstance(value, dict)}
    for what in _TIMES:
        for percentile, value in (status.get(f"{what}_ms") or {}).items():
            flat[f"{what}_{percentile}_ms"] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Undo `flatten` as far as possible: the sender is not trusted."""
    status = dict(flat)
    for what in _TIMES:
        found = {percentile: status.pop(f"{what}_{percentile}_ms", None) for percentile in _PERCENTILES}
        if any(value is not None for value in found.values()):
            status[f"{what}_ms"] = found
    return status
