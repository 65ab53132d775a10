"""The guard process: lets stopped processes run on if the one that stopped them dies.

    python guard.py PIPE PIDFD…

It reads a byte at a time from PIPE: S before the processes are stopped, C when they run again. At the end of the pipe
(whoever held the other end is gone) it sends SIGCONT if the last word was S. It imports nothing but the standard
library, so that it starts fast and cannot break with the package.
"""

import os
import signal
import sys


def main() -> None:
    """Guard the processes named by descriptors on the command line."""
    pipe, *pidfds = map(int, sys.argv[1:])
    last = b"C"
    while data := os.read(pipe, 4096):
        last = data[-1:]
    if last == b"S":
        for pidfd in pidfds:
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            except ProcessLookupError:
                continue


if __name__ == "__main__":
    main()
