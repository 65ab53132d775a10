"""A few runs of tools/fleet_kills.py, and its control; and the cuts that it makes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from services import LONG_S

from remus_ckpt.demo.lan import Host, Network

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fleet_kills.py"

pytestmark = [pytest.mark.kill, pytest.mark.root]


def kills(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--seed", "3", "--frozen", "4", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("fault", ["cut off leader", "backup", "cut primary-backup", "frozen primary"])
def test_nothing_released_is_lost_or_done_twice(fault: str) -> None:
    ran = kills("--runs", "1", "--only", fault)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 valid runs" in ran.stdout


def test_without_the_log_it_is() -> None:
    """A backup that was killed comes back, and takes over what the other one protects by then."""
    ran = kills("--runs", "1", "--only", "backup", "--control")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 wrong" in ran.stdout


def connected(here: Host, there: Host) -> tuple[socket.socket, socket.socket]:
    with there.visit(), socket.create_server((there.address, 0)) as server, here.visit():
        near = socket.create_connection(server.getsockname(), LONG_S)
        far, _ = server.accept()
    far.settimeout(0.5)
    return near, far


def test_a_cut_lets_nothing_through_and_tells_nobody() -> None:
    with Network({name: (f"10.83.9.{number}", "") for number, name in enumerate("abc", 11)}) as network:
        a, b, c = network.hosts.values()
        pairs = [connected(here, there) for here, there in ((a, b), (b, a), (a, c))]
        a.cut_from(b)
        for near, _ in pairs:
            near.sendall(b"x")
        for _, far in pairs[:2]:
            with pytest.raises(TimeoutError):
                far.recv(1)
        assert pairs[2][1].recv(1) == b"x"
        a.mend_to(b)
        for _, far in pairs[:2]:
            far.settimeout(LONG_S)
            assert far.recv(1) == b"x"
        for near, far in pairs:
            near.close()
            far.close()
