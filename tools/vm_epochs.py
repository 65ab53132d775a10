"""Whether the memory of the QEMU that waits is, at every epoch, what the guest's was in the pause of that epoch.

    sudo python tools/vm_epochs.py [--seconds 300] [--memory 96M] [--vcpus 2] [--pages 5000] [--interval 25ms]
    sudo python tools/vm_epochs.py --seconds 20 --control    # one written page in a thousand is not named

The guest of the demo writes pages and blocks while a client asks it without rest. In each pause the primary hashes all
of the guest's RAM, as it lies in its file; when the backup has applied an epoch, it hashes all that the waiting QEMU
sees as its RAM, through that process. Both write epoch and hash down, and they are compared at the end. Pauses and
commits take the longer for it: the figures here are no measurements of time.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

from remus_ckpt.demo import guest
from remus_ckpt.demo.lan import Host
from remus_ckpt.demo.vm import Client, Scene, missing

DISK_BYTES = 4 << 20

TRACER = '''
"""Writes down hashes of memory. Loaded by Python as it starts, in whatever the tool starts."""
import os
import sys

words, folder = sys.orig_argv, os.environ.get("REMUS_EPOCHS")
if folder and words[1:3] == ["-m", "remus_ckpt"] and words[3:4] in (["backup"], ["run"]):
    import hashlib
    import mmap

    log = open(f"{folder}/{words[3]}.{os.environ['REMUS_EPOCHS_HOST']}", "w", buffering=1)

    if words[3] == "run":
        import numpy as np

        from remus_ckpt.service.primary import Primary
        from remus_ckpt.source.track.kernel import KernelTracker
        from remus_ckpt.vm.source import QemuSource

        source, primary, written = QemuSource.__init__, Primary.__init__, KernelTracker.written
        ram = []

        def with_its_ram(self, stopper, path, *arguments, **options):
            with open(path, "rb") as file:
                ram.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            source(self, stopper, path, *arguments, **options)

        def hash_all(epoch):
            log.write(f"{epoch} {hashlib.sha256(ram[0]).hexdigest()}\\n")

        def forgetting(self):
            found = written(self)
            keep = np.random.default_rng().random(len(found)) > 0.001
            return found[keep]

        QemuSource.__init__ = with_its_ram
        Primary.__init__ = lambda self, *a, **k: primary(self, *a, **k | {"on_paused": hash_all})
        if os.environ.get("REMUS_EPOCHS_CONTROL"):
            KernelTracker.written = forgetting
    else:
        from remus_ckpt.service.backup import Backup
        from remus_ckpt.service.vms import GuestStandby

        backup, standby = Backup.__init__, GuestStandby.__init__
        guests = []

        def seen_by(pid):
            """The hash of the RAM of a QEMU: of the largest memory that it shares."""
            with open(f"/proc/{pid}/maps") as maps:
                spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if "rw-s" in line]
            start, end = max(spans, key=lambda span: span[1] - span[0])
            found = hashlib.sha256()
            with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                memory.seek(start)
                while start < end:
                    data = memory.read(min(1 << 20, end - start))
                    start += len(data)
                    found.update(data)
            return found.hexdigest()

        def note(step, epoch):
            if step == "applied" and guests and (waiting := guests[0]._standby) is not None:
                log.write(f"{epoch} {seen_by(waiting.pid)}\\n")

        def known(self, *arguments, **options):
            standby(self, *arguments, **options)
            guests.append(self)

        GuestStandby.__init__ = known
        Backup.__init__ = lambda self, *a, **k: backup(self, *a, **k, on_phase=note)
'''


class Traced(Scene):
    """A scene whose processes write down hashes."""

    def __init__(self, folder: Path, image: Path, *, control: bool, **options: object) -> None:
        self.hashes = folder / "hashes"
        self.hashes.mkdir()
        (self.hashes / "sitecustomize.py").write_text(TRACER)
        self._control = control
        self._disk = folder / "web.raw"
        self._disk.write_bytes(bytes(DISK_BYTES))
        super().__init__(folder, image, **options)  # type: ignore[arg-type]

    def environment(self, host: Host) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(self.hashes), os.environ.get("PYTHONPATH"))))
        found = {"REMUS_EPOCHS": str(self.hashes), "REMUS_EPOCHS_HOST": self.letters[host], "PYTHONPATH": path}
        return found | {"REMUS_EPOCHS_CONTROL": "1" if self._control else ""}

    def run_words(self, host: Host) -> list[str]:
        return [*super().run_words(host), "-drive", f"file={self._disk},if=virtio,format=raw"]

    def told(self, role: str, host: Host) -> dict[int, str]:
        """The hashes that a process has written down, by epoch; the last of each, since a pause may be repeated."""
        lines = (self.hashes / f"{role}.{self.letters[host]}").read_text().splitlines()
        return {int(epoch): digest for epoch, digest in (line.split() for line in lines)}


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-epochs-", dir="/dev/shm"))
        append = f"guest.pages={arguments.pages} guest.mib=16 guest.blocks=128 guest.pause_us=5000"
        options = {"interval": arguments.interval, "memory": arguments.memory, "vcpus": arguments.vcpus}
        image = guest.build(guest.cache())
        scene = Traced(Path(folder), image, control=arguments.control, append=append, lease="60s", **options)
        stack.callback(scene.close)
        here, there = scene.lan.a, scene.lan.b
        scene.backup(there)
        scene.run(here)
        client = stack.enter_context(closing(Client(scene.lan.client.inside())))
        scene.until("the guest answers", lambda: client.is_ready(0.1), 300.0)
        scene.until("it is protected", lambda: scene.is_protected(there), 300.0)
        time.sleep(arguments.seconds)
        primary, told = scene.status(there)["primary"], client.status()
        here.kill()
        paused, applied = scene.told("run", here), scene.told("backup", there)
    if told["wrong"]:
        raise SystemExit(told["wrong"])
    both = paused.keys() & applied.keys()
    differing = sorted(epoch for epoch in both if paused[epoch] != applied[epoch])
    dirty = primary["dirty_pages_total"] / primary["checkpoints"]
    print(
        f"{len(both):,} epochs compared, {len({paused[epoch] for epoch in both}):,} different memories among them, "
        f"{dirty:,.0f} dirty pages in the mean, {told['answers']:,} answers to the client: "
        f"{len(differing)} epochs differ{f', first {differing[0]}' if differing else ''}"
    )
    return int(bool(differing) or not both)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--memory", default="96M")
    parser.add_argument("--vcpus", type=int, default=2)
    parser.add_argument("--pages", type=int, default=5000, help="that the guest writes a second")
    parser.add_argument("--interval", default="25ms")
    parser.add_argument("--control", action="store_true", help="leave out what must be noticed: fails if it works")
    arguments = parser.parse_args()
    if lacks := missing():
        parser.error("; ".join(lacks))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # take apart what was set up
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
