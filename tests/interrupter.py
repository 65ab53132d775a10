"""Interrupts a thread at a chosen event, as a signal handler would."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any


class Interrupter:
    """Raises KeyboardInterrupt at one event of this thread, in the block.

    at: which, counted from 0; math.inf for none
    kind: "line" or "opcode"
    files: whose code counts: how their paths begin
    seen: how many events there were so far
    """

    def __init__(self, at: float, kind: str = "line", *, files: tuple[str, ...]) -> None:
        self.at = at
        self.seen = 0
        self._kind = kind
        self._files = files
        # CPython 3.11 only borrows its trace function while it makes the frame object of a call. That may run the
        # garbage collector, and with it a `__del__` in which `_trace` raises: then sys.settrace lets the function go,
        # and the interpreter calls what is freed. So it is kept alive here.
        self._tracer = self._trace

    def __enter__(self) -> Interrupter:
        sys.settrace(self._tracer)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self._files):
            return None
        if self._kind == "opcode":
            frame.f_trace_opcodes = True
        if event == self._kind:
            self.seen += 1
            if self.seen == self.at + 1:
                raise KeyboardInterrupt
        return self._trace

    @property
    def has_struck(self) -> bool:
        return self.seen > self.at
