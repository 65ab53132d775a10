"""What a running primary or backup says of itself: logs, metrics, and words to systemd.

It keeps no truth: nothing that decides anything is read from here.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import socketserver
import sys
import threading
import wsgiref.simple_server
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, TextIO

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, make_wsgi_app

from remus_ckpt.errors import LinkError
from remus_ckpt.service.transport import Address

LogFormat = Literal["text", "json"]

_logger = logging.getLogger("remus_ckpt")
# A program that has configured no logs of its own is not to find ours on its standard error.
_logger.addHandler(logging.NullHandler())
_PLAIN_ATTRIBUTES = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName", "fields"}
"""What every record has; all else was given as `extra`."""


def log(event: str, /, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Say that something happened.

    event: a few constant words, the same each time, so that they can be searched for
    error: its traceback is logged with it
    fields: what differs from time to time, such as name="orders", epoch=17
    """
    _logger.log(level, event, extra={"fields": fields}, exc_info=error)


def configure_logs(
    format: LogFormat = "text", level: int | str = logging.INFO, stream: TextIO | None = None
) -> logging.Handler:
    """Write what is logged to standard error, one line for each record; what was configured before is replaced.

    format: "text" for people and the journal, "json" for machines: time, level, event, and the fields
    level: the lowest to be written, such as "info"
    stream: another place than standard error
    Returns the handler. A program that uses this package as a library leaves this alone, and has its own.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if format == "json" else _Text())
    for old in _logger.handlers[:]:
        _logger.removeHandler(old)
        old.close()
    _logger.addHandler(handler)
    _logger.setLevel(level.upper() if isinstance(level, str) else level)
    _logger.propagate = False
    return handler


def _as_plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


class _Json(logging.Formatter):
    """One JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.parts(record), default=_as_plain)

    def parts(self, record: logging.LogRecord) -> dict[str, Any]:
        """What the record says: time, level and event, then the fields."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        parts: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        fields = dict(getattr(record, "fields", {}))
        fields |= {key: value for key, value in record.__dict__.items() if key not in _PLAIN_ATTRIBUTES}
        if record.exc_info and record.exc_info[0] is not None:
            fields["traceback"] = self.formatException(record.exc_info)
        for key, value in fields.items():
            parts[f"{key}_" if key in parts else key] = value
        return parts


class _Text(_Json):
    """time LEVEL event key=value …: a value with spaces or newlines is quoted, so that a record stays one line."""

    def format(self, record: logging.LogRecord) -> str:
        parts = self.parts(record)
        front = f"{parts.pop('time')} {parts.pop('level'):7} {_on_one_line(parts.pop('event'))}"
        return " ".join([front, *(f"{key}={self._value(value)}" for key, value in parts.items())])

    @staticmethod
    def _value(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.6g}"
        text = json.dumps(value, default=_as_plain, ensure_ascii=False)
        bare = text[1:-1]
        is_bare = text.startswith('"') and bare and bare.isprintable() and not set(bare) & set(' "\\=')
        return bare if is_bare else _on_one_line(text)


def _on_one_line(text: str) -> str:
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


_FAST_BUCKETS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds: from a pause of a few pages to a disk that hangs."""
_WINDOW = 1024
"""How many of the newest pauses and commits the percentiles of `status` are taken from."""


_STAGES = ("raw", "encoded", "wire")
_COMMANDS = ("fence", "takeover")
_TIMES = ("pause", "commit_latency")
_PERCENTILES = ("p50", "p99", "max")


class _Series:
    """All that is counted under one name, for `status`."""

    def __init__(self) -> None:
        self.pauses: deque[float] = deque(maxlen=_WINDOW)
        self.latencies: deque[float] = deque(maxlen=_WINDOW)
        self.both: dict[str, Any] = {
            "committed": 0,
            "raw_bytes": 0,
            "encoded_bytes": 0,
            "wire_bytes": 0,
            "fenced": 0,
            "last_commit_at": None,
        }
        """What both sides count."""
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
        }
        """What only a primary counts; of a backup, the store knows it."""


