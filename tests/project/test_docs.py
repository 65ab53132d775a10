"""The pages of docs/: each command and program on them runs, in their order, and prints what stands there.

A page is a script. `sh` blocks run in one shell, so that variables and background processes last; `python` and `toml`
blocks that begin with a comment such as `# work.py` become that file, other `python` blocks run. A `text` block lists,
in order, lines that what ran since the previous one has printed; `…` stands for anything. `sh readme` is a command of
README.md, which CI runs, and `nginx` a file that tests/dashboard/test_proxy.py tries. After a backup was started in the
background, the next block waits until it listens.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from vm_guest.build import build

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
LIMIT_S = 300
MARK = "REMUS_CKPT_DOCS_PAGE"


class Block(NamedTuple):
    """A fenced block. line: of the page, of its first line"""

    kind: str
    line: int
    text: str


def blocks(page: str) -> list[Block]:
    return [
        Block(match[1], page.count("\n", 0, match.start()) + 2, match[2])
        for match in re.finditer(r"^```(\S[^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    ]


def script(found: list[Block]) -> Iterator[str]:
    """The lines of a shell that does what the blocks say, and says before each which it is."""
    for number, (kind, line, text) in enumerate(found):
        yield f"echo; echo '@@{number} line {line}'"
        if kind in ("text", "nginx") or kind.startswith("{"):
            continue
        named = re.match(r"# (\S+\.(?:py|toml))\n", text)
        if named:
            yield f"cat > {named[1]} <<'THE-END'\n{text}THE-END"
        elif kind == "python":
            yield f"python - <<'THE-END'\n{text}THE-END"
        else:
            assert kind == "sh", f"line {line}: no block of the kind {kind!r} is run"
            yield text
            if re.search(r"^remus-ckpt backup (?:.|\\\n)* &$", text, re.MULTILINE):
                yield "until grep -q '^listening on' output; do sleep 0.1; done"


def elsewhere(text: str, page: str, folder: Path) -> str:
    """The same on one machine, beside other tests."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for there, here in (
        ("backup.example.net", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        (":7411", f":{port}"),
        ("/var/lib/remus", str(folder / "remus")),
        ("/dev/shm/orders", f"/dev/shm/remus-docs-{os.getpid()}-{page.removesuffix('.md')}"),
    ):
        text = text.replace(there, here)
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for path in Path("/dev/shm").glob(f"remus-docs-{os.getpid()}-*"):
        path.unlink()


def ran(page: str, found: list[Block], folder: Path) -> tuple[int, str]:
    """Run a page; returns the exit status of its shell and all output. Nothing that it started is left."""
    lines = ["set -euo pipefail", *script(found)]
    (folder / "script").write_text(elsewhere("\n".join(lines) + "\n", page, folder))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        MARK: str(folder),
    }
    with open(folder / "output", "w") as output:
        shell = subprocess.Popen(
            ["bash", "script"], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            status = shell.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            status = -1
        finally:
            end_all(folder)
            shell.wait()
    return status, (folder / "output").read_text(errors="replace")


def end_all(folder: Path) -> None:
    """End whatever a page has started, also what has a session of its own, as a guest that goes on."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + 20.0
        for pid in started(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
                os.kill(pid, signal.SIGCONT)
        while started(folder) and time.monotonic() < until:
            time.sleep(0.05)


def started(folder: Path) -> list[int]:
    """The processes of a page: they have inherited its mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={folder}\0".encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def is_printed(expected: list[str], printed: list[str]) -> str | None:
    """The first expected line that does not follow, None if all do."""
    rest = iter(printed)
    for line in expected:
        pattern = re.compile(".*".join(re.escape(part) for part in line.split("…")))
        if not any(pattern.fullmatch(one.rstrip()) for one in rest):
            return line
    return None


def run_page(page: str, folder: Path) -> None:
    found = blocks((DOCS / page).read_text())
    for block in found:
        if block.kind == "sh readme":
            assert f"    {block.text}" in (ROOT / "README.md").read_text()
    found = [block for block in found if block.kind != "sh readme"]
    status, output = ran(page, found, folder)
    assert status == 0, f"{page}: ended with {status}\n{output}"
    said = dict(re.findall(r"^@@(\d+) line \d+\n(.*?)(?=^@@|\Z)", output, re.MULTILINE | re.DOTALL))
    assert len(said) == len(found), output
    printed: list[str] = []
    for number, block in enumerate(found):
        if block.kind == "text":
            missing = is_printed(elsewhere(block.text, page, folder).splitlines(), printed)
            assert missing is None, f"{page}, line {block.line}: {missing!r} was not printed:\n" + "\n".join(printed)
            printed = []
        printed += said[str(number)].splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "machine.md"])
def test_a_page_does_what_it_says(page: str, folder: Path) -> None:
    run_page(page, folder)


@pytest.mark.slow
@pytest.mark.qemu
def test_the_page_of_machines_does_what_it_says(folder: Path) -> None:
    guest = build()
    (folder / "vmlinuz").symlink_to(guest / "kernel")
    (folder / "initrd.img").symlink_to(guest / "initramfs")
    run_page("machine.md", folder)


@pytest.mark.parametrize(
    ("expected", "printed", "missing"),
    [
        (["a"], ["b", "a"], None),
        (["a", "b"], ["b", "a"], "b"),
        (["… a …"], ["x a y"], None),
        (["a …"], ["a"], "a …"),
        (["(a)"], ["(a) "], None),
        (["a"], ["ab"], "a"),
    ],
)
def test_what_is_not_printed_is_noticed(expected: list[str], printed: list[str], missing: str | None) -> None:
    assert is_printed(expected, printed) == missing


def test_a_page_that_fails_is_noticed(folder: Path) -> None:
    status, output = ran("x.md", [Block("sh", 1, "setsid sleep 1000 &\necho one\nfalse\necho two\n")], folder)
    assert status == 1
    assert started(folder) == []
    assert "one" in output and "two" not in output


@pytest.mark.parametrize(
    "path", sorted([*DOCS.glob("*.md"), ROOT / "README.md", *(ROOT / "specs").rglob("*.md")]), ids=str
)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, _ = target.partition("#")
        assert not file or (path.parent / shlex.split(file)[0]).exists(), f"{path}: {target} is not there"


def test_every_page_is_listed() -> None:
    index = (DOCS / "index.md").read_text()
    listed = re.findall(r"^[a-z]+$", index, re.MULTILINE)
    assert sorted(f"{name}.md" for name in listed) == [page for page in PAGES if page != "index.md"]


def test_every_extra_for_users_is_listed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = re.findall(r"^\| `remus_ckpt\[(\w+)\]` \|", (DOCS / "quickstart.md").read_text(), re.MULTILINE)
    assert set(listed) == set(extras) - {"test", "docs", "wheels", "bench", "dev"}
    assert set(extras["all"][0].removeprefix("remus_ckpt[").removesuffix("]").split(",")) == set(listed) - {"all"}
