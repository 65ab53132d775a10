"""The page's server, without a browser: what it says, to whom, and for how long."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import math
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services import LONG_S, command, until

from remus_ckpt import Backup, protect
from remus_ckpt.dashboard import server
from remus_ckpt.dashboard.board import FIGURES, KEPT, Board, to_json
from remus_ckpt.dashboard.server import Dashboard
from remus_ckpt.dashboard.sources import OfAddress, OfBackup, OfPrimary
from remus_ckpt.errors import LinkError, RemusError
from remus_ckpt.link.address import Address
from remus_ckpt.link.dial import connect
from remus_ckpt.observe.log import configure_logs, log
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.pages import PARTS
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.protect import Protection
from remus_ckpt.store import Survey
from remus_ckpt.store.remote import Remote

PAGES = 256
TOKEN = "0123456789abcdef"
BASIC = {"Authorization": "Basic " + base64.b64encode(f"me:{TOKEN}".encode()).decode()}
ASKED = {"X-Remus-Ckpt": "failover"}


@contextmanager
def serving(*sources: Any, every_s: float = 0.1, **options: Any) -> Iterator[Dashboard]:
    board = Board(sources, every_s=every_s)
    try:
        with Dashboard("0", board, **options) as dashboard:
            yield dashboard
    finally:
        board.close()


def place(dashboard: Dashboard) -> str:
    return dashboard.url.removeprefix("http://").removesuffix("/")


def ask(
    dashboard: Dashboard, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, Any]:
    """Status and body, read as JSON where it is."""
    link = http.client.HTTPConnection(place(dashboard), timeout=LONG_S)
    link.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
    answer = link.getresponse()
    text = answer.read()
    link.close()
    return answer.status, json.loads(text) if answer.getheader("Content-Type") == "application/json" else text


def events(dashboard: Dashboard, **headers: str) -> Iterator[tuple[str, Any]]:
    """(kind, data) of each event, as a browser reads them."""
    link = http.client.HTTPConnection(place(dashboard), timeout=LONG_S)
    link.request("GET", "/events", headers=headers)
    answer = link.getresponse()
    assert answer.status == 200, answer.read()
    unpack = zlib.decompressobj(wbits=31) if answer.getheader("Content-Encoding") == "gzip" else None
    text = b""
    try:
        while True:
            more = answer.read1(1 << 16)
            if not more:
                return
            text += unpack.decompress(more) if unpack else more
            while b"\n\n" in text:
                event, _, text = text.partition(b"\n\n")
                fields = dict(line.split(b": ", 1) for line in event.split(b"\n") if b": " in line)
                if b"data" in fields or b"event" in fields:
                    data = fields.get(b"data")
                    yield fields.get(b"event", b"message").decode(), json.loads(data) if data else None
    finally:
        link.close()


def looks(dashboard: Dashboard, **headers: str) -> Iterator[dict[str, Any]]:
    return (data for kind, data in events(dashboard, **headers) if kind == "message")


@pytest.fixture
def backup(tmp_path: Path) -> Iterator[Backup]:
    with Backup(tmp_path / "store", [f"unix:{tmp_path}/sock"], policy=Policy(lease_s=2.0)) as backup:
        yield backup


@pytest.fixture
def orders(backup: Backup) -> Iterator[tuple[Any, Protection]]:
    """An array of so many pages, protected."""
    array = np.zeros((PAGES, 512), dtype=np.int64)
    with protect({"orders": array}, to=backup.addresses[0], name="orders") as protection:
        array += 1
        protection.checkpoint(wait=True)
        until(lambda: backup.status()["names"]["orders"]["committed"] == 1)  # which it counts behind the answer
        yield array, protection


def unmoved(report: dict[str, Any]) -> Any:
    """A report without what changes while nothing happens."""
    found = json.loads(to_json(report)) | {"health": None}
    for one in found["names"].values():
        for key in ("silent_s", "lease_left_s", "health"):
            del one[key]
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_events_say_what_status_says(backup: Backup, orders: tuple[Any, Protection], packed: bool) -> None:
    array, protection = orders
    for step in range(3):
        array[step * 40] += 1
        protection.checkpoint(wait=True)
    until(lambda: backup.status()["names"]["orders"]["primary"].get("epoch") == 3)  # a heartbeat has told it
    with serving(OfBackup(backup)) as dashboard:
        stream = events(dashboard, **({"Accept-Encoding": "gzip"} if packed else {}))
        kind, hello = next(stream)
        assert (kind, hello["columns"], hello["kept"], hello["may_fail_over"]) == ("hello", list(FIGURES), KEPT, False)
        kind, look = next(stream)
        assert (kind, next(stream)[0]) == ("message", "whole")
        status = ask_status(backup)
        assert unmoved(look["report"]) == unmoved(status)
        assert look["report"]["names"]["orders"]["health"]["state"] == "protected"
        figures = dict(zip(FIGURES, look["figures"]["orders"], strict=True))
        primary = status["names"]["orders"]["primary"]
        assert figures["pause_ms"] == pytest.approx(primary["pause_ms"]["p50"])
        assert figures["commit_p99_ms"] == pytest.approx(primary["commit_latency_ms"]["p99"])
        assert figures["dirty_pages"] == primary["dirty_pages"]
        assert figures["dirty_pages"] >= 1


def ask_status(backup: Backup) -> dict[str, Any]:
    """As `status --json` does."""
    from remus_ckpt.link.control import ask as ask_backup

    return ask_backup(connect(Address.parse(backup.addresses[0])), "status", {})


def test_the_past_has_the_rates_and_where_memory_changes(backup: Backup, orders: tuple[Any, Protection]) -> None:
    array, protection = orders
    with serving(OfBackup(backup)) as dashboard:
        stream = looks(dashboard)
        before = next(stream)["report"]["names"]["orders"]
        array[10:20] += 1  # parts 5 to 9, of two pages each
        protection.checkpoint(wait=True)
        look = next(one for one in stream if one["report"]["names"]["orders"]["epoch"] == 1)
        after = look["report"]["names"]["orders"]
        grown = np.array(after["changed_by_part"]) - np.array(before["changed_by_part"])
        assert grown.sum() * 4096 == after["raw_bytes"] - before["raw_bytes"]
        assert grown[4:11].sum() >= 10  # the array may begin within a page, and others write to that
        _, past = ask(dashboard, "/past?source=0&name=orders")
        heat = np.frombuffer(base64.b64decode(past["heat"]), dtype=np.uint8).reshape(-1, PARTS)
        assert [len(column) for column in past["figures"]] == [len(heat)] * len(FIGURES)
        pages = np.round(2 ** (heat.max(0) / 16) - 1)
        assert pages.tolist() == grown.tolist()
        ratios = [value for value in past["figures"][FIGURES.index("ratio")] if value is not None]
        assert ratios == [
            pytest.approx((after["encoded_bytes"] - before["encoded_bytes"]) / (grown.sum() * 4096), rel=1e-3)
        ]
        _, listed = ask(dashboard, "/past")
        assert list(listed["names"]) == ["0/orders"]
        assert ask(dashboard, "/past?source=0&name=other") == (200, {})
        assert ask(dashboard, "/past?source=7&name=orders") == (200, {})


def test_primary_and_backup_count_the_same_changes(backup: Backup, orders: tuple[Any, Protection]) -> None:
    array, protection = orders
    rng = np.random.default_rng(5)
    before = backup.status()["names"]["orders"]["changed_by_part"]
    assert sum(before) == 0  # a full copy is no change
    metrics = protection._primary.metrics
    mine = metrics.changed_by_part("orders")
    for _ in range(5):
        array[rng.integers(0, PAGES, 7)] += 1
        protection.checkpoint(wait=True)
    until(lambda: backup.status()["names"]["orders"]["committed"] == 6)
    there = backup.status()["names"]["orders"]["changed_by_part"]
    here = np.array(metrics.changed_by_part("orders")) - mine
    assert there == here.tolist()
    assert sum(there) > 0


def test_what_can_be_restored_and_what_has_happened(
    backup: Backup, orders: tuple[Any, Protection], caplog: pytest.LogCaptureFixture
) -> None:
    array, protection = orders
    handlers = logging.getLogger("remus_ckpt").handlers[:]
    configure_logs()
    try:
        log("odd", level=logging.WARNING, name="orders", reason="two\nlines")
        log("not this", name="other")
    finally:
        logging.getLogger("remus_ckpt").handlers[:] = handlers
        logging.getLogger("remus_ckpt").propagate = True
    array[3] += 1
    protection.checkpoint(wait=True)
    remote = OfAddress(
        backup.addresses[0],
        partial(connect, Address.parse(backup.addresses[0])),
        lambda name: Remote(f"{backup.addresses[0]}/{name}"),
    )
    primary = OfPrimary(
        protection._primary, Metrics(), backup.addresses[0], lambda: Remote(f"{backup.addresses[0]}/orders")
    )
    wheres = (f"store:{backup.directory}/orders", *[f"{backup.addresses[0]}/orders"] * 2)
    with serving(OfBackup(backup), remote, primary) as dashboard:
        until(lambda: len(ask(dashboard, "/past")[1]["names"]) == 3)
        for number, where in enumerate(wheres):
            _, detail = ask(dashboard, f"/detail?source={number}&name=orders")
            history = detail["history"]
            assert history["where"] == where
            ((first, last, at, until_at),) = history["kept"]
            assert (first, last, history["lost"]) == (0, 1, [])
            assert time.time() - 60 < at <= until_at < time.time()
            assert [1, r'odd: reason "two\nlines"'] in [[one["level"], one["text"]] for one in detail["events"]]
            assert not any("not this" in one["text"] for one in detail["events"])
        assert "error" in ask(dashboard, "/detail?source=0&name=other")[1]
        assert "error" in ask(dashboard, "/detail?source=9&name=orders")[1]
        protection.close()
        until(lambda: ask_status(backup)["names"]["orders"]["health"]["state"] == "ended")

        def changes() -> list[str]:
            return [one["text"] for one in ask(dashboard, "/detail?source=0&name=orders")[1]["events"]]

        until(lambda: any(text.startswith("protected → ended: ") for text in changes()))


def test_a_primary_shows_its_own_status(backup: Backup) -> None:
    protection = protect({"orders": np.zeros(512)}, to=backup.addresses[0], name="orders")
    protection.checkpoint(wait=True)
    primary = protection._primary
    with serving(OfPrimary(primary, primary.metrics, "unix:x", lambda: Remote("unix:x/orders"))) as dashboard:
        look = next(looks(dashboard))
        found = look["report"]["names"]["orders"]
        assert found["primary"] == json.loads(to_json(protection.status()))
        assert (found["health"]["state"], found["epoch"]) == ("protected", 0)
        backup.close()
        with pytest.raises(LinkError):
            protection.checkpoint(timeout_s=0.5)
        stream = looks(dashboard)
        until(lambda: next(stream)["report"]["names"]["orders"]["health"]["state"] == "disconnected")
        _, detail = ask(dashboard, "/detail?source=0&name=orders")
        assert "unix:x" in detail["history"]["error"]
    with pytest.raises(LinkError):
        protection.close(0.5)


def test_a_backup_that_goes_and_comes_back(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/sock"
    source = OfAddress(address, partial(connect, Address.parse(address)), lambda name: Remote(f"{address}/{name}"))
    array = np.zeros((PAGES, 512))
    with serving(source, every_s=0.05) as dashboard:
        stream = looks(dashboard)
        first = next(stream)
        assert (first["report"], first["health"]["state"], first["figures"]) == (None, "unreachable", None)
        for epoch in range(2):
            with Backup(tmp_path / "store", [address]) as _, protect({"a": array}, to=address, name="a") as protection:
                protection.checkpoint(wait=True)
                names = ((look["report"] or {"names": {}})["names"] for look in stream)
                assert next(one for one in names if one.get("a", {"epoch": None})["epoch"] == epoch)
            look = next(look for look in stream if not look["report"])
            assert look["health"]["level"] == 3
        _, past = ask(dashboard, "/past")
        assert past["names"]["0/a"]["commit_ms"][-1] is None  # a gap, and no zero


class Odd:
    """A source whose primary reports what no primary should."""

    label = "odd"

    def __init__(self, **found: Any) -> None:
        self.found = found
        self.promoted: list[Any] = []

    def status(self) -> dict[str, Any]:
        health = {"level": 0, "state": "protected", "words": "<b>protected</b>", "next": ""}
        return {"names": {"odd": {"health": health, "primary": {}, "role": "standby"} | self.found}, "health": health}

    def survey(self, name: str) -> Survey:
        raise RemusError("no")

    def where(self, name: str) -> str:
        return name

    def events(self, name: str) -> list[list[Any]]:
        return []

    def close(self) -> None:
        pass

    def fail_over(self, name: str, fence: bool) -> dict[str, Any]:
        self.promoted.append((name, fence))
        if fence:
            raise RemusError("there is no fencing command")
        return {"term": 1}


@pytest.mark.parametrize(
    "found",
    [
        {"primary": {"pause_ms": {"p50": math.nan, "p99": 1e300}, "dirty_pages": True, "lag_checkpoints": "9"}},
        {"primary": {"pause_ms": 3, "commit_latency_ms": [1], "x": b"\xff", "y": {"z": [math.inf]}, "s": "\ud800"}},
        {"changed_by_part": [1, 2], "raw_bytes": -5, "wire_bytes": None},
        {"changed_by_part": ["x"] * PARTS, "primary": {"dirty_pages": 1 << 70}},
    ],
)
def test_whatever_a_primary_reports_is_json_with_whole_figures(found: dict[str, Any]) -> None:
    with serving(Odd(**found), every_s=0.02) as dashboard:
        stream = looks(dashboard)
        for _ in range(3):
            look = next(stream)
            assert all(value is None or abs(value) < 1e31 for value in look["figures"]["odd"])


def test_a_look_that_fails_is_not_the_last(caplog: pytest.LogCaptureFixture) -> None:
    odd = Odd()
    odd.found = {"health": None}
    with serving(odd, every_s=0.02) as dashboard:
        until(lambda: "dashboard failed" in caplog.text)
        odd.found = {}
        assert next(looks(dashboard))["source"] == 0


def test_the_past_is_bounded() -> None:
    odd = Odd()
    board = Board([odd], every_s=3600)
    try:
        until(lambda: board.listed()["names"])
        for number in range(2 * KEPT):
            odd.found = {"wire_bytes": number, "changed_by_part": [number] + [0] * (PARTS - 1)}
            board.look(0)
        past = board.past(0, "odd")
        assert {len(column) for column in past["figures"]} == {KEPT}
        heat = np.frombuffer(base64.b64decode(past["heat"]), dtype=np.uint8)
        assert heat.reshape(KEPT, PARTS)[:, 0].tolist() == [16] * KEPT  # log2(1 + 1) in sixteenths
        assert not heat.reshape(KEPT, PARTS)[:, 1:].any()
    finally:
        board.close()


# Who may


def test_without_a_token_only_this_machine_and_only_reading() -> None:
    for where, may in (("0.0.0.0:0", False), ("[::]:0", False), ("example.org:80", False), ("127.0.0.1:0", True)):
        with pytest.raises(LinkError):
            server.check_access(where, None, may)
    for where in ("127.0.0.1:0", "[::1]:0", "localhost:0", "7412"):
        server.check_access(where, None, False)
    server.check_access("0.0.0.0:0", TOKEN, True)
    with serving(Odd()) as dashboard:
        port = place(dashboard).rpartition(":")[2]
        assert ask(dashboard, "/", Host=f"localhost:{port}")[0] == 200
        assert ask(dashboard, "/past", Host=f"evil.example:{port}")[0] == 403  # a name that was given our address
        body = json.dumps({"source": 0, "name": "odd", "fence": False}).encode()
        assert ask(dashboard, "/failover", "POST", body, **ASKED)[0] == 403


def test_a_token_is_asked_for_everything(tmp_path: Path) -> None:
    with serving(Odd(), token=TOKEN) as dashboard:
        wrong = {"Authorization": "Basic " + base64.b64encode(b"me:0123456789abcdeF").decode()}
        for path in ("/", "/page.js", "/past", "/events", "/detail?source=0&name=odd", "/nothing"):
            for headers in ({}, wrong, {"Authorization": "Basic ***"}, {"Authorization": f"Bearer {TOKEN}"}):
                assert ask(dashboard, path, **headers)[0] == 401
        assert ask(dashboard, "/", **BASIC)[0] == 200
        assert ask(dashboard, "/", Host="far.example", **BASIC)[0] == 200
    file = tmp_path / "token"
    with pytest.raises(LinkError, match="No such file"):
        server.read_token(file)
    file.write_text("short\n")
    with pytest.raises(LinkError, match="16 characters"):
        server.read_token(file)
    file.write_text(f"{TOKEN}\nmore\n")
    assert server.read_token(file) == TOKEN


def test_failover_is_for_the_page_alone() -> None:
    odd = Odd()
    body = json.dumps({"source": 0, "name": "odd", "fence": False}).encode()
    with serving(odd, token=TOKEN, may_fail_over=True) as dashboard:
        post = partial(ask, dashboard, "/failover", "POST")
        assert post(body, **ASKED)[0] == 401
        assert post(body, **BASIC)[0] == 403
        assert post(body, **BASIC, **ASKED, Origin="http://evil.example")[0] == 403
        assert ask(dashboard, "/failover", **BASIC, **ASKED)[0] == 405
        for wrong in (b"", b"{}", b"[1]", b"\xff", b"x" * 5000, b"[" * 4000,
                      body.replace(b"0", b"1"), body.replace(b"0", b"-1"),
                      body.replace(b"false", b"0"), body.replace(b"odd", b"../odd")):  # fmt: skip
            assert post(wrong, **BASIC, **ASKED)[0] == 400, wrong
        assert odd.promoted == []
        assert post(body, **BASIC, **ASKED, Origin=dashboard.url.removesuffix("/")) == (200, {"term": 1})
        status, answer = post(body.replace(b"false", b"true"), **BASIC, **ASKED)
        assert (status, answer) == (409, {"error": "there is no fencing command"})
        assert odd.promoted == [("odd", False), ("odd", True)]


def test_failover_promotes_the_backup(backup: Backup, orders: tuple[Any, Protection]) -> None:
    body = json.dumps({"source": 0, "name": "orders", "fence": False}).encode()
    with serving(OfBackup(backup), token=TOKEN, may_fail_over=True) as dashboard:
        status, report = ask(dashboard, "/failover", "POST", body, **BASIC, **ASKED)
        assert (status, report["term"], report["epoch"]) == (200, 1, 0)
        stream = looks(dashboard, **BASIC)
        until(lambda: next(stream)["report"]["names"]["orders"]["role"] == "promoted")


# The server


def test_the_files_of_the_page_and_nothing_else() -> None:
    with serving(Odd()) as dashboard:
        for path in ("/", "/page.css", "/page.js", "/draw.js", "/words.js"):
            link = http.client.HTTPConnection(place(dashboard), timeout=LONG_S)
            link.request("GET", path)
            answer = link.getresponse()
            assert answer.status == 200
            assert "default-src 'none'" in answer.getheader("Content-Security-Policy", "")
            assert b"http" not in answer.read().replace(b"http-equiv", b"")  # nothing comes from elsewhere
            link.close()
        for path in ("/server.py", "/../board.py", "/page.html/", "/%2e%2e/server.py"):
            assert ask(dashboard, path)[0] == 404
        assert ask(dashboard, "/past", "DELETE")[0] == 405


def test_a_page_that_stays_is_served_beyond_the_time_of_a_request_and_one_that_does_not_read_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "TAKE_S", 1.0)
    with serving(Odd(primary={"text": "x" * 1_000_000}), every_s=0.2) as dashboard:
        host, _, port = place(dashboard).rpartition(":")
        with socket.create_connection((host, int(port)), timeout=LONG_S) as sleeper:
            sleeper.sendall(b"GET /events HTTP/1.0\r\nHost: localhost\r\n\r\n")
            stream, begin = looks(dashboard), time.monotonic()
            while time.monotonic() - begin < 3:  # three times what one look may take
                next(stream)
            until(lambda: _is_cut(sleeper))


def _is_cut(sock: socket.socket) -> bool:
    """Whether the other side has ended the connection; reads no more than there is."""
    try:
        return not sock.recv(1 << 22, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_viewers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Odd()) as dashboard:
        open_ones = [events(dashboard) for _ in range(server.VIEWERS)]
        for one in open_ones:
            assert next(one)[0] == "hello"
        assert ask(dashboard, "/events")[0] == 503
        assert ask(dashboard, "/")[0] == 200  # others are still answered
        for one in open_ones:
            one.close()  # type: ignore[attr-defined]
        until(lambda: dashboard.free.acquire(blocking=False))


def test_it_ends_at_once_with_pages_open() -> None:
    threads = threading.active_count()
    board = Board([Odd()], every_s=1.0)
    with Dashboard("0", board) as dashboard:
        stream = events(dashboard)
        next(stream)
        begin = time.monotonic()
    assert time.monotonic() - begin < 3
    stream.close()  # type: ignore[attr-defined]
    until(lambda: threading.active_count() <= threads)


def test_the_commands(tmp_path: Path) -> None:
    """`backup --dashboard`, `protect --dashboard` and `dashboard` show one name alike."""
    memory = Path("/dev/shm") / f"remus-dashboard-{tmp_path.name}"
    memory.write_bytes(bytes(64 * 4096))
    address = f"unix:{tmp_path}/sock"
    logs = [tmp_path / f"{name}.log" for name in ("backup", "protect", "dashboard")]
    commands = [
        ("backup", "--listen", address, "--store", tmp_path / "store", "--dashboard", "0"),
        ("protect", memory, "--pause", "true", "--resume", "true", "--to", address, "--name", "m", "--dashboard", "0"),
        ("dashboard", "--from", address, "--listen", "127.0.0.1:0"),
    ]
    urls = []
    try:
        with command(*commands[0], log=logs[0]) as backup:
            assert backup.stdout is not None and backup.stdout.readline() == f"listening on {address}\n"
            with command(*commands[1], log=logs[1]), command(*commands[2], log=logs[2]):
                for log_file in logs:
                    until(lambda log_file=log_file: "http://" in log_file.read_text())
                    urls.append(log_file.read_text().partition("http://")[2].partition("/")[0])
                states = []
                for url in urls:
                    page = type("Page", (), {"url": f"http://{url}/"})()
                    stream = looks(page)

                    def is_protected(stream: Any = stream) -> bool:
                        found = next(stream)["report"]["names"].get("m", {"health": {"state": ""}})
                        return bool(found["health"]["state"] == "protected")

                    until(is_protected)
                    states.append(next(stream)["report"]["names"]["m"]["memory_bytes"])
                assert states == [64 * 4096] * 3
    finally:
        memory.unlink()


@pytest.mark.parametrize(
    "options",
    [
        ["--dashboard", "0.0.0.0:0"],
        ["--dashboard", "nohost"],
        ["--dashboard", "0", "--allow-failover"],
        ["--allow-failover"],
        ["--dashboard", "0", "--dashboard-token", "/nonexistent"],
    ],
)
def test_usage(tmp_path: Path, options: list[str]) -> None:
    with command(
        "backup", "--listen", f"unix:{tmp_path}/s", "--store", tmp_path / "store", *options, log=tmp_path / "log"
    ) as process:
        assert process.wait(LONG_S) == 2
    assert not (tmp_path / "store").exists()
