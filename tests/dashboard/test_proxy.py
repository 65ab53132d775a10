"""The page behind a proxy with TLS: the file in docs/operate.md, in a real nginx before a real `backup`."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from services import LONG_S, command, until

ROOT = Path(__file__).resolve().parents[2]
NGINX = os.environ.get("REMUS_CKPT_NGINX") or shutil.which("nginx")
TOKEN = "0123456789abcdef"
BASIC = {"Authorization": "Basic " + base64.b64encode(f"me:{TOKEN}".encode()).decode()}

pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx: install Debian's package of that name")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def nginx(folder: Path, page: int, path: str = "/") -> Iterator[tuple[int, ssl.SSLContext]]:
    """What the documentation shows, for this page. Gives the port, and what trusts the certificate."""
    (found,) = re.findall(r"^```nginx\n(.*?)^```$", (ROOT / "docs/operate.md").read_text(), re.MULTILINE | re.DOTALL)
    port = free_port()
    changes = [
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("/etc/ssl/backup.pem", f"{folder}/keys/page/cert.pem"),
        ("/etc/ssl/backup.key", f"{folder}/keys/page/key.pem"),
        ("http://127.0.0.1:7412", f"http://127.0.0.1:{page}{path[1:] and '/'}"),
        ("location /", f"location {path}"),
    ]
    for there, here in changes:
        assert there in found
        found = found.replace(there, here)
    for words in ("init keys", "issue keys page --host backup.example.net"):
        subprocess.run([sys.executable, "-m", "remus_ckpt", "keys", *words.split()], cwd=folder, check=True)
    places = "".join(f"{one}_temp_path {folder}/{one};" for one in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr; events {{}} "
        f"http {{ access_log off; {places} {found} }}"
    )
    with open(folder / "nginx.log", "w") as log:
        process = subprocess.Popen([str(NGINX), "-e", "stderr", "-c", folder / "nginx.conf"], stderr=log)
    try:
        until(lambda: process.poll() is not None or is_open(port))
        assert process.poll() is None, (folder / "nginx.log").read_text()
        yield port, ssl.create_default_context(cafile=folder / "keys/page/ca.pem")
    finally:
        process.kill()
        process.wait()


class ThroughProxy(http.client.HTTPSConnection):
    """A connection to this machine by the name in the certificate."""

    def __init__(self, port: int, trust: ssl.SSLContext) -> None:
        super().__init__("backup.example.net", port, context=trust, timeout=LONG_S)
        self.trust = trust

    def connect(self) -> None:
        plain = socket.create_connection(("127.0.0.1", self.port), LONG_S)
        self.sock = self.trust.wrap_socket(plain, server_hostname=self.host)


@pytest.mark.parametrize("path", ["/", "/remus/"])
def test_the_page_behind_nginx(tmp_path: Path, path: str) -> None:
    page = free_port()
    (tmp_path / "token").write_text(TOKEN)
    with (
        command(
            "backup", "--listen", f"unix:{tmp_path}/sock", "--store", tmp_path / "store", "--dashboard", page,
            "--dashboard-token", tmp_path / "token", "--allow-failover", log=tmp_path / "log",
        ) as backup,
        nginx(tmp_path, page, path) as (port, trust),
    ):  # fmt: skip
        assert backup.stdout is not None and backup.stdout.readline(), (tmp_path / "log").read_text()
        link = ThroughProxy(port, trust)

        def ask(method: str, what: str, body: str | None = None, **headers: str) -> tuple[int, str]:
            link.request(method, path + what, body, BASIC | {name.replace("_", "-"): headers[name] for name in headers})
            answer = link.getresponse()
            return answer.status, answer.read().decode()

        link.request("GET", path)
        answer = link.getresponse()
        assert (answer.status, answer.read()) == (401, b"the token is missing or wrong")
        status, text = ask("GET", "")
        assert status == 200 and "page.js" in text
        assert ask("GET", "page.js")[0] == 200

        wanted = json.dumps({"source": 0, "name": "nobody", "fence": False})
        ours = {"Origin": f"https://backup.example.net:{port}", "X_Remus_Ckpt": "failover"}
        status, text = ask("POST", "failover", wanted, **ours)
        assert status == 409 and "nothing is protected under the name 'nobody'" in text
        assert ask("POST", "failover", wanted, **ours | {"Origin": "https://elsewhere.example.net"})[0] == 403

        link.request("GET", f"{path}events", headers=BASIC)
        answer = link.getresponse()
        begin, looks = time.monotonic(), 0
        while looks < 3:
            looks += answer.readline().startswith(b"data: {")
        assert time.monotonic() - begin < 15, "events wait in the proxy"
        answer.close()
        link.close()
