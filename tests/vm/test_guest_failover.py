"""A real guest behind the bridge: its QEMU is killed, a standby goes on, and the client's stream is exact.

The primary and the backup are this test: it copies what memory differs, and keeps it with the device state.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bridging import SO_RCVBUFFORCE, Network, inside, network
from conftest import many
from services import LONG_S
from vm_pair import GUEST, fail_over, pair
from vm_qemu import Qemu

from remus_ckpt.errors import BridgeError
from remus_ckpt.vm.bridge import Bridge, guest_pair

pytestmark = [pytest.mark.root, pytest.mark.qemu, pytest.mark.slow]


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory: on a disk each epoch would wait for the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="remus-guest-") as made:
        yield Path(made)


@pytest.mark.parametrize(
    ("kills", "vcpus", "append"),
    [
        (3, 1, ""),
        pytest.param(20, 1, "guest.pages=20000 guest.mib=32", marks=pytest.mark.kill),
        pytest.param(20, 2, "guest.pages=20000 guest.mib=32", marks=pytest.mark.kill),
    ],
    ids=["light", "heavy", "two-vcpus"],
)
def test_a_client_sees_no_failover(folder: Path, kills: int, vcpus: int, append: str) -> None:
    dice = random.Random(14)
    silences_s = []
    with pair(folder, 14, vcpus=vcpus, append=append) as (guest, client):
        while len(silences_s) < kills or not guest.cut_frames:  # kills that take nothing back show nothing
            assert len(silences_s) < kills + 10, "no kill takes a frame back"
            guest.run_until_dead(dice.uniform(0.3, 1.5))
            told = fail_over(guest, client)
            assert not told["wrong"] and not told["is_stalled"], told
            silences_s.append(told["silence_s"])
        guest.bridge.let_pass()
        told = client.end()
    print(
        f"silences, s: {sorted(silences_s)}; kills by phase: {dict(guest.phases)}; dropped: {guest.cut_frames} frames"
    )
    assert (told["wrong"], told["faults"]) == (None, 0)


_QUEUES_FILL_S = 0.3
"""Behind a bridge that is full, those of QEMU and of the guest are full by then."""
_KILLS = 4
"""Where nothing had left since the last commit, a kill shows nothing."""


@pytest.mark.parametrize("seed", range(many(1, 5)))
def test_the_client_sees_it_when_output_is_not_held(folder: Path, seed: int) -> None:
    """The control: what left before its commit is contradicted by the standby, or the stream stalls for good."""
    dice = random.Random(seed)
    for _ in range(_KILLS):
        with pair(folder, seed, is_held=False) as (guest, client):
            guest.run_until_dead(dice.uniform(0.3, 1.5))
            told = fail_over(guest, client, timeout_s=10)
            if told["wrong"] or told["is_stalled"]:
                return
    pytest.fail(f"not in {_KILLS} kills: {told}")


def test_a_client_does_not_see_that_the_bridge_is_killed(folder: Path) -> None:
    """Frames are lost with it, as on a wire; then the guest is killed too."""
    dice, deaths = random.Random(6), 0
    with pair(folder, 6) as (guest, client):
        for _ in range(many(3, 20)):
            timer = threading.Timer(dice.uniform(0, 0.2), os.kill, (guest.bridge.pid, signal.SIGKILL))
            timer.start()
            with pytest.raises(BridgeError):
                while True:
                    guest.checkpoint()
            timer.join()
            guest.bridge.restart()
            deaths += 1
            before, deadline = client.status(), time.monotonic() + 60
            while (told := client.status())["answers"] < before["answers"] + 50:
                assert not told["wrong"] and time.monotonic() < deadline, told
                guest.checkpoint()
        guest.run_until_dead(0.5)
        told = fail_over(guest, client)
        assert not told["wrong"] and not told["is_stalled"], told
    assert deaths


def burst(net: Network, count: int) -> tuple[socket.socket, Callable[[], list[int]]]:
    """Ask the guest for so many datagrams. Returns the socket, and what has come so far."""
    with inside(net.name):
        ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    ear.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    ear.setblocking(False)
    ear.sendto(struct.pack("<I", count), (GUEST, 7001))
    came: list[int] = []

    def look() -> list[int]:
        with contextlib.suppress(BlockingIOError):
            while True:
                came.append(int.from_bytes(ear.recv(2000)[:4], "little"))
        return came

    return ear, look


@pytest.mark.parametrize("held_frames", [65_536, 100], ids=["roomy", "narrow"])
def test_a_burst_of_a_guest_loses_nothing(folder: Path, held_frames: int) -> None:
    """With stops in the middle of it, and with so little room that the guest has to wait again and again."""
    with network() as net, contextlib.ExitStack() as stack:
        bridge = stack.enter_context(Bridge.start([net.tap("tap0", "10.83.9.1/24")], held_frames=held_frames))
        ours, theirs = guest_pair()
        bridge.attach(0, ours)
        guest = stack.enter_context(contextlib.closing(Qemu(folder, [theirs])))
        bridge.let_pass()
        guest.until_said("guest is ready")
        bridge.hold()
        ear, look = burst(net, 20_000)
        stack.callback(ear.close)
        epochs = fulls = seen = 0
        stands_still_at = time.monotonic() + LONG_S
        while len(look()) < 20_000 and time.monotonic() < stands_still_at:
            time.sleep(0.01)
            if held_frames < 20_000 and bridge.status().is_full:
                fulls += 1
                time.sleep(_QUEUES_FILL_S)
            bridge.make_room()
            guest.qmp.ask("stop")
            bridge.mark(epochs)
            guest.qmp.ask("cont")
            bridge.release(epochs)
            epochs += 1
            if len(look()) > seen:
                seen, stands_still_at = len(look()), time.monotonic() + LONG_S
        assert look() == list(range(20_000))
        assert epochs > 3
        assert held_frames > 20_000 or fulls > 3
