"""The page in a browser, before a real `backup` and `protect`: what a user sees, and what happens when they press.

Pictures of it are put into the folder that REMUS_CKPT_SHOTS names, if it does. REMUS_CKPT_PAGE_S says for how many
seconds a hundred names are watched.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
from chromium import Browser, Page
from conftest import many
from services import LONG_S, command, until

from remus_ckpt import protect

ROOT = Path(__file__).parents[2]
AXE = Path(os.environ.get("REMUS_CKPT_AXE", ROOT / ".cache/axe/node_modules/axe-core/axe.min.js"))
TOKEN = "0123456789abcdef"
SIZES = {"phone": (390, 844), "tablet": (820, 1180), "wide": (1440, 900)}

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not chromium.is_there(), reason="needs chromium"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Served:
    """A backup with a page, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"unix:{folder}/sock"
        self.port = free_port()
        self.url = f"http://me:{TOKEN}@127.0.0.1:{self.port}/"
        (folder / "token").write_text(f"{TOKEN}\n")
        self.process: subprocess.Popen[str]

    @contextmanager
    def backup(self) -> Iterator[subprocess.Popen[str]]:
        with command(
            "backup", "--listen", self.address, "--store", self.folder / "store", "--lease", "5s", "--dashboard",
            self.port, "--dashboard-token", self.folder / "token", "--allow-failover", log=self.folder / "backup.log",
        ) as process:  # fmt: skip
            assert process.stdout is not None
            assert process.stdout.readline(), (self.folder / "backup.log").read_text()
            self.process = process
            yield process

    @contextmanager
    def primary(self, name: str, interval: str) -> Iterator[subprocess.Popen[str]]:
        """`protect`, of a file that nobody maps; what is written to it is found by comparison."""
        memory = Path("/dev/shm") / f"remus-page-{os.getpid()}-{name}"
        memory.write_bytes(os.urandom(256 * 4096))
        try:
            with command(
                "protect", memory, "--pause", "true", "--resume", "true", "--to", self.address, "--name", name,
                "--interval", interval, "--tracking", "compare", log=self.folder / f"{name}.log",
            ) as process:  # fmt: skip
                yield process
        finally:
            memory.unlink()

    def status(self) -> dict[str, Any]:
        """As a user asks for it."""
        done = subprocess.run(
            [sys.executable, "-m", "remus_ckpt", "status", "--from", self.address, "--json"],
            capture_output=True, text=True, timeout=LONG_S, check=True,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    with served.backup():
        yield served


def shown(page: Page, key: str) -> Any:
    """The value of a figure of the open name, as the page took it from the report."""
    return page.run(f"document.querySelector('#facts [data-key=\"{key}\"]')?.dataset.value ?? null")


def open_name(page: Page, key: str) -> None:
    page.until(f"document.querySelector('#rows [data-key=\"{key}\"] a')")
    page.run(f"document.querySelector('#rows [data-key=\"{key}\"] a').click()")
    page.until("!document.getElementById('detail').hidden && document.querySelectorAll('#facts dd').length > 5")


def test_what_it_shows_is_what_status_says(browser: Browser, served: Served) -> None:
    with served.primary("orders", "1h"):  # one checkpoint, and then nothing changes
        until(lambda: served.status()["names"].get("orders", {}).get("primary", {}).get("epoch") == 0)
        page = browser.page(served.url)
        open_name(page, "0/orders")
        found = served.status()["names"]["orders"]
        primary = found["primary"]
        expected = {
            "epoch": found["epoch"],
            "last_commit_at": found["last_commit_at"],
            "lag_checkpoints": primary["lag_checkpoints"],
            "pause_ms.p50": primary["pause_ms"]["p50"],
            "pause_ms.p99": primary["pause_ms"]["p99"],
            "commit_latency_ms.p50": primary["commit_latency_ms"]["p50"],
            "commit_latency_ms.p99": primary["commit_latency_ms"]["p99"],
            "dirty_pages": primary["dirty_pages"],
            "ratio": found["ratio"],
            "raw_bytes": found["raw_bytes"],
            "encoded_bytes": found["encoded_bytes"],
            "wire_bytes": found["wire_bytes"],
            "memory_bytes": found["memory_bytes"],
            "term": found["term"],
            "reconnects": primary["reconnects"],
        }
        got = {key: None if (text := shown(page, key)) is None else float(text) for key in expected}
        assert got == {key: pytest.approx(value) for key, value in expected.items()}
        assert (shown(page, "tracking"), shown(page, "peer")) == (primary["tracking"], found["peer"])
        row = "document.querySelector('#rows [data-key=\"0/orders\"]')"
        assert page.run(f"{row}.querySelector('[data-label=epoch]').dataset.value") == "0"
        assert page.run(f"{row}.querySelector('.state').textContent") == found["health"]["state"] == "protected"
        assert page.run("document.getElementById('words').textContent").startswith("protected: epoch 0 is committed")
        page.until("document.querySelector('#ranges li').textContent.startsWith('checkpoint 0, taken')")
        command_line = page.run("document.querySelector('#picked code').textContent").split()
        command_line[0:1] = [sys.executable, "-m", "remus_ckpt"]
        command_line[-1] = str(served.folder / "memory.img")
        done = subprocess.run(command_line, capture_output=True, text=True, timeout=LONG_S, check=False)
        assert done.returncode == 0, done.stderr  # what it tells a user to type can be typed
        assert len((served.folder / "memory.img").read_bytes()) == 256 * 4096


def test_failover_by_the_keyboard(browser: Browser, served: Served) -> None:
    with served.primary("orders", "100ms") as primary:
        page = browser.page(served.url)
        page.until("document.querySelector('#rows .level0')")
        page.run("document.querySelector('#rows a').focus()")
        page.key("Enter")
        page.until("document.activeElement.id === 'detail-name'")
        page.until("!document.getElementById('take-over').hidden")
        page.run("document.getElementById('take-over').focus()")
        page.key("Enter")
        page.until("document.getElementById('confirm').open")
        assert page.run("document.getElementById('confirm-go').disabled")  # nothing has been chosen yet
        assert page.run("document.getElementById('fence-choice').hidden")  # there is no fence command
        page.key("Escape")
        page.until("!document.getElementById('confirm').open")
        assert served.status()["names"]["orders"]["role"] == "standby"
        page.key("Enter")
        page.until("document.getElementById('confirm').open")
        page.run("document.querySelector('[value=vouch]').click()")
        page.run("document.getElementById('confirm-go').focus()")
        page.key("Enter")
        page.until("!document.getElementById('confirm').open")
        page.until("document.getElementById('words').textContent.startsWith('taken over')")
        assert served.status()["names"]["orders"]["role"] == "promoted"
        assert page.run("document.getElementById('take-over').hidden")
        assert primary.wait(LONG_S) == 22  # the old one has been told
        page.until("document.getElementById('events').textContent.includes('failover asked for on the page')")
        page.key("Escape")
        page.until("document.getElementById('detail').hidden && document.activeElement.textContent === 'orders'")


def test_a_backup_that_dies_under_the_page(browser: Browser, served: Served) -> None:
    with served.primary("orders", "200ms"):
        page = browser.page(served.url)
        open_name(page, "0/orders")
        page.until("document.querySelector('#rows .level0')")
        epoch = float(shown(page, "epoch"))
        served.process.kill()
        served.process.wait()
        page.until("document.getElementById('faults').textContent.includes('has not answered since')")
        assert page.run("document.querySelector('#rows tr').classList.contains('stale')")
        with served.backup():
            page.until("document.getElementById('faults').textContent === ''")
            page.until("document.querySelector('#rows .level0')")
            page.until(f"Number(document.querySelector('[data-key=epoch]').dataset.value) > {epoch}")
            assert not page.run("document.querySelector('#rows tr').classList.contains('stale')")


@contextmanager
def many_names(served: Served, count: int) -> Iterator[Any]:
    """Names that are protected by this process. Gives what writes to all and takes a checkpoint of each."""
    rng = np.random.default_rng(3)
    arrays = [np.zeros((64, 512), dtype=np.int64) for _ in range(count)]
    with ExitStack() as stack:
        protections = [
            stack.enter_context(protect({"a": array}, to=served.address, name=f"name-{number:03}"))
            for number, array in enumerate(arrays)
        ]

        def beat() -> None:
            for array, protection in zip(arrays, protections, strict=True):
                array[rng.integers(0, 64, 3)] += 1
                protection.checkpoint()

        yield beat


def test_a_hundred_names_take_no_more_and_more_memory(
    browser: Browser, served: Served, record_property: pytest.RecordProperty
) -> None:
    seconds = int(os.environ.get("REMUS_CKPT_PAGE_S") or many(30, 60))

    def anonymous() -> int:
        """Bytes of the backup, without the warm copies, which fill up as pages are written for the first time."""
        lines = Path(f"/proc/{served.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10

    with many_names(served, 100) as beat:
        beat()
        page = browser.page(served.url)
        page.until("document.querySelectorAll('#rows .level0').length === 100")
        open_name(page, "0/name-042")
        beat()
        time.sleep(5)
        began, (heap, server) = time.monotonic(), (page.heap_bytes(), anonymous())
        while time.monotonic() - began < seconds:
            beat()
            time.sleep(0.5)
        later, server_later = page.heap_bytes(), anonymous()
        # The figures of the last minutes: of a row two, of the open name all, in the page; 48 KB a name in the server.
        figures = f"page {heap:,} to {later:,} bytes, server {server:,} to {server_later:,} in {seconds} s"
        print(figures)
        record_property("memory", figures)
        assert later - heap < 100 * 2 * 300 * 16 + (4 << 20), figures
        assert server_later - server < 100 * 48_000 + (24 << 20), figures
        work = page.run(
            "(async () => { const begin = performance.now(); for (let n = 0; n < 10; n++) {"
            " dispatchEvent(new Event('resize')); } return performance.now() - begin; })()"
        )
        print(f"all that is shown drawn anew: {work / 10:.1f} ms")
        page.run("document.getElementById('find').focus()")
        for letter in "042":
            page.key(letter)
        page.until("document.querySelectorAll('#rows tr:not([hidden])').length === 1")


def picture(page: Page, name: str) -> None:
    if folder := os.environ.get("REMUS_CKPT_SHOTS"):
        Path(folder).mkdir(exist_ok=True)
        page.shoot(Path(folder) / f"{name}.png")


def serious(page: Page) -> list[str]:
    """What axe finds that keeps users out."""
    if not page.run("typeof axe !== 'undefined'"):
        page.run(AXE.read_text() + "; 0")
    found = page.run("axe.run({resultTypes: ['violations']}).then((found) => found.violations)")
    return [
        f"{one['id']}: {one['help']}: {one['nodes'][0]['html']:.200}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def test_sizes_schemes_and_what_axe_finds(browser: Browser, served: Served) -> None:
    with many_names(served, 4) as beat, served.primary("a-long-name-with-some.dots_and-dashes", "300ms"):
        beat()
        page = browser.page(served.url)
        page.until("document.querySelectorAll('#rows .level0').length === 5")
        for _ in range(6):
            beat()
            time.sleep(0.5)
        found: dict[str, list[str]] = {}
        for view in ("list", "name", "dialog"):
            if view == "name":
                open_name(page, "0/name-001")
                page.until("document.querySelector('#ranges li')")
            elif view == "dialog":
                page.run("document.getElementById('take-over').click()")
            for size, (width, height) in SIZES.items():
                for scheme in ("light", "dark"):
                    page.resize(width, height, dark=scheme == "dark")
                    time.sleep(0.3)
                    picture(page, f"{view}-{size}-{scheme}")
                    what = f"{view}, {size}, {scheme}"
                    assert page.run("document.documentElement.scrollWidth <= innerWidth"), f"{what} is too wide"
                    if AXE.exists():
                        found |= {what: faults} if (faults := serious(page)) else {}
        assert found == {}
        # The heat map has something in it: more than the colour behind it.
        page.run("document.getElementById('confirm').close()")
        colours = page.run(
            "(() => { const c = document.getElementById('heat'); const d = c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data; const seen = new Set();"
            " for (let i = 0; i < d.length; i += 4) seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]);"
            " return seen.size })()"
        )
        assert colours > 2
        if not AXE.exists():
            pytest.skip("axe was not asked: npm install --prefix .cache/axe axe-core")


def test_a_password_is_asked_for(browser: Browser, served: Served) -> None:
    page = browser.page("about:blank")
    page.tell("Network.enable")
    page.tell("Page.navigate", url=f"http://localhost:{served.port}/")
    page.until("document.readyState === 'complete'")
    assert "Names" not in page.text()
    basic = base64.b64encode(f"me:{TOKEN}".encode()).decode()
    page.tell("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {basic}"})
    page.go(f"http://localhost:{served.port}/")
    page.until("document.getElementById('overall').textContent === 'no names'")
    assert "nothing is protected on this backup" in page.run("document.getElementById('notices').textContent")