class Metrics:
    """Counts what happens to each protected name, for Prometheus and for `status`. Safe to use from any thread.

    registry: where the metrics stand; one of its own if None, so that two in one process do not meet
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        if registry is None:
            ProcessCollector(registry=self.registry)
        self.pause = self._histogram("remus_checkpoint_pause_seconds", "How long a checkpoint stopped its source")
        self.latency = self._histogram(
            "remus_commit_latency_seconds",
            "On the primary: from the first byte of a checkpoint on its way to its acknowledgement. "
            "On the backup: from the end of a checkpoint's arrival until it is checked, durable and acknowledged",
        )
        self.dirty_pages = self._counter("remus_dirty_pages", "Pages that checkpoints found changed")
        self.bytes = self._counter(
            "remus_bytes",
            "Bytes of pages (raw), of the save stream (encoded), and of that on the link (wire), "
            "sent by a primary or stored by a backup",
            "stage",
        )
        self.fenced = self._counter("remus_fenced", "Times that this side was told, or told another, to stop")
        self.committed_total = self._counter("remus_checkpoints_committed", "Checkpoints that were committed")
        self.reconnects = self._counter("remus_reconnects", "Links that were made again after one broke")
        self.epoch = self._gauge("remus_epoch", "Number of the newest committed checkpoint")
        self.lag = self._gauge("remus_replication_lag_checkpoints", "Checkpoints taken and not committed yet")
        self.committed_at = self._gauge("remus_last_commit_timestamp_seconds", "Unix time of the newest commit")
        self.term = self._gauge("remus_term", "Term of the store: it rises with each failover")
        self.connected = self._gauge("remus_connected", "1 while there is a session with the other side")
        self.promoted = self._gauge("remus_promoted", "1 where this backup has taken over, 0 while it stands by")
        self.store_bytes = self._gauge("remus_store_bytes", "Bytes of the segments that the backup holds")
        self.store_free_bytes = self._gauge("remus_store_free_bytes", "Bytes that are free where they lie")
        self.store_open = self._gauge(
            "remus_store_open", "1 where the backup serves a name, 0 where its store is refused"
        )
        self.store_errors = self._counter("remus_store_errors", "Times that the backup could not store something")
        self.command_failures = self._counter(
            "remus_command_failures", "Runs of the fencing or takeover command that failed", "command"
        )
        self._certificate_expiry: Gauge | None = None
        self._lock = threading.Lock()
        self._series: dict[str, _Series] = {}

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, ["name"], buckets=_FAST_BUCKETS, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ["name", *labels], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["name"], registry=self.registry)

    def _of(self, name: str) -> _Series:
        """With the lock held."""
        series = self._series.get(name)
        if series is None:
            series = self._series[name] = _Series()
            # From here on its absence would say something; what only one side counts begins with that side's first.
            self.fenced.labels(name)
            self.committed_total.labels(name)
            for stage in _STAGES:
                self.bytes.labels(name, stage)
        return series

    # What both sides, or a primary, count

    def checkpoint(
        self,
        name: str,
        *,
        pause_s: float,
        dirty_pages: int,
        raw_bytes: int = 0,
        encoded_bytes: int = 0,
        wire_bytes: int = 0,
    ) -> None:
        """A checkpoint was taken, by a primary.

        raw_bytes: of the pages that it carries; encoded_bytes: of its part of the save stream; wire_bytes: of that
        part as it was sent. What is not known yet is given to `add_bytes` later.
        """
        with self._lock:
            series = self._of(name)
            self.pause.labels(name).observe(pause_s)
            series.pauses.append(pause_s)
            self.dirty_pages.labels(name).inc(dirty_pages)
            self.reconnects.labels(name)
            series.primary["checkpoints"] += 1
            series.primary["dirty_pages"] = dirty_pages
            series.primary["dirty_pages_total"] += dirty_pages
            self._add_bytes(name, series, raw_bytes, encoded_bytes, wire_bytes)

    def add_bytes(self, name: str, *, raw: int = 0, encoded: int = 0, wire: int = 0) -> None:
        """Bytes were encoded, sent or received."""
        with self._lock:
            self._add_bytes(name, self._of(name), raw, encoded, wire)

    def _add_bytes(self, name: str, series: _Series, *sizes: int) -> None:
        for stage, size in zip(_STAGES, sizes, strict=True):
            if size:
                self.bytes.labels(name, stage).inc(size)
                series.both[f"{stage}_bytes"] += size

    def committed(self, name: str, epoch: int, latency_s: float | None, at: float, digest: bytes | None = None) -> None:
        """Checkpoint `epoch` is committed.

        latency_s: how long that took; None where that is not known
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

    def set_lag(self, name: str, checkpoints: int) -> None:
        """How many checkpoints are taken and not committed."""
        with self._lock:
            self._of(name).primary["lag_checkpoints"] = checkpoints
            self.lag.labels(name).set(checkpoints)

    def set_term(self, name: str, term: int) -> None:
        """The term has been learned or has risen."""
        with self._lock:
            self._of(name).primary["term"] = term
            self.term.labels(name).set(term)

    def set_connected(self, name: str, connected: bool) -> None:
        """A session has begun or ended."""
        with self._lock:
            self._of(name).primary["connected"] = connected
            self.connected.labels(name).set(connected)

    def reconnected(self, name: str) -> None:
        """A link that was broken has been made again."""
        with self._lock:
            self._of(name).primary["reconnects"] += 1
            self.reconnects.labels(name).inc()

    def fence(self, name: str) -> None:
        """One side has been told that another has taken over."""
        with self._lock:
            self._of(name).both["fenced"] += 1
            self.fenced.labels(name).inc()

    def watch_certificate(self, expires: Callable[[], datetime]) -> None:
        """Show when this side's certificate expires.

        expires: asked at each scrape, for it may be renewed meanwhile
        """
        if self._certificate_expiry is None:
            self._certificate_expiry = Gauge(
                "remus_certificate_expiry_timestamp_seconds",
                "Unix time at which this side's certificate expires",
                registry=self.registry,
            )
        self._certificate_expiry.set_function(lambda: expires().timestamp())

    # What a backup counts

    def watch_store(self, name: str, directory: str | Path) -> None:
        """Show how large a store is, and what is free where it lies; looked up at each scrape.

        directory: of that name, with its segments
        """
        segments = Path(directory) / "segments"
        with self._lock:
            self._of(name)
            self.store_bytes.labels(name).set_function(lambda: _bytes_in(segments))
            self.store_free_bytes.labels(name).set_function(lambda: _free_bytes(segments))
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
        """The store of a name cannot be opened; `watch_store` says that it could be."""
        with self._lock:
            self._of(name)
            self.store_errors.labels(name).inc()
            self.store_open.labels(name).set(0)

    def store_failed(self, name: str) -> None:
        """Something could not be stored."""
        with self._lock:
            self._of(name)
            self.store_errors.labels(name).inc()

    def command_failed(self, name: str, command: Literal["fence", "takeover"]) -> None:
        """A run of one of the user's commands has failed."""
        with self._lock:
            self._of(name)
            self.command_failures.labels(name, command).inc()

    # Of all names

    def forget(self, name: str) -> None:
        """Count a name no longer, and no longer show it."""
        with self._lock:
            if self._series.pop(name, None) is None:
                return
            for stage in _STAGES:
                self.bytes.remove(name, stage)
            for command in _COMMANDS:
                self.command_failures.remove(name, command)
            for metric in (
                self.pause, self.latency, self.dirty_pages, self.fenced, self.committed_total, self.reconnects,
                self.epoch, self.lag, self.committed_at, self.term, self.connected, self.promoted, self.store_bytes,
                self.store_free_bytes, self.store_errors, self.store_open,
            ):  # fmt: skip
                metric.remove(name)

    def status(self, name: str) -> dict[str, Any]:
        """What there is to say of one name, in plain numbers, strings and dicts: {} if nothing was counted for it.

        ratio: raw bytes for each byte on the wire (of the stream where nothing was sent), None without any
        pause_ms, commit_latency_ms: {"p50", "p99", "max"} of the newest 1,024, None without any
        """
        return self._status(name, is_primary=True)

    def backup_status(self, name: str) -> dict[str, Any]:
        """The same of a backup, without what only a primary counts."""
        return self._status(name, is_primary=False)

    def _status(self, name: str, *, is_primary: bool) -> dict[str, Any]:
        with self._lock:
            series = self._series.get(name)
            if series is None:
                return {}
            status = (series.primary if is_primary else {}) | series.both
            pauses, latencies = list(series.pauses), list(series.latencies)
        sent = status["wire_bytes"] or status["encoded_bytes"]
        return (
            status
            | {"ratio": status["raw_bytes"] / sent if sent else None}
            | ({"pause_ms": _in_ms(summarize(pauses))} if is_primary else {})
            | {"commit_latency_ms": _in_ms(summarize(latencies))}
        )

    def names(self) -> list[str]:
        """All that something was counted for."""
        with self._lock:
            return sorted(self._series)

    def serve(self, where: str) -> MetricsServer:
        """Serve /metrics over HTTP until it is closed.

        where: HOST:PORT, or a port alone, which is one of this machine only
        Raises LinkError.
        """
        return MetricsServer(where, self.registry)


