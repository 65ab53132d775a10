"""Build the guest of the tests, which is that of `remus-ckpt demo --vm` (remus_ckpt/demo/guest).

    python3 tests/vm_guest/build.py [FOLDER]

FOLDER (.cache/vm_guest by default) then holds `kernel` and `initramfs`; the last line printed names it. The file is
loaded by its path, so that any Python does, without the package's requirements.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".cache" / "vm_guest"


def build(folder: Path = FOLDER) -> Path:
    """Returns the folder. Raises what the guest's `build` does."""
    spec = importlib.util.spec_from_file_location("demo_guest", ROOT / "remus_ckpt" / "demo" / "guest" / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Path = module.build(folder)
    return made


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
