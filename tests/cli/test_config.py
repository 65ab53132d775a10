"""Options from files: what `--config` reads, what wins, and what `config check` says, as users meet them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from services import LONG_S, command, make_keys, service, until
from support import Command, writer_process

from remus_ckpt import cli
from remus_ckpt.cli.config import CONFIGURABLE, Configurable, key_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def remus(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "orders.toml"


GOOD = """
[protect]
file = "/dev/shm/orders"
pid = [4711, 4712]
name = "orders"
to = "unix:/run/backup"
interval = "10ms"
realtime = true
"""


def test_these_commands_read_files() -> None:
    group = typer.main.get_command(cli.app)
    context = typer.Context(group)
    commands = {name: group.get_command(context, name) for name in cli.COMMANDS}  # type: ignore[attr-defined]
    assert {name for name, one in commands.items() if isinstance(one, Configurable)} == set(CONFIGURABLE)


@pytest.mark.parametrize("name", CONFIGURABLE)
def test_every_option_is_a_key_of_the_same_name(name: str) -> None:
    params = [one for one in cli.command_named(name).params if one.name != "config"]
    keys = [key_of(one) for one in params]
    assert len(set(keys)) == len(keys) > 10
    for key, param in zip(keys, params, strict=True):
        assert param.param_type_name == "argument" or f"--{key}" in param.opts


def checked(remus: Command, *files: Path) -> tuple[int, list[dict[str, str | None]]]:
    ran = remus("config", "check", "--json", *files)
    return ran.code, json.loads(ran.out)


def test_a_good_file_is_good(remus: Command, file: Path) -> None:
    file.write_text(GOOD)
    assert checked(remus, file) == (0, [{"file": str(file), "command": "protect", "error": None}])
    assert remus("config", "check", file).out == f"{file}: protect: good\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("interval", "intervall"), ["'intervall'", "did you mean 'interval'"]),
        (GOOD.replace("interval =", "max_pause ="), ["'max_pause'", "did you mean 'max-pause'"]),
        (GOOD.replace("realtime", "zzz"), ["no key 'zzz'", "there are audit, cgroup"]),
        (GOOD + 'config = "other.toml"', ["no key 'config'"]),
        (GOOD.replace("[protect]", "[protct]"), ["[protct]", "did you mean [protect]?"]),
        (GOOD.replace("[protect]", "[status]"), ["[status]", "not a command that reads a file"]),
        ('interval = "10ms"\n' + GOOD, ["'interval' is outside a table"]),
        ("", ["no table"]),
        (GOOD.replace('"10ms"', '"10"'), ["line 7: [protect] interval: '10' is not a duration"]),
        ("# first\n" + GOOD + 'max-pause = "25"', ["line 10: [protect] max-pause: '25' is not a duration"]),
        (
            "[protect]\n\n" + GOOD.replace("[protect]\n", "").replace("interval", "  'interval'").replace("10ms", "10"),
            ["line 8: "],
        ),
        (
            '[backup]\nlisten = "unix:s"\nstore = "s"\nkeep-size = "16GX"',
            ["line 4: [backup] keep-size: '16GX' is not a size"],
        ),
        (GOOD.replace('"10ms"', "10ms"), ["line 7"]),
        (GOOD.replace('"10ms"', "true"), ["interval: write a string"]),
        (GOOD.replace('"10ms"', "2.5"), ["interval: write a string"]),
        (GOOD.replace('"10ms"', "['10ms']"), ["interval: write a string"]),
        (GOOD.replace("4712", '"x"'), ["pid:"]),
        (GOOD.replace("4712", "0"), ["pid:"]),
        (GOOD.replace("true", "1"), ["realtime: write true or false"]),
        (GOOD + "window = 0", ["window:"]),
        (GOOD + 'wait = "durabel"', ["wait:", "'durable'"]),
        (GOOD + 'cgroup = "/sys/fs/cgroup/x"', ["say who writes"]),
        (GOOD.replace("pid = [4711, 4712]", ""), ["say who writes"]),
        (GOOD.replace('to = "unix:/run/backup"', ""), ["--to"]),
        (GOOD.replace("unix:/run/backup", "tls://backup:7411"), ["--tls-dir"]),
        (GOOD + 'tls-dir = "/nonexistent"', ["/nonexistent"]),
        ('[backup]\nlisten = "unix:s"\nstore = "s"\nauto-failover = true', ["--fence"]),
        ('[backup]\nlisten = "unix:s"\nstore = "s"\nlease = "1ms"', ["line 4: ", "--lease"]),
        ('[backup]\nlisten = "unix:s"\nstore = "s"\nkeep = "hourli=3"', ["--keep"]),
        ('[run]\nname = "web"\nto = "unix:s"', ["QEMU"]),
        ('[run]\nname = "web"\nqemu = "qemu-system-x86_64 -m 64M"', ["--to is missing"]),
        ('[run]\nname = "web"\nto = "unix:s"\nqemu = "qemu-system-x86_64 -m 64M -device vfio-pci"', ["vfio"]),
        ('[run]\nname = "web"\nto = "unix:s"\nqemu = "qemu-system-x86_64 \\"half"', ["line 4: ", "quotation"]),
        ("[backup]\nlisten = " + "[" * 5000, ["too deep"]),
        ("#" * (1 << 21), ["bytes"]),
    ],
)
def test_what_is_wrong_is_named(remus: Command, file: Path, text: str, words: list[str]) -> None:
    file.write_text(text)
    code, (row,) = checked(remus, file)
    assert code == 2
    assert row["error"] is not None
    assert row["error"].startswith(f"{file}: ")
    assert all(one in row["error"] for one in words), row["error"]


def test_all_wrong_keys_are_named_at_once(remus: Command, file: Path) -> None:
    file.write_text(GOOD.replace("interval", "intervall").replace("realtime", "realtme"))
    _, (row,) = checked(remus, file)
    assert row["error"] is not None and "'interval'" in row["error"] and "'realtime'" in row["error"]
    assert "line 7: " in row["error"] and "line 8: " in row["error"]


def test_text_that_is_not_utf8_is_refused(remus: Command, file: Path) -> None:
    file.write_bytes(b'[protect]\nname = "\xff"\n')
    assert checked(remus, file)[0] == 2


def test_a_check_touches_nothing(remus: Command, tmp_path: Path, file: Path) -> None:
    file.write_text(f'[backup]\nlisten = "unix:{tmp_path}/socket"\nstore = "{tmp_path}/store"\n')
    assert checked(remus, file)[0] == 0
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_for_another_command_is_refused(remus: Command, file: Path) -> None:
    file.write_text(GOOD)
    ran = remus("backup", "--config", file)
    assert ran.code == 2
    assert "no table [backup], only [protect]" in ran.err


def test_the_file_gives_the_command_line_and_the_command_line_wins(remus: Command, file: Path) -> None:
    line = "qemu-system-x86_64 -m 64M -nographic"
    file.write_text(f"[run]\nqemu = '{line}'\ndry-run = true\n")
    assert remus("run", "--config", file).out.startswith(f"{line} ")
    other = remus("run", "--config", file, "--", "qemu-system-x86_64", "-m", "128M")
    assert other.code == 0
    assert "size=134217728B" in other.out
    assert "--name is missing" in remus("run", "--config", file, "--no-dry-run").err


@pytest.fixture
def memory() -> Iterator[Path]:
    path = Path(f"/dev/shm/remus-config-{os.getpid()}")
    path.write_bytes(bytes(8 * 4096))
    try:
        yield path
    finally:
        path.unlink()


def test_both_services_run_from_files(tmp_path: Path, folder: Path, memory: Path) -> None:
    """As the units start them: a file a side, the name on the command line."""
    with (
        writer_process(memory) as worker,
        service(tmp_path, folder, "--config", _written(tmp_path / "backup.toml", "[backup]\nlease = '3s'\n")) as served,
    ):
        orders = _written(
            tmp_path / "orders.toml",
            f"[protect]\nfile = '{memory}'\npid = {worker.pid}\nto = '{served.address}'\nname = 'other'\n"
            f"tls-dir = '{served.folder / 'ca' / 'primary'}'\ninterval = '5ms'\njson = true\n",
        )
        with command("protect", "--config", orders, "--name", "orders", log=tmp_path / "log") as primary:
            until(lambda: (served.ask()["names"].get("orders") or {}).get("epoch"))
            report = served.ask()
            primary.send_signal(signal.SIGTERM)
            out, _ = primary.communicate(timeout=LONG_S)
    assert (primary.returncode, json.loads(out)["name"]) == (0, "orders"), (tmp_path / "log").read_text()
    assert report["lease_s"] == 3.0
    assert set(report["names"]) == {"orders"}


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
