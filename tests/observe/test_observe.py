"""Logs, metrics and words to systemd, as those who read them see them."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgpack
import numpy as np
import pytest
import typer
from prometheus_client import make_wsgi_app
from prometheus_client.parser import text_string_to_metric_families
from services import make_keys

from remus_ckpt.cli import app
from remus_ckpt.errors import LinkError
from remus_ckpt.observe import disks
from remus_ckpt.observe.http import HttpServer
from remus_ckpt.observe.log import LogFormat, configure_logs, log
from remus_ckpt.observe.metrics import Metrics, flatten, summarize, unflatten
from remus_ckpt.observe.systemd import notify, watchdog_interval_s

UNITS = Path(__file__).parents[2] / "tools" / "systemd"


# Logs


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The package's logger, put back as it was."""
    logger = logging.getLogger("remus_ckpt")
    before = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def logged(format: LogFormat, level: int | str = "info") -> io.StringIO:
    stream = io.StringIO()
    configure_logs(format, level, stream)
    return stream


@pytest.mark.usefixtures("logger")
def test_a_record_is_one_json_object_on_one_line() -> None:
    stream = logged("json")
    fields = {
        "name": "orders",
        "epoch": np.int64(7),
        "lag_s": 0.5,
        "text": 'two\nlines "quoted" ü',
        "digest": b"\1\xff",
    }
    log("checkpoint committed", **fields)
    log("second", level=logging.ERROR)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "info",
        "event": "checkpoint committed",
        **fields,
        "epoch": 7,
        "digest": "01ff",
    }
    assert second["level"] == "error"


@pytest.mark.usefixtures("logger")
def test_no_field_hides_what_every_record_has() -> None:
    stream = logged("json")
    log("said", event="fake", time=1, message="m", lineno=3)
    record = json.loads(stream.getvalue())
    assert record["event"] == "said"
    assert (record["event_"], record["time_"], record["message"], record["lineno"]) == ("fake", 1, "m", 3)


@pytest.mark.usefixtures("logger")
def test_plain_logging_with_extra_is_understood() -> None:
    stream = logged("json", logging.DEBUG)
    logging.getLogger("remus_ckpt.store").debug("opened %s", "x", extra={"segments": 3})
    record = json.loads(stream.getvalue())
    assert (record["event"], record["level"], record["segments"]) == ("opened x", "debug", 3)


@pytest.mark.usefixtures("logger")
@pytest.mark.parametrize("format", ["text", "json"])
def test_an_error_brings_its_traceback_on_the_same_line(format: LogFormat) -> None:
    stream = logged(format)
    try:
        raise RuntimeError("odd")
    except RuntimeError as error:
        log("failed", error=error)
    (line,) = stream.getvalue().splitlines()
    assert "RuntimeError: odd" in line
    assert "test_observe.py" in line


@pytest.mark.usefixtures("logger")
def test_text_is_one_line_that_can_be_taken_apart_again() -> None:
    stream = logged("text")
    values = {"plain": "orders", "spaced": "a b", "cut": "x\ny\u2028z\x1b[2J", "quote": '"', "empty": "", "none": None}
    log("an event\nforged", **values, epoch=7)
    (line,) = stream.getvalue().splitlines()
    assert "\x1b" not in line
    assert " epoch=7" in line
    assert " plain=orders " in line
    for key, value in values.items():
        if key == "plain":
            continue
        rest = line[line.index(f" {key}=") + len(key) + 2 :]
        read, _ = json.JSONDecoder().raw_decode(rest.replace("\\x1b", "\\u001b"))
        assert read == value


@pytest.mark.usefixtures("logger")
def test_levels_and_a_second_configuration() -> None:
    first = logged("text")
    second = logged("text", "warning")
    log("quiet")
    log("loud", level=logging.WARNING)
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1


def test_logs_go_to_standard_error() -> None:
    program = "from remus_ckpt.observe.log import *; configure_logs('json'); log('started', pid=1)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert ran.stdout == ""
    assert json.loads(ran.stderr)["pid"] == 1


def test_a_program_that_configures_no_logs_sees_none() -> None:
    program = "from remus_ckpt.observe.log import log; log('no link', level=40)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert ran.stdout == ran.stderr == ""


# Metrics