def summarize(values: Sequence[float]) -> dict[str, float] | None:
    """{"p50", "p99", "max"} by nearest rank, None of none."""
    if not values:
        return None
    ordered = sorted(values)
    rank = {quantile: ordered[math.ceil(quantile / 100 * len(ordered)) - 1] for quantile in (50, 99)}
    return {"p50": rank[50], "p99": rank[99], "max": ordered[-1]}


def _in_ms(seconds: dict[str, float] | None) -> dict[str, float] | None:
    return None if seconds is None else {key: value * 1e3 for key, value in seconds.items()}


def flatten(status: dict[str, Any]) -> dict[str, Any]:
    """A status as it goes through a heartbeat, which holds no maps: pause_ms.p50 becomes pause_p50_ms."""
    flat = {key: value for key, value in status.items() if not isinstance(value, dict)}
    for what in _TIMES:
        for percentile, value in (status.get(f"{what}_ms") or {}).items():
            flat[f"{what}_{percentile}_ms"] = value
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """What `flatten` was given, as far as it is there: another program may have sent anything."""
    status = dict(flat)
    for what in _TIMES:
        found = {percentile: status.pop(f"{what}_{percentile}_ms", None) for percentile in _PERCENTILES}
        if any(value is not None for value in found.values()):
            status[f"{what}_ms"] = found
    return status


