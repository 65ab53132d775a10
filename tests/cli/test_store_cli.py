"""The commands on stores, as a user types them."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from store_support import Source, fill, memory_at, sha
from support import Command

from remus_ckpt import read_checkpoints
from remus_ckpt.memory import memory_sha256
from remus_ckpt.store import Store


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two names; `orders` has the epochs 0 to 3 in one segment and 3 to 6 in the next."""
    with Store(tmp_path / "store").writer("orders") as writer:
        source = fill(writer, 4)
        writer.compact(wait=True)
        fill(writer, 3, source)
        writer.set_state(term=2)
    with Store(tmp_path / "store").writer("empty"):
        pass
    return tmp_path / "store"


def newest_segment(store: Path) -> Path:
    return max((store / "orders" / "segments").iterdir())


def damage(store: Path, epoch: int) -> None:
    entry = Store(store).history("orders").find(epoch)
    path = store / "orders" / "segments" / entry.segment
    data = bytearray(path.read_bytes())
    data[entry.start + 40] ^= 1
    path.write_bytes(data)


def test_list(store: Path, command: Command) -> None:
    code, out, _ = command("list", f"store:{store}")
    assert code == 0 and "orders" in out and "empty" in out
    code, out, _ = command("list", f"store:{store}", "--json")
    rows = {row["name"]: row for row in json.loads(out)["histories"]}
    assert rows["empty"]["newest"] is None and rows["empty"]["checkpoints"] == 0
    orders = rows["orders"]
    assert (orders["newest"], orders["checkpoints"], orders["term"], orders["role"]) == (6, 7, 2, "standby")
    assert orders["time_ns"] == 6 * 10**9
    assert orders["bytes"] == sum(path.stat().st_size for path in (store / "orders" / "segments").iterdir())
    for options, listed in (([], None), (["--checkpoints"], range(7)), (["--last", "2"], (5, 6))):
        code, out, _ = command("list", f"store:{store}/orders", *options, "--json")
        found = json.loads(out)
        assert found["newest"] == 6 and found["lost"] == []
        assert [(row["first"], row["last"], row["checkpoints"]) for row in found["segments"]] == [(0, 3, 4), (3, 6, 4)]
        assert all(0 < row["base_bytes"] < row["bytes"] for row in found["segments"])
        if listed is None:
            assert "entries" not in found
        else:
            assert [row["epoch"] for row in found["entries"]] == list(listed)
        code, out, err = command("list", f"store:{store}/orders", *options)
        assert code == 0 and not err and len(out.splitlines()) == 1 + 2 + 1 + (0 if listed is None else 1 + len(listed))


@pytest.mark.parametrize(
    ("options", "epoch"),
    [
        ([], 6),
        (["--at", "2"], 2),
        (["--checkpoint", "3"], 3),
        (["--at", "1970-01-01T00:00:04.5+00:00"], 4),
        (["--at", "1970-01-01T00:00:01Z"], 1),
    ],
)
def test_restore(store: Path, command: Command, tmp_path: Path, options: list[str], epoch: int) -> None:
    image, state = tmp_path / "image", tmp_path / "state"
    ran = command("restore", f"store:{store}/orders", "-o", image, "--device-state", state, "--json", *options)
    assert ran.code == 0 and json.loads(ran.out)["restored"] == epoch
    assert image.read_bytes() == memory_at(epoch).tobytes() and state.read_bytes() == b"dev%d" % epoch
    code, data, _ = command.binary("restore", f"store:{store}/orders", "-o", "-", *options)
    assert code == 0 and data == memory_at(epoch).tobytes()


def test_restore_what_is_bad(store: Path, command: Command, tmp_path: Path) -> None:
    damage(store, 5)
    image = tmp_path / "image"
    code, _, err = command("restore", f"store:{store}/orders", "-o", image)
    assert code == 20 and image.read_bytes() == memory_at(4).tobytes()
    assert newest_segment(store).name in err
    stream = image.with_name("stream")
    assert command("export", f"store:{store}/orders", "-o", stream).code == 20
    assert [one.epoch for one in read_checkpoints(stream, strict=True)] == [3, 4]
    image.unlink()
    assert command("restore", f"store:{store}/orders", "-o", image, "--at", "6").code == 20
    assert not image.exists()
    assert command("restore", f"store:{store}/orders", "-o", image, "--at", "4").code == 0
    damage(store, 0)
    damage(store, 3)
    image.unlink()
    # Nothing is left of either segment.
    assert command("restore", f"store:{store}/orders", "-o", image).code == 20
    assert not image.exists()


