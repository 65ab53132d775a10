"""The commands of the services as users type them: real processes, keys, memory in /dev/shm, signals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from services import LONG_S, Service, command, make_keys, service, until
from support import Command, Ran, is_running, process_state, writer_process
from writers import cgroup_mount, own_cgroup

from remus_ckpt.cli.status import _tell
from remus_ckpt.loop import StopSignal
from remus_ckpt.service import keys, release
from remus_ckpt.store import Store
from remus_ckpt.wire.record import Position

PAGES = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def remus(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def served(tmp_path: Path, folder: Path) -> Iterator[Service]:
    with service(tmp_path, folder, "--lease", "2s") as served:
        yield served


@pytest.fixture
def memory() -> Iterator[Path]:
    path = Path(f"/dev/shm/remus-test-{os.getpid()}")
    path.write_bytes(bytes(PAGES * 4096))
    try:
        yield path
    finally:
        path.unlink()


def to(served: Service, name: str = "orders") -> list[object]:
    return ["--to", served.address, "--tls-dir", served.folder / "ca" / "primary", "--name", name]


def asking(served: Service) -> list[object]:
    return ["--from", served.address, "--tls-dir", served.folder / "ca" / "primary"]


def end(process: subprocess.Popen[str], number: int | None = signal.SIGTERM) -> tuple[int, str]:
    """Exit code and standard output."""
    if number is not None:
        process.send_signal(number)
    out, _ = process.communicate(timeout=LONG_S)
    return process.returncode, out


def committed(served: Service, name: str = "orders") -> int:
    found = served.ask()["names"].get(name)
    return -1 if found is None or found["epoch"] is None else found["epoch"]


def test_a_day_in_the_life(tmp_path: Path, folder: Path, memory: Path, remus: Command) -> None:
    """Protect, look, restart the backup under it, fail over, restore, list, verify, export, prune."""
    with writer_process(memory) as worker, service(tmp_path, folder) as first:
        commits = tmp_path / "commits"
        address = first.address
        with command(
            "protect", memory, "--pid", worker.pid, *to(first), "--interval", "5ms", "--json",
            "--on-commit", f"echo started >> {tmp_path}/started; cat > {commits}", log=tmp_path / "protect.log",
        ) as protecting:  # fmt: skip
            until(lambda: committed(first) > 3)
            found = json.loads(remus("status", *asking(first), "--json").out)["names"]["orders"]
            assert (found["role"], found["connected"], found["term"]) == ("standby", True, 0)
            assert "orders" in remus("status", *asking(first)).out
            held = committed(first)
            code, _ = end(first.process)
            assert code == 0
            with service(tmp_path, folder, listen=address) as second:
                until(lambda: committed(second) > held + 3)
                until(lambda: second.ask()["names"]["orders"]["primary"].get("reconnects") == 1)
                ran = remus("failover", "--name", "orders", *asking(second), "--json")
                given = json.loads(ran.out)
                assert (ran.code, given["term"]) == (0, 1)
                code, out = end(protecting, None)
                report = json.loads(out)
                assert (code, report["ended"]) == (22, "fenced")
                # What was stored and not yet acknowledged is part of what was taken over.
                assert held < report["committed_epoch"] <= given["epoch"]
                assert worker.poll() is None
                assert process_state(worker.pid) in "SR"
                again = remus("protect", memory, "--pid", worker.pid, *to(second), "--json")
                assert again.code == 22
                assert json.loads(again.out)["committed_epoch"] is None
                again = remus("protect", memory, "--pid", worker.pid, *to(second))
                assert again.code == 22
                assert " ms" not in again.err, "there was no pause"
                assert again.err.count("stop, and release nothing") == 1
                assert remus("failover", "--name", "nobody", *asking(second)).code == 1
        # One line for each commit, in their order; the command was started once.
        lines = [line.split() for line in commits.read_text().splitlines()]
        entries = Store(tmp_path / "store").history("orders").entries()
        assert [(int(epoch), digest) for epoch, digest in lines] == [
            (entry.epoch, entry.position.digest.hex()) for entry in entries[: len(lines)]
        ]
        assert len(entries) - len(lines) <= 1
        assert (tmp_path / "started").read_text() == "started\n"
    store = f"store:{tmp_path}/store/orders"
    middle = entries[len(entries) // 2]
    taken = datetime.fromtimestamp((middle.time_ns or 0) / 1e9 + 1e-4, UTC).isoformat()
    images = [tmp_path / "newest.img", tmp_path / "number.img", tmp_path / "time.img"]
    for image, at in zip(images, ([], ["--at", middle.epoch], ["--at", taken]), strict=True):
        restored = json.loads(remus("restore", store, *at, "-o", image, "--json").out)["restored"]
        assert restored == (middle.epoch if at else given["epoch"])
    assert images[0].read_bytes() == Path(given["image"]).read_bytes()
    assert images[1].read_bytes() == images[2].read_bytes() != images[0].read_bytes()
    listed = json.loads(remus("list", store, "--checkpoints", "--json").out)
    assert [entry["epoch"] for entry in listed["entries"]] == [entry.epoch for entry in entries]
    assert json.loads(remus("list", f"store:{tmp_path}/store", "--json").out)["histories"][0]["role"] == "promoted"
    assert json.loads(remus("verify", store, "--json").out)["good"] is True
    exported = remus("export", store, "-o", tmp_path / "out.remus", "--at", middle.epoch, "--json")
    assert json.loads(exported.out)["epoch"] == middle.epoch
    assert remus("verify", tmp_path / "out.remus").code == 0
    assert json.loads(remus("compact", store, "--json").out)["epoch"] == given["epoch"]
    pruned = json.loads(remus("prune", store, "--keep-count", 1, "--json").out)
    assert (len(pruned["removed"]), pruned["checkpoints"]) == (1, 1)


@pytest.mark.slow
def test_both_sides_are_scraped(tmp_path: Path, folder: Path, memory: Path) -> None:
    ports = free_ports(2)
    with (
        writer_process(memory) as worker,
        service(tmp_path, folder, "--metrics", ports[0]) as served,
        command(
            "protect", memory, "--pid", worker.pid, *to(served), "--metrics", ports[1], log=tmp_path / "protect.log"
        ) as protecting,
    ):
        until(lambda: committed(served) > 3)
        for port in ports:
            found = scrape(port)
            assert found['remus_checkpoints_committed_total{name="orders"}'] > 3
            assert found['remus_bytes_total{name="orders",stage="encoded"}'] > PAGES
            assert found['remus_connected{name="orders"}'] == 1
        assert scrape(ports[1])['remus_checkpoint_pause_seconds_count{name="orders"}'] > 3
        assert 'remus_checkpoint_pause_seconds_count{name="orders"}' not in scrape(ports[0])
        expires = keys.show(folder / "ca" / "backup")[1].expires.timestamp()
        assert scrape(ports[0])["remus_certificate_expiry_timestamp_seconds"] == expires
        assert end(protecting)[0] == 0
        assert process_state(worker.pid) in "SR"
        until(lambda: scrape(ports[0])['remus_connected{name="orders"}'] == 0)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def scrape(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONG_S) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@pytest.mark.parametrize("kind", ["commands", pytest.param("cgroup", marks=pytest.mark.root)])
def test_other_ways_to_stop_the_writers(served: Service, memory: Path, tmp_path: Path, kind: str) -> None:
    def protects(*how: object) -> None:
        with command("protect", memory, *to(served), *how, "--json", log=tmp_path / "log") as protecting:
            until(lambda: committed(served) > 1)
            code, out = end(protecting)
        assert (code, json.loads(out)["ended"]) == (0, "stopped"), (tmp_path / "log").read_text()
        assert json.loads(out)["committed_epoch"] > 1

    with writer_process(memory) as worker:
        if kind == "commands":
            protects("--pause", f"kill -STOP {worker.pid}", "--resume", f"kill -CONT {worker.pid}")
        else:
            mount = cgroup_mount()
            if mount is None:
                pytest.skip("no cgroup2 is mounted")
            with own_cgroup(mount, f"remus-test-{os.getpid()}") as group:
                (group / "cgroup.procs").write_text(str(worker.pid))
                protects("--cgroup", group)
                (mount / "cgroup.procs").write_text(str(worker.pid))
        assert process_state(worker.pid) in "SR"


@pytest.mark.slow
@pytest.mark.parametrize("does", ["read line; exit 3", "read line", "exec <&-; sleep 0.1"])
@pytest.mark.parametrize("interval", ["5ms", "1h"])
def test_a_command_that_dies_ends_the_protection(
    served: Service, memory: Path, remus: Command, does: str, interval: str
) -> None:
    """Also where no commit comes that it could miss: nobody else can release what waits for one."""
    with writer_process(memory) as worker:
        ran = remus(
            "protect", memory, "--pid", worker.pid, *to(served), "--duration", f"{LONG_S:g}s", "--interval", interval,
            "--on-commit", does, "--json",
        )  # fmt: skip
        report = json.loads(ran.out)
        assert (ran.code, report["ended"]) == (1, "on-commit ended")
        assert report["lag_checkpoints"] == 0
        assert "Traceback" not in ran.err
        assert ran.err.count("--on-commit") <= 3
        assert process_state(worker.pid) in "SR"


@pytest.mark.parametrize("does", ["setsid {lasting} & {lasting}", "cat > /dev/null; {lasting}", "{lasting} | cat"])
def test_a_command_that_does_not_end_is_killed_whole(does: str) -> None:
    stop, complaints = StopSignal(), list[str]()
    lasting = f"sleep 99.{os.getpid()}"
    command = release.ReleaseCommand("orders", does.format(lasting=lasting), stop, complaints.append, last_words_s=0.3)
    command(release.Committed(epoch=0, position=Position(0, bytes(32)), latency_s=0.0))
    command.close()
    stop.close()
    assert command.has_failed
    assert "it is killed" in complaints[0]
    assert not is_running(lasting)


def test_a_command_that_reads_nothing_holds_nothing_up_at_the_end() -> None:
    stop = StopSignal()
    complaints: list[str] = []
    command = release.ReleaseCommand("orders", "sleep 60", stop, complaints.append, last_words_s=0.3)
    calls: list[int] = []

    def commit() -> None:
        for epoch in range(5000):
            command(release.Committed(epoch=epoch, position=Position(epoch, bytes(32)), latency_s=0.0))
            calls.append(epoch)

    working = threading.Thread(target=commit, daemon=True)
    working.start()
    until(lambda: len(calls) > 100)
    working.join(0.5)
    assert working.is_alive(), "checkpoints wait for it"
    stop.set()
    working.join(LONG_S)
    assert not working.is_alive()
    command.close()
    assert command.has_failed
    assert len(complaints) == 2, "it is killed, and commits were lost"
    stop.close()


def test_both_sides_report_in_the_same_words(served: Service, memory: Path, remus: Command) -> None:
    with writer_process(memory) as worker:
        ran = remus("protect", memory, "--pid", worker.pid, *to(served), "--duration", "300ms", "--json")
    report = json.loads(ran.out)
    backup = served.ask()["names"]["orders"]
    assert report["committed_position"] == backup["position"]
    assert len(backup["position"].partition(":")[2]) == 64
    assert (report["raw_bytes"], report["encoded_bytes"]) == (backup["raw_bytes"], backup["encoded_bytes"])
    assert report["commit_latency_ms"].keys() == backup["commit_latency_ms"].keys() == report["pause_ms"].keys()
    assert "pause_ms" not in backup


@pytest.mark.slow
def test_status_says_what_is_wrong_and_nothing_where_all_is_well(
    tmp_path: Path, folder: Path, memory: Path, remus: Command
) -> None:
    fence = f"test -e {tmp_path}/fenced"
    options = ["--lease", "1s", "--auto-failover", "--fence", fence, "--on-failover", f"test -e {tmp_path}/taken"]
    with service(tmp_path, folder, *options) as served:

        def said() -> str:
            return remus("status", *asking(served)).out

        with (
            writer_process(memory) as worker,
            command("protect", memory, "--pid", worker.pid, *to(served), log=tmp_path / "protect.log") as protecting,
        ):
            until(lambda: committed(served) > 1 and "lag_checkpoints" in served.ask()["names"]["orders"]["primary"])
            assert len(said().splitlines()) == 3
            end(protecting, signal.SIGKILL)
        until(lambda: served.ask()["names"]["orders"]["fence_retry_s"] is not None)
        until(lambda: "fence failed" in said())
        (tmp_path / "fenced").touch()
        until(lambda: served.ask()["names"]["orders"]["takeover_retry_s"] is not None)
        until(lambda: "takeover failed" in said())
        assert "  fence" not in said()
        (tmp_path / "taken").touch()
        until(lambda: "takeover succeeded" in said())


def test_status_of_a_primary_that_says_odd_things() -> None:
    """No primary of ours says them, and a backup is not asked here: `_tell` alone has to bear them."""
    found = {
        "role": "standby", "term": 0, "epoch": None, "position": None, "connected": True, "peer": "x", "silent_s": 0.0,
        "trouble": "the disk is full", "warnings": ["two"],
        "health": {"level": 0, "state": "protected", "words": "protected", "next": ""},
    }  # fmt: skip
    for primary in ({"ratio": "x", "pause_ms": 3}, {"ratio": 0.0, "pause_ms": {"p50": "1", "p99": None}}, {"a": None}):
        lines = _tell("orders", found | {"primary": primary})
        assert len(lines) == 5
        assert "disk is full" in lines[3]


def test_a_slow_command_gets_every_line(served: Service, memory: Path, remus: Command, tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    with writer_process(memory) as worker:
        ran = remus(
            "protect", memory, "--pid", worker.pid, *to(served), "--duration", "500ms", "--interval", "1ms",
            "--on-commit", f"sleep 1; cat > {lines}", "--json",
        )  # fmt: skip
    assert ran.code == 0
    assert len(lines.read_text().splitlines()) == json.loads(ran.out)["committed_epoch"] + 1


def test_a_terminal_that_goes_away_is_a_goodbye(served: Service, memory: Path, tmp_path: Path) -> None:
    """Not a silence, after which a backup would fence and take over."""
    with (
        writer_process(memory) as worker,
        command("protect", memory, "--pid", worker.pid, *to(served), "--json", log=tmp_path / "log") as protecting,
    ):
        until(lambda: committed(served) >= 0)
        code, out = end(protecting, signal.SIGHUP)
        assert (code, json.loads(out)["ended"]) == (0, "stopped")
    assert end(served.process, signal.SIGHUP)[0] == 0


@pytest.mark.slow
def test_signals_before_there_is_anything_to_do(tmp_path: Path, folder: Path, memory: Path, remus: Command) -> None:
    """Nobody listens, or somebody who says nothing: a signal is heard, and the time that was given is kept."""
    with writer_process(memory) as worker, socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        log = tmp_path / "protect.log"
        options = ["--pid", worker.pid, "--name", "orders"]
        with command("protect", memory, *options, "--to", f"tcp://127.0.0.1:{port}", "--json", log=log) as protecting:
            connection, _ = silent.accept()
            with connection:
                code, out = end(protecting)
        assert (code, json.loads(out)["ended"]) == (0, "stopped")
        assert process_state(worker.pid) in "SR"
    with writer_process(memory) as worker:
        ran = remus(
            "protect", memory, "--pid", worker.pid, "--name", "orders", "--to", "tcp://127.0.0.1:1", "--json",
            "--duration", "300ms",
        )  # fmt: skip
        assert (ran.code, json.loads(ran.out)["ended"]) == (1, "duration"), "nothing was committed"


@pytest.mark.slow
def test_what_cannot_be_is_said_at_once(
    served: Service, tmp_path: Path, folder: Path, memory: Path, remus: Command
) -> None:
    def fails(*arguments: object, code: int = 1) -> Ran:
        ran = remus(*arguments)
        assert ran.code == code, arguments
        assert "Traceback" not in ran.err
        assert len(ran.err.strip().splitlines()) <= 4
        return ran

    mine = folder / "ca" / "primary"
    port = served.port
    for wrong in (
        ["--from", f"127.0.0.1:{port}"],
        ["--from", "127.0.0.1", "--tls-dir", mine],
        ["--from", str(port), "--tls-dir", mine],
        ["--from", "tcp://10.0.0.1:1"],
    ):
        fails("status", *wrong, code=2)
        fails("failover", "--name", "orders", *wrong, code=2)
    for wrong in (
        ["--from", "127.0.0.1:1", "--tls-dir", mine],
        ["--from", f"tcp://127.0.0.1:{port}"],
        ["--from", f"localhost:{port}", "--tls-dir", mine],
        ["--from", f"127.0.0.1:{port}", "--tls-dir", folder / "ca"],
        ["--from", f"127.0.0.1:{port}", "--tls-dir", folder / "other" / "stranger"],
        ["--from", f"127.0.0.1:{port}", "--tls-dir", tmp_path],
        ["--from", f"unix:{tmp_path}/nothing"],
    ):
        fails("status", *wrong)
    fails("failover", "--name", "nobody", *asking(served))
    fails("failover", "--name", "../nobody", *asking(served), code=2)
    with writer_process(memory) as worker:
        run = ["protect", memory, "--name", "orders", "--pid", worker.pid]
        fails(*run, "--to", f"127.0.0.1:{port}", code=2)
        fails(*run, "--to", "tcp://192.0.2.1:7411", code=2)
        fails(*run, *to(served), "--metrics", "nohost", code=2)
        fails(*run, *to(served, "a/b"), code=2)
        fails("protect", memory, *to(served), code=2)
        fails("protect", tmp_path / "none", "--pid", worker.pid, *to(served))
    backup = ["backup", "--tls-dir", folder / "ca" / "backup"]
    in_use = fails(*backup, "--listen", "127.0.0.1:0", "--store", tmp_path / "store")
    assert str(tmp_path / "store") in in_use.err
    store = ["--store", tmp_path / "other"]
    fails(*backup, "--listen", f"127.0.0.1:{port}", *store)
    fails(*backup, "--listen", "127.0.0.1", *store, code=2)
    fails(*backup, "--listen", "127.0.0.1:0", *store, "--metrics", "nohost", code=2)
    fails(*backup, "--listen", "127.0.0.1:0", *store, "--lease", "0s", code=2)
    fails("backup", "--listen", "127.0.0.1:0", *store, code=2)
    fails("backup", "--listen", "127.0.0.1:0", *store, "--tls-dir", tmp_path)
    fails("backup", "--listen", "tcp://192.0.2.1:0", *store, code=2)
    fails(*backup, "--listen", "127.0.0.1:0", *store, "--auto-failover", code=2)
    assert not (tmp_path / "other").exists()
    for arguments in (
        ["restore", f"store:{tmp_path}/store/none", "-o", tmp_path / "x"],
        ["list", f"store:{tmp_path}/no"],
    ):
        fails(*arguments)


@pytest.mark.parametrize(
    "name",
    ["backup", "protect", "status", "failover", "demo", "list", "prune", "compact", "export", "restore", "verify",
     "keys init", "keys issue", "keys show"],
)  # fmt: skip
def test_every_help_has_an_example(remus: Command, name: str) -> None:
    ran = remus(*name.split(), "--help")
    assert ran.code == 0
    assert f"remus-ckpt {name}" in ran.out
    assert "<list" not in ran.out.replace("CONNECTION <list[str]>", "")


def test_keys_from_the_first_to_the_last(tmp_path: Path, remus: Command) -> None:
    for arguments in (
        ["init", tmp_path],
        ["issue", tmp_path, "backup", "--host", "127.0.0.1"],
        ["issue", tmp_path, "me"],
    ):
        assert Path(json.loads(remus("keys", *arguments, "--json").out)["path"]).is_file()
    assert remus("keys", "init", tmp_path).code == 1
    with command(
        "backup", "--listen", "127.0.0.1:0", "--store", tmp_path / "store", "--tls-dir", tmp_path / "backup",
        log=tmp_path / "log",
    ) as backup:  # fmt: skip
        assert backup.stdout is not None
        address = backup.stdout.readline().split()[-1]
        status = json.loads(remus("status", "--from", address, "--tls-dir", tmp_path / "me", "--json").out)
        assert status["names"] == {}
        assert end(backup, signal.SIGINT)[0] == 0
    # Stopped in that instant, it may say that it ended the session of who asked.
    assert " warning " not in (tmp_path / "log").read_text()
