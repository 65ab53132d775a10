"""The house has floors: a module imports from its own floor or from one below, never from above."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import remus_ckpt

PACKAGE = Path(remus_ckpt.__file__).parent

FLOORS: list[set[str]] = [
    {"errors", "forks", "pages", "plural", "limits", "version", "flag", "stages", "extensions"},
    {"codec", "wire", "disk"},
    {"session", "sender", "restorer", "record_restorer", "xen_start", "memory", "image", "blocks", "qemu_sender"},
    {"source", "link", "compressed", "hashing"},
    {"store", "observe", "files", "machines", "image_file", "relay", "pause", "loop", "vm"},
    {"service", "fleet"},
    {"cli", "walk", "convert", "demo", "conformance", "plan", "recording", "report", "dashboard", "__main__"},
]
APART = {frozenset({"codec", "wire"})}
"""These share a floor and know nothing of each other."""
QUIET_FLOORS = 3
"""How many floors, from the ground, hold no socket, thread, clock or event loop …"""
NOISE = {"socket", "threading", "time", "asyncio", "selectors", "subprocess", "multiprocessing", "signal", "_thread"}
"""… which means that they import none of these."""


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def room(path: Path) -> str:
    """The name under which a file stands in FLOORS."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    found = [number for number, names in enumerate(FLOORS) if name in names]
    assert found, f"remus_ckpt.{name} stands on no floor: give it one in DESIGN and here"
    return found[0]


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, full name) of everything that a file imports, in functions too; `from a import b` counts as a and a.b."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    package = list(parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.append((node.lineno, name))
            found += [(node.lineno, f"{name}.{alias.name}") for alias in node.names]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward(path: Path) -> None:
    here = room(path)
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "remus_ckpt" or len(parts) < 2:
            continue
        there = parts[1]
        if not (PACKAGE / there).is_dir() and not (PACKAGE / f"{there}.py").is_file():
            continue  # a name of remus_ckpt/__init__.py, caught below
        assert floor(there) <= floor(here), f"{path.name}:{line} on floor {floor(here)} imports {name}"
        assert frozenset({here, there}) not in APART, f"{path.name}:{line}: {here} and {there} do not know each other"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_below_the_top_imports_the_public_names(path: Path) -> None:
    """`remus_ckpt/__init__.py` draws on floors 0 to 2, so what it offers is for those above them."""
    if floor(room(path)) >= QUIET_FLOORS:
        return
    for line, name in imports(path):
        if name.startswith("remus_ckpt."):
            there = name.split(".")[1]
            known = (PACKAGE / there).is_dir() or (PACKAGE / f"{there}.py").is_file()
            assert known, f"{path.name}:{line} takes {name} from the package's front"


@pytest.mark.parametrize(
    "path",
    [path for path in modules() if any(room(path) in names for names in FLOORS[:QUIET_FLOORS])],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_the_lower_floors_are_quiet(path: Path) -> None:
    for line, name in imports(path):
        assert name.split(".")[0] not in NOISE, f"{path.name}:{line} imports {name}"


def test_the_walk_sees_imports(tmp_path: Path) -> None:
    """The test would be worth nothing if `imports` found none."""
    assert any(name == "remus_ckpt.codec" for _, name in imports(PACKAGE / "sender.py"))
    assert any(name == "remus_ckpt.pages" for _, name in imports(PACKAGE / "codec" / "scan.py"))
    assert room(PACKAGE / "codec" / "scan.py") == "codec"
    assert len(modules()) > 15


def test_the_map_of_the_house_is_true() -> None:
    """Every file and room that ARCHITECTURE.md names is there, and it draws every room."""
    page = (PACKAGE.parent / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?|[a-z_]+\.py)`", page))
    missing = [name for name in named if not (PACKAGE.parent / name).exists() and not (PACKAGE / name).exists()]
    assert named and not missing
    drawing = page[page.index("    cli") : page.index("No socket")]
    assert set().union(*FLOORS) - {"__main__"} <= set(re.findall(r"[a-z_]+", drawing))
