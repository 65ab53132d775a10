"""Kills around a protected virtual machine at random instants, and a client that checks every byte throughout.

    sudo python tools/vm_kills.py --kills 60 [--seed 1] [--json FILE]
    sudo PATH=DIR:$PATH python tools/vm_kills.py …    # with the QEMU that is in this folder
    python tools/vm_kills.py --table FILE …            # of the rows in these files, without a run
    sudo python tools/vm_kills.py --control output     # output is not held
    sudo python tools/vm_kills.py --control disk       # what the guest writes to its disk is not held
    sudo python tools/vm_kills.py --control apart      # memory and disk are committed apart

Two hosts, which are network namespaces with addresses of their own, have a backup each; the guest runs on one and is
protected by the other, goes on there when its host dies, and is protected again, and so on. One client keeps one TCP
connection through all of it. The guest writes numbered blocks to a disk, and compares what it reads there with its
memory. With a control, whatever is killed must be noticed by the client or by the guest, every time.

What is killed, by SIGKILL: everything on the guest's host; QEMU alone; the service that protects the guest; the
bridge; the disk server; the backup; the QEMU that waits; and the guest's host is cut off, for longer or shorter than
the lease. All come at a random instant, and half of them then wait for a step of the primary or of the backup; those
that wait for the loss of a mirror, or for its copy, kill the disk server first. A backup that is killed has waited
for a step of its own. Each process writes its step into a small file that is mapped into memory, so that it tells
where the process was when it died; it stays for 20 ms in the step that a kill waits for. So that backups compact and
prune while they are watched, they do so after a few dozen checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np

from remus_ckpt.demo import guest
from remus_ckpt.demo.lan import Host
from remus_ckpt.demo.vm import NAME, Client, Scene, missing, protects
from remus_ckpt.errors import RemusError

PRIMARY = (
    *("between", "stop", "drain", "find", "copy", "encode", "state", "resume", "send", "commit", "first copy"),
    *("mirror lost", "mirror copy"),
)
"""Steps of the primary. send: what the pause took is sent; commit: its end is sent, and waits for room in the window;
between: all is sent, and perhaps not committed; first copy: of memory; mirror lost, copy: of the disk."""
BACKUP = (
    "idle",
    "receiving",
    "staged",
    "stored",
    "applying",
    "applied",
    "acknowledged",
    "compacted",
    "pruning",
)
COMPACTING = "compacting"
"""Beside any step of the backup: a thread writes a new segment."""
KINDS = {
    "host": 10,
    "qemu": 4,
    "primary": 5,
    "cut": 3,
    "short cut": 2,
    "bridge": 3,
    "disk server": 3,
    "backup": 6,
    "standby": 2,
    "standby, host": 2,
}
"""What is killed, and how often of forty times."""
AIMS = (
    *(("primary", step) for step in PRIMARY if step not in ("between", "first copy")),
    *(("backup", step) for step in (*BACKUP[1:], COMPACTING)),
)
"""What kills wait for, in turn."""
BACKUP_AIMS = tuple(aim for aim in AIMS if aim[0] == "backup")
COMPACT_CHECKPOINTS = 60
KEPT = 80
"""Checkpoints; what is older is pruned with the next compaction."""
UNPROTECTED = ("first copy", "mirror copy")
"""Steps before a survivor is protected again: only what protects it can be killed then."""
DISK_BYTES = 4 << 20
BLOCK = 4096
BLOCKS = 128
READ_BACK = 3 * BLOCKS
"""Writes, each with a read, after which each block has most likely been looked at."""
CONTROLS = ("output", "disk", "apart")
SETTINGS = (
    {"vcpus": 1, "pages": 1000, "has_tls": True},
    {"vcpus": 2, "pages": 20_000, "has_tls": True},
    {"vcpus": 2, "pages": 1000, "has_tls": False},
    {"vcpus": 1, "pages": 20_000, "has_tls": False},
)
"""pages: that the guest writes a second."""
MORE_ANSWERS = 100
PATIENCE_S = 120.0
STALL_S = 40.0
"""Without held output the connection stands still for good, and nothing is gained by waiting for it longer."""
LOOK_S = 0.1
AIM_S = 2.0
DWELL_S = 0.02
"""How long a process stays in the step that a kill waits for: some last microseconds."""
EARLY_S = 20.0
SHORT_CUT_S = 0.1, 0.4
DROPPED_S = 0.3
"""Less than a lease, more than the backup takes to bring its image to the last commit."""

TRACER = '''
"""Writes down where a process is. Loaded by Python as it starts, in whatever the tool starts."""
import os
import sys

words, folder = sys.orig_argv, os.environ.get("REMUS_KILLS")
role = next((one for one in ("backup", "run", "protect") if one in words[3:4]), "")
if folder and role and words[1:3] == ["-m", "remus_ckpt"]:
    import mmap
    import time

    path = f"{folder}/{os.environ['REMUS_KILLS_HOST']}.{'backup' if role == 'backup' else 'primary'}"
    with open(path, "wb") as file:
        file.write(bytes(3))
    with open(path, "r+b") as file:
        place = mmap.mmap(file.fileno(), 3)

    def note(steps, step):
        if step in steps:
            place[0] = steps.index(step)
            if place[2] == place[0] + 1:
                time.sleep(DWELL_S)

    if role == "backup":
        from remus_ckpt.service import backup

        init = backup.Backup.__init__
        backup.Backup.__init__ = lambda self, *a, **k: init(self, *a, **k, on_phase=lambda s, _: note(BACKUP, s))
        from remus_ckpt.store.compaction import Compaction
        from remus_ckpt.store.writer import HistoryWriter

        HistoryWriter.__init__.__kwdefaults__["compact_checkpoints"] = COMPACT_CHECKPOINTS
        compact = Compaction._run

        def noting_compact(self):
            place[1] = 1
            try:
                compact(self)
            finally:
                place[1] = 0

        Compaction._run = noting_compact
        control = os.environ.get("REMUS_KILLS_CONTROL")
        if control in ("disk", "apart"):
            import shutil

            from remus_ckpt.vm.disk_image import DiskImages

            hand_over, follow, late = DiskImages.hand_over, DiskImages._follow, {}

            def with_the_own_disk(self, disks):
                with open(os.environ["REMUS_KILLS_DISK"], "rb") as own, open(self._path(disks[0]), "r+b") as image:
                    shutil.copyfileobj(own, image)
                hand_over(self, disks)

            def one_behind(self, disk, log):
                before, late[disk.ident] = late.get(disk.ident, b""), log
                follow(self, disk, before)

            if control == "disk":
                DiskImages.hand_over = with_the_own_disk
            else:
                DiskImages._follow = one_behind
    else:
        from contextlib import contextmanager

        from remus_ckpt.loop import CheckpointLoop
        from remus_ckpt.pause import Pause
        from remus_ckpt.service.primary import Primary

        timed, give_back, commit = Pause.timed, Pause.give_back, Primary.commit
        copy_live = CheckpointLoop._copy_live

        @contextmanager
        def noting_timed(self, step):
            note(PRIMARY, step)
            with timed(self, step):
                yield

        def noting_give_back(self):
            if self._is_on:
                note(PRIMARY, "resume")
                give_back(self)
                note(PRIMARY, "send")

        def noting_commit(self, sent):
            note(PRIMARY, "commit")
            commit(self, sent)
            note(PRIMARY, "between")

        def noting_copy(self):
            note(PRIMARY, "first copy")
            return copy_live(self)

        Pause.timed, Pause.give_back, Primary.commit = noting_timed, noting_give_back, noting_commit
        CheckpointLoop._copy_live = noting_copy
        from remus_ckpt.errors import VmError
        from remus_ckpt.service.guest_disks import GuestDisks

        check, copy_disk = GuestDisks.check, GuestDisks._copy

        def noting_check(self):
            try:
                check(self)
            except VmError:
                note(PRIMARY, "mirror lost")
                raise

        def noting_copy_disk(self, *arguments):
            note(PRIMARY, "mirror copy")
            copy_disk(self, *arguments)

        GuestDisks.check, GuestDisks._copy = noting_check, noting_copy_disk
        if os.environ.get("REMUS_KILLS_CONTROL") == "output":
            from remus_ckpt.vm.network import GuestNetwork

            drain = GuestNetwork.drain

            def letting_pass(self, epoch):
                drain(self, epoch)
                self._bridge.let_pass()

            GuestNetwork.drain = letting_pass
'''


class Traced(Scene):
    """A scene whose processes write down where they are."""

    def __init__(self, folder: Path, image: Path, *, control: str | None, **options: Any) -> None:
        self._control = control
        self.disk = folder / "web.raw"
        self.disk.write_bytes(bytes(DISK_BYTES))
        self._tracer = folder / "tracer"
        self._tracer.mkdir()
        steps = f"\nPRIMARY = {PRIMARY!r}\nBACKUP = {BACKUP!r}\nCOMPACT_CHECKPOINTS = {COMPACT_CHECKPOINTS}\n"
        steps += f"DWELL_S = {DWELL_S}\n"
        (self._tracer / "sitecustomize.py").write_text(steps + TRACER)
        super().__init__(folder, image, **options)

    def environment(self, host: Host) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(self._tracer), os.environ.get("PYTHONPATH"))))
        found = {"REMUS_KILLS": str(self._tracer), "REMUS_KILLS_HOST": self.letters[host], "PYTHONPATH": path}
        return found | {"REMUS_KILLS_CONTROL": self._control or "", "REMUS_KILLS_DISK": str(self.disk)}

    def run_words(self, host: Host) -> list[str]:
        return [*super().run_words(host), "-drive", f"file={self.disk},if=virtio,format=raw"]

    def backup_words(self, host: Host) -> list[str]:
        return [*super().backup_words(host), "--keep-count", str(KEPT)]

    def image(self, host: Host, *, has_run: bool) -> Path | None:
        """The newest image of the guest's disk in a host's store: one that it has run on, or one that it has not."""
        images = list((self.folder / f"store-{self.letters[host]}" / ".disks" / NAME).glob("*.raw"))
        found = [path for path in images if Path(f"{path}.ran").exists() == has_run]
        return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)

    def steps(self, host: Host, role: str) -> list[str]:
        """Where a process is, or was when it died; two of a backup that compacts meanwhile."""
        with suppress(OSError, ValueError):
            number, compacts, _ = (self._tracer / f"{self.letters[host]}.{role}").read_bytes()
            return [(PRIMARY if role == "primary" else BACKUP)[number], *[COMPACTING] * compacts]
        return ["not there"]

    def dwell(self, host: Host, role: str, step: str) -> None:
        """Have a process stay for a moment in this step, so that a kill can hit it there; "" for none."""
        steps = PRIMARY if role == "primary" else BACKUP
        with suppress(FileNotFoundError), open(self._tracer / f"{self.letters[host]}.{role}", "r+b") as file:
            file.seek(2)
            file.write(bytes([steps.index(step) + 1 if step in steps else 0]))


def newest_write(disk: Path) -> int:
    """The number of the newest block on a disk of the guest, which counts its writes."""
    with suppress(FileNotFoundError):  # another copy has taken its place
        data = np.fromfile(disk, np.uint8, BLOCKS * BLOCK).reshape(-1, BLOCK)
        return int(data[:, 8:16].copy().view("<u8").max(initial=0))
    return 0


class Run:
    """One guest, and all the kills around it with one setting."""

    def __init__(self, scene: Traced, client: Client, dice: random.Random, stall_s: float) -> None:
        self.scene = scene
        self.stall_s = stall_s
        """How long the client may hear nothing after a kill."""
        self.client = client
        self.dice = dice
        self.here, self.there = scene.lan.a, scene.lan.b
        self.own = scene.disk
        """The disk that the guest writes to."""
        self.rows: list[dict[str, Any]] = []
        self.is_unprotected = False
        """The guest has just gone on, and nobody has seen it protected again."""
        self.unasked = 0
        """Failovers that no kill has caused: on a machine that is too busy a lease may end."""

    def is_protected(self) -> bool:
        """Whether a kill may come: the guest's output waits for commits, and a QEMU waits for the guest."""
        found = self.scene.status(self.there)
        if found.get("vm") == "running":
            self.unasked += 1
            self._go_along()
            return False
        primary = found.get("primary") or {}
        if protects(found) and not primary.get("copy_pass") and not primary.get("disk_trouble"):
            return True
        time.sleep(LOOK_S)  # each look takes time of the backup's
        return False

    def _has_moved(self) -> bool:
        return bool(self.scene.status(self.there).get("vm") == "running")

    def _go_along(self) -> None:
        """The guest runs on the other host: what is left of the first is ended, and it is started again."""
        self.here.kill()
        self.here.mend()
        self.here, self.there = self.there, self.here
        self.own = self.scene.image(self.here, has_run=True) or self.own
        self.is_unprotected = True
        self.scene.backup(self.there)

    def one(self, kind: str, aim: tuple[str, str] | None) -> dict[str, Any]:
        """One kill, and what comes of it. aim: whose step it waits for, and which"""
        scene = self.scene
        is_early = self.is_unprotected and kind in ("primary", "backup") and self.dice.random() < 0.5
        """Whether it comes before the survivor is protected again."""
        waited_s = 0.0
        if is_early:
            aim = ("primary", self.dice.choice(UNPROTECTED))
        else:
            waited_s = scene.until("the guest is protected", self.is_protected, PATIENCE_S)
            self.is_unprotected = False
        told = self.client.until_answers(1 if is_early else MORE_ANSWERS, PATIENCE_S)
        before = told["answers"]
        if not is_early:
            self.client.status()
            time.sleep(self.dice.uniform(0.0, 1.0))
            if aim is not None and aim[1].startswith("mirror"):
                self._kill(scene.find(self.here, "disk server"))
        victims = self._victims(kind)  # now: to look for them takes longer than a step
        deadline = time.monotonic() + (EARLY_S if is_early else AIM_S)
        role, step = aim or ("", "")
        place = self.here if role == "primary" else self.there
        if aim is not None:
            scene.dwell(place, role, step)
            while step not in scene.steps(place, role) and time.monotonic() < deadline:
                time.sleep(0.0001)
        if is_early:
            victims = self._victims(kind)  # it has just been started
        at_backup = scene.steps(self.there, "backup")
        if "cut" in kind:
            self.here.cut()
        self._kill(victims)
        scene.dwell(place, role, "")
        begun = time.monotonic()
        row: dict[str, Any] = {"kind": kind, "aim": aim and " ".join(aim), "backup": at_backup, "is_early": is_early}
        row["primary"] = scene.steps(self.here, "primary")
        if kind == "backup":
            row["backup"] = scene.steps(self.there, "backup")
            time.sleep(0.2)
            scene.backup(self.there)
        if kind.endswith("host"):
            self.here.kill()
        if kind == "short cut":
            time.sleep(self.dice.uniform(*SHORT_CUT_S))
            self.here.mend()
        row["dropped"] = self._dropped_writes() if kind in ("host", "qemu", "primary", "standby, host") else None
        told = self.client.until_answers(MORE_ANSWERS, self.stall_s)
        silence_s, blocks = told["silence_s"], told["blocks"]
        row["has_moved"] = self._has_moved()
        is_stalled = told["answers"] < before + MORE_ANSWERS
        if row["has_moved"] and not is_stalled:
            until = time.monotonic() + PATIENCE_S
            while not (told["wrong"] or told["faults"]) and told["blocks"] < blocks + READ_BACK:
                told = self.client.until_answers(1, PATIENCE_S)
                if time.monotonic() > until:
                    told["wrong"] = f"only {told['blocks'] - blocks} blocks were written in {PATIENCE_S:g} s"
        row["silence_s"], row["seconds"], row["waited_s"] = silence_s, time.monotonic() - begun, waited_s
        row["wrong"] = told["wrong"] or (f"{told['faults']} faults in the guest" if told["faults"] else None)
        if not row["wrong"] and is_stalled:
            row["wrong"] = f"only {told['answers'] - before} answers in {self.stall_s:g} s"
        row["unasked"], self.unasked = self.unasked, 0
        if row["has_moved"]:
            self._go_along()
        else:
            row["dropped"] = None
        self.rows.append(row)
        return row

    @staticmethod
    def _kill(pids: Sequence[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _dropped_writes(self) -> int | None:
        """How many writes of the guest, which is dead, will not be on its disk when it goes on; None if it has already
        gone on."""
        deadline = time.monotonic() + DROPPED_S
        while time.monotonic() < deadline:
            image = self.scene.image(self.there, has_run=False)
            found = None if image is None else newest_write(self.own) - newest_write(image)
            if image is None or Path(f"{image}.ran").exists():
                return None
            time.sleep(0.02)
        return found

    def _victims(self, kind: str) -> list[int]:
        find, here, there = self.scene.find, self.here, self.there
        victims: dict[str, Callable[[], list[int]]] = {
            "host": lambda: [*find(here, "primary"), *find(here, "qemu"), *find(here, "bridge")],
            "qemu": lambda: find(here, "qemu"),
            "primary": lambda: find(here, "primary"),
            "bridge": lambda: find(here, "bridge"),
            "disk server": lambda: find(here, "disk server"),
            "backup": lambda: find(there, "backup"),
            "standby": lambda: find(there, "qemu"),
            "standby, host": lambda: [*find(there, "qemu"), *find(here, "primary"), *find(here, "qemu")],
            "cut": lambda: [],
            "short cut": lambda: [],
        }
        return victims[kind]()


def run_setting(
    setting: dict[str, Any],
    kills: Sequence[tuple[str, tuple[str, str] | None]],
    dice: random.Random,
    image: Path,
    *,
    interval: str,
    lease: str,
    control: str | None = None,
    logs: Path | None = None,
) -> list[dict[str, Any]]:
    """These kills, with one guest, one client and one connection. Stops at the first that went wrong.

    logs: where the logs of a run that went wrong are put
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-kills-", dir="/dev/shm")))
        append = f"guest.pages={setting['pages']} guest.mib=16 guest.blocks={BLOCKS} guest.pause_us=1000"
        options = {"vcpus": setting["vcpus"], "has_tls": setting["has_tls"], "memory": "96M", "lease": lease}
        scene = Traced(folder, image, control=control, interval=interval, append=append, **options)
        stack.callback(scene.close)
        scene.backup(scene.lan.b)
        scene.backup(scene.lan.a)
        scene.run(scene.lan.a)
        client = stack.enter_context(closing(Client(scene.lan.client.inside(), seed=dice.getrandbits(16))))
        scene.until("the guest answers", lambda: client.is_ready(0.1), 300.0)
        run = Run(scene, client, dice, STALL_S if control else PATIENCE_S)
        qemu = {"qemu": version()}
        for kind, aim in kills:
            try:
                row = run.one(kind, aim)
            except RemusError as error:
                row = {"kind": kind, "primary": ["?"], "backup": ["?"], "has_moved": False, "wrong": str(error)}
                run.rows.append(row)
            print(json.dumps(qemu | setting | row), file=sys.stderr, flush=True)
            if row["wrong"]:
                if logs is not None:
                    kept = Path(tempfile.mkdtemp(prefix="wrong-", dir=logs))
                    for path in folder.glob("*.log"):
                        shutil.copy(path, kept)
                break
        else:
            told = client.end()
            if told["wrong"] or told["faults"]:
                run.rows[-1]["wrong"] = f"at the end: {told['wrong'] or told['faults']}"
    return [qemu | setting | row for row in run.rows]


def version() -> str:
    """Of the QEMU that runs here."""
    said = subprocess.run(["qemu-system-x86_64", "--version"], check=True, capture_output=True, text=True).stdout
    return said.split()[3]


def table(rows: list[dict[str, Any]]) -> str:
    """The account, in Markdown."""
    lines = [
        "| QEMU | vCPUs | pages/s | link | kills | went on elsewhere | stream exact | silence, median | max |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for qemu, setting in product(sorted({row["qemu"] for row in rows}), SETTINGS):
        some = [row for row in rows if row["qemu"] == qemu and setting.items() <= row.items()]
        if not some:
            continue
        silences = [row["silence_s"] for row in some if row.get("has_moved")] or [float("nan")]
        link = "TLS" if setting["has_tls"] else "TCP"
        lines.append(
            f"| {qemu} | {setting['vcpus']} | {setting['pages']:,} | {link} | {len(some)} | "
            f"{sum(row['has_moved'] for row in some)} | {sum(not row['wrong'] for row in some)} | "
            f"{statistics.median(silences):.2f} s | {max(silences):.2f} s |"
        )
    lines += [
        "",
        "| killed | times | went on elsewhere | stream exact | silence, median |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind in KINDS:
        some = [row for row in rows if row["kind"] == kind]
        if some:
            silences = [row["silence_s"] for row in some if "silence_s" in row] or [float("nan")]
            lines.append(
                f"| {kind} | {len(some)} | {sum(row['has_moved'] for row in some)} | "
                f"{sum(not row['wrong'] for row in some)} | {statistics.median(silences):.2f} s |"
            )
    lines += ["", f"failovers that no kill has caused: {sum(row.get('unasked', 0) for row in rows)}"]
    dropped = [row["dropped"] for row in rows if row.get("dropped") is not None]
    lines += [
        f"writes to the disk that were dropped: {sum(dropped):,} in {sum(map(bool, dropped))} of the {len(dropped)} "
        "failovers in which they were counted",
    ]
    killed = [row for row in rows if row["kind"] == "backup"]
    for role, who, steps, some in (
        ("primary", "the primary", PRIMARY, rows),
        ("backup", "the backup", (*BACKUP, COMPACTING), rows),
        ("backup", "a backup that was killed", (*BACKUP, COMPACTING), killed),
    ):
        counts = dict.fromkeys(steps, 0) | Counter(step for row in some for step in row[role])
        said = ", ".join(f"{step} {count}" for step, count in sorted(counts.items(), key=lambda one: -one[1]))
        lines += ["", f"{who} was in: {said}"]
    return "\n".join(lines)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--interval", default="25ms")
    parser.add_argument("--lease", default="1s", help="of the backups: longer where the machine is busy")
    parser.add_argument("--control", choices=CONTROLS, help="leave out what must be noticed, at every kill")
    parser.add_argument("--json", type=Path, help="write all rows into this file")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="put the logs of what went wrong there")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="only tell of the rows in these files")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([row for path in arguments.table for row in json.loads(path.read_text())]))
        return 0
    if lacks := missing():
        parser.error("; ".join(lacks))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # take apart what was set up
    image = guest.build(guest.cache())
    seed = random.SystemRandom().getrandbits(32) if arguments.seed is None else arguments.seed
    dice = random.Random(seed)
    print(f"seed {seed}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    options = {
        "interval": arguments.interval,
        "lease": arguments.lease,
        "control": arguments.control,
        "logs": arguments.logs,
    }
    if arguments.control:
        for number in range(arguments.kills):
            rows += run_setting(SETTINGS[number % len(SETTINGS)], [("host", None)], dice, image, **options)
        caught = sum(bool(row["wrong"]) for row in rows)
        print(f"control {arguments.control}: {caught} of {len(rows)} kills were noticed")
        return int(caught < len(rows))
    kinds = [kind for kind, share in KINDS.items() for _ in range(-(-share * arguments.kills // sum(KINDS.values())))]
    dice.shuffle(kinds)
    aims, at_backup = (cycle(dice.sample(some, len(some))) for some in (AIMS, BACKUP_AIMS))
    kills = [
        (kind, next(at_backup) if kind == "backup" else next(aims) if number % 2 else None)
        for number, kind in enumerate(kinds[: arguments.kills])
    ]
    for number, setting in enumerate(SETTINGS):
        some = kills[number * len(kills) // len(SETTINGS) : (number + 1) * len(kills) // len(SETTINGS)]
        while some:
            done = run_setting(setting, some, dice, image, **options)
            rows += done
            some = some[len(done) :]
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
