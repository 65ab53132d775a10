"""Plays histories one by one, each in a child of its own, on standard input's word; the shim is loaded here.

python worker.py BELOW CONTROL        lines of JSON, a task each, answered by a line each
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults.history import Life, Story, judge
from faults.shim import LOST_CUT, LOST_ZEROS, Shim
from remus_ckpt import Store
from remus_ckpt.store import ahead

_TIMEOUT_S = 60


def main() -> None:
    """Serve until the end of the input."""
    below, shim = Path(sys.argv[1]), Shim(Path(sys.argv[2]))
    # Space is written ahead from the first checkpoint on, here too, and by no thread: calls must come in one order.
    ahead.WINDOW_S = 0.0
    ahead.overwrites_in_place = lambda fd: True
    ahead.start = lambda run: run()
    for line in sys.stdin:
        print(json.dumps(play(json.loads(line), below, shim)), flush=True)


def play(task: dict[str, Any], below: Path, shim: Shim) -> dict[str, Any]:
    """One history with its fault, and the judgement.

    task: fault: keywords of `Shim.arm`; insists: as of `Life`; end: "close", "exit" or "power"
    """
    shutil.rmtree(below, ignore_errors=True)
    below.mkdir()
    store = Store(below / "store")
    answer, wrong = _in_child(lambda: _live(task, store, shim))
    shim.disarm()
    result = {"hits": shim.hits, "wrong": wrong, "errors": 0, "full_copies": 0, "reopened": 0}
    if task.get("log"):
        result["calls"] = shim.calls
    if answer is not None:
        story = Story(**answer)
        story.states = [(term, role) for term, role in story.states]
        is_lossy = task["end"] == "power" or task["fault"].get("how") in (LOST_ZEROS, LOST_CUT)
        if task["end"] == "power":
            shim.lose_unsynced(below)
        found, failed = _in_child(lambda: judge(store, story, shim, strict=not is_lossy))
        result |= {"wrong": [*(found or []), *failed]}
        result |= {key: answer[key] for key in ("errors", "full_copies", "reopened")}
    return result


def _live(task: dict[str, Any], store: Store, shim: Shim) -> dict[str, Any]:
    story = Story()
    life = Life(store, shim, story, insists=task["insists"])
    descriptors = len(os.listdir("/proc/self/fd"))
    shim.arm(**task["fault"])
    life.play()
    shim.relent()
    life.settle()
    if task["end"] == "close":
        life.close()
        if len(os.listdir("/proc/self/fd")) > descriptors:
            story.wrong.append("descriptors are left open")
    return asdict(story)


def _in_child(what: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What it returns, or how it ended: an error that is none of ours, a signal, or never."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(_TIMEOUT_S)
        gc.disable()  # a descriptor that only the garbage collector would close is left open
        os.close(reader)
        try:
            answer = [what(), []]
        except BaseException:
            answer = [None, ["".join(traceback.format_exc().splitlines(keepends=True)[-14:])]]
        with os.fdopen(writer, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    if not text:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return None, [f"it hangs for {_TIMEOUT_S} s" if number == signal.SIGALRM else f"it ended with status {status}"]
    answer, wrong = json.loads(text)
    return answer, wrong


if __name__ == "__main__":
    main()
