"""The C extensions: which sources each is built from, and whether the installed one was built from these.

An extension built from other sources would misread its arguments. If the sources are beside the package, as in a
checkout, they are compared; if they are not, the two were installed together. `setup.py` reads this file too, so
it imports nothing of the package before it has to.
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

SOURCES: dict[str, tuple[str, ...]] = {
    "codec._native": ("codec/_kernels/*.[ch]",),
    "store._pages": ("store/_pages.c", "codec/_kernels/*.[ch]"),
    "wire._path": ("wire/_walk/*.[ch]", "codec/_kernels/crc32c.h", "codec/_kernels/cpu.h"),
}
"""Patterns of the files that each one is made of, from the package's folder."""
PACKAGE = Path(__file__).parent


def fingerprint(name: str, package: Path = PACKAGE) -> str | None:
    """A digest of the sources of an extension; None if they are not there."""
    digest = hashlib.sha256()
    for pattern in SOURCES[name]:
        paths = sorted(package.glob(pattern))
        if not paths:
            return None
        for path in paths:
            data = path.read_bytes()
            digest.update(f"{path.name} {len(data)}\n".encode() + data)
    return digest.hexdigest()[:16]


def load(name: str) -> Any:
    """Load the extension. Raises ImportError if it was not built, KernelUnavailable if built from other sources."""
    # By name: a failure of the plain statement would read like a circular import.
    module = importlib.import_module(f"remus_ckpt.{name}")
    wanted = fingerprint(name)
    if wanted is not None and getattr(module, "SOURCES", None) != wanted:
        from remus_ckpt.errors import KernelUnavailable

        raise KernelUnavailable(
            f"{module.__file__} was built from other sources than {PACKAGE / SOURCES[name][0]}: build it again "
            "(pip install -e .), or remove it and let Python and numpy do its work"
        )
    return module
