"""An extension that was built from other sources is refused, and says what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from remus_ckpt import extensions
from remus_ckpt.errors import KernelUnavailable

PATH = next(name for name in extensions.SOURCES if name.startswith("wire"))


@pytest.mark.parametrize("name", extensions.SOURCES)
def test_what_is_built_was_built_from_what_is_here(name: str) -> None:
    try:
        module = extensions.load(name)
    except ImportError:
        pytest.skip("it was not built")
    assert extensions.fingerprint(name) == module.SOURCES


def test_a_change_of_any_source_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "wire" / "_walk"
    folder.mkdir(parents=True)
    (tmp_path / "codec" / "_kernels").mkdir(parents=True)
    for path in ("crc32c.h", "cpu.h"):
        (tmp_path / "codec" / "_kernels" / path).write_text("a")
    assert extensions.fingerprint(PATH, tmp_path) is None  # as in a wheel
    for path in ("walk.c", "walk.h"):
        (folder / path).write_text("a")
    seen = {extensions.fingerprint(PATH, tmp_path)}
    (folder / "walk.h").write_text("b")
    seen.add(extensions.fingerprint(PATH, tmp_path))
    (folder / "walk.h").rename(folder / "ram.h")
    seen.add(extensions.fingerprint(PATH, tmp_path))
    assert len(seen) == 3


def test_a_stale_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for stale in (SimpleNamespace(__file__="x.so", SOURCES="0"), SimpleNamespace(__file__="x.so")):
        monkeypatch.setitem(sys.modules, f"remus_ckpt.{PATH}", stale)
        with pytest.raises(KernelUnavailable, match="pip install"):
            extensions.load(PATH)
        monkeypatch.setattr(extensions, "fingerprint", lambda *_: None)
        assert extensions.load(PATH) is stale
        monkeypatch.undo()


@pytest.mark.parametrize("name", extensions.SOURCES)
def test_a_command_says_so(name: str) -> None:
    """In one line, as any other error of ours; not as if the extension had not been built."""
    program = (
        f"import sys, types, remus_ckpt; sys.modules['remus_ckpt.{name}'] = types.ModuleType('stale', '');"
        f"sys.modules['remus_ckpt.{name}'].__file__ = 'stale.so'; from remus_ckpt.cli import main; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, "list", "/nowhere/at/all"], capture_output=True, text=True, check=False
    )
    assert ran.returncode and "pip install -e ." in ran.stderr
    assert "Traceback" not in ran.stderr
