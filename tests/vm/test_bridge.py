"""A bridge between a guest and a real TAP device: what is not committed never leaves, and nothing is lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import guests
import pytest
from bridging import GUEST_MAC, HOST_MAC, Ear, Network, frame, network, number_of, send_all, until
from conftest import many

from remus_ckpt.errors import BridgeError, RemusError
from remus_ckpt.vm import bridge as near_end
from remus_ckpt.vm.bridge import Bridge, guest_pair
from remus_ckpt.vm.disk_server import listen
from remus_ckpt.vm.network import GuestNetwork

pytestmark = pytest.mark.root


@pytest.fixture
def net() -> Iterator[Network]:
    with network() as made:
        yield made


class Bridged:
    """A bridge with one NIC, a socket in the guest's place, and an ear in the network."""

    def __init__(self, net: Network, **options: object) -> None:
        self.bridge = Bridge.start([net.tap()], **options)  # type: ignore[arg-type]
        self.guest = self.plug()
        self.ear = net.ear()

    def plug(self, nic: int = 0) -> socket.socket:
        ours, theirs = guest_pair()
        self.bridge.attach(nic, ours)
        return theirs

    def close(self) -> None:
        self.guest.close()
        self.ear.close()
        self.bridge.close()


@pytest.fixture
def bridged(net: Network) -> Iterator[Bridged]:
    made = Bridged(net)
    yield made
    made.close()


def test_frames_wait_for_their_epoch(bridged: Bridged) -> None:
    bridge, ear = bridged.bridge, bridged.ear
    send_all(bridged.guest, [frame(number) for number in range(3)])
    assert bridge.mark(7) == 3
    send_all(bridged.guest, [frame(number) for number in range(3, 5)])
    assert bridge.mark(8) == 2
    send_all(bridged.guest, [frame(5)])
    assert ear.silence()
    assert bridge.release(7) == 3
    assert ear.numbers(3) == [0, 1, 2]
    assert ear.silence()
    assert bridge.release(8) == 2
    assert ear.numbers(2) == [3, 4]
    assert ear.silence()
    status = bridge.status()
    assert (status.marked, status.released, status.nics[0].held_frames, status.nics[0].held_bytes) == (8, 8, 1, 60)
    assert (status.nics[0].released_frames, sum(status.latency_counts)) == (5, 5)
    assert 0 < status.latency_s(0.5) <= status.latency_s(1.0) <= status.latency_max_s <= status.latency_sum_s


def test_a_release_covers_the_epochs_before(bridged: Bridged) -> None:
    for epoch in range(4):
        send_all(bridged.guest, [frame(epoch)])
        bridged.bridge.mark(epoch)
    assert bridged.bridge.release(2) == 3
    assert bridged.bridge.release(1) == 0
    assert bridged.ear.numbers(4, 0.5) == [0, 1, 2]


def test_incoming_frames_pass_at_once(bridged: Bridged) -> None:
    bridged.guest.settimeout(5)
    for number in range(100):
        sent = frame(number, 1514, source=HOST_MAC, to=GUEST_MAC)
        bridged.ear.socket.send(sent)
        assert bridged.guest.recv(1 << 17) == sent


def test_what_comes_before_the_guest_waits_for_it(net: Network) -> None:
    with contextlib.closing(Bridged(net)) as bridged:
        bridged.guest.close()
        until(lambda: not bridged.bridge.status().nics[0].has_guest)
        bridged.ear.socket.send(frame(1, source=HOST_MAC, to=GUEST_MAC))
        time.sleep(0.05)
        bridged.guest = bridged.plug()
        bridged.guest.settimeout(5)
        assert number_of(bridged.guest.recv(100)) == 1


@pytest.mark.parametrize("size", [60, 1514])
def test_a_burst_loses_nothing(bridged: Bridged, size: int) -> None:
    send_all(bridged.guest, [frame(number, size) for number in range(5000)])
    assert bridged.bridge.mark(0) == 5000
    assert bridged.ear.silence()
    bridged.bridge.release(0)
    assert bridged.ear.numbers(5000) == list(range(5000))


