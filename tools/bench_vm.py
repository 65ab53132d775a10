"""What protection costs a guest: its pauses, and where they go; how much slower it is; its disk; a takeover.

    sudo python tools/bench_vm.py [pauses] [slowdown] [disk] [takeover] [--seconds 30] [--json FILE] [--plot FILE.svg]

pauses     the guest of the demo writes so many pages between two pauses (--pages, --interval), while a client asks it
           without rest; for each --memory. Of the newest 1,024 pauses, and of so many at least: those right after the
           first copy, when much was written, are not among them
slowdown   how many pages it writes at most, beside the same QEMU without protection; at 100, 50 and 25 ms
disk       dd in a guest, by the clock of the host, beside a plain QEMU with the same disk; in memory, as the stores are
takeover   from the order to take over until the guest runs, and until its client has an answer

All of it is on this machine, over TLS. On one that is busy with other things, `chrt -r 1` in front of this gives what
it starts the CPU first, so that medians are those of a quiet one.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from remus_ckpt.cli.options import parse_duration
from remus_ckpt.demo import guest
from remus_ckpt.demo.lan import Host
from remus_ckpt.demo.vm import NAME, Client, Scene, missing
from remus_ckpt.link.address import Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.pause import STEPS

WHAT = ("pauses", "slowdown", "disk", "takeover")
INTERVALS = ("100ms", "50ms", "25ms")
ROUNDS = 5
DISK_MIB = 64
DD = (
    ("write 1M", f"dd if=/dev/zero of=/dev/vda bs=1M count={DISK_MIB} oflag=direct", DISK_MIB),
    ("read 1M", f"dd if=/dev/vda of=/dev/null bs=1M count={DISK_MIB} iflag=direct", DISK_MIB),
    ("write 4k", "dd if=/dev/zero of=/dev/vda bs=4k count=4096 oflag=direct", 16),
)
"""What is run in the guest, and how many MiB that moves."""
INIT = """#!/busybox sh
/busybox mkdir -p /dev
/busybox mount -t devtmpfs none /dev
exec > /dev/console 2>&1
for name in $(/busybox cat /modules/order); do /busybox insmod /modules/$name; done
while :; do
WORK
done
"""


@contextmanager
def scene_of(image: Path, **options: Any) -> Iterator[BenchScene]:
    """Two hosts, of which one has a backup."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-bench-", dir="/dev/shm"))
        scene = stack.enter_context(closing(BenchScene(Path(folder), image, **options)))
        scene.backup(scene.lan.b)
        yield scene


class BenchScene(Scene):
    """more: that stands behind the command line of QEMU"""

    def __init__(
        self, folder: Path, image: Path, *, more: Callable[[Path], list[str]] = lambda _: [], **options: Any
    ) -> None:
        super().__init__(folder, image, **options)
        self._more = more(folder)

    def run_words(self, host: Host) -> list[str]:
        return [*super().run_words(host), *self._more]

    def run_plain(self, host: Host) -> subprocess.Popen[bytes]:
        """The guest without protection."""
        words = self.run_words(host)
        qemu = [word + ",script=no,downscript=no" if word.startswith("tap,") else word for word in words]
        return self.start(host, "plain", [*host.inside(), *qemu[qemu.index("--") + 1 :], "-display", "none"])


PAUSES = 1100


def until_protected(scene: Scene) -> None:
    scene.until("it is protected", lambda: scene.is_protected(scene.lan.b), 300.0)


def pauses(memory: str, pages: int, interval: str, seconds: float) -> dict[str, Any]:
    """What the primary says of itself after so long."""
    append = f"guest.pages={int(pages / parse_duration(interval))} guest.mib=32"
    with scene_of(guest.build(guest.cache()), interval=interval, append=append, memory=memory) as scene:
        scene.run(scene.lan.a)
        with closing(Client(scene.lan.client.inside())) as client:
            scene.until("the guest answers", lambda: client.is_ready(0.1), 300.0)
            until_protected(scene)
            time.sleep(max(seconds, PAUSES * parse_duration(interval)))
            found: dict[str, Any] = scene.status(scene.lan.b)["primary"]
            told = client.status()
            if told["wrong"]:
                raise SystemExit(told["wrong"])
    return {"memory": memory, "answers": told["answers"]} | found


