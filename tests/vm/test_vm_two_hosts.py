"""The README's guide for two hosts, as it stands there, on two network namespaces; and the demo."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from services import LONG_S
from support import Command
from vm_qemu import guest_files

from remus_ckpt.demo import vm
from remus_ckpt.demo.lan import Host, Lan
from remus_ckpt.demo.vm import Client
from remus_ckpt.service.vms import run_directory

README = (Path(__file__).parents[2] / "README.md").read_text()
FIRST, SECOND = "192.0.2.1", "192.0.2.2"
BOOT_S = 180.0


class Site:
    """Two hosts, and the guide's commands on them."""

    def __init__(self, folder: Path) -> None:
        section = README.partition("## Protect a virtual machine")[2].partition("\n## ")[0]
        self.commands = re.findall(r"^    (\S.*)$", section, re.MULTILINE)
        self.folder = folder
        self.lan = Lan(taps=("", ""))
        files = guest_files()
        (folder / "vmlinuz").symlink_to(files / "kernel")
        (folder / "initrd.img").symlink_to(files / "initramfs")
        self._started: list[subprocess.Popen[bytes]] = []

    def command(self, beginning: str, host: Host, but: str = "") -> list[str]:
        """The guide's only command that begins like this, for a host. but: it has this, too"""
        (line,) = [one for one in self.commands if one.startswith(beginning) and but in one]
        return self.on(host, line)

    def on(self, host: Host, line: str) -> list[str]:
        """A command line of the guide, typed on a host: with the addresses that are there, and a store for each."""
        line = line.replace(FIRST, self.lan.a.address).replace(SECOND, self.lan.b.address)
        line = line.replace("/var/lib/remus", self._store(host)).replace(
            "remus-ckpt", f"{sys.executable} -m remus_ckpt"
        )
        return host.inside("sh", "-c", f"exec {line}" if "&&" not in line else line)

    def _store(self, host: Host) -> str:
        return str(self.folder / ("store-a" if host is self.lan.a else "store-b"))

    def do(self, words: list[str]) -> str:
        """Run a command to its end. It must succeed."""
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, timeout=LONG_S, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, words: list[str]) -> None:
        """Start a command."""
        with open(self.folder / f"{len(self._started)}.log", "wb") as log:
            self._started.append(
                subprocess.Popen(
                    words, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
                )
            )

    def backup(self, host: Host) -> None:
        """Start a host's backup."""
        self.start(self.command("remus-ckpt backup", host, f"--listen {FIRST if host is self.lan.a else SECOND}"))

    def status(self, host: Host) -> dict[str, Any]:
        """What its backup says of the guest."""
        letter = "a" if host is self.lan.a else "b"
        at = f"tls://{FIRST if host is self.lan.a else SECOND}:7411"
        words = self.on(host, f"remus-ckpt status --json --from {at} --tls-dir keys/{letter}")
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, timeout=LONG_S, check=False)
        found: dict[str, Any] = json.loads(done.stdout)["names"].get("web", {}) if not done.returncode else {}
        return found

    def until(self, condition: Callable[[], Any], patience_s: float = 240.0) -> None:
        deadline = time.monotonic() + patience_s
        while not condition():
            logs = [path.read_text() for path in sorted(self.folder.glob("*.log"))]
            assert time.monotonic() < deadline, logs
            time.sleep(0.05)

    def close(self) -> None:
        self.lan.close()
        for process in self._started:
            process.wait()
        for host in (self.lan.a, self.lan.b):
            shutil.rmtree(run_directory(Path(self._store(host))), ignore_errors=True)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with closing(Site(tmp_path)) as made:
        yield made


def is_ready(found: dict[str, Any]) -> bool:
    return bool(found) and found["health"]["state"] == "protected" and found["vm"] == "waiting"


@pytest.mark.root
@pytest.mark.qemu
@pytest.mark.kill
def test_the_guide_for_two_hosts(site: Site) -> None:
    a, b = site.lan.a, site.lan.b
    site.do(site.command("remus-ckpt keys init", a))
    for name in ("a", "b"):
        site.do(site.command("remus-ckpt keys issue", a, f" keys {name} "))
    for host in (a, b):
        site.do(site.command("ip tuntap", host))
    site.backup(a)
    site.backup(b)
    site.start(site.command("remus-ckpt run", a))
    with closing(Client(site.lan.client.inside())) as client:
        site.until(lambda: client.is_ready(0.1), BOOT_S)
        site.until(lambda: is_ready(site.status(b)))
        assert site.status(b)["primary"]["held_frames"] >= 0
        before = client.until_answers(50, 60)
        a.kill()
        site.do(site.command("remus-ckpt failover", b))
        told = client.until_answers(50, 60)
        assert not told["wrong"] and told["answers"] >= before["answers"] + 50, told
        assert site.status(b)["health"]["state"] == "taken over"
        site.backup(a)
        site.until(lambda: site.status(b)["health"]["state"] == "protected" and is_ready(site.status(a)))
        before = client.until_answers(50, 60)
        b.kill()
        (line,) = [line for line in site.commands if line.startswith("remus-ckpt failover")]
        site.do(site.on(a, line.replace(SECOND, FIRST).replace("keys/b", "keys/a")))
        told = client.until_answers(50, 60)
        assert not told["wrong"] and told["answers"] >= before["answers"] + 50, told
        told = client.end()
        assert not told["wrong"] and not told["faults"], told


@pytest.mark.root
@pytest.mark.qemu
@pytest.mark.kill
def test_the_demo(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    done = Command(monkeypatch, capfdbinary)("demo", "--vm", "--seconds", "0.5", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert len(report["failovers"]) == 2
    for failover in report["failovers"]:
        assert 0 < failover["takeover_s"] < 60 and 0 < failover["silence_s"] < 60
    assert report["answers"] > report["failovers"][1]["answers_before"] > report["failovers"][0]["answers_before"] > 0


def test_the_demo_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = Command(monkeypatch, capfdbinary)("demo", "--vm")
    assert done.code == 1
    for needed in ("qemu-system-x86", "iproute2", "gcc"):
        assert f"apt install {needed}" in done.err
    assert all("apt install" in text or "modprobe" in text or "root" in text for text in vm.missing())