def scrape(address: str, path: str = "/metrics") -> dict[tuple[str, ...], float]:
    """(sample, name, values of the other labels …) → value"""
    with urllib.request.urlopen(f"http://{address}{path}", timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    return {
        (sample.name, sample.labels.pop("name", ""), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_metric_is_served() -> None:
    metrics = Metrics()
    metrics.checkpoint("orders", pause_s=0.0003, dirty_pages=10, raw_bytes=40960, encoded_bytes=900, wire_bytes=800)
    metrics.checkpoint("orders", pause_s=4.0, dirty_pages=5)
    metrics.add_bytes("orders", raw=1, encoded=2, wire=3)
    metrics.committed("orders", 17, 0.002, 1e9)
    metrics.committed("orders", 18, None, 2e9)
    metrics.set_lag("orders", 2)
    metrics.set_term("orders", 4)
    metrics.set_connected("orders", True)
    metrics.reconnected("orders")
    metrics.fence("orders")
    metrics.set_connected("other", False)
    metrics.set_promoted("orders", True)
    metrics.store_failed("orders")
    metrics.command_failed("orders", "takeover")
    metrics.watch_certificate(lambda: datetime.fromtimestamp(3e9, UTC))
    with metrics.serve("127.0.0.1:0") as server:
        seen = scrape(server.address)
    expected = {
        ("remus_checkpoint_pause_seconds_bucket", "orders", "0.00025"): 0,
        ("remus_checkpoint_pause_seconds_bucket", "orders", "0.0005"): 1,
        ("remus_checkpoint_pause_seconds_bucket", "orders", "10.0"): 2,
        ("remus_checkpoint_pause_seconds_count", "orders"): 2,
        ("remus_commit_latency_seconds_count", "orders"): 1,
        ("remus_commit_latency_seconds_sum", "orders"): 0.002,
        ("remus_dirty_pages_total", "orders"): 15,
        ("remus_bytes_total", "orders", "raw"): 40961,
        ("remus_bytes_total", "orders", "encoded"): 902,
        ("remus_bytes_total", "orders", "wire"): 803,
        ("remus_fenced_total", "orders"): 1,
        ("remus_checkpoints_committed_total", "orders"): 2,
        ("remus_reconnects_total", "orders"): 1,
        ("remus_epoch", "orders"): 18,
        ("remus_replication_lag_checkpoints", "orders"): 2,
        ("remus_last_commit_timestamp_seconds", "orders"): 2e9,
        ("remus_term", "orders"): 4,
        ("remus_connected", "orders"): 1,
        ("remus_connected", "other"): 0,
        ("remus_promoted", "orders"): 1,
        ("remus_store_errors_total", "orders"): 1,
        ("remus_command_failures_total", "orders", "takeover"): 1,
        ("remus_certificate_expiry_timestamp_seconds", ""): 3e9,
    }
    assert {key: seen.get(key) for key in expected} == expected
    assert any(key[0] == "process_resident_memory_bytes" for key in seen)


def test_what_is_forgotten_is_gone(tmp_path: Path) -> None:
    metrics = Metrics()
    for name in ("a", "b"):
        metrics.checkpoint(name, pause_s=0.1, dirty_pages=1, wire_bytes=1, steps_s={"stop": 0.1})
        metrics.captured(name, "encode", "")
        metrics.watch_store(name, tmp_path)
        metrics.set_promoted(name, False)
        metrics.command_failed(name, "fence")
    metrics.forget("a")
    metrics.forget("never seen")
    assert metrics.names() == ["b"]
    assert metrics.status("a") == {}
    with metrics.serve("0") as server:
        assert {key[1] for key in scrape(server.address) if key[0].startswith("remus_")} == {"b"}


def test_status_is_plain_and_says_what_is_new() -> None:
    metrics = Metrics()
    assert metrics.status("orders") == {}
    metrics.set_connected("orders", True)
    empty = metrics.status("orders")
    assert (empty["pause_ms"], empty["commit_latency_ms"], empty["ratio"], empty["epoch"]) == (None, None, None, None)
    for number in range(5000):
        metrics.checkpoint("orders", pause_s=number / 1000, dirty_pages=number, raw_bytes=4096, encoded_bytes=64)
    metrics.committed("orders", 9, 0.25, 1e9, b"\xab\xcd")
    status = metrics.status("orders")
    assert msgpack.unpackb(msgpack.packb(status)) == json.loads(json.dumps(status)) == status
    assert status["ratio"] == 1 / 64
    assert status["dirty_pages"] == 4999
    assert status["pause_ms"] == pytest.approx({"p50": 4487, "p99": 4989, "max": 4999})  # of 3976 … 4999
    assert status["commit_latency_ms"] == {"p50": 250, "p99": 250, "max": 250}
    assert (status["epoch"], status["committed_position"], status["connected"]) == (9, "9:abcd", True)
    metrics.add_bytes("orders", wire=5000 * 32)
    assert metrics.status("orders")["ratio"] == 1 / 64, "what a link saves is not in it"


def test_pages_that_tracking_missed_are_counted_once() -> None:
    metrics = Metrics()
    assert not metrics.found("orders", "kernel", "", 0)
    assert metrics.found("orders", "compare", "it had missed 2 pages", 2)
    assert not metrics.found("orders", "compare", "it had missed 2 pages", 2)
    with metrics.serve("0") as server:
        scraped = scrape(server.address)
        assert scraped["remus_missed_pages_total", "orders"] == 2
        assert scraped["remus_tracking_kernel", "orders"] == 0
        metrics.captured("orders", "copy", "too many")
        assert scrape(server.address)["remus_capture_encode", "orders"] == 0
        metrics.captured("orders", "encode", "")
        assert scrape(server.address)["remus_capture_encode", "orders"] == 1
    status = metrics.status("orders")
    assert (status["tracking"], status["missed_pages"]) == ("compare", 2)


def test_a_status_goes_through_a_heartbeat_and_comes_back() -> None:
    metrics = Metrics()
    steps = {"stop": 0.1, "find": 0.2, "copy": 0.1, "encode": 0.05, "resume": 0.05}
    metrics.checkpoint("orders", pause_s=0.5, dirty_pages=3, steps_s=steps)
    assert not metrics.found("orders", "kernel", "", 0)
    metrics.captured("orders", "copy", "too many")
    metrics.committed("orders", 1, 0.25, 1e9, bytes(32))
    status = metrics.status("orders")
    flat = flatten(status)
    assert not any(isinstance(value, dict) for value in flat.values())
    assert unflatten(flat) == status
    assert status["find_ms"] == {"p50": 200, "p99": 200, "max": 200}
    assert (status["tracking"], status["tracking_why"]) == ("kernel", "")
    assert (status["capture"], status["capture_why"], status["encode_ms"]["max"]) == ("copy", "too many", 50)
    # What another program says.
    assert unflatten({"pause_ms": 1, "pause_p99_ms": 2.0, "x_p50_ms": 3}) == {
        "pause_ms": {"p50": None, "p99": 2.0, "max": None},
        "x_p50_ms": 3,
    }
    assert unflatten({"pause_ms": 1}) == {"pause_ms": 1}


def test_a_disk_that_hangs_holds_up_no_scrape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on another disk is shown, and that disk is asked again once it has answered."""
    answers = threading.Event()
    looks: list[Path] = []

    def free_bytes(path: Path) -> int:
        looks.append(path)
        if "slow" in path.parts:
            answers.wait()
        return 77

    devices = {"slow": 1, "slow too": 1, "quick": 2}
    monkeypatch.setattr(disks, "free_bytes", free_bytes)
    monkeypatch.setattr(disks, "device_of", lambda path: devices[path.parent.name])
    metrics = Metrics()
    for name in devices:
        (tmp_path / name / "segments").mkdir(parents=True)
        metrics.watch_store(name, tmp_path / name)
    with metrics.serve("0") as server:
        for _ in range(2):
            begin = time.monotonic()
            seen = scrape(server.address)
            assert disks.LOOK_S <= time.monotonic() - begin < disks.LOOK_S + 2.0
            assert (seen["remus_store_free_bytes", "quick"], seen["remus_store_bytes", "quick"]) == (77, 0)
            for name in ("slow", "slow too"):
                assert math.isnan(seen["remus_store_free_bytes", name])
        assert [path.parent.name for path in looks].count("slow") == 1
        answers.set()
        deadline = time.monotonic() + 10.0
        while scrape(server.address)["remus_store_free_bytes", "slow too"] != 77:
            assert time.monotonic() < deadline
        metrics.forget("slow")
        assert ("remus_store_free_bytes", "slow") not in scrape(server.address)


def test_a_backup_shows_nothing_that_only_a_primary_counts(tmp_path: Path) -> None:
    metrics = Metrics()
    (tmp_path / "segments").mkdir()
    metrics.watch_store("orders", tmp_path)
    metrics.set_promoted("orders", False)
    metrics.set_term("orders", 1)
    metrics.set_connected("orders", True)
    metrics.committed("orders", 7, 0.001, 1e9, bytes(32))
    metrics.add_bytes("orders", raw=8192, encoded=100, wire=50)
    status = metrics.backup_status("orders")
    assert not status.keys() & {"pause_ms", "dirty_pages", "dirty_pages_total", "lag_checkpoints", "reconnects"}
    assert status["commit_latency_ms"] == {"p50": 1.0, "p99": 1.0, "max": 1.0}
    with metrics.serve("0") as server:
        seen = scrape(server.address)
        assert seen["remus_store_bytes", "orders"] == 0
        # Looked up when they are asked for.
        (tmp_path / "segments" / "one").write_bytes(bytes(1000))
        (tmp_path / "segments" / "two").write_bytes(bytes(234))
        seen = scrape(server.address)
        assert seen["remus_store_bytes", "orders"] == 1234
        assert seen["remus_store_free_bytes", "orders"] > 0
        shutil.rmtree(tmp_path / "segments")
        assert math.isnan(scrape(server.address)["remus_store_bytes", "orders"])
    assert seen["remus_promoted", "orders"] == seen["remus_store_errors_total", "orders"] == 0
    assert seen["remus_command_failures_total", "orders", "fence"] == 0
    shown = {key[0] for key in seen}
    assert not shown & {
        "remus_checkpoint_pause_seconds_count",
        "remus_dirty_pages_total",
        "remus_replication_lag_checkpoints",
        "remus_reconnects_total",
    }


@pytest.mark.parametrize("count", [1, 2, 3, 99, 100, 101])
def test_percentiles_by_nearest_rank(count: int) -> None:
    values = list(np.random.default_rng(count).permutation(count) + 1.0)
    summary = summarize(values)
    assert summary is not None
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        below = sum(value <= summary[name] for value in values)
        assert below >= share * count > below - 1
    assert summary["max"] == count


def test_many_threads_count_right() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(500):
            metrics.checkpoint("orders", pause_s=0.001, dirty_pages=2, wire_bytes=3)

    threads = [threading.Thread(target=count) for _ in range(6)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    status = metrics.status("orders")
    assert (status["checkpoints"], status["dirty_pages_total"], status["wire_bytes"]) == (3000, 6000, 9000)


@pytest.mark.parametrize("where", ["0", ":0", "127.0.0.1:0", "localhost:0"])
def test_where_metrics_are_served(where: str) -> None:
    with Metrics().serve(where) as server:
        host, port = server.address.rsplit(":", 1)
        assert host in ("127.0.0.1", "localhost")
        assert int(port) > 0
        scrape(server.address)


@pytest.mark.parametrize("where", ["", "host", "192.0.2.1:0", "127.0.0.1:70000", "no-such-host.invalid:1"])
def test_where_they_cannot_be(where: str) -> None:
    with pytest.raises(LinkError):
        Metrics().serve(where)


def test_an_address_that_is_taken() -> None:
    with Metrics().serve("0") as server, pytest.raises(LinkError):
        Metrics().serve(server.address)


def dial(server: HttpServer) -> socket.socket:
    host, port = server.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=20)


def test_those_who_ask_and_do_not_listen_are_bounded() -> None:
    """However many hold on, threads stay few; those beyond are hung up on; and close() does not wait for them."""
    before = threading.active_count()
    server = Metrics().serve("0")
    held = []
    for _ in range(40):
        held.append(dial(server))
        held[-1].sendall(b"GET /metrics HT")
    until = time.monotonic() + 20
    hung_up = 0
    while hung_up < 32 and time.monotonic() < until:
        hung_up = 0
        for sock in held:
            sock.setblocking(False)
            try:
                hung_up += sock.recv(1) == b""
            except BlockingIOError:
                pass
            except ConnectionResetError:
                hung_up += 1
    assert hung_up == 32
    assert threading.active_count() - before <= 1 + 2 * 8
    server.close()
    for sock in held:
        sock.close()
    assert threading.active_count() == before
    server.close()


def test_a_byte_now_and_then_renews_nothing() -> None:
    with HttpServer("0", make_wsgi_app(Metrics().registry), "metrics", request_s=0.2) as server, dial(server) as sock:
        with pytest.raises(OSError):
            for _ in range(2000):
                sock.sendall(b"G")
                time.sleep(0.01)
        scrape(server.address)


def test_bytes_that_are_no_request_do_no_harm(capfd: pytest.CaptureFixture[str]) -> None:
    with Metrics().serve("0") as server:
        for data in (b"", b"\0\xff" * 50_000, b"GET\r\n\r\n", b"POST / HTTP/1.0\r\nContent-Length: -1\r\n\r\n"):
            with dial(server) as sock:
                try:
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(1000):
                        pass
                except OSError:
                    pass
        scrape(server.address)
    assert capfd.readouterr().err == ""


# systemd


@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_abstract: bool) -> None:
    name = f"@remus-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if is_abstract else name)
        listener.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify("READY=1\nSTATUS=epoch 7 ü")
        assert listener.recv(1000).decode() == "READY=1\nSTATUS=epoch 7 ü"
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            assert not notify("WATCHDOG=1"), "no descriptor is left"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not notify("STOPPING=1")


@pytest.mark.parametrize("value", [None, "", "relative", "/nonexistent/socket", "vsock:2:1", "@" + "x" * 200])
def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if value is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    assert not notify("READY=1")


@pytest.mark.parametrize(
    ("microseconds", "pid", "expected"),
    [
        (None, None, None),
        ("30000000", None, 15.0),
        ("30000000", "ours", 15.0),
        ("1000", "1", None),
        ("0", None, None),
        ("-5", None, None),
        ("", None, None),
        ("soon", None, None),
    ],
)
def test_the_watchdog(
    monkeypatch: pytest.MonkeyPatch, microseconds: str | None, pid: str | None, expected: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", microseconds), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(os.getpid()) if value == "ours" else value)
    assert watchdog_interval_s() == expected


def unit_lines(path: Path, key: str) -> list[str]:
    return [line.removeprefix(f"{key}=") for line in path.read_text().splitlines() if line.startswith(f"{key}=")]


@pytest.mark.parametrize("path", sorted(UNITS.glob("*.service")), ids=lambda path: path.name)
def test_units_start_commands_that_exist(path: Path) -> None:
    (start,) = unit_lines(path, "ExecStart")
    program, name, *arguments = start.split()
    assert program == "/opt/remus-ckpt/bin/remus-ckpt"
    venv = Path(program).parents[1]
    install = f"python3 -m venv {venv} && {venv}/bin/pip install ."
    assert install in path.read_text()
    assert install in (UNITS.parents[1] / "docs/operate.md").read_text()
    group = typer.main.get_command(app)
    command = group.get_command(typer.Context(group), name)  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= known


def test_the_files_of_the_units_are_good(tmp_path: Path) -> None:
    """Each unit reads a file, and there is one to begin with."""
    read = {
        match[1]
        for path in UNITS.glob("*.service")
        for match in re.finditer(r"install .* (\S+\.toml) ", path.read_text())
    }
    assert read == {path.name for path in UNITS.glob("*.toml")}
    keys = make_keys(tmp_path) / "ca" / "primary"
    paths = []
    for name in sorted(read):
        text = (UNITS / name).read_text()
        assert '"/etc/remus-ckpt/keys"' in text
        paths.append(tmp_path / name)
        paths[-1].write_text(text.replace("/etc/remus-ckpt/keys", str(keys)))
    done = subprocess.run(
        [sys.executable, "-m", "remus_ckpt", "config", "check", *paths], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.count(": good") == len(paths) == 3


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="asks systemd-analyze")
@pytest.mark.parametrize("path", sorted(UNITS.glob("*.service")), ids=lambda path: path.name)
def test_systemd_understands_the_units(tmp_path: Path, path: Path) -> None:
    text = path.read_text()
    assert unit_lines(path, "Type") == ["notify"]
    assert unit_lines(path, "WatchdogSec")
    unit = tmp_path / path.name.replace("@.", "@orders.")
    # The command need not be installed where the tests run.
    unit.write_text(text.replace("ExecStart=/opt/remus-ckpt/bin/remus-ckpt", f"ExecStart={sys.executable}"))
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, check=False, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert path.name.partition(".")[0] not in ran.stderr, ran.stderr