def test_verify(store: Path, command: Command) -> None:
    ran = command("verify", f"store:{store}/orders", "--json")
    assert ran.code == 0
    report = json.loads(ran.out)
    assert report["good"] and report["checkpoints"] == 8 and report["newest"] == 6
    assert command("verify", f"store:{store}/orders").code == 0
    damage(store, 5)
    ran = command("verify", f"store:{store}/orders", "--json")
    assert ran.code == 20
    (bad,) = json.loads(ran.out)["bad"]
    assert (bad["epoch"], bad["good"], bad["unreachable"]) == (5, 4, [5, 6])
    ran = command("verify", f"store:{store}/orders")
    assert ran.code == 20 and newest_segment(store).name in ran.err


LOSSES = {
    "the newest segment gone": ("rm", 1, [4, 5, 6], 3),
    "its end cut off": ("cut", 1, [6], 5),
    "all but some of its base cut off": ("cut base", 1, [4, 5, 6], 3),
    "one in the middle gone": ("rm", 1, [4, 5, 6], 9),
    "one in the middle cut": ("cut", 1, [6], 9),
}


@pytest.mark.parametrize(("how", "number", "lost", "newest"), LOSSES.values(), ids=LOSSES)
def test_what_was_committed_and_is_lost(
    store: Path, command: Command, tmp_path: Path, how: str, number: int, lost: list[int], newest: int
) -> None:
    """Said by every command that looks: without a fault in any byte that is there."""
    text, image, stream = f"store:{store}/orders", tmp_path / "image", tmp_path / "stream"
    if newest == 9:
        with Store(store).writer("orders") as writer:
            writer.begin(full=True)
            fill(writer, 3, Source(position=writer.position))
    segment = sorted((store / "orders" / "segments").iterdir())[number]
    last = [entry for entry in Store(store).history("orders").entries() if entry.segment == segment.name][-1]
    if how == "rm":
        segment.unlink()
    else:
        os.truncate(segment, last.start if how == "cut" else 1000)
    ran = command("list", text, "--json")
    (row,) = json.loads(ran.out)["lost"]
    assert ran.code == 0 and (row["segment"], row["checkpoints"]) == (segment.name, len(lost))
    assert row["epochs"] == (f"{lost[0]}-{lost[-1]}" if len(lost) > 1 else str(lost[0]))
    for listed in (text, f"store:{store}"):
        ran = command("list", listed)
        assert ran.code == 0 and segment.name in ran.err
    ran = command("verify", text, "--json")
    assert ran.code == 20
    (bad,) = json.loads(ran.out)["bad"]
    good = min(newest, lost[0] - 1)
    assert (bad["segment"], bad["good"], bad["unreachable"]) == (segment.name, good, lost)
    # Of the base there is another copy; it is named as what is bad here.
    assert bad["epoch"] == (3 if how == "cut base" else lost[0])
    # The newest that is there is given all the same.
    ran = command("restore", text, "-o", image)
    assert ran.code == (20 if newest < lost[-1] else 0) and (segment.name in ran.err) == (newest < lost[-1])
    assert image.read_bytes() == memory_at(newest).tobytes()
    assert command("export", text, "-o", stream).code == ran.code
    assert [one.epoch for one in read_checkpoints(stream, strict=True)][-1] == newest
    for at in (lost[-1], f"1970-01-01T00:00:{lost[-1]:02}Z"):
        for words in (["restore", text, "-o", tmp_path / "none"], ["export", text, "-o", tmp_path / "none"]):
            ran = command(*words, "--at", at)
            assert ran.code == 20 and segment.name in ran.err and not (tmp_path / "none").exists()
    # After the next writer has looked, and made the index again: where newer ones have come, it is over.
    with Store(store).writer("orders") as writer:
        assert writer.position is not None and writer.position.epoch == newest and writer.warnings
    ran = command("restore", text, "-o", image, "--overwrite")
    assert ran.code == (20 if newest < lost[-1] else 0)
    assert image.read_bytes() == memory_at(newest).tobytes()
    if how == "rm":
        assert command("verify", text).code == 20 and segment.name in command("list", text).err
    if newest < lost[-1]:
        assert command("verify", text).code == 20
        assert command("restore", text, "-o", tmp_path / "none", "--at", 6).code == 20


