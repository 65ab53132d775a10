"""The page over HTTP: its files, the figures as server-sent events, and failover by hand if allowed.

    GET /, /page.css, /page.js …     the page
    GET /events                      `hello`, then each look at each source as it is made; `whole` after the first ones
    GET /past                        the last minutes of all names; with source and name, all of one
    GET /detail?source=&name=        what can be restored, and what has happened
    POST /failover                   {"source", "name", "fence"}

Nobody who reaches the port is trusted. Without a token only this machine can reach it, but any web page may make a
browser there send a request: so the Host must be this machine's, and nothing can be changed.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
import logging
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from remus_ckpt.dashboard.board import FIGURES, KEPT, Board, to_json
from remus_ckpt.errors import LinkError, RemusError
from remus_ckpt.observe.http import HttpServer, http_address
from remus_ckpt.observe.log import log
from remus_ckpt.pages import PARTS
from remus_ckpt.session.messages import check_name
from remus_ckpt.version import __version__

TOKEN_CHARS = 16
"""The minimum length of a token."""
VIEWERS = 16
_REQUESTS = VIEWERS + 16
_BODY_BYTES = 4096
_FAILOVER_S = 150.0
TAKE_S = 5.0
"""How long a page's request for a look may take."""
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_FILES = {path.name: path for path in Path(__file__).parent.iterdir() if path.suffix in _TYPES}
_HEADERS = [
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
]

Environ = dict[str, Any]
Start = Callable[[str, list[tuple[str, str]]], Any]


