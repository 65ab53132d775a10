"""The keeper process: runs one of the user's shell commands, and leaves nothing of it running unless it succeeds.

    python keeper.py SOCKET GRACE_S COMMAND

The keeper is a child subreaper: whatever the command starts and abandons becomes a child of the keeper, even in another
session. The keeper kills all of these processes when the command fails, when the byte K arrives, or when the other end
of the socket has been gone for longer than GRACE_S. After the byte L it kills nothing any more. A command that succeeds
may leave processes running: they live on. The exit status is the command's, or 128 + the signal that ended it; the
keeper also sends it as its last message on the socket.

It imports only the standard library, so that it starts fast and cannot break with the package.
Source: prctl(2), PR_SET_CHILD_SUBREAPER and PR_SET_PDEATHSIG.
"""

import contextlib
import ctypes
import math
import os
import select
import signal
import socket
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    """Run the command that the command line names; returns the exit status."""
    words = socket.socket(fileno=int(sys.argv[1]))
    words.set_inheritable(False)
    grace_s, command = float(sys.argv[2]), sys.argv[3]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    shell = _start(libc, command)
    # Only the command holds the input, so that whoever writes to it notices when nobody reads it any more.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    poll = select.poll()
    poll.register(woken, select.POLLIN)
    poll.register(words, select.POLLIN)
    kill_at = math.inf
    is_let_be = False
    while True:
        left = kill_at - time.monotonic()
        ready = {fd for fd, _ in poll.poll(None if left == math.inf else max(left, 0.0) * 1000)}
        if words.fileno() in ready:
            word = words.recv(1)
            if word == b"L":
                is_let_be = True
            else:
                kill_at = time.monotonic() + (0.0 if word else grace_s)
                poll.unregister(words)
        if is_let_be:
            kill_at = math.inf
        if woken in ready:
            os.read(woken, 4096)
        status = _reap(shell)
        if status is None and time.monotonic() < kill_at:
            continue
        if kill_at <= time.monotonic() or (status and not is_let_be):
            _kill_all()
        status = 128 + signal.SIGKILL if status is None else status
        with contextlib.suppress(OSError):  # the other end is gone
            words.send(b"%d" % status)
        return status


def _start(libc: ctypes.CDLL, command: str) -> int:
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        # Whoever kills the keeper kills the command with it.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == keeper:
            os.setsid()
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these two
                signal.signal(number, signal.SIG_DFL)
            os.execv("/bin/sh", ["sh", "-c", command])
    finally:
        os._exit(126)


def _reap(shell: int) -> int | None:
    """Reap the children that have ended; returns the exit status of the shell if it is among them."""
    status = None
    while True:
        try:
            pid, how = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if not pid:
            return status
        if pid == shell:
            code = os.waitstatus_to_exitcode(how)
            status = code if code >= 0 else 128 - code


def _kill_all() -> None:
    """Kill until no child is left: when a child dies, its own children become ours.

    Only our children are killed: until we reap a child, its pid cannot be reused.
    """
    while True:
        for child in _children():
            try:
                os.kill(child, signal.SIGKILL)
            except PermissionError:  # it runs as another user: wait for it
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = file.read().rpartition(b")")[2].split()[1]
        except (OSError, IndexError):
            continue
        if int(parent) == os.getpid():
            found.append(int(name))
    return found


if __name__ == "__main__":
    sys.exit(main())
