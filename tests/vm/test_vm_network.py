"""A guest with a network, as users run it: its host dies, the backup goes on with it, and its client notices nothing
but a silence."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import guests
import pytest
from bridging import Network, network
from conftest import many
from services import until
from vm_qemu import Client, guest_files

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.slow]
GUEST = "10.83.9.2"


@contextmanager
def two_taps() -> Iterator[Network]:
    """A network that a client and two hosts share: one host has tap0 in it, the other tap7."""
    with network() as net:
        net.ip("link", "add", "br0", "type", "bridge")
        for tap in ("tap0", "tap7"):
            net.ip("tuntap", "add", tap, "mode", "tap")
            net.ip("link", "set", tap, "master", "br0", "up")
        net.ip("addr", "add", "10.83.9.1/24", "dev", "br0")
        net.ip("link", "set", "br0", "up")
        yield net


@contextmanager
def run(net: Network, folder: Path, to: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`remus-ckpt run` with the guest of demo/guest."""
    files = guest_files()
    words = [
        *("ip", "netns", "exec", net.name, sys.executable, "-m", "remus_ckpt", "run", "--name", "web", "--to", to),
        *("--log-format", "json", "--interval", "20ms", *options, "--", "qemu-system-x86_64", "-nodefaults"),
        *("-m", "96M", "-accel", "tcg", "-serial", f"file:{folder}/serial", "-kernel", str(files / "kernel")),
        *(
            "-initrd",
            str(files / "initramfs"),
            "-append",
            "console=ttyS0 quiet panic=-1 no_timer_check mitigations=off",
        ),
        *("-nic", "tap,ifname=tap0,model=virtio,mac=52:54:00:83:14:01"),
    ]
    with open(folder / "run.log", "wb") as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_ready(client: Client, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not client.is_ready(0.1):
        assert time.monotonic() < deadline, ((folder / "run.log").read_text(), (folder / "serial").read_text())


@pytest.mark.parametrize("seed", range(many(2, 10)))
def test_a_client_notices_nothing_but_a_silence(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    with two_taps() as net, ExitStack() as stack:
        served = stack.enter_context(
            guests.backup(tmp_path, "--vm-map", "tap0=tap7", inside=("ip", "netns", "exec", net.name))
        )
        primary = stack.enter_context(run(net, tmp_path, served.address))
        client = stack.enter_context(closing(Client(net.name, GUEST, seed)))
        wait_ready(client, tmp_path)
        guests.wait_committed(served)
        told = client.until_answers(20, 60)
        assert not told["wrong"] and told["answers"] >= 20, told
        time.sleep(dice.uniform(0, 0.5))
        client.status()
        os.kill(primary.pid, signal.SIGKILL)
        served.failover()
        until(lambda: served.status()["vm"] == "running")
        before = client.status()
        told = client.until_answers(200, 60)
        assert not told["wrong"] and told["answers"] >= before["answers"] + 200, told
        print(f"silence {max(before['silence_s'], told['silence_s']) * 1e3:.0f} ms")
        told = client.end()
        assert not told["wrong"] and not told["faults"], told


def test_output_waits_while_nothing_is_committed(tmp_path: Path) -> None:
    """The backup is frozen: the guest runs on, and its client hears nothing until commits come again."""
    with two_taps() as net, ExitStack() as stack:
        served = stack.enter_context(
            guests.backup(tmp_path, "--vm-map", "tap0=tap7", inside=("ip", "netns", "exec", net.name))
        )
        stack.enter_context(run(net, tmp_path, served.address))
        client = stack.enter_context(closing(Client(net.name, GUEST)))
        wait_ready(client, tmp_path)
        client.until_answers(20, 60)
        served.process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        before: dict[str, Any] = client.status()
        time.sleep(1.0)
        assert client.status()["answers"] == before["answers"]
        served.process.send_signal(signal.SIGCONT)
        told = client.until_answers(100, 60)
        assert not told["wrong"] and told["answers"] >= before["answers"] + 100, told


def test_a_bridge_that_dies_is_replaced(tmp_path: Path) -> None:
    """What it held is lost, as on a wire; the guest's protection goes on."""
    with two_taps() as net, ExitStack() as stack:
        served = stack.enter_context(
            guests.backup(tmp_path, "--vm-map", "tap0=tap7", inside=("ip", "netns", "exec", net.name))
        )
        primary = stack.enter_context(run(net, tmp_path, served.address))
        client = stack.enter_context(closing(Client(net.name, GUEST)))
        wait_ready(client, tmp_path)
        until(lambda: served.status()["primary"].get("released_frames"))
        for _ in range(3):
            client.until_answers(20, 60)
            (bridge,) = [pid for pid in guests.descendants(primary.pid) if b"bridge_process" in guests.line_of(pid)]
            os.kill(bridge, signal.SIGKILL)
            before: dict[str, Any] = client.status()
            told = client.until_answers(50, 60)
            assert not told["wrong"] and told["answers"] >= before["answers"] + 50, told
        assert primary.poll() is None


def test_a_survivor_is_protected_again_with_its_network(tmp_path: Path) -> None:
    """And the next failover is as good as the first."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with two_taps() as net, ExitStack() as stack:
        inside = ("ip", "netns", "exec", net.name)
        here = stack.enter_context(guests.backup(first, "--vm-map", "tap0=tap7", inside=inside))
        there = stack.enter_context(guests.backup(second, "--vm-map", "tap7=tap0", inside=inside))
        primary = stack.enter_context(run(net, first, here.address))
        client = stack.enter_context(closing(Client(net.name, GUEST)))
        wait_ready(client, first)
        guests.wait_committed(here)
        os.kill(primary.pid, signal.SIGKILL)
        term = here.failover()["term"]
        until(lambda: here.status()["vm"] == "running")
        told = client.until_answers(50, 60)
        assert not told["wrong"], told
        primary.wait()
        (qmp,) = here.sockets("*.guest")
        how = ["protect", f"qemu:{qmp}", "--name", "web", "--to", there.address, "--term", term, "--interval", "20ms"]
        with guests.command(*how, log=second / "protect.log", inside=inside) as protecting:
            guests.wait_committed(there)
            assert there.status()["primary"].get("held_frames") is not None, "its output is not held"
            told = client.until_answers(50, 60)
            assert not told["wrong"], told
            before = client.status()
            os.kill(here.status()["vm_pid"], signal.SIGKILL)
            assert protecting.wait(guests.LONG_S) == 1
        until(lambda: not there.status()["connected"])
        assert not there.status()["last_end"]["goodbye"]
        there.failover()
        until(lambda: there.status()["vm"] == "running")
        told = client.until_answers(100, 60)
        assert not told["wrong"] and told["answers"] >= before["answers"] + 100, told
        told = client.end()
        assert not told["wrong"] and not told["faults"], told