def test_a_full_bridge_makes_the_guest_wait_and_loses_nothing(net: Network) -> None:
    """Far more than may be held, and the socket's room besides."""
    with contextlib.closing(Bridged(net, held_frames=1000)) as bridged:
        bridged.guest.setblocking(False)
        sent = 0
        with pytest.raises(BlockingIOError):
            while sent < 100_000:
                bridged.guest.send(frame(sent, 1514))
                sent += 1
                if sent % 100 == 0:
                    time.sleep(0.001)
        status = bridged.bridge.status()
        assert status.is_full
        assert 1000 <= status.nics[0].held_frames < 1000 + 64 < sent
        heard: list[int] = []
        epoch = 0
        while len(heard) < sent:
            bridged.bridge.mark(epoch)
            bridged.bridge.release(epoch)
            epoch += 1
            heard += bridged.ear.numbers(sent - len(heard), 0.5)
        assert heard == list(range(sent))


def test_a_guest_that_waits_gets_room_before_its_stop(net: Network) -> None:
    with contextlib.closing(Bridged(net, held_frames=100)) as bridged:
        bridged.guest.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                bridged.guest.send(frame(sent, 1514))
                sent += 1
        bridged.bridge.make_room()
        assert bridged.bridge.status().nics[0].held_frames >= sent
        send_all(bridged.guest, [frame(number) for number in range(sent, sent + 5000)])
        assert bridged.bridge.mark(0) == sent + 5000
        assert bridged.bridge.status().is_full


def test_a_mark_of_a_guest_that_still_sends_is_refused(bridged: Bridged) -> None:
    """It would have no end: the guest is not stopped."""
    program = f"import os\nwhile True: os.write({bridged.guest.fileno()}, bytes(60000))"
    descriptors = [bridged.guest.fileno()]
    senders = [subprocess.Popen([sys.executable, "-c", program], pass_fds=descriptors) for _ in range(3)]
    try:
        deadline = time.monotonic() + 60.0  # a mark between two of their turns finds an end
        with pytest.raises(BridgeError, match="still sends"):
            for epoch in itertools.takewhile(lambda _: time.monotonic() < deadline, itertools.count()):
                bridged.bridge.mark(epoch)
    finally:
        for sender in senders:
            sender.kill()
            sender.wait()


def test_epochs_rise_and_only_what_is_marked_is_released(bridged: Bridged) -> None:
    bridged.bridge.mark(5)
    for wrong in (lambda: bridged.bridge.mark(5), lambda: bridged.bridge.release(6), lambda: bridged.bridge.mark(-1)):
        with pytest.raises(BridgeError):
            wrong()
    bridged.bridge.drop()
    assert bridged.bridge.release(6) == 0, "what was dropped cannot be released, but a late commit is no fault"
    bridged.bridge.mark(2)


def test_what_was_not_committed_is_dropped_at_a_failover(bridged: Bridged) -> None:
    """Also what the dead guest had sent and nobody had read."""
    bridge = bridged.bridge
    send_all(bridged.guest, [frame(0)])
    bridge.mark(0)
    send_all(bridged.guest, [frame(1)])
    bridge.mark(1)
    send_all(bridged.guest, [frame(number) for number in range(2, 500)])
    bridged.guest.close()
    bridge.release(0)
    assert bridge.drop() == 499
    bridged.guest = bridged.plug()
    send_all(bridged.guest, [frame(1000)])
    bridge.mark(0)
    bridge.release(0)
    assert bridged.ear.numbers(3, 0.5) == [0, 1000]
    assert bridge.status().nics[0].dropped_frames == 499


def test_what_a_guest_that_waits_has_sent_is_dropped_too(net: Network) -> None:
    """It is still in the socket, and must not leave as the output of a later epoch."""
    with contextlib.closing(Bridged(net, held_frames=10)) as bridged:
        send_all(bridged.guest, [frame(number) for number in range(500)])
        assert bridged.bridge.drop() == 500
        bridged.bridge.let_pass()
        send_all(bridged.guest, [frame(500)])
        assert bridged.ear.numbers(2, 0.3) == [500]