class Dashboard:
    """Serves a board until it is closed.

    where: HOST:PORT, or a port alone, which listens on this machine only
    token: what a user has to enter as the password, with any name; required where other machines reach the address
    may_fail_over: whether the page can promote a backup; needs a token
    Raises LinkError.
    """

    def __init__(self, where: str, board: Board, *, token: str | None = None, may_fail_over: bool = False) -> None:
        check_access(where, token, may_fail_over)
        self._board = board
        self._token = token
        self._host = http_address(where, "dashboard").host
        self._may_fail_over = may_fail_over
        self.free = threading.BoundedSemaphore(VIEWERS)
        self._server = HttpServer(where, self._answer, "dashboard", most=_REQUESTS)
        self.url = f"http://{self._server.address}/"
        log("dashboard", url=self.url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all that is being served, and the board."""
        self._board.close()
        self._server.close()

    # Who may

    def _may(self, environ: Environ) -> bool:
        if self._token is None:
            return True
        scheme, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            _, _, password = base64.b64decode(given, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(password.encode(), self._token.encode())

    def _is_ours(self, environ: Environ) -> bool:
        """Whether the browser means this machine: another site may have pointed its own name at our address."""
        host = urlsplit(f"//{environ.get('HTTP_HOST', '')}").hostname or ""
        return host in ("localhost", self._host) or _is_address(host)

    def _is_from_page(self, environ: Environ) -> bool:
        """Whether a request that changes something was made by our page: no other one can send this header."""
        origin = environ.get("HTTP_ORIGIN")
        is_same = origin is None or urlsplit(origin).netloc == environ.get("HTTP_HOST")
        return is_same and environ.get("HTTP_X_REMUS_CKPT") == "failover"

    # Requests

    def _answer(self, environ: Environ, start: Start) -> Iterable[bytes]:
        try:
            if self._token is None and not self._is_ours(environ):
                return _say(start, "403 Forbidden", f"this is not {environ.get('HTTP_HOST', '')!r:.80}")
            if not self._may(environ):
                challenge = [("WWW-Authenticate", 'Basic realm="remus-ckpt: the token is the password"')]
                return _say(start, "401 Unauthorized", "the token is missing or wrong", challenge)
            method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
            if path == "/failover":
                return self._fail_over(environ, start) if method == "POST" else _wrong_method(start)
            if method != "GET":
                return _wrong_method(start)
            asked = parse_qs(environ.get("QUERY_STRING", ""))
            source, name = _whole(asked.get("source", [""])[0]), asked.get("name", [""])[0]
            match path:
                case "/events":
                    return self._events(environ, start)
                case "/past" if not name:
                    return _send_json(environ, start, self._board.listed())
                case "/past":
                    return _send_json(environ, start, self._board.past(source, name))
                case "/detail":
                    return _send_json(environ, start, self._board.detail(source, name))
            file = _FILES.get(path[1:] or "page.html")
            if file is None:
                return _say(start, "404 Not Found", "there is no such page")
            return _send(environ, start, file.read_bytes(), f"{_TYPES[file.suffix]}; charset=utf-8")
        except Exception as error:
            log("dashboard failed", level=logging.ERROR, error=error)
            return _say(start, "500 Internal Server Error", "see the log")

    def _events(self, environ: Environ, start: Start) -> Iterable[bytes]:
        if not self.free.acquire(blocking=False):
            return _say(start, "503 Service Unavailable", f"{VIEWERS} pages are open already: close one")
        packed = "gzip" in environ.get("HTTP_ACCEPT_ENCODING", "")
        headers = [("Content-Type", "text/event-stream; charset=utf-8")]
        start("200 OK", headers + ([("Content-Encoding", "gzip")] if packed else []) + _HEADERS)
        return _Stream(self._stream(environ["remus_ckpt.go_on"], packed), self.free.release)

    def _stream(self, go_on: Callable[[float], None], packed: bool) -> Iterator[bytes]:
        pack = zlib.compressobj(1, wbits=31)
        board = self._board

        def sent(text: bytes) -> bytes:
            go_on(TAKE_S)
            return pack.compress(text) + pack.flush(zlib.Z_SYNC_FLUSH) if packed else text

        hello = {"program": f"remus_ckpt {__version__}", "columns": FIGURES, "parts": PARTS, "kept": KEPT}
        hello |= {"every_s": board.every_s, "may_fail_over": self._may_fail_over}
        yield sent(b"retry: 1000\nevent: hello\ndata: " + to_json(hello) + b"\n\n")
        seen = [0] * len(board.sources)
        is_whole = False
        while not board.is_over:
            looks = board.wait(seen, board.every_s)
            text = b"".join(b"data: " + look + b"\n\n" for look in looks) or b":\n\n"
            if not is_whole and all(seen):
                text, is_whole = text + b"event: whole\ndata:\n\n", True
            yield sent(text)

    def _fail_over(self, environ: Environ, start: Start) -> Iterable[bytes]:
        if not self._may_fail_over:
            return _say_json(start, "403 Forbidden", "failover is not allowed here: see --allow-failover")
        if not self._is_from_page(environ):
            return _say_json(start, "403 Forbidden", "only the page itself may ask for a failover")
        size = _whole(environ.get("CONTENT_LENGTH") or "")
        if not 0 < size <= _BODY_BYTES:
            return _say_json(start, "400 Bad Request", "what is to be promoted?")
        try:
            wanted = json.loads(environ["wsgi.input"].read(size))
            source, name, fence = wanted["source"], check_name(wanted["name"]), wanted["fence"]
            watched = self._board.sources[source] if type(source) is int and source >= 0 else None
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            watched = None
        if watched is None or type(fence) is not bool:
            return _say_json(start, "400 Bad Request", "what is to be promoted?")
        environ["remus_ckpt.go_on"](_FAILOVER_S)
        log("failover asked for on the page", level=logging.WARNING, name=name, peer=environ.get("REMOTE_ADDR"))
        try:
            report = watched.fail_over(name, fence)
        except RemusError as error:
            return _say_json(start, "409 Conflict", str(error))
        return _send(environ, start, to_json(report), "application/json")


class _Stream:
    """Events, and what to do when they end, even if nobody has taken the first."""

    def __init__(self, events: Iterator[bytes], close: Callable[[], None]) -> None:
        self._events = events
        self._close = close

    def __iter__(self) -> Iterator[bytes]:
        return self._events

    def close(self) -> None:
        """Called once, by the server."""
        self._close()


def check_access(where: str, token: str | None, may_fail_over: bool) -> None:
    """Check that a page may be served like that. Raises LinkError."""
    host = http_address(where, "dashboard").host
    if token is None and host != "localhost" and not (_is_address(host) and ipaddress.ip_address(host).is_loopback):
        raise LinkError(f"dashboard at {where}: other machines can reach it, so it needs a token (--dashboard-token)")
    if token is None and may_fail_over:
        raise LinkError("failover on a page that anyone on this machine can open needs a token (--dashboard-token)")


def read_token(path: Path) -> str:
    """The token in a file: its first line. Raises LinkError."""
    try:
        with path.open(encoding="utf-8") as file:
            token = file.readline(4096).strip()
    except OSError as error:
        raise LinkError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError:
        token = ""
    if len(token) < TOKEN_CHARS:
        raise LinkError(f"{path}: a token has {TOKEN_CHARS} characters or more: openssl rand -hex 16 > {path}")
    return token


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1


def _send(environ: Environ, start: Start, body: bytes, kind: str) -> list[bytes]:
    headers = [("Content-Type", kind)]
    if "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
        pack = zlib.compressobj(1, wbits=31)
        body = pack.compress(body) + pack.flush()
        headers.append(("Content-Encoding", "gzip"))
    start("200 OK", [*headers, ("Content-Length", str(len(body))), *_HEADERS])
    return [body]


def _send_json(environ: Environ, start: Start, value: Any) -> list[bytes]:
    return _send(environ, start, to_json(value), "application/json")


def _say(start: Start, status: str, text: str, headers: Iterable[tuple[str, str]] = ()) -> list[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8"), *headers, *_HEADERS])
    return [text.encode()]


def _say_json(start: Start, status: str, text: str) -> list[bytes]:
    start(status, [("Content-Type", "application/json"), *_HEADERS])
    return [to_json({"error": text})]


def _wrong_method(start: Start) -> list[bytes]:
    return _say(start, "405 Method Not Allowed", "use GET: this page is read-only")
