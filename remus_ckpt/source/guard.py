"""The guard process: lets those run on who were stopped if the one that stopped them dies.

    python guard.py SOCKET continue
    python guard.py SOCKET thaw FILE
    python guard.py SOCKET run PAUSE RESUME TIMEOUT_S

It is sent one word at a time: S before they are stopped, with their pidfds if they are processes (+ brings more of
those), and C when they run again. At the end of the socket (whoever held the other end is gone) it lets them run on if
the last word was not C: by SIGCONT, by writing 0 to the open file of a cgroup, or by the user's command. It also runs
those commands when the word comes, and answers with the word and what was wrong: a pause command has ended before the
resume command begins, whenever the other side dies.
It ends with the socket, and ignores the signals that a service manager sends to everybody: whoever is stopped needs it
until then.
It imports nothing but the standard library, so that it starts fast and cannot break with the package.
"""

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import sys
import time

IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36
_MAX_FDS = 253
_KILL_S = 5.0


def main() -> None:
    """Guard what the command line names."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    words = socket.socket(fileno=int(sys.argv[1]))
    words.set_inheritable(False)
    how, *what = sys.argv[2:]
    if how == "run":
        # What a command leaves behind becomes our child, so that it can be found.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stopped: list[int] = []
    last = b"C"
    while True:
        word, pidfds = _next(words)
        if not word:
            break
        if word != b"+":
            for pidfd in stopped:
                os.close(pidfd)
            stopped = []
        stopped += pidfds
        trouble = ""
        if how == "run":
            trouble = _run(what[0 if word == b"S" else 1], float(what[2]))
        if word != b"C" or not trouble:
            last = word
        if how == "run":
            try:
                words.send(word + trouble.encode(errors="replace"))
            except OSError:
                break
    if last == b"C":
        return
    if how == "run":
        _run(what[1], float(what[2]))
    elif how == "thaw":
        with contextlib.suppress(OSError):  # the cgroup is gone
            os.pwrite(int(what[0]), b"0", 0)
    for pidfd in stopped:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)


def _next(words: socket.socket) -> tuple[bytes, list[int]]:
    try:
        word, pidfds, _, _ = socket.recv_fds(words, 16, _MAX_FDS)
        return word, pidfds
    except ConnectionResetError:  # the other side died without having read our answer
        return b"", []


def _run(command: str, timeout_s: float) -> str:
    """Run a command of the user's to its end. Returns what was wrong, or nothing.

    Its error output goes to a file: a pipe would end only with the last daemon that it may have started. One that takes
    too long is killed with all that it has started, in whatever session and process group. What an earlier one has left
    behind is not: those children we had before.
    """
    output = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        # None of these numbers is given to another before it is waited for, which only we do.
        before = _children()
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", command],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, *fds) for fds in ((null, 0), (null, 1), (output, 2))],
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, *IGNORED],  # Python ignores the first two
        )
        pidfd = os.pidfd_open(pid)
        try:
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            in_time = bool(ended.poll(timeout_s * 1000))
        finally:
            os.close(pidfd)
        if not in_time:
            _kill_all(before)
            return _tell(f"was not done in {timeout_s:g} s", output)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return "" if code == 0 else _tell(f"ended with {code}", output)
    except OSError as error:
        return f"was not run: {error.strerror}"
    finally:
        # A daemon that it has left behind would fill our memory with what it says.
        with contextlib.suppress(OSError):
            fcntl.fcntl(output, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        os.close(output)
        os.close(null)


def _tell(how: str, output: int) -> str:
    said = os.pread(output, 2000, max(os.fstat(output).st_size - 2000, 0)).decode(errors="replace").strip()
    return f"{how}: {said}" if said else how


def _children() -> set[int]:
    with open("/proc/thread-self/children", encoding="ascii") as file:
        return set(map(int, file.read().split()))


def _kill_all(before: set[int]) -> None:
    """Kill the children that were not there before, and theirs, which become ours as their parents die.

    One that the kernel does not let die is not waited for longer than whoever waits for us.
    """
    deadline = time.monotonic() + _KILL_S
    while (found := _children() - before) and time.monotonic() < deadline:
        for child in found:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)


if __name__ == "__main__":
    main()