def test_a_guest_that_ends_with_frames_unread_has_still_sent_its_own(bridged: Bridged) -> None:
    bridged.ear.socket.send(frame(1, source=HOST_MAC, to=GUEST_MAC))
    until(lambda: bridged.bridge.status().nics[0].incoming_frames == 1)
    os.kill(bridged.bridge.pid, signal.SIGSTOP)
    send_all(bridged.guest, [frame(number) for number in range(10)])
    bridged.guest.close()
    os.kill(bridged.bridge.pid, signal.SIGCONT)
    until(lambda: not bridged.bridge.status().nics[0].has_guest)
    assert bridged.bridge.mark(0) == 10


def test_another_guest_never_inherits_what_is_held(bridged: Bridged) -> None:
    send_all(bridged.guest, [frame(0)])
    bridged.bridge.mark(0)
    former, bridged.guest = bridged.guest, bridged.plug()
    former.close()
    send_all(bridged.guest, [frame(1)])
    bridged.bridge.mark(1)
    bridged.bridge.release(1)
    assert bridged.ear.numbers(2, 0.5) == [1]


def test_a_guest_that_nobody_protects_is_heard_at_once(bridged: Bridged) -> None:
    send_all(bridged.guest, [frame(0)])
    bridged.bridge.mark(0)
    send_all(bridged.guest, [frame(1)])
    bridged.bridge.let_pass()
    assert bridged.ear.numbers(2) == [0, 1]
    send_all(bridged.guest, [frame(2)])
    assert bridged.ear.numbers(1) == [2]
    bridged.bridge.hold()
    send_all(bridged.guest, [frame(3)])
    assert bridged.ear.silence()


def test_several_nics_are_marked_together(net: Network) -> None:
    bridge = Bridge.start([net.tap("tap0"), net.tap("tap1")])
    ears = [net.ear("tap0"), net.ear("tap1")]
    guests = []
    for nic in range(2):
        ours, theirs = guest_pair()
        bridge.attach(nic, ours)
        guests.append(theirs)
    send_all(guests[0], [frame(0), frame(1)])
    send_all(guests[1], [frame(10)])
    assert bridge.mark(0) == 3
    assert all(ear.silence(0.1) for ear in ears)
    bridge.release(0)
    assert [ear.numbers(2, 0.5) for ear in ears] == [[0, 1], [10]]
    with pytest.raises(BridgeError, match="none with the number 2"):
        bridge.attach(2, guests[0])
    for opened in (*guests, *ears, bridge):
        opened.close()


def test_as_many_nics_as_there_may_be_with_all_their_addresses(net: Network) -> None:
    """The answers still fit into a message, and so do all descriptors."""
    with pytest.raises(BridgeError, match="at most 16"):
        Bridge.start(["tap0"] * 17)
    path = Path(f"/run/netns/{net.name}.bridge")
    with Bridge.start([net.tap(f"tap{number}") for number in range(16)], listen=path) as bridge:
        guests = []
        for nic in range(16):
            ours, theirs = guest_pair()
            bridge.attach(nic, ours)
            guests.append(theirs)
            for number in range(100):
                mac, ip = bytes([2, 0, 0, 0, nic, number]), bytes([254, *bytes(13), nic, number])
                body = HOST_MAC + mac + b"\x86\xdd" + bytes.fromhex("6000000000203aff") + ip + ip
                send_all(theirs, [body + b"\x88" + bytes(7) + ip])
        bridge.mark(0)
        addresses = [nic.addresses for nic in bridge.status().nics]
        assert {(len(one.macs), len(one.ips)) for one in addresses} == {(32, 32)}
        bridge.announce(addresses)
        with Bridge.connect(path) as other:
            other.mark(0)
        for guest in guests:
            guest.close()


def test_a_guest_without_a_network_has_a_bridge_too() -> None:
    with Bridge.start([]) as bridge:
        assert bridge.mark(0) == bridge.release(0) == bridge.drop() == 0
        bridge.announce()
        assert bridge.status().nics == ()