def _bytes_in(directory: Path) -> float:
    try:
        with os.scandir(directory) as entries:
            return float(sum(entry.stat().st_size for entry in entries if entry.is_file()))
    except OSError:
        return math.nan


def _free_bytes(directory: Path) -> float:
    try:
        found = os.statvfs(directory)
    except OSError:
        return math.nan
    return float(found.f_bavail * found.f_frsize)


_MAX_SCRAPES = 8


def metrics_address(where: str) -> Address:
    """HOST:PORT, or a port alone, which is one of this machine only. Raises LinkError."""
    port = where.removeprefix(":")
    place = f"127.0.0.1:{port}" if port.isascii() and port.isdigit() else where
    try:
        return Address.parse(f"tcp://{place}")
    except LinkError:
        raise LinkError(f"metrics at {where!r}: write HOST:PORT, or a port of this machine alone") from None


class MetricsServer:
    """Metrics over HTTP, from a thread of its own.

    address: HOST:PORT where it really listens
    request_s: for all of one request, after which it is hung up on
    At most 8 are served at a time; more are hung up on at once.
    """

    def __init__(self, where: str, registry: CollectorRegistry, *, request_s: float = 5.0) -> None:
        address = metrics_address(where)
        try:
            family, _, _, _, place = socket.getaddrinfo(
                address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._server = _Server(family, place, request_s)
        except OSError as error:
            raise LinkError(f"metrics at {where}: {error.strerror or error}") from error
        self._server.set_app(make_wsgi_app(registry))
        port = self._server.socket.getsockname()[1]
        self.address = f"[{address.host}]:{port}" if ":" in address.host else f"{address.host}:{port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.5,), name="metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop, and hang up on who is being served. May be called twice."""
        _shut([self._server.socket])  # its thread wakes at once, not at its next look around
        self._server.shutdown()
        self._thread.join()
        self._server.hang_up()
        self._server.server_close()


class _Handler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = False  # so that server_close() waits for them
    request_queue_size = 64

    def __init__(self, family: int, place: Any, request_s: float) -> None:
        self.address_family = family
        self._request_s = request_s
        self._free = threading.BoundedSemaphore(_MAX_SCRAPES)
        self._live: dict[socket.socket, threading.Timer] = {}
        self._live_lock = threading.Lock()
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the resolver for our name and may wait for it.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        # A limit for each read, which the handler could have, would be passed by a peer that sends a byte a second.
        timer = threading.Timer(self._request_s, self._cut, [request])
        timer.daemon = True
        with self._live_lock:
            self._live[request] = timer
        try:
            timer.start()
            super().process_request(request, client_address)
        except BaseException:
            self._finished(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._finished(request)

    def _finished(self, request: socket.socket) -> None:
        with self._live_lock:
            timer = self._live.pop(request)
        timer.cancel()
        if timer.is_alive():
            timer.join()
        self._free.release()

    def _cut(self, request: socket.socket) -> None:
        with self._live_lock:
            if request in self._live:
                _shut([request])

    def hang_up(self) -> None:
        """On every peer that is being served."""
        with self._live_lock:
            _shut(self._live)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log("metrics request failed", level=logging.DEBUG, peer=str(client_address), error=sys.exc_info()[1])


def _shut(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def notify(state: str) -> bool:
    """Tell systemd, where it has started us: "READY=1", "STATUS=…", "WATCHDOG=1", "STOPPING=1".

    Returns whether it was told. Never raises for want of a systemd.
    Source: sd_notify(3).
    """
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.sendto(state.encode(), f"\0{where[1:]}" if where.startswith("@") else where)
        except OSError:
            return False
    return True


def watchdog_interval_s() -> float | None:
    """How often to say "WATCHDOG=1": half the time that systemd allows; None where it does not watch us.

    Source: sd_watchdog_enabled(3).
    """
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", "")
    if not microseconds.isdigit() or int(microseconds) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 2e6
