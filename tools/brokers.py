"""Start three NATS servers on this machine, with the stream of a commit log, and print how to reach them.

    python tools/brokers.py [DIR]

DIR keeps their files; without it, they are removed at the end. They run until this program is ended.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from remus_ckpt.demo.brokers import Brokers


def main() -> None:
    """Run until a signal comes."""
    directory = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else None
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    with Brokers(directory) as brokers:
        brokers.make_log()
        print(brokers.url, flush=True)
        for monitor in brokers.monitors:
            print(f"monitoring: {monitor}", file=sys.stderr, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
