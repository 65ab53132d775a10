"""The demo's primary: `remus-ckpt protect` with a second reader.

    python primary.py FILE PID ADDRESS TLS_DIR INTERVAL_S

In each pause it reads the memory independently from its file and prints `paused EPOCH SHA256`; for each commit it
prints `committed EPOCH`. Its parent compares.
"""

from __future__ import annotations

import hashlib
import os
import sys

from remus_ckpt.demo import ledger
from remus_ckpt.link.tls import TlsFiles
from remus_ckpt.observe.log import configure_logs
from remus_ckpt.service.protect import primary_of
from remus_ckpt.service.release import Committed
from remus_ckpt.source.processes import Processes
from remus_ckpt.source.shared_file import SharedFile

NAME = "ledger"


def main() -> None:
    """Protect until killed."""
    path, pid, address, tls_dir, interval_s = sys.argv[1:]
    configure_logs(level="error")
    reader = os.open(path, os.O_RDONLY)

    def look(epoch: int) -> None:
        digest = hashlib.sha256()
        for start in range(0, ledger.BYTES, 1 << 20):
            digest.update(os.pread(reader, 1 << 20, start))
        os.write(1, f"paused {epoch} {digest.hexdigest()}\n".encode())

    def report(committed: Committed) -> None:
        os.write(1, f"committed {committed.epoch}\n".encode())

    primary = primary_of(
        SharedFile(path, Processes([int(pid)])),
        NAME,
        address,
        tls=TlsFiles(tls_dir),
        interval_s=float(interval_s),
        on_paused=look,
        on_commit=report,
    )
    for _ in primary.run():
        pass


if __name__ == "__main__":
    main()
