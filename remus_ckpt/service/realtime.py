"""Realtime scheduling for the threads that a commit passes through (`--realtime`), with guards for everything else.

A thread under SCHED_FIFO runs as soon as it is ready, whatever else wants the CPU. It must not keep the CPU for long:

- the kernel takes it away for a twentieth of each second (sched_rt_runtime_us); where it does not, nothing starts;
- a thread that runs for `MOST_RUNNING_S` without waiting for anything loses the class (RLIMIT_RTTIME), with all others
  of this process, and the log says so;
- children, and threads that others start, have the normal class;
- a copy of all memory is made in the normal class.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
from contextlib import suppress
from pathlib import Path

from remus_ckpt.errors import RemusError
from remus_ckpt.observe.log import log

PRIORITY = 10
"""Below the kernel's own threads, which have 50, and above anything that asks for the lowest."""
MOST_RUNNING_S = 2.0
SYSCTL = Path("/proc/sys/kernel")


class Realtime:
    """Gives threads of this process SCHED_FIFO, each by its own call, and takes it back.

    Created in the main thread, since it takes SIGXCPU. Any thread may call `enter` and `leave`, as often as it likes.
    Raises RemusError if it is not permitted, or if a runaway thread could stop the machine.
    """

    def __init__(self, priority: int = PRIORITY) -> None:
        self._priority = os.sched_param(priority)
        self._own = threading.local()
        self._threads: set[int] = set()  # of the system, that have the class
        self._has_given_up = False
        _check_kernel()
        try:
            self.enter()
            self.leave()
        except PermissionError:
            raise RemusError(
                "realtime scheduling is not permitted: run as root or with CAP_SYS_NICE, or allow it "
                f"(LimitRTPRIO={priority} in the unit, without RestrictRealtime=; ulimit -r {priority} in a shell)"
            ) from None
        _, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
        most_us = int(MOST_RUNNING_S * 1e6)
        soft = most_us if hard == resource.RLIM_INFINITY else min(most_us, hard * 4 // 5)  # at the hard one, it kills
        resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))
        signal.signal(signal.SIGXCPU, lambda *_: self._give_up())

    def enter(self) -> None:
        """From now on, the calling thread has the class."""
        if getattr(self._own, "is_in", False) or self._has_given_up:
            return
        self._own.is_in = True
        self._threads.add(threading.get_native_id())
        # Whatever this thread starts has the normal class.
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, self._priority)

    def leave(self) -> None:
        """The calling thread has the normal class again."""
        if getattr(self._own, "is_in", False):
            self._own.is_in = False
            self._threads.discard(threading.get_native_id())
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))

    def _give_up(self) -> None:
        """Take the class from all threads, for good."""
        self._has_given_up = True
        for thread in tuple(self._threads):
            if not Path(f"/proc/self/task/{thread}").exists():
                continue  # it has ended, and the number may be somebody else's
            with suppress(ProcessLookupError):
                os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
        log("realtime given up", level=logging.ERROR, reason=f"a thread ran for {MOST_RUNNING_S:g} s without waiting")


def _check_kernel() -> None:
    """Raises RemusError if realtime threads may take all of a CPU for good."""
    try:
        runtime_us, period_us = (int((SYSCTL / f"sched_rt_{name}_us").read_text()) for name in ("runtime", "period"))
    except (OSError, ValueError):
        runtime_us, period_us = -1, 1_000_000  # it cannot be told
    if not 0 < runtime_us < period_us:
        raise RemusError(
            f"--realtime: this kernel lets realtime threads take a CPU for good (kernel.sched_rt_runtime_us is "
            f"{runtime_us}, of {period_us}): set it to {period_us * 95 // 100}"
        )
