"""`prune` as a user types it: what goes, why, and only that."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from store_support import Source, commit, sha
from support import Command

from remus_ckpt.cli.options import retention_of
from remus_ckpt.memory import memory_sha256
from remus_ckpt.store import Retention, Store

HOUR_NS = 3600 * 10**9


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def orders(tmp_path: Path) -> str:
    """Two checkpoints an hour, of 24 hours, and a segment for each two: the last of one is the first of the next."""
    begin_ns = (time.time_ns() // HOUR_NS - 24) * HOUR_NS
    with Store(tmp_path / "store").writer("orders", compact_bytes=None) as writer:
        source = Source()
        writer.begin(full=True)
        for number in range(48):
            commit(writer, source.checkpoint(begin_ns + number * HOUR_NS // 2), source.position)
            if number % 2:
                writer.compact(wait=True)
    return f"store:{tmp_path}/store/orders"


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "store" / "orders" / "segments").iterdir())


RULES = ["--keep", "hourly=5,daily=2", "--keep-age", "2h", "--keep-size", "2M"]


def test_a_dry_run_says_what_a_run_does(orders: str, tmp_path: Path, command: Command) -> None:
    before = names(tmp_path)
    dry = json.loads(command("prune", orders, *RULES, "--dry-run", "--json").out)
    text = command("prune", orders, *RULES, "--dry-run").out
    assert names(tmp_path) == before
    # It needs no lock, and so works beside a backup.
    with Store(tmp_path / "store").writer("orders", compact_bytes=None):
        assert json.loads(command("prune", orders, *RULES, "--dry-run", "--json").out) == dry
        assert command("prune", orders, *RULES).code == 1
    done = json.loads(command("prune", orders, *RULES, "--json").out)
    assert (dry["dry_run"], done["dry_run"]) == (True, False)
    assert dry | {"dry_run": False} == done
    gone = [row["segment"] for row in done["removed"]]
    assert names(tmp_path) == [name for name in before if name not in gone]
    assert {row["rule"] for row in done["removed"]} == {"--keep-age"}
    assert done["bytes"] == sum(row["bytes"] for row in done["removed"]) > 0
    for row in done["removed"]:
        assert f"would be removed by --keep-age: {row['segment']}, checkpoints {row['first']} to {row['last']}" in text
        assert row["first_time_ns"] < row["last_time_ns"]
    history = Store(tmp_path / "store").history("orders")
    assert done["checkpoints"] == len(history)
    assert memory_sha256(history.restore().memory) == sha(47)
    again = command("prune", orders, *RULES)
    assert again.code == 0 and again.out.splitlines()[0].startswith("0 segments, 0 bytes removed")


def test_the_rule_that_calls_is_named(orders: str, command: Command) -> None:
    found = {}
    for rules in (["--keep", "hourly=5"], ["--keep-count", "3"], ["--keep-size", "1K"], ["--keep-free", "9999999T"]):
        rows = json.loads(command("prune", orders, *rules, "--dry-run", "--json").out)["removed"]
        found[rules[0]] = {row["rule"] for row in rows}
    assert found == {rule: {rule} for rule in found}
    assert json.loads(command("prune", orders, "--keep-free", "1", "--dry-run", "--json").out)["removed"] == []


def test_a_run_says_it_in_words(orders: str, command: Command) -> None:
    ran = command("prune", orders, "--keep-count", "1")
    *lines, last = ran.out.splitlines()
    assert len(lines) == 24 and all(line.startswith("removed by --keep-count: 0000") for line in lines)
    assert last.startswith("24 segments, ") and last.endswith(" bytes removed; 1 checkpoint left")


def test_grammar_of_tiers() -> None:
    limits = {"count": None, "age": None, "size": None, "free": None}
    assert retention_of("hourly=48, daily = 30", **limits) == Retention(hourly=48, daily=30)
    assert retention_of("yearly=1,monthly=2,weekly=3,minutely=4", **limits).tiers == {
        "minutely": 4, "weekly": 3, "monthly": 2, "yearly": 1,
    }  # fmt: skip
    assert retention_of(None, count=5, age="2h", size="3K", free="1G") == Retention(5, 7200, 3072, 1 << 30)
    assert retention_of(None, **limits) == Retention()


@pytest.mark.parametrize("take", [["backup", "--listen", "unix:s", "--store", "s"], ["prune", "store:s/n"]])
@pytest.mark.parametrize(
    ("option", "bad"),
    [
        *(("--keep", bad) for bad in ("hourly", "hourly=", "hourly=0", "hourly=-1", "hourly=1.5", "fortnightly=2", "")),
        *(("--keep", bad) for bad in ("hourly=1,hourly=2", "hourly=1,", "hourly=5001", "hourly=1;daily=2", "48")),
        ("--keep-free", "10 pounds"),
        ("--keep-free", "5%"),
    ],
)
def test_what_is_no_rule_is_refused(take: list[str], option: str, bad: str, command: Command) -> None:
    ran = command(*take, option, bad)
    assert ran.code == 2 and repr(bad) in ran.err
    assert not Path("s").exists()
