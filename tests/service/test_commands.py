"""Commands of the user's: what is killed is killed whole, and what a good one leaves behind lives on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from services import LONG_S, until

from remus_ckpt.errors import RemusError
from remus_ckpt.service.commands import ShellCommand

FAMILIES = {
    "a child": "{worker}",
    "in the background": "{worker} & wait",
    "a pipe": "{worker} 2>&1 | cat",
    "a session of its own": "setsid {worker} & wait",
    "a daemon": "(setsid sh -c '{worker} & exit' &); sleep 60",
    "deaf to all that can be heard": 'trap "" TERM HUP INT; {worker}',
}


def started(at: Path) -> int:
    until(at.exists)
    return int(at.read_text())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, and while it is read
        return False


def script(tmp_path: Path, family: str) -> str:
    path = tmp_path / "worker"
    path.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/new\nmv {tmp_path}/new {tmp_path}/pid\nexec sleep 60\n")
    path.chmod(0o700)
    return FAMILIES[family].format(worker=path)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_killed_is_killed_whole(tmp_path: Path, family: str) -> None:
    command = ShellCommand(script(tmp_path, family))
    pid = started(tmp_path / "pid")
    assert command.wait(0.0) is None
    command.kill()
    assert command.wait(LONG_S) == 128 + signal.SIGKILL
    assert not is_alive(pid)


@pytest.mark.parametrize("family", FAMILIES)
def test_when_this_process_is_killed(tmp_path: Path, family: str) -> None:
    code = (
        "import sys; from remus_ckpt.service.commands import ShellCommand\n"
        "shell = ShellCommand(sys.argv[1]); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code, script(tmp_path, family)], stdin=subprocess.PIPE) as process:
        pid = started(tmp_path / "pid")
        process.kill()
    until(lambda: not is_alive(pid))


@pytest.mark.parametrize("family", ["in the background", "a session of its own"])
def test_one_that_fails_leaves_nothing_and_one_that_succeeds_may(tmp_path: Path, family: str) -> None:
    for status in (1, 0):
        command = script(tmp_path, family).replace("wait", f"while ! test -e {tmp_path}/pid; do sleep 0.01; done")
        assert ShellCommand(f"{command}; exit {status}").wait(LONG_S) == status
        pid = int((tmp_path / "pid").read_text())
        (tmp_path / "pid").unlink()
        assert is_alive(pid) is (status == 0)
    os.kill(pid, signal.SIGKILL)


def test_one_that_is_let_be_outlives_us(tmp_path: Path) -> None:
    code = (
        "import sys; from remus_ckpt.service.commands import ShellCommand\n"
        "shell = ShellCommand(sys.argv[1]); shell.let_be(); shell.kill(); print('let be', flush=True); sys.stdin.read()"
    )
    command = script(tmp_path, "a pipe")
    with subprocess.Popen(
        [sys.executable, "-c", code, command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        pid = started(tmp_path / "pid")
        assert process.stdout is not None
        assert process.stdout.readline() == b"let be\n"
        process.kill()
    time.sleep(0.3)
    assert is_alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_what_it_is_told(tmp_path: Path) -> None:
    """A NUL, which no environment can hold, does not cut a name short."""
    command = ShellCommand(f'printf %s "$REMUS_PEER" > {tmp_path}/peer', {"REMUS_PEER": "good\0 evil"})
    assert command.wait(LONG_S) == 0
    assert (tmp_path / "peer").read_text() == "good\ufffd evil"


@pytest.mark.parametrize("environment", [{"A": "x" * (1 << 22)}, {"A\0": "x"}, {"A": "\ud800"}])
def test_one_that_cannot_be_started(environment: dict[str, str]) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(RemusError) as caught:
        ShellCommand("true", environment)
    assert os.listdir("/proc/self/fd") == before
    assert "true" in str(caught.value)  # whose traceback keeps what the call had


def test_how_it_ended() -> None:
    before = os.listdir("/proc/self/fd")
    command = ShellCommand("exit 7")
    assert command.wait(LONG_S) == 7
    assert os.listdir("/proc/self/fd") == before, "a descriptor is left"
    assert ShellCommand("kill -9 $$").wait(LONG_S) == 128 + 9
    assert ShellCommand("cat").wait(LONG_S) == 0, "it has no input"


@pytest.mark.parametrize("reaper", ["signal.SIG_IGN", "lambda *_: os.waitpid(-1, os.WNOHANG)"])
def test_how_it_ended_where_somebody_else_buries_our_children(reaper: str) -> None:
    """Popen takes such an end for a good one: a fence that failed would have succeeded."""
    code = (
        f"import os, signal; signal.signal(signal.SIGCHLD, {reaper})\n"
        "from remus_ckpt.service.commands import ShellCommand\n"
        "print([ShellCommand(f'exit {status}').wait() for status in (7, 0)])\n"
        "killed = ShellCommand('exec sleep 60')\n"
        "os.kill(int(open(f'/proc/self/task/{os.getpid()}/children').read()), 9); print(killed.wait() != 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LONG_S, check=True)
    assert ran.stdout == "[7, 0]\nTrue\n"
