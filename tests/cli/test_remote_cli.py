"""The commands on a backup's address say what they say on its store."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from liars import Liar, Peer
from services import LONG_S, make_keys
from services import command as process
from store_support import fill, memory_at
from support import Command

from remus_ckpt import Backup, Limits, Policy
from remus_ckpt.service.reader import Readers
from remus_ckpt.session import messages
from remus_ckpt.store import Store


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    return Command(monkeypatch, capfdbinary)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_keys(tmp_path_factory.mktemp("keys")) / "ca"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """`orders` has the epochs 0 to 3 in one segment and 3 to 6 in the next."""
    with Store(tmp_path / "store").writer("orders") as writer:
        source = fill(writer, 4)
        writer.compact(wait=True)
        fill(writer, 3, source)
    return tmp_path / "store"


@pytest.fixture
def backup(store: Path, keys: Path) -> Iterator[Backup]:
    with Backup(store, ["tls://127.0.0.1:0", f"unix:{store}.socket"], tls_dir=keys / "backup") as backup:
        yield backup


@pytest.fixture(params=["tls", "unix"])
def at(request: pytest.FixtureRequest, backup: Backup, keys: Path) -> tuple[str, list[str]]:
    """The address of the store, and the options that it takes."""
    if request.param == "tls":
        return backup.addresses[0], ["--tls-dir", str(keys / "primary")]
    return backup.addresses[1], []


def damage(store: Path, epoch: int) -> None:
    history = Store(store)["orders"]
    entry = history.find(epoch)
    path = history.path_of(entry.segment)
    data = bytearray(path.read_bytes())
    data[entry.start + 40] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "words",
    [
        ["list", "{}"],
        ["list", "{}/orders", "--last", "2"],
        ["list", "{}/orders", "--checkpoints"],
        ["list", "{}/nobody"],
        ["verify", "{}/orders"],
        ["restore", "{}/orders", "-o", "out"],
        ["restore", "{}/orders", "-o", "out", "--at", "2", "--device-state", "state"],
        ["restore", "{}/orders", "-o", "out", "--at", "1970-01-01T00:00:04.5+00:00"],
        ["restore", "{}/orders", "-o", "-", "--checkpoint", "3"],
        ["restore", "{}/orders", "-o", "out", "--at", "99"],
        ["export", "{}/orders", "-o", "out"],
        ["export", "{}/orders", "-o", "-", "--at", "2"],
        ["extract", "{}/orders", "--pfn", "1-3", "--at", "4"],
        ["extract", "{}/orders", "--pfn", "1", "--hex"],
        ["diff", "{}/orders", "2", "5"],
        ["diff", "{}/orders", "5", "2"],
        ["diff", "{}/orders", "2", "99"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("is_bad", [False, True], ids=["good", "bad"])
def test_there_as_here(
    at: tuple[str, list[str]], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command,
    words: list[str], as_json: bool, is_bad: bool,
) -> None:  # fmt: skip
    if is_bad:
        damage(store, 5)
    address, options = at
    ran = []
    for where, extra in ((f"store:{store}", []), (address, options)):
        folder = tmp_path / str(len(ran))
        folder.mkdir()
        monkeypatch.chdir(folder)
        given = [word.format(where) for word in words]
        code, out, err = command.binary(*given, *extra, *(["--json"] if as_json else []))
        text = out.replace(where.encode(), b"WHERE").replace(str(store).encode(), b"WHERE")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        ran.append((code, text, err.replace(where, "WHERE"), files))
    here, there = ran
    assert here[0] == there[0] and here[3] == there[3]
    if here[0] in (0, 20):
        assert here[1] == there[1]
        assert bool(here[2]) == bool(there[2]) == (here[0] != 0)


def test_an_image_of_the_newest(at: tuple[str, list[str]], tmp_path: Path, command: Command) -> None:
    address, options = at
    ran = command("restore", f"{address}/orders", "-o", tmp_path / "image", *options, "--json")
    assert ran.code == 0 and json.loads(ran.out)["restored"] == 6
    assert (tmp_path / "image").read_bytes() == memory_at(6).tobytes()
    assert command("restore", f"{address}/orders", "-o", tmp_path / "image", *options).code == 1  # it is there


def test_the_newest_good_one_where_the_newest_is_bad(
    at: tuple[str, list[str]], store: Path, tmp_path: Path, command: Command
) -> None:
    damage(store, 5)
    address, options = at
    ran = command("restore", f"{address}/orders", "-o", tmp_path / "image", *options)
    assert ran.code == 20 and (tmp_path / "image").read_bytes() == memory_at(4).tobytes()
    assert "checkpoint 5" in ran.err and "4" in ran.out
    assert command("verify", f"{address}/orders", *options).code == 20


def test_what_is_no_way_to_a_checkpoint(backup: Backup, keys: Path, tmp_path: Path, command: Command) -> None:
    address, tls = backup.addresses[0], ["--tls-dir", keys / "primary"]
    output = ["-o", tmp_path / "image"]
    for words, code, said in (
        (["restore", f"{address}/orders", *output], 2, "--tls-dir"),
        (["restore", "tcp://192.0.2.1:7411/orders", *output], 2, "tls://"),
        (["restore", "tls://127.0.0.1/orders", *output, *tls], 2, "HOST:PORT"),
        (["restore", f"{address}/../orders", *output, *tls], 2, "name"),
        (["restore", f"{address}/orders", *output, *tls, "--strict"], 2, "--strict"),
        (["restore", address, *output, *tls], 1, f"{address}/orders"),
        (["restore", f"{address}/orders", *output, "--tls-dir", keys / "expired"], 1, "expired"),
        (["restore", "unix:/nothing/here/orders", *output], 1, "/nothing/here"),
        (["list", address, "--last", "3", *tls], 2, "NAME"),
        (["prune", f"{address}/orders", "--keep-count", "1"], 2, "store:"),
        (["compact", f"{address}/orders"], 2, "store:"),
    ):
        ran = command(*words)
        assert ran.code == code and said in ran.err.replace("\n", " "), (words, ran)
        assert not (tmp_path / "image").exists()


def test_a_restore_that_is_ended_leaves_nothing(store: Path, keys: Path, tmp_path: Path) -> None:
    """The backup takes the connection and never answers; the command is told to end."""
    image = tmp_path / "images" / "image"
    image.parent.mkdir()
    said = threading.Event()

    def stall(peer: Peer) -> None:
        peer.welcome()
        readers = Readers(Store(store), Policy(), Limits(), lambda name: None)
        with readers.lend("peer") as reader:
            while isinstance(request := peer.hear(), messages.Request) and request.method != "read":
                result = reader.answer(request.method, request.arguments)
                assert result is not None
                peer.say(messages.Reply(number=request.number, result=result))
        said.set()
        peer.wait()

    with (
        Liar(stall) as there,
        process("restore", f"{there.address}/orders", "-o", image, log=tmp_path / "log") as restoring,
    ):
        assert said.wait(LONG_S)
        assert list(image.parent.iterdir())  # under another name
        restoring.terminate()
        assert restoring.wait(LONG_S) == 128 + signal.SIGTERM
    assert not list(image.parent.iterdir())