def pages_a_second(interval: str | None, seconds: float) -> float:
    """How many pages the guest writes; None: without protection."""
    options = {"interval": interval or "50ms", "append": "guest.pages=1000000000 guest.mib=2", "memory": "96M"}
    with scene_of(guest.build(guest.cache()), **options) as scene:
        (scene.run if interval else scene.run_plain)(scene.lan.a)
        with closing(Client(scene.lan.client.inside())) as client:
            scene.until("the guest answers", lambda: client.is_ready(0.1), 300.0)
            if interval:
                until_protected(scene)
            client.until_answers(20, 60.0)
            begun, before = time.monotonic(), client.status()["pages"]
            time.sleep(seconds)
            told = client.until_answers(1, 60.0)
            return float((told["pages"] - before) / (time.monotonic() - begun))


def disk_rates(interval: str | None, folder: Path) -> dict[str, list[float]]:
    """MiB/s of each of `DD`, several times, by the clock of the host."""
    options: dict[str, Any] = {"interval": interval or "50ms", "memory": "96M"}

    def drive(where: Path) -> list[str]:
        with open(where / "disk.raw", "wb") as disk:
            for _ in range(DISK_MIB):
                disk.write(bytes(1 << 20))  # no holes: plain and protected alike
        return ["-drive", f"file={where / 'disk.raw'},if=virtio,format=raw,cache.no-flush=on"]

    found: dict[str, list[float]] = {name: [] for name, _, _ in DD}
    with scene_of(folder, more=drive, **options) as scene:
        (scene.run if interval else scene.run_plain)(scene.lan.a)
        console = scene.folder / "console"

        def said() -> list[str]:
            """Its whole lines."""
            return console.read_text(errors="replace").rpartition("\n")[0].splitlines()

        scene.until("the guest works", lambda: console.exists() and "begin" in console.read_text(), 300.0)
        if interval:
            until_protected(scene)
        seen, at = len(said()), 0.0
        while any(len(rates) < ROUNDS for rates in found.values()):
            time.sleep(0.001)
            lines = said()
            for line in lines[seen:]:
                name = re.sub(r"^(begin|end) ", "", line)
                if line.startswith("begin "):
                    at = time.monotonic()
                elif line.startswith("end ") and at:
                    found[name].append(dict((one[0], one[2]) for one in DD)[name] / (time.monotonic() - at))
                    at = 0.0
            seen = len(lines)
        if interval and (copies := scene.status(scene.lan.b)["primary"]["disk_copies"]) != 1:
            raise SystemExit(f"the disk was copied {copies} times: its mirror was lost")
    return found


def build_disk_guest(folder: Path) -> Path:
    """A guest that runs `DD` again and again, and says so. Returns the folder."""
    guest.get_kernel(folder)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["apt-get", "-q", "download", "busybox-static"], check=True, cwd=scratch, capture_output=True)
        (package,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, scratch], check=True)
        busybox = Path(scratch, "bin/busybox").read_bytes()
    work = "\n".join(f'echo "begin {name}"; /busybox {words} 2>/dev/null; echo "end {name}"' for name, words, _ in DD)
    modules = folder / "modules"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in modules.glob("*.ko")}
    files["modules/order"] = "".join(f"{name}.ko\n" for name in guest.in_order(modules)).encode()
    files |= {"init": INIT.replace("WORK", work).encode(), "busybox": busybox}
    (folder / "initramfs").write_bytes(guest.archive(files))
    return folder


def takeover(interval: str) -> dict[str, float]:
    """ms from the order until the guest runs, as the backup says, and until its client has an answer."""
    with scene_of(guest.build(guest.cache()), interval=interval, lease="600s", memory="96M") as scene:
        scene.run(scene.lan.a)
        with closing(Client(scene.lan.client.inside())) as client:
            scene.until("the guest answers", lambda: client.is_ready(0.1), 300.0)
            until_protected(scene)
            client.until_answers(50, 60.0)
            scene.lan.a.kill()
            time.sleep(0.1)
            before = client.status()["answers"]
            address = Address.parse(f"unix:{scene.folder / 'b'}.sock")
            begun = time.monotonic()
            ask(connect(address), "failover", {"name": NAME}, timeout_s=60.0)
            while client.status()["answers"] == before and time.monotonic() < begun + 60:
                time.sleep(0.001)
            answered_s = time.monotonic() - begun
            log = (scene.folder / "backup-b.log").read_text()
            took = [float(found) for found in re.findall(r'"took": "([\d.]+) ms"', log)]
            return {"runs_ms": took[-1], "answers_ms": answered_s * 1e3}