def test_frames_that_are_none_harm_nobody(bridged: Bridged) -> None:
    """Too short, too long, and what the device does not take: the guest decides on these bytes."""
    for odd in (b"\0", bytes(13), bytes(69_633), bytes(100_000), random.Random(1).randbytes(60_000)):
        bridged.guest.send(odd)
    send_all(bridged.guest, [frame(1)])
    bridged.bridge.mark(0)
    bridged.bridge.release(0)
    assert bridged.ear.numbers(1) == [1]
    assert bridged.bridge.status().nics[0].refused_frames >= 4


def test_a_device_that_is_removed_is_told(net: Network, bridged: Bridged) -> None:
    net.ip("link", "del", "tap0")
    until(lambda: not bridged.bridge.status().nics[0].has_tap)
    send_all(bridged.guest, [frame(1)])
    bridged.bridge.mark(0)
    bridged.bridge.release(0)
    until(lambda: bridged.bridge.status().nics[0].refused_frames == 1)
    before = _cpu_s(bridged.bridge.pid)
    time.sleep(0.5)
    assert _cpu_s(bridged.bridge.pid) - before < 0.2, "it must not turn in circles"


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Deaths


OWNER = """
import json, os, signal, socket, sys, time
from bridging import frame
from pathlib import Path
from remus_ckpt.vm.bridge import Bridge
from remus_ckpt.vm.tap import Tap
tap, ours, guest, committed, hold = (int(word) for word in sys.argv[1:6])
bridge = Bridge.start([Tap(tap, "tap0")], listen=Path(sys.argv[6]))
os.set_inheritable(guest, False)
bridge.attach(0, socket.socket(fileno=ours))
if not hold:
    bridge.let_pass()
print(bridge.pid, flush=True)
sender = socket.socket(fileno=guest)
number = epoch = 0
while True:
    for _ in range(37):
        sender.send(frame(number))
        number += 1
    bridge.mark(epoch)
    sender.send(frame(number))  # of the next epoch
    number += 1
    os.pwrite(committed, (number - 1).to_bytes(8, "little"), 0)  # how many frames are committed
    bridge.release(epoch)
    epoch += 1
"""
"""Sends frames in the guest's place, marks, commits by writing a number, and releases: the last word is on the disk."""


class Owned:
    """A bridge whose owner is another process."""

    def __init__(self, net: Network, folder: Path, *, hold: bool = True) -> None:
        self.path = folder / "bridge"
        self.committed = os.open(folder / "committed", os.O_RDWR | os.O_CREAT)
        tap = net.tap()
        self.ear = net.ear()
        ours, self.guest = guest_pair()
        fds = [tap.fd, ours.fileno(), self.guest.fileno(), self.committed]
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, *map(str, fds), str(int(hold)), str(self.path)],
            pass_fds=fds,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        ours.close()
        tap.close()
        assert self.process.stdout is not None
        self.pid = int(self.process.stdout.readline())

    def kill_owner(self) -> int:
        """Returns how many frames were committed."""
        self.process.kill()
        self.process.wait()
        return int.from_bytes(os.pread(self.committed, 8, 0), "little")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        os.close(self.committed)
        self.guest.close()
        self.ear.close()


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.mark.parametrize("seed", range(many(4, 40)))
def test_when_the_owner_dies_only_what_was_committed_has_left(net: Network, tmp_path: Path, seed: int) -> None:
    with contextlib.closing(Owned(net, tmp_path)) as owned:
        time.sleep(random.Random(seed).uniform(0.001, 0.3))
        committed = owned.kill_owner()
        heard = owned.ear.numbers(1 << 20, 0.5)
        assert heard == list(range(len(heard))), "in order, without a gap"
        # A commit of which the bridge was not told may be missing; that is loss, as on any wire.
        assert committed - 38 <= len(heard) <= committed


def test_the_test_sees_what_leaves_too_early(net: Network, tmp_path: Path) -> None:
    """The control: with the hold switched off, more has left than was committed."""
    seen = 0
    with contextlib.closing(Owned(net, tmp_path, hold=False)) as owned:
        for _ in range(20):
            time.sleep(0.02)
            os.kill(owned.process.pid, signal.SIGSTOP)
            committed = int.from_bytes(os.pread(owned.committed, 8, 0), "little")
            heard = owned.ear.numbers(1 << 20, 0.1)
            seen += bool(heard) and heard[-1] >= committed
            os.kill(owned.process.pid, signal.SIGCONT)
    assert seen


