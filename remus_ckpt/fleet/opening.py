"""A commit log by its address: opened on first use, so a service can start before its brokers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.util import find_spec

from remus_ckpt.errors import LogError
from remus_ckpt.fleet.engine import APPEND_S, Entry, Log
from remus_ckpt.fleet.jetstream import JetStreamLog, Nats, servers_of
from remus_ckpt.link.tls import TlsFiles


class OpenedLog:
    """A `Log` that connects when it is first used, and tries again the next time if that fails.

    url, tls, insecure: as for `Nats`; a malformed URL raises LogError at once, and so does
        a missing nats-py
    Any thread may call any method.
    """

    def __init__(self, url: str, *, tls: TlsFiles | None = None, insecure: bool = False) -> None:
        if find_spec("nats") is None:
            raise LogError("a commit log needs nats-py: pip install 'remus_ckpt[fleet]'")
        servers_of(url, insecure)
        self._url = url
        self._tls = tls
        self._insecure = insecure
        self._lock = threading.Lock()  # held while connecting, so that it is done once
        self._log: Log | None = None

    def _opened(self) -> Log:
        with self._lock:
            if self._log is None:
                nats = Nats(self._url, tls=self._tls, insecure=self._insecure)
                try:
                    self._log = JetStreamLog(nats)
                except BaseException:
                    nats.close()
                    raise
            return self._log

    @property
    def identity(self) -> str:
        """See `Log.identity`. Raises LogError."""
        return self._opened().identity

    def append(self, name: str, data: bytes, *, expected: int, key: str, timeout_s: float = APPEND_S) -> int:
        """See `Log.append`."""
        return self._opened().append(name, data, expected=expected, key=key, timeout_s=timeout_s)

    def last(self, name: str) -> Entry | None:
        """See `Log.last`."""
        return self._opened().last(name)

    def read(self, name: str, after: int = 0) -> Iterator[Entry]:
        """See `Log.read`."""
        return self._opened().read(name, after)

    def names(self) -> list[str]:
        """See `Log.names`."""
        return self._opened().names()

    def close(self) -> None:
        """End the connection, if there is one."""
        with self._lock:
            if self._log is not None:
                self._log.close()
                self._log = None
