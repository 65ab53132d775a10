"""The guard process: resumes stopped processes if the process that stopped them dies.

    python guard.py SOCKET continue
    python guard.py SOCKET thaw FILE
    python guard.py SOCKET run PAUSE RESUME TIMEOUT_S
    python guard.py SOCKET qmp PATH

The other side sends one word at a time: S before the processes are stopped, with their pidfds in the mode `continue` (+
brings more pidfds), and C once they run again. If the socket ends, because the other side is gone, and the last word
was not C, the guard resumes them: with SIGCONT, by writing 0 to the open file of a cgroup, with the user's command, or
over QMP at a QEMU socket, which serves one client at a time and is free again once the other side is gone. The guard
also runs the user's commands, each at its word, and answers with the word and the fault, if any: so whenever the other
side dies, a pause command has ended before the resume command begins. The guard ends with the socket. It ignores the
signals that a service manager sends to all processes, because stopped processes need it until then. It imports only the
standard library, so that it starts fast and cannot break with the package.
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
_QMP_S = 60.0
_AGAIN_S = 0.005


def main() -> None:
    """Guard what the command line names."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    words = socket.socket(fileno=int(sys.argv[1]))
    words.set_inheritable(False)
    how, *what = sys.argv[2:]
    if how == "run":
        # Processes that a command leaves behind become our children, so that we can find them.
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
    elif how == "qmp":
        _let_run(what[0])
    elif how == "thaw":
        with contextlib.suppress(OSError):  # the cgroup is gone
            os.pwrite(int(what[0]), b"0", 0)
    for pidfd in stopped:
        with contextlib.suppress(OSError):  # dead, or another user's by now: the others run on all the same
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)


def _next(words: socket.socket) -> tuple[bytes, list[int]]:
    try:
        word, pidfds, _, _ = socket.recv_fds(words, 16, _MAX_FDS)
        return word, pidfds
    except ConnectionResetError:  # the other side died without having read our answer
        return b"", []


def _run(command: str, timeout_s: float) -> str:
    """Run one of the user's commands to its end. Returns what was wrong, or an empty string.

    The error output goes to a file: a pipe would stay open until the last daemon that the command started has ended. A
    command that takes too long is killed with all that it has started, in any session and process group. Processes left
    by an earlier command are spared: they were already our children.
    """
    output = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        # None of these pids can be reused before the child is reaped, which only we do.
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
            return _tell(f"did not finish within {timeout_s:g} s", output)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return "" if code == 0 else _tell(f"ended with {code}", output)
    except OSError as error:
        return f"was not run: {error.strerror}"
    finally:
        # Otherwise a daemon left behind would fill our memory with its output.
        with contextlib.suppress(OSError):
            fcntl.fcntl(output, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        os.close(output)
        os.close(null)


def _let_run(path: str) -> None:
    """Tell QEMU to resume its guest. QEMU finishes earlier commands first, in order."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as monitor:
        monitor.settimeout(_QMP_S)
        deadline = time.monotonic() + _QMP_S
        while True:
            try:
                monitor.connect(path)
                break
            except BlockingIOError:  # too many wait there, whom QEMU will take in first, now that it is free
                if time.monotonic() > deadline:
                    return
                time.sleep(_AGAIN_S)
        monitor.sendall(b'{"execute": "qmp_capabilities"}{"execute": "cont", "id": "c"}')
        said = b""
        while b'"id": "c"' not in said and (more := monitor.recv(65536)):
            said = said[-100:] + more


def _tell(how: str, output: int) -> str:
    said = os.pread(output, 2000, max(os.fstat(output).st_size - 2000, 0)).decode(errors="replace").strip()
    return f"{how}: {said}" if said else how


def _children() -> set[int]:
    with open("/proc/thread-self/children", encoding="ascii") as file:
        return set(map(int, file.read().split()))


def _kill_all(before: set[int]) -> None:
    """Kill the new children, and their children, which become ours as their parents die.

    If the kernel does not let one die, we give up before the process that waits for us does.
    """
    deadline = time.monotonic() + _KILL_S
    while (found := _children() - before) and time.monotonic() < deadline:
        for child in found:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, os.WNOHANG)
        time.sleep(0.001)


if __name__ == "__main__":
    main()
