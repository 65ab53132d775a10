#!/usr/bin/env python3
"""Makes the vectors of Xen's v2 stream in specs/vectors/xen-v2/ of the streams that tests/v2_streams.py puts together.

python tools/v2_vectors.py            make them anew, and their manifest
python tools/v2_vectors.py --check    change nothing; exit code 1 if anything would change
"""

# ruff: noqa: E402
from __future__ import annotations

import hashlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]
import v2_streams as v
from qemu_vectors import Vectors, bring_up_to_date

FOLDER = ROOT / "specs" / "vectors" / "xen-v2"
SECTIONS = {
    "hvm": "§3, §5.1, §5.6, §5.7, §5.8",
    "series": "§5.12, §7",
    "libxl": "§2, §5.10, §6",
    "libxl-series": "§6.3, §7",
    "pv": "§5.2, §5.3, §5.4, §5.5",
    "suspended": "§2.1",
}


def build() -> dict[str, bytes]:
    """Every file of the folder, by name."""
    vectors = Vectors()

    def good(name: str, data: bytes, memories: list[bytes], **more: object) -> None:
        sections = ", ".join(f"xen-v2.md {one}" for one in SECTIONS[name.removesuffix("-cut")].split(", "))
        checkpoints = [{"epoch": i, "memory_sha256": hashlib.sha256(one).hexdigest()} for i, one in enumerate(memories)]
        vectors.add(name, sections, data, format="xen-v2", checkpoints=checkpoints, **{"complete": True, **more})

    for name, data in v.ALL.items():
        good(name, data, v.MEMORY[name])
    good("suspended", v.SUSPENDED, v.MEMORY["hvm"])
    for name in ("series", "libxl-series"):
        good(f"{name}-cut", v.ALL[name][:-60], v.MEMORY[name][:1], complete=False)
    good("pv-cut", v.PV[:-10], [], complete=False, whole=False)
    for name, data, kind, offset, section in v.hostile():
        ident = "".join(letter if letter.isalnum() else "-" for letter in name.replace("'", "").lower())
        vectors.bad(ident, f"xen-v2.md {section}", offset, data, kind=kind)
    return vectors.made()


if __name__ == "__main__":
    sys.exit(bring_up_to_date(FOLDER, build()))
