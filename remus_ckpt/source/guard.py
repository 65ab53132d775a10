"""The guard process: lets those run on who were stopped if the one that stopped them dies.

    python guard.py SOCKET continue PIDFD…
    python guard.py SOCKET thaw FILE
    python guard.py SOCKET run PAUSE RESUME TIMEOUT_S

It is sent a word at a time: S before they are stopped, C when they run again. At the end of the socket (whoever held
the other end is gone) it lets them run on if the last word was S: by SIGCONT, by writing 0 to the open file of a
cgroup, by the user's command. Those commands it also runs itself when the word comes, and answers with the word and
what was wrong: so that a pause command is at its end before the resume command begins, whenever the other side dies.
It imports nothing but the standard library, so that it starts fast and cannot break with the package.
"""

import os
import select
import signal
import socket
import sys


def main() -> None:
    """Guard what the command line names."""
    words = socket.socket(fileno=int(sys.argv[1]))
    words.set_inheritable(False)
    how, *what = sys.argv[2:]
    last = b"C"
    while word := _next(words):
        trouble = ""
        if how == "run":
            trouble = _run(what[0 if word == b"S" else 1], float(what[2]))
        if word == b"S" or not trouble:
            last = word
        if how == "run":
            try:
                words.send(word + trouble.encode(errors="replace"))
            except OSError:
                break
    if last == b"S":
        _let_run(how, what)


def _let_run(how: str, what: list[str]) -> None:
    if how == "run":
        _run(what[1], None)
    elif how == "thaw":
        try:
            os.pwrite(int(what[0]), b"0", 0)
        except OSError:
            return  # the cgroup is gone
    else:
        for pidfd in what:
            try:
                signal.pidfd_send_signal(int(pidfd), signal.SIGCONT)
            except ProcessLookupError:
                continue


def _next(words: socket.socket) -> bytes:
    try:
        return words.recv(16)
    except ConnectionResetError:  # the other side died without having read our answer
        return b""


def _run(command: str, timeout_s: float | None) -> str:
    """Run a command of the user's to its end. Returns what was wrong, or nothing.

    Its error output goes to a file: a pipe would end only with the last daemon that it may have started.
    """
    output = os.memfd_create("output")
    null = os.open(os.devnull, os.O_RDWR)
    try:
        pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", command],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, *fds) for fds in ((null, 0), (null, 1), (output, 2))],
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores these two
        )
        pidfd = os.pidfd_open(pid)
        try:
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            in_time = bool(ended.poll(None if timeout_s is None else timeout_s * 1000))
            if not in_time:
                os.killpg(pid, signal.SIGKILL)
        finally:
            os.close(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if in_time and code == 0:
            return ""
        said = os.pread(output, 2000, max(os.fstat(output).st_size - 2000, 0)).decode(errors="replace").strip()
        how = f"ended with {code}" if in_time else f"was not done in {timeout_s:g} s"
        return f"{how}: {said}" if said else how
    except OSError as error:
        return f"was not run: {error.strerror}"
    finally:
        os.close(output)
        os.close(null)


if __name__ == "__main__":
    main()