def test_a_guest_whose_owner_died_is_taken_by_another(net: Network, tmp_path: Path) -> None:
    with contextlib.closing(Owned(net, tmp_path)) as owned:
        time.sleep(0.1)
        owned.kill_owner()
        send_all(owned.guest, [frame(900_000)])
        heard = owned.ear.numbers(1 << 20, 0.3)
        assert heard and 900_000 not in heard
        with Bridge.connect(owned.path) as bridge:
            assert bridge.pid == owned.pid
            assert (bridge.status().mode, bridge.status().nics[0].has_guest) == ("hold", True)
            send_all(owned.guest, [frame(900_001)])
            bridge.mark(0)
            bridge.release(0)
            assert owned.ear.numbers(1) == [900_001]
            os.kill(owned.pid, signal.SIGKILL)
            with pytest.raises(BridgeError, match="does not answer"):
                bridge.mark(1)
            send_all(owned.guest, [frame(900_002)])
            bridge.restart()
            bridge.mark(1)
            bridge.release(1)
            assert owned.ear.numbers(1) == [900_002], "what the guest sent meanwhile is not lost"
            owned.guest.close()
            pid = bridge.pid
        until(lambda: not is_alive(pid))
        assert not owned.path.exists()


def test_a_guest_that_nobody_protects_keeps_its_network_until_it_is_protected_again(
    net: Network, tmp_path: Path
) -> None:
    """As after a takeover, when the backup ends and another primary begins."""
    with contextlib.closing(Bridged(net, listen=tmp_path / "bridge")) as bridged:
        bridged.bridge.let_pass()
        bridged.bridge.close()
        send_all(bridged.guest, [frame(0)])
        assert bridged.ear.numbers(1) == [0]
        with Bridge.connect(tmp_path / "bridge") as again:
            assert again.status().mode == "pass"
            again.hold()
            send_all(bridged.guest, [frame(1)])
            assert bridged.ear.silence()
            again.mark(0)
            again.release(0)
            assert bridged.ear.numbers(1) == [1]
            bridged.guest.close()


def test_a_bridge_ends_with_its_guest_when_nobody_owns_it(net: Network, tmp_path: Path) -> None:
    with contextlib.closing(Owned(net, tmp_path)) as owned:
        owned.kill_owner()
        time.sleep(0.2)
        assert is_alive(owned.pid)
        owned.guest.close()
        until(lambda: not is_alive(owned.pid))


def test_signals_to_all_processes_of_a_service_end_no_bridge(bridged: Bridged) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(bridged.bridge.pid, number)
    assert bridged.bridge.mark(0) == 0


@pytest.mark.parametrize("seed", range(many(3, 30)))
def test_when_the_bridge_dies_nothing_uncommitted_leaves(bridged: Bridged, seed: int) -> None:
    """It dies at any instant, and is started again; a frame may be lost, none comes twice or too early."""
    dice = random.Random(seed)
    bridge, ear = bridged.bridge, bridged.ear
    number = committed = 0
    heard: list[int] = []
    deaths = 0
    for epoch in range(200):
        try:
            send_all(bridged.guest, [frame(number + more) for more in range(dice.randrange(20))])
            number = number + 20
            if dice.random() < 0.05:
                os.kill(bridge.pid, signal.SIGKILL)
            bridge.mark(epoch)
            committed = number
            bridge.release(epoch)
        except BridgeError:
            deaths += 1
            bridge.restart()
        if epoch % 20 == 19:
            heard += ear.numbers(1 << 20, 0.02)
            assert not heard or heard[-1] < committed
    assert heard == sorted(set(heard))
    assert deaths