def test_what_was_pruned_is_not_lost(store: Path, command: Command, tmp_path: Path) -> None:
    """Also where a death between has left it in the index."""
    min((store / "orders" / "segments").iterdir()).unlink()
    text = f"store:{store}/orders"
    assert json.loads(command("list", text, "--json").out)["lost"] == []
    assert command("verify", text).code == 0
    assert command("restore", text, "-o", tmp_path / "image").code == 0
    assert command("restore", text, "-o", tmp_path / "image", "--at", "1", "--overwrite").code == 1


def test_a_history_without_its_state(store: Path, command: Command) -> None:
    """It is not taken for nothing."""
    (store / "orders" / "store.json").unlink()
    ran = command("list", f"store:{store}")
    assert ran.code == 1 and "empty" in ran.out and "orders" in ran.err
    ran = command("list", f"store:{store}", "--json")
    assert ran.code == 1 and [row["name"] for row in json.loads(ran.out)["unreadable"]] == ["orders"]
    (store / "empty" / "store.json").unlink()
    assert Store(store).names() == ["orders"]
    for words in (["verify"], ["list"], ["compact"], ["restore", "-o", store.parent / "image"]):
        assert command(words[0], f"store:{store}/orders", *words[1:]).code == 1


def test_a_store_for_a_history(store: Path, command: Command) -> None:
    """What could have been meant is named."""
    for words in (["verify"], ["restore", "-o", store.parent / "image"], ["compact"], ["prune", "--keep-count", "1"]):
        ran = command(words[0], f"store:{store}", *words[1:])
        assert ran.code == 1
        assert {f"store:{store}/empty", f"store:{store}/orders"} <= set(re.split(r"[\s,]+", ran.err))


def test_what_is_there_is_not_written_over(store: Path, command: Command, tmp_path: Path) -> None:
    old = tmp_path / "old"
    for words in (
        ["restore", f"store:{store}/orders", "-o", old],
        ["restore", f"store:{store}/orders", "-o", tmp_path / "new", "--device-state", old],
        ["export", f"store:{store}/orders", "-o", old],
    ):
        old.write_bytes(b"dear")
        assert command(*words).code == 1
        assert old.read_bytes() == b"dear" and not (tmp_path / "new").exists()
        assert command(*words, "--overwrite").code == 0
        assert old.read_bytes() != b"dear"
        (tmp_path / "new").unlink(missing_ok=True)


def test_compact_and_prune(store: Path, command: Command) -> None:
    ran = command("compact", f"store:{store}/orders", "--json")
    assert ran.code == 0 and json.loads(ran.out)["epoch"] == 6 and json.loads(ran.out)["is_base"]
    ran = command("prune", f"store:{store}/orders", "--keep-count", "2", "--json")
    assert ran.code == 0 and len(json.loads(ran.out)["removed"]) == 1
    history = Store(store).history("orders")
    assert [entry.epoch for entry in history.entries()] == [3, 4, 5, 6]
    with Store(store).writer("orders") as writer:
        writer.begin(full=True)
        fill(writer, 1, Source(position=writer.position))
    # The times in these checkpoints are of 1970, and not believed: those of the files stand in.
    for age_days, path in enumerate(sorted((store / "orders" / "segments").iterdir(), reverse=True)):
        os.utime(path, times=(0, time.time() - age_days * 86_400))
    assert command("prune", f"store:{store}/orders", "--keep-age", "50d").code == 0
    assert [entry.epoch for entry in history.entries()] == [3, 4, 5, 6, 7]
    assert command("prune", f"store:{store}/orders", "--keep-age", "12h").code == 0
    assert [entry.epoch for entry in history.entries()] == [7]
    assert command("prune", f"store:{store}/orders", "--keep-size", "1.5K").code == 0
    assert memory_sha256(history.restore().memory) == sha(7)


