"""A guest that went on here is protected again, on another backup, as soon as that is there.

    other backup      guest here
    not there     →   goes on, unprotected: what it sends leaves at once
    answers       →   `remus-ckpt protect`, in a process of its own; its output is held from the first pause on
    commits       →   protected

The process lives on when this backup ends, as the guest does. A backup that is started again asks the other side who is
connected there, and starts nothing while the guest is protected.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remus_ckpt.errors import RemusError
from remus_ckpt.link.address import INSECURE_OPTION, Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.observe.log import News, log

_LOOK_S, _LOOK_PROTECTED_S = 0.5, 5.0
"""How often the other backup is asked."""
_ANSWER_S = 5.0
_TURN_S = 0.1
_AGAIN_S = 5.0
"""A process that has ended is not started again sooner."""
_GOOD = (0, 1)
"""Levels of a name's health (health.py) at which checkpoints are committed, or soon will be …"""
_UNDER_WAY = ("copying", "opening")
"""… and states in which they are not yet."""

_children: list[subprocess.Popen[bytes]] = []
"""Those that may outlive their `Reprotection`: Popen complains unless they are kept."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The backup that protects guests that went on here.

    to: its address
    options: more options of `remus-ckpt protect`
    """

    to: str
    tls_dir: Path | None = None
    insecure: bool = False
    options: tuple[str, ...] = ()


class Reprotection:
    """Has one guest protected until it ends, or until `close`.

    qmp: the guest's control socket
    term: the one under which it went on
    lives: whether it still runs
    wake: called when the state has changed
    Any thread may call the methods.
    """

    def __init__(
        self, name: str, qmp: Path, term: int, elsewhere: Elsewhere, lives: Callable[[], bool], wake: Callable[[], None]
    ) -> None:
        self._name, self._qmp, self._term, self._elsewhere = name, qmp, term, elsewhere
        self._lives, self._wake = lives, wake
        self._process: subprocess.Popen[bytes] | None = None
        self._epoch: Any = None
        """What the other backup had committed before the process was started."""
        self._news = News()
        self._is_over = threading.Event()
        self._state = ("waiting", "")
        threading.Thread(target=self._run, name=f"protection of {name}", daemon=True).start()

    def status(self) -> dict[str, Any]:
        """Where the guest is protected: `to`, `state` ("waiting" for that backup, "copying", "protected") and `why`, in
        that backup's words."""
        state, why = self._state
        return {"to": self._elsewhere.to, "state": state, "why": why}

    def close(self) -> None:
        """Look after it no longer. Whatever protects the guest goes on."""
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.is_set() and self._lives():
            self._look()
            if self._process is None:
                self._is_over.wait(_LOOK_S)
                continue
            left_s = _LOOK_PROTECTED_S if self._state[0] == "protected" else _LOOK_S
            while left_s > 0 and self._process.poll() is None and not self._is_over.wait(_TURN_S):
                left_s -= _TURN_S
            if self._process.poll() is not None:
                self._ended(self._process.wait())

    def _look(self) -> None:
        """Ask the other backup, and start the process if nobody protects the guest there."""
        there: dict[str, Any] = {}
        try:
            tls = None if self._elsewhere.tls_dir is None else TlsFiles(self._elsewhere.tls_dir)
            address = Address.parse(self._elsewhere.to)
            connection = connect(address, tls=tls, timeout_s=_ANSWER_S, insecure=self._elsewhere.insecure)
            there = ask(connection, "status", {}, timeout_s=_ANSWER_S)["names"].get(self._name, {})
            is_connected = there.get("connected") and there.get("term") == self._term
            words = str(there.get("health", {}).get("words", "it knows nothing of the guest"))
            if is_connected:
                is_under_way = there["health"]["state"] in _UNDER_WAY
                if self._process is not None and there.get("epoch") == self._epoch:
                    is_under_way = True  # it is about to begin its copy; what is committed there is of old
                is_good = there["health"]["level"] in _GOOD
                self._note(("copying" if is_under_way else "protected") if is_good else "waiting", words)
            elif self._process is None:
                self._epoch = there.get("epoch")
                self._start()
                self._note("copying", "it has just been started")
            elif self._state[0] == "protected":
                self._note("waiting", words)
        # Another program may say anything.
        except (RemusError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._note("waiting", str(error) or type(error).__name__)

    def _note(self, state: str, why: str) -> None:
        before, self._state = self._state[0], (state, why[:300])
        if state == "waiting" and self._news.is_new(why):
            log("not protected", level=logging.WARNING, name=self._name, to=self._elsewhere.to, reason=why)
        if state != before:
            if state == "protected":
                self._news.clear()
                log("the guest is protected again", name=self._name, to=self._elsewhere.to)
            self._wake()

    def _start(self) -> None:
        elsewhere = self._elsewhere
        words = [sys.executable, "-m", "remus_ckpt", "protect", f"qemu:{self._qmp}", "--name", self._name]
        words += ["--to", elsewhere.to, "--term", str(self._term), *elsewhere.options]
        if elsewhere.tls_dir is not None:
            words += ["--tls-dir", str(elsewhere.tls_dir)]
        if elsewhere.insecure:
            words.append(INSECURE_OPTION)
        # In a session of its own: Ctrl-C is meant for the backup.
        self._process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        _children[:] = [child for child in _children if child.poll() is None]
        _children.append(self._process)

    def _ended(self, status: int) -> None:
        self._process = None
        if self._lives():
            self._note("waiting", f"`remus-ckpt protect` has ended with status {status}")
            self._is_over.wait(_AGAIN_S)
