"""The compiled grammar, once for each process of the tests."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest


@pytest.fixture(scope="session")
def grammar(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The class that the grammar compiles to."""
    from grammar_trees import NO_COMPILER, TOOL

    out = tmp_path_factory.mktemp("grammar")
    ran = subprocess.run([sys.executable, str(TOOL), str(out)], capture_output=True, text=True, check=False)
    if ran.returncode == NO_COMPILER:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stderr
    spec = importlib.util.spec_from_file_location("remus_stream", out / "remus_stream.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.RemusStream