def test_export(store: Path, command: Command, tmp_path: Path) -> None:
    stream = tmp_path / "stream"
    ran = command("export", f"store:{store}/orders", "-o", stream, "--at", "5", "--json")
    assert ran.code == 0 and json.loads(ran.out)["epoch"] == 5
    found = [(one.epoch, memory_sha256(one.memory)) for one in read_checkpoints(stream, strict=True)]
    assert found == [(epoch, sha(epoch)) for epoch in (3, 4, 5)]
    code, data, _ = command.binary("export", f"store:{store}/orders", "-o", "-")
    assert code == 0 and data == newest_segment(store).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["list", "store:DIR/none"], 1),
        (["list", "DIR"], 2),
        (["list", "store:"], 2),
        (["verify", "store:DIR"], 1),
        (["restore", "store:DIR", "-o", "OUT"], 1),
        (["restore", "store:DIR/none", "-o", "OUT"], 1),
        (["restore", "store:DIR/empty", "-o", "OUT"], 20),
        (["restore", "store:DIR/orders", "-o", "OUT", "--at", "7"], 1),
        (["restore", "store:DIR/orders", "-o", "OUT", "--at", "1969-01-01"], 1),
        (["restore", "store:DIR/orders", "-o", "OUT", "--at", "noon"], 2),
        (["restore", "store:DIR/orders", "-o", "DIR/no/image"], 1),
        (["restore", "DIR/orders", "-o", "OUT", "--at", "7"], 2),
        (["restore", "store:DIR/orders", "-o", "OUT", "--at", "3", "--checkpoint", "4"], 2),
        *(
            ([command, "store:DIR/orders", *output, *option], 2)
            for option in (["--strict"], ["--word", "4"], ["--guest", "pv"], ["--codec", "rle"])
            for command, output in (("restore", ["-o", "OUT"]), ("verify", []))
        ),
        (["verify", "store:DIR/orders", "--hash"], 2),
        (["list", "store:DIR", "--last", "2"], 2),
        (["export", "store:DIR/orders", "-o", "DIR/no/stream"], 1),
        (["compact", "store:DIR/none"], 1),
        (["compact", "store:DIR/empty"], 1),
        (["prune", "store:DIR/orders"], 2),
        (["prune", "store:DIR/orders", "--keep-age", "7"], 2),
        (["prune", "store:DIR/orders", "--keep-size", "much"], 2),
        (["prune", "store:DIR/none", "--keep-count", "1"], 1),
    ],
)
def test_what_cannot_be_done(store: Path, command: Command, tmp_path: Path, arguments: list[str], code: int) -> None:
    named = [text.replace("DIR", str(store)).replace("OUT", str(tmp_path / "out")) for text in arguments]
    ran = command(*named)
    assert ran.code == code and ran.err
    assert not (store / "none").exists() and not (tmp_path / "out").exists()


def test_no_checkpoint_is_not_good(store: Path, command: Command, tmp_path: Path) -> None:
    bare, unnamed = tmp_path / "bare", tmp_path / "unnamed"
    bare.mkdir()
    with Store(tmp_path / "fresh").writer("orders"):
        pass
    unnamed.mkdir()
    (unnamed / "notes").touch()
    out = ["-o", tmp_path / "out"]
    read = [["list"], ["verify"], ["restore", *out], ["export", *out]]
    cases = [(f"store:{bare}", read), (f"store:{store}/empty", read)]
    cases += [(f"store:{tmp_path}/fresh", [["list"]]), (f"store:{unnamed}", [["list"]])]
    for name, commands in cases:
        for words in commands:
            for as_json in ([], ["--json"]):
                ran = command(words[0], name, *words[1:], *as_json)
                assert ran.code == 20 and "nothing to restore" in ran.err, (words, name, ran)
    assert json.loads(command("verify", f"store:{store}/empty", "--json").out)["good"] is False
    assert not (tmp_path / "out").exists()
    # One name of several that holds nothing yet is no fault of the store.
    assert command("list", f"store:{store}").code == 0


def test_a_store_that_is_being_written(store: Path, command: Command, tmp_path: Path) -> None:
    with Store(store).writer("orders") as writer:
        source = Source(position=writer.position)
        writer.begin(full=True)
        writer.feed(source.checkpoint()[:-5])
        for words in (["compact"], ["prune", "--keep-count", "1"]):
            assert command(words[0], f"store:{store}/orders", *words[1:]).code == 1
        assert command("restore", f"store:{store}/orders", "-o", tmp_path / "image").code == 0
        assert command("verify", f"store:{store}/orders").code == 0
    assert (tmp_path / "image").read_bytes() == memory_at(6).tobytes()