def test_a_frozen_bridge_is_an_error_in_time(bridged: Bridged) -> None:
    os.kill(bridged.bridge.pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(BridgeError, match="does not answer"):
        bridged.bridge.mark(0)
    assert time.monotonic() - start < 10
    bridged.bridge.restart()
    send_all(bridged.guest, [frame(1)])
    bridged.bridge.mark(0)
    bridged.bridge.release(0)
    assert bridged.ear.numbers(1) == [1]


def test_two_owners_are_one_too_many(net: Network, tmp_path: Path) -> None:
    with contextlib.closing(Bridged(net, listen=tmp_path / "bridge")) as bridged:
        send_all(bridged.guest, [frame(0)])
        bridged.bridge.mark(0)
        with Bridge.connect(tmp_path / "bridge") as other:
            with pytest.raises(BridgeError, match="another client owns"):
                bridged.bridge.release(0)
            assert bridged.bridge.status().nics[0].dropped_frames == 1, "the status is for all"
            other.mark(0)
        assert (tmp_path / "bridge").stat().st_mode & 0o777 == 0o600


def test_requests_that_are_none_harm_nobody(net: Network, tmp_path: Path) -> None:
    with contextlib.closing(Bridged(net, listen=tmp_path / "bridge")) as bridged:
        odd = [
            b"\xff", b"[" * 30_000, b"[]", b"{}", b'{"do": 1}', b'{"do": "mark", "epoch": 1}', b'{"do": ["mark"]}',
            b"{" + b" " * 60_000, bytes(70_000),
        ]  # fmt: skip
        for request in odd:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                stranger.connect(str(tmp_path / "bridge"))
                stranger.send(request)
                assert b"error" in stranger.recv(1 << 16)
        crowd = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(40)]
        for stranger in crowd:
            stranger.connect(str(tmp_path / "bridge"))
        assert bridged.bridge.mark(0) == 0
        for stranger in crowd:
            stranger.close()


def test_a_second_bridge_on_the_same_device_or_path_is_refused(net: Network, tmp_path: Path) -> None:
    with contextlib.closing(Bridged(net, listen=tmp_path / "bridge")):
        with pytest.raises(BridgeError, match="another program has it"):
            net.tap()
        with pytest.raises(BridgeError, match="another bridge listens"):
            Bridge.start([], listen=tmp_path / "bridge")
    with pytest.raises(BridgeError, match="not a name for a TAP device"):
        net.tap("a-name-that-is-too-long")
    net.ip("link", "add", "tap1", "type", "bridge")
    with pytest.raises(BridgeError, match="of another kind"):
        net.tap("tap1")


def test_a_guest_goes_on_though_the_bridge_died_that_waited_for_it(net: Network, tmp_path: Path) -> None:
    waiting = GuestNetwork([net.tap()], tmp_path / "bridge")  # type: ignore[list-item]
    guest = socket.socket(fileno=os.dup(waiting.sockets[0]))
    waiting.plug_in()
    (bridge,) = [pid for pid in guests.descendants(os.getpid()) if b"bridge_process" in guests.line_of(pid)]
    os.kill(bridge, signal.SIGKILL)
    waiting.go_on()
    with contextlib.closing(net.ear()) as ear, guest:
        send_all(guest, [frame(0)])
        assert ear.numbers(1) == [0]
        with contextlib.closing(GuestNetwork.of_survivor(tmp_path / "bridge")) as taken:
            for refused in (waiting.let_pass, waiting.before_pause, lambda: waiting.drain(0)):
                with pytest.raises(RemusError, match="take it"):
                    refused()
            assert taken.output() is not None, "the bridge of the new owner is not killed"
    waiting.close()


