"""The control connection, against a QEMU that says whatever a test wants."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from remus_ckpt.errors import VmError
from remus_ckpt.vm import qmp
from remus_ckpt.vm.qmp import Qmp

Answer = Callable[[dict[str, Any]], bytes]
GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


def done(request: dict[str, Any], **answer: object) -> bytes:
    return json.dumps({"return": answer, "id": request["id"]}).encode() + b"\r\n"


@contextmanager
def speaking(tmp_path: Path, answer: Answer, *, greeting: bytes = GREETING, piece: int = 1 << 20) -> Iterator[Path]:
    """A server that answers each request but the first, in pieces of so many bytes. b"" hangs up."""
    path = tmp_path / "qmp"
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            # Whoever has heard enough hangs up.
            with connection, suppress(OSError), connection.makefile("rb") as lines:
                connection.sendall(greeting)
                for line in lines:
                    request = json.loads(line)
                    said = done(request) if request["execute"] == "qmp_capabilities" else answer(request)
                    if not said:
                        return
                    for start in range(0, len(said), piece):
                        connection.sendall(said[start : start + piece])

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield path
        thread.join(10.0)
        assert not thread.is_alive()


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_answers_and_events_in_any_pieces(tmp_path: Path, piece: int) -> None:
    def answer(request: dict[str, Any]) -> bytes:
        event = {"event": request["execute"].upper(), "timestamp": {"seconds": 1, "microseconds": 2}}
        return json.dumps(event).encode() + b"\n" + done(request, text="a\nb", given=request.get("arguments"))

    with speaking(tmp_path, answer, piece=piece) as path, closing(Qmp(path)) as found:
        assert found.pid == os.getpid()
        assert found.execute("one") == {"text": "a\nb", "given": None}
        first, second = found.begin([("two", {"x": 1}), ("three", {})])
        assert found.finish([second])[0]["given"] is None
        assert found.finish([first, second])[0]["given"] == {"x": 1}
        assert [event["event"] for event in found.events(look=False)] == ["ONE", "TWO", "THREE"]
        assert found.events() == []


def test_a_refusal_comes_after_what_is_behind_it(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(request: dict[str, Any]) -> bytes:
        asked.append(request["execute"])
        if request["execute"] == "bad":
            return json.dumps({"error": {"class": "X", "desc": "no such thing"}, "id": request["id"]}).encode() + b"\n"
        return done(request)

    with speaking(tmp_path, answer) as path, closing(Qmp(path)) as found:
        with pytest.raises(VmError, match="no such thing"):
            found.execute_all([("bad", {}), ("good", {})])
        assert asked == ["bad", "good"]
        assert found.execute("good") == {}


def test_a_late_answer_is_not_taken_for_another(tmp_path: Path) -> None:
    late: list[bytes] = []

    def answer(request: dict[str, Any]) -> bytes:
        if request["execute"] == "slow":
            late.append(done(request, which="slow"))
            return b" "  # white space before the next line is nothing
        return late.pop() + done(request, which="fast")

    with speaking(tmp_path, answer) as path, closing(Qmp(path)) as found:
        with pytest.raises(VmError, match="has not answered `slow`"):
            found.execute("slow", timeout_s=0.05)
        assert found.execute("fast") == {"which": "fast"}


def test_the_last_words_are_heard(tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> bytes:
        return b'{"event": "SHUTDOWN", "data": {"reason": "guest-shutdown"}}\n' if request["execute"] == "quit" else b""

    with speaking(tmp_path, answer) as path, closing(Qmp(path)) as found:
        found.begin([("quit", {}), ("more", {})])
        heard: list[Any] = []
        while not heard:
            heard = found.events()
        assert heard[0]["data"] == {"reason": "guest-shutdown"}
        with pytest.raises(VmError):
            found.execute("again")
        with pytest.raises(VmError):
            found.events()
        found.close()
        assert found.connection == -1 and not found.is_open
        with pytest.raises(VmError, match="closed"):
            found.execute("again")


@pytest.mark.parametrize("said", [b"HTTP/1.1 400\r\n", b"[1]\n", b"\xff\xfe\n", b"[" * 9999 + b"\n"])
def test_what_is_no_qmp_is_refused(tmp_path: Path, said: bytes) -> None:
    with (
        speaking(tmp_path, done, greeting=said) as path,
        pytest.raises(VmError, match="does not speak QMP"),
        closing(Qmp(path, timeout_s=2.0)),
    ):
        pass


def test_an_answer_to_no_number_is_refused(tmp_path: Path) -> None:
    with (
        speaking(tmp_path, lambda _: b'{"return": {}, "id": [1]}\n') as path,
        closing(Qmp(path)) as found,
        pytest.raises(VmError, match="does not speak QMP"),
    ):
        found.execute("stop")


def test_an_answer_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "LINE_BYTES", 1000)
    with (
        speaking(tmp_path, lambda _: b"x" * 70_000) as path,
        closing(Qmp(path)) as found,
        pytest.raises(VmError, match="more than 1,000 bytes"),
    ):
        found.execute("long")


def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(VmError, match="no QEMU answers"):
        Qmp(tmp_path / "none")
