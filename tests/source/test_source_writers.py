"""The cgroup freezer and the user's own commands, in what is theirs alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import writers
from support import is_running, only_guard

from remus_ckpt.errors import SourceError
from remus_ckpt.source.cgroup import CgroupFreezer
from remus_ckpt.source.commands import PauseCommands


@pytest.fixture
def group() -> Iterator[Path]:
    """A cgroup of our own, with nobody in it."""
    parent = writers.cgroup_mount()
    if parent is None:
        pytest.skip("no cgroup2 is mounted")
    with writers.own_cgroup(parent, f"remus-test-{os.getpid()}") as path:
        yield path


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.root
def test_a_group_that_is_frozen_already_is_left_alone(group: Path) -> None:
    (group / "cgroup.freeze").write_text("1")
    with pytest.raises(SourceError):
        CgroupFreezer(group)
    assert (group / "cgroup.freeze").read_text() == "1\n"


@pytest.mark.root
def test_a_group_below_a_frozen_one_is_refused(group: Path) -> None:
    (group / "cgroup.freeze").write_text("1")
    with writers.own_cgroup(group, "below") as below, pytest.raises(SourceError):
        CgroupFreezer(below)


@pytest.mark.root
def test_a_group_is_recorded_by_one(group: Path) -> None:
    first = CgroupFreezer(group)
    with pytest.raises(SourceError):
        CgroupFreezer(group)
    first.close()
    CgroupFreezer(group).close()


@pytest.mark.root
@pytest.mark.parametrize("deep", [False, True])
def test_the_group_of_this_process_is_refused(group: Path, deep: bool) -> None:
    """Asked in another process, so that a mistake freezes that one."""
    code = (
        "import pathlib, sys\n"
        "from remus_ckpt.errors import SourceError\n"
        "from remus_ckpt.source.cgroup import CgroupFreezer\n"
        "group = pathlib.Path(sys.argv[1])\n"
        "(pathlib.Path(sys.argv[2]) / 'cgroup.procs').write_text('0')\n"
        "try:\n"
        "    CgroupFreezer(group)\n"
        "except SourceError:\n"
        "    print('refused')\n"
    )
    with writers.own_cgroup(group, "below") as below:
        place = below if deep else group
        done = subprocess.run(
            [sys.executable, "-c", code, group, place], stdout=subprocess.PIPE, check=True, timeout=30
        )
        assert done.stdout == b"refused\n"
        wait_until_empty(group)


def wait_until_empty(group: Path) -> None:
    while "populated 1" in (group / "cgroup.events").read_text():
        time.sleep(0.001)


@pytest.mark.root
def test_the_root_of_all_groups_is_refused(group: Path) -> None:
    with pytest.raises(SourceError):
        CgroupFreezer(group.parent)


def test_what_is_no_group_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "cgroup.procs").write_text("")
    (tmp_path / "v1" / "freezer.state").write_text("THAWED\n")
    for path in (tmp_path, tmp_path / "v1", tmp_path / "none", Path("/sys/fs/cgroup/freezer")):
        with pytest.raises(SourceError):
            CgroupFreezer(path)


@pytest.mark.root
def test_a_pause_that_somebody_ends_is_noticed(group: Path, sleeper: subprocess.Popen[bytes]) -> None:
    (group / "cgroup.procs").write_text(str(sleeper.pid))
    freezer = CgroupFreezer(group)
    freezer.stop()
    freezer.check_stopped()
    (group / "cgroup.freeze").write_text("0")
    with pytest.raises(SourceError):
        freezer.check_stopped()
    freezer.resume()
    freezer.close()
    sleeper.kill()
    wait_until_empty(group)


@pytest.mark.root
def test_all_below_are_frozen_and_whoever_is_started_is_too(group: Path) -> None:
    with writers.own_cgroup(group, "below") as below:
        # It forks all the time: no list of processes would ever be whole.
        script = f"echo $$ > {below}/cgroup.procs; echo ready; while :; do (:); done"
        with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as forker:
            assert forker.stdout is not None
            forker.stdout.readline()
            freezer = CgroupFreezer(group)
            for _ in range(20):
                freezer.stop()
                before = (below / "cgroup.procs").read_text()
                time.sleep(0.001)
                assert (below / "cgroup.procs").read_text() == before
                freezer.check_stopped()
                freezer.resume()
            freezer.close()
            forker.kill()
        wait_until_empty(group)


@pytest.mark.root
def test_a_group_that_does_not_freeze_in_time_is_thawed(group: Path, sleeper: subprocess.Popen[bytes]) -> None:
    (group / "cgroup.procs").write_text(str(sleeper.pid))
    freezer = CgroupFreezer(group, freeze_timeout_s=-1.0)
    with pytest.raises(SourceError):
        for _ in range(1000):  # it may be frozen at the first look
            freezer.stop()
            freezer.resume()
    assert (group / "cgroup.freeze").read_text() == "0\n"
    freezer.close()
    sleeper.kill()
    wait_until_empty(group)


@pytest.mark.root
def test_a_group_that_is_removed_is_dead(group: Path) -> None:
    below = group / "below"
    below.mkdir()
    freezer = CgroupFreezer(below)
    below.rmdir()
    assert not freezer.alive()
    freezer.stop()
    freezer.check_stopped()
    freezer.resume()
    assert freezer.death_fds() == ()
    freezer.close()


# Commands


def log(path: Path, word: str) -> str:
    return f"echo {word} >> {path}"


def test_commands_run_in_turn(tmp_path: Path) -> None:
    said = tmp_path / "said"
    them = PauseCommands(log(said, "pause"), log(said, "resume"))
    for _ in range(3):
        them.stop()
        them.check_stopped()
        them.resume()
    them.close()
    assert said.read_text().split() == ["pause", "resume"] * 3


def test_a_pause_command_that_fails_is_followed_by_the_other(tmp_path: Path) -> None:
    said = tmp_path / "said"
    them = PauseCommands(f"{log(said, 'pause')}; echo machine $((40 + 2)) >&2; exit 3", log(said, "resume"))
    with pytest.raises(SourceError, match="machine 42"):
        them.stop()
    them.close()
    assert said.read_text().split() == ["pause", "resume"]


def test_when_both_fail_both_are_told_of(tmp_path: Path) -> None:
    them = PauseCommands("echo first $((40 + 2)) >&2; false", "echo second $((40 + 3)) >&2; false")
    with pytest.raises(SourceError, match=r"(?s)first 42.*second 43"):
        them.stop()
    them.close()


def test_a_resume_command_that_fails_is_tried_again_at_the_end(tmp_path: Path) -> None:
    said = tmp_path / "said"
    # The first time it fails.
    them = PauseCommands("true", f"{log(said, 'resume')}; test $(wc -l < {said}) -gt 1")
    them.stop()
    with pytest.raises(SourceError):
        them.resume()
    them.close()
    assert said.read_text().split() == ["resume", "resume"]


def test_a_command_that_takes_too_long_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    said = tmp_path / "said"
    lasting = f"sleep 60.{os.getpid()}"
    them = PauseCommands(f"({lasting}; {log(said, 'late')}) & {lasting}", log(said, "resume"), timeout_s=0.2)
    with pytest.raises(SourceError):
        them.stop()
    assert not is_running(lasting)
    them.close()
    assert said.read_text().split() == ["resume"]


@pytest.mark.parametrize("how", ["setsid sh -c", "sh -mc", "setsid setsid sh -c"])
def test_it_is_killed_with_what_has_left_its_session(tmp_path: Path, how: str) -> None:
    said = tmp_path / "said"
    lasting = f"sleep 60.{os.getpid()}"
    late = f"{how} 'echo up >> {said}; {lasting}; {log(said, 'late')}' &"
    them = PauseCommands(f"{late} while ! test -e {said}; do sleep 0.01; done; sleep 60", "true", timeout_s=1.0)
    with pytest.raises(SourceError):
        them.stop()
    assert said.read_text() == "up\n"
    assert not is_running(lasting)
    assert not left_behind()
    them.close()


def left_behind() -> list[str]:
    """The processes that the commands have left behind."""
    guard = only_guard()
    return Path(f"/proc/{guard}/task/{guard}/children").read_text().split()


def test_what_an_earlier_command_left_behind_is_not_killed_with_a_later_one(tmp_path: Path) -> None:
    them = PauseCommands("setsid sleep 60 & sleep 0.05", "exec sleep 60", timeout_s=0.5)
    them.stop()
    daemons = left_behind()
    assert daemons
    with pytest.raises(SourceError):
        them.resume()
    assert left_behind() == daemons
    them.close()
    for daemon in daemons:
        os.kill(int(daemon), 9)


def test_a_resume_command_that_hangs_does_not_hang_the_end() -> None:
    them = PauseCommands("true", "sleep 60", timeout_s=0.1)
    them.stop()
    with pytest.raises(SourceError):
        them.resume()
    begin = time.monotonic()
    them.close()
    assert time.monotonic() - begin < 30


def test_a_daemon_that_holds_the_error_output_is_not_waited_for_and_takes_no_memory(tmp_path: Path) -> None:
    told = tmp_path / "told"
    daemon = f"(trap '' PIPE; sleep 0.2; yes too much | head -c 1000000 >&2; echo $? > {told}; exec sleep 60)"
    them = PauseCommands(f"{daemon} & echo machine $((40 + 2)) >&2; false", "true", timeout_s=5.0)
    with pytest.raises(SourceError, match="machine 42"):
        them.stop()
    while not told.exists() or not told.read_text():
        time.sleep(0.01)
    assert told.read_text() != "0\n"
    for left in left_behind():
        os.kill(int(left), 9)
    them.close()


def test_a_command_that_leaves_a_daemon_behind_is_not_waited_for(tmp_path: Path) -> None:
    them = PauseCommands("sleep 60 & echo $! > " + str(tmp_path / "pid"), "true")
    begin = time.monotonic()
    them.stop()
    them.resume()
    them.close()
    assert time.monotonic() - begin < 30
    os.kill(int((tmp_path / "pid").read_text()), 9)


def test_commands_that_are_none() -> None:
    for pause, resume in (("", "true"), ("true", " "), ("true\0", "true")):
        with pytest.raises(SourceError):
            PauseCommands(pause, resume)


def test_killed_while_the_pause_command_runs(tmp_path: Path) -> None:
    """The resume command comes after it: the other way round they would stay stopped."""
    said = tmp_path / "said"
    pause = f"{log(said, 'pausing')}; sleep 0.3; {log(said, 'paused')}"
    code = (
        "import sys\n"
        "from remus_ckpt.source.commands import PauseCommands\n"
        "PauseCommands(sys.argv[1], sys.argv[2]).stop()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, pause, log(said, "resume")]) as recorder:
        while not said.exists():
            time.sleep(0.005)
        recorder.kill()
    deadline = time.monotonic() + 5
    while len(said.read_text().split()) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert said.read_text().split() == ["pausing", "paused", "resume"]