def test_a_bridge_that_does_not_answer_at_its_start_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    hangs = tmp_path / "hangs.py"
    hangs.write_text(
        f"import os, pathlib, time\npathlib.Path({str(started)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    monkeypatch.setattr(near_end, "PROCESS", hangs)
    monkeypatch.setattr(near_end, "START_S", 5.0)
    with pytest.raises(BridgeError, match="cannot be started"):
        Bridge.start([])
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_only_the_owner_may_connect_and_no_other_file_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The umask belongs to all threads, each of which may start a bridge."""
    monkeypatch.delattr(os, "umask")
    with Bridge.start([], listen=tmp_path / "bridge"), listen(tmp_path / "disk"):
        assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("bridge", "disk")] == [0o600, 0o600]


def test_a_fork_does_not_keep_a_bridge_alive(bridged: Bridged) -> None:
    pid = os.fork()
    if not pid:
        bridged.guest.close()  # it is the test's own
        time.sleep(30)
        os._exit(0)
    try:
        bridged.guest.close()
        bridged.bridge.close()
        until(lambda: not is_alive(bridged.bridge.pid))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# Announcements


def test_a_network_learns_where_the_guest_is_now(net: Network) -> None:
    """The kernel itself reads them: its tables of neighbours, and a switch of two ports."""
    net.ip("link", "add", "switch", "type", "bridge")
    taps = [net.tap("tap0"), net.tap("tap1")]
    for name in ("tap0", "tap1"):
        net.ip("link", "set", name, "master", "switch")
    subprocess.run(
        ["ip", "netns", "exec", net.name, "sh", "-c", "echo 0 > /proc/sys/net/ipv6/conf/switch/disable_ipv6"],
        check=True,
    )
    net.ip("addr", "add", "10.83.9.1/24", "dev", "switch")
    net.ip("addr", "add", "fd83::1/64", "dev", "switch", "nodad")
    net.ip("link", "set", "switch", "up")
    here, there = Bridge.start(taps[:1]), Bridge.start(taps[1:])
    ours, guest = guest_pair()
    here.attach(0, ours)
    mac = GUEST_MAC
    ip, ip6 = bytes([10, 83, 9, 2]), bytes.fromhex("fd83") + bytes(13) + b"\2"
    arp = bytes(6 * [255]) + mac + bytes.fromhex("08060001080006040001") + mac + ip + bytes(6) + bytes([10, 83, 9, 1])
    advert = HOST_MAC + mac + b"\x86\xdd" + bytes.fromhex("6000000000203aff") + ip6 + ip6 + b"\x88" + bytes(7) + ip6
    data = HOST_MAC + mac + b"\x08\0" + bytes(12) + bytes([8, 8, 8, 8]) * 2
    foreign = arp[:22] + HOST_MAC + bytes([10, 83, 9, 3]) + arp[32:]
    send_all(guest, [arp, advert, data, foreign])
    here.mark(0)
    here.release(0)
    until(lambda: here.status().nics[0].released_frames == 4)
    addresses = here.status().nics[0].addresses
    assert addresses.macs == (mac,)
    assert addresses.ips == ((mac, ip), (mac, ip6)), "the source of a packet may be another's"
    for text in ("10.83.9.2", "fd83::2"):
        net.ip("neigh", "replace", text, "lladdr", "02:00:00:00:00:01", "dev", "switch", "nud", "stale")
    until(lambda: _port(net, mac) == "tap0")
    there.announce([addresses])
    until(lambda: _port(net, mac) == "tap1")
    for text in ("10.83.9.2", "fd83::2"):
        until(lambda text=text: mac.hex(":") in _asked(net, "neigh", "show", text))
    for opened in (guest, here, there):
        opened.close()


def _asked(net: Network, *words: str) -> str:
    return subprocess.run(["ip", "-n", net.name, *words], check=True, capture_output=True, text=True).stdout


def _port(net: Network, mac: bytes) -> str:
    told = subprocess.run(
        ["ip", "netns", "exec", net.name, "bridge", "fdb", "show"], check=True, capture_output=True, text=True
    ).stdout
    return next((line.split()[2] for line in told.splitlines() if line.startswith(mac.hex(":"))), "")


def test_a_mac_without_an_address_is_announced_too(bridged: Bridged) -> None:
    send_all(bridged.guest, [frame(1)])
    bridged.bridge.mark(0)
    bridged.bridge.announce()
    heard = bridged.ear.frames(5, kind=0x8035)
    assert len(heard) == 5
    assert {one[6:12] for one in heard} == {GUEST_MAC}
    assert bridged.ear.silence(), "what is held stays held"


def test_the_ear_hears(bridged: Bridged) -> None:
    """`silence` would be worth nothing if it were always so."""
    assert isinstance(bridged.ear, Ear)
    bridged.bridge.let_pass()
    send_all(bridged.guest, [frame(1)])
    assert not bridged.ear.silence()