def table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|---|" + "---:|" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)
    print(flush=True)


def run(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    what = arguments.what or WHAT
    if "pauses" in what:
        some = [
            pauses(memory, arguments.pages, arguments.interval, arguments.seconds)
            for memory in arguments.memory or ["128M", "1G"]
        ]
        found["pauses"] = some
        rows = []
        for one in some:
            steps = [f"{(one.get(f'{step}_ms') or {}).get('p50', 0.0):.2f}" for step in STEPS]
            ends = [f"{one[field][part]:.2f}" for field in ("pause_ms", "commit_latency_ms") for part in ("p50", "p99")]
            dirty = f"{one['dirty_pages_total'] / one['checkpoints']:.0f}"
            rows.append([one["memory"], dirty, *ends[:2], *steps, *ends[2:]])
        table(["memory", "dirty pages", "pause p50", "p99", *STEPS, "commit p50", "p99"], rows)
    if "slowdown" in what:
        rates = {interval or "none": pages_a_second(interval, arguments.seconds) for interval in (None, *INTERVALS)}
        found["slowdown"] = rates
        rows = [[name, f"{rate:,.0f}", f"{1 - rate / rates['none']:.1%}"] for name, rate in rates.items()]
        table(["protection, interval", "pages/s", "slower by"], rows)
    if "disk" in what:
        with tempfile.TemporaryDirectory() as folder:
            files = build_disk_guest(Path(folder))
            plain, ours = disk_rates(None, files), disk_rates(arguments.interval, files)
        found["disk"] = {"plain": plain, "protected": ours}
        rows = []
        for name, _, _ in DD:
            before, now = statistics.median(plain[name]), statistics.median(ours[name])
            rows.append([name, f"{before:.0f}", f"{now:.0f}", f"{now / before:.2f}"])
        table(["dd", "plain, MiB/s", "protected, MiB/s", "ratio"], rows)
    if "takeover" in what:
        times = [takeover(arguments.interval) for _ in range(ROUNDS)]
        found["takeover"] = times
        rows = []
        for name, key in (("guest runs", "runs_ms"), ("client has an answer", "answers_ms")):
            some_ms = [one[key] for one in times]
            rows.append([name, f"{statistics.median(some_ms):.1f}", f"{max(some_ms):.1f}"])
        table([f"ms after the order, {ROUNDS} times", "median", "max"], rows)


def plot(found: dict[str, Any], path: Path) -> None:
    """Where pauses go, and how much slower the guest is."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "bench"})
    with ExitStack() as stack:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
        stack.callback(plt.close, figure)
        ends = [0.0] * len(found.get("pauses", ()))
        for step in STEPS:
            lengths = [(one.get(f"{step}_ms") or {}).get("p50", 0.0) for one in found.get("pauses", ())]
            left.barh([one["memory"] for one in found.get("pauses", ())], lengths, left=ends, label=step)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        left.set(title="Pause, medians of its steps", xlabel="ms")
        left.legend(fontsize=7, frameon=False, ncols=2)
        rates = found.get("slowdown", {})
        names = [name for name in rates if name != "none"]
        right.bar(names, [100 * (1 - rates[name] / rates["none"]) for name in names], color="#1b6ca8")
        right.set(title="Guest slower by", xlabel="interval", ylabel="percent")
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="*", choices=[*WHAT, []], help=f"{', '.join(WHAT)}; default: all")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--memory", action="append")
    parser.add_argument("--pages", type=int, default=500)
    parser.add_argument("--interval", default="100ms")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw it (needs the extra `bench`)")
    arguments = parser.parse_args()
    if lacks := missing():
        parser.error("; ".join(lacks))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # take apart what was set up
    found: dict[str, Any] = {}
    run(arguments, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.plot:
        plot(found, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
