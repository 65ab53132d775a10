"""The demo protects a real worker over TLS, kills its side, lets the backup take over, and checks each claim.

Three processes: the worker, its primary, and a backup. The backup's takeover command starts a fourth, another worker
that continues from the memory that the backup held.
"""

from __future__ import annotations

import hashlib
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from remus_ckpt.demo import ledger as worker
from remus_ckpt.demo import primary
from remus_ckpt.demo.ledger import Ledger
from remus_ckpt.errors import RemusError
from remus_ckpt.files import read_checkpoints
from remus_ckpt.pages import PAGE_SIZE
from remus_ckpt.plural import counted
from remus_ckpt.service import keys
from remus_ckpt.store import Store

_CONTINUE_TRANSFERS = 1000
_LEASE = "1s"
_PATIENCE_S = 30.0


def run_demo(
    *,
    seconds: float,
    interval_s: float,
    directory: Path | None,
    seed: int | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run it.

    seconds: about how long the worker runs before it is killed
    directory: where to keep the store; by default it is removed
    say: called with each line of the account
    Returns the account's figures. Raises RemusError if a claim does not hold.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="remus-demo-") as temporary, ExitStack() as stack:
        where = directory or Path(temporary)
        where.mkdir(parents=True, exist_ok=True)
        shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
        memory_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-demo-", dir=shared)))
        memory = memory_folder / "ledger"
        blank = bytearray(worker.BYTES)
        Ledger(blank).create(rng.getrandbits(32))
        memory.write_bytes(blank)
        scene = _Scene(Path(temporary), where / "store", memory_folder)
        address = stack.enter_context(scene.backup())
        say(f"backup: remus-ckpt backup --listen {address}, with mutual TLS, a lease of {_LEASE} and a fence")
        report = _protect_and_kill(scene, memory, address, seconds, interval_s, rng, say)
        report |= _await_takeover(scene, stack, say)
        report |= prove(scene.store, report.pop("witness"), report["committed"], say)
        report |= _check_survivor(scene, say)
    if directory is not None:
        say(f"kept: {where / 'store'} (remus-ckpt list store:{where / 'store'})")
        report["store"] = str(where / "store")
    return report


class _Scene:
    """Where the files are.

    folder: keys, and the process ids that the fence and the takeover use
    log: what the backup says, once it is running
    """

    def __init__(self, folder: Path, store: Path, memory_folder: Path) -> None:
        self.store = store
        self.fenced = folder / "primary-side.pids"
        self.survivor = folder / "survivor.pid"
        self.image: Path | None = None
        self.log: _Lines | None = None
        self._memory_folder = memory_folder
        keys.init(folder / "keys")
        for name in ("backup", "primary"):
            keys.issue(folder / "keys", name, hosts=["127.0.0.1"])
        self.keys = folder / "keys"

    @contextmanager
    def backup(self) -> Iterator[str]:
        """A backup as a user would start it; yields its address."""
        # In a machine room the fence cuts the power. Here it kills those two, which may be dead already.
        fence = f"kill -9 $(cat {shlex.quote(str(self.fenced))}) 2>/dev/null; true"
        start = f'{shlex.quote(sys.executable)} {shlex.quote(worker.__file__)} "$REMUS_IMAGE" >/dev/null'
        number = shlex.quote(str(self.survivor))
        takeover = f'{start} & echo $! "$REMUS_IMAGE" > {number}.new && mv {number}.new {number}'
        command = [sys.executable, "-m", "remus_ckpt", "backup", "--listen", "tls://127.0.0.1:0"]
        command += ["--store", str(self.store), "--tls-dir", str(self.keys / "backup"), "--lease", _LEASE]
        command += ["--warm", str(self._memory_folder / "warm"), "--auto-failover", "--fence", fence]
        command += ["--on-failover", takeover]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        self.log = log = _Lines(process.stderr)
        try:
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                raise RemusError(f"the backup did not start: {' / '.join(log.lines[-3:])}")
            yield line.removeprefix("listening on ").strip()
        finally:
            process.terminate()
            process.wait()
            log.close()
            process.stdout.close()


class _Lines:
    """Reads what a process prints, so that the process never waits for a reader."""

    def __init__(self, stream: Any) -> None:
        self.lines: list[str] = []
        self._stream = stream
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        self.lines.extend(line.rstrip("\n") for line in self._stream)

    def close(self) -> None:
        """Everything that it printed is in `lines`."""
        self._thread.join()
        self._stream.close()


def _protect_and_kill(
    scene: _Scene,
    memory: Path,
    address: str,
    seconds: float,
    interval_s: float,
    rng: random.Random,
    say: Callable[[str], None],
) -> dict[str, Any]:
    with subprocess.Popen([sys.executable, worker.__file__, str(memory)], stdout=subprocess.PIPE) as work:
        try:
            assert work.stdout is not None
            if work.stdout.readline() != b"ready\n":
                raise RemusError("the demo's worker did not start")
            say(f"worker {work.pid} makes transfers in {counted(worker.BYTES // PAGE_SIZE, 'page')} of shared memory")
            arguments = [memory, work.pid, address, scene.keys / "primary", interval_s]
            protect = subprocess.Popen(
                [sys.executable, primary.__file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True
            )
            said = _Lines(protect.stdout)
            try:
                scene.fenced.write_text(f"{work.pid} {protect.pid}\n")
                deadline = time.monotonic() + _PATIENCE_S
                while not any(line.startswith("committed ") for line in said.lines):
                    if time.monotonic() > deadline or protect.poll() is not None:
                        raise RemusError("the primary committed nothing")
                    time.sleep(0.01)
                after_s = seconds * rng.uniform(0.8, 1.2)
                time.sleep(after_s)
            finally:
                protect.send_signal(signal.SIGKILL)
                work.send_signal(signal.SIGKILL)
                protect.wait()
                said.close()
        finally:
            work.kill()
    witness, committed = {}, -1
    # The last line may have been cut off by the kill.
    for words in (line.split() for line in said.lines):
        if words[0] == "paused" and len(words) == 3 and len(words[2]) == 64:
            witness[int(words[1])] = words[2]
        elif words[0] == "committed":
            committed = max(committed, int(words[1]))
    say(
        f"killed worker and primary with SIGKILL after {after_s:.3f} s: {counted(len(witness), 'checkpoint')} taken, "
        f"the last one acknowledged is {committed}"
    )
    return {"witness": witness, "checkpoints": len(witness), "committed": committed, "killed_at": time.monotonic()}


def _await_takeover(scene: _Scene, stack: ExitStack, say: Callable[[str], None]) -> dict[str, Any]:
    begin = time.monotonic()
    while not scene.survivor.exists():
        if time.monotonic() - begin > _PATIENCE_S:
            said = scene.log.lines[-3:] if scene.log is not None else []
            raise RemusError(f"the backup did not take over within {_PATIENCE_S:g} s: {' / '.join(said)}")
        time.sleep(0.01)
    pid, image = scene.survivor.read_text().split(" ", 1)
    scene.image = Path(image.rstrip("\n"))
    stack.callback(_kill, int(pid))
    seconds = time.monotonic() - begin
    say(
        f"the lease ran out: the backup fenced the old side and took over after {seconds:.2f} s; worker {pid} "
        "continues there"
    )
    return {"takeover_s": seconds, "survivor": int(pid)}


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def prove(store: Path, witness: dict[int, str], committed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Check the store against what the second reader saw, and the transfers that pauses fell into."""
    found: set[int] = set()
    inside: list[int] = []
    before: list[str] = []
    for segment in sorted((store / primary.NAME / "segments").glob("*.remus")):
        for checkpoint in read_checkpoints(segment):
            epoch = checkpoint.epoch
            digest = hashlib.sha256(checkpoint.memory.reshape(-1)[: worker.BYTES].data).hexdigest()
            if digest != witness.get(epoch):
                raise RemusError(f"checkpoint {epoch} is not what the second reader saw in that pause")
            found.add(epoch)
            if Ledger(checkpoint.memory).in_transfer:
                inside.append(epoch)
                ledger = Ledger(checkpoint.memory.copy())
                before = ledger.faults()
                ledger.recover()
                if after := ledger.faults():
                    raise RemusError(f"checkpoint {epoch} after its intent was replayed: {'; '.join(after)}")
    last = max(found, default=-1)
    if found != set(range(last + 1)) or last < committed:
        raise RemusError(f"checkpoints up to {committed} were acknowledged, and the store holds {sorted(found)}")
    say(f"restored: all {len(found)} checkpoints match the hash that a second reader took of the file during the pause")
    if inside:
        state = "; ".join(before) or "no store of it had been made, or all had"
        say(f"{len(inside)} pauses fell into a transfer, the last in checkpoint {inside[-1]}: {state}")
        say(f"after replaying its intent, all {worker.ACCOUNTS:,} accounts are right")
    else:
        say("no pause fell into a transfer this time")
    return {"proved": len(found), "pauses_in_transfer": len(inside)}


def _check_survivor(scene: _Scene, say: Callable[[str], None]) -> dict[str, Any]:
    """The second worker must have started at the last checkpoint, and must have made no mistake since."""
    checkpoint = Store(scene.store).history(primary.NAME).restore()
    ledger = Ledger(checkpoint.memory)
    replayed = ledger.recover()
    if faults := ledger.faults():
        raise RemusError(f"the restored ledger is wrong: {'; '.join(faults)}")
    restored = ledger.transfers
    say(
        f"the last checkpoint, {checkpoint.epoch}: {restored:,} transfers, "
        f"{'one of them finished from its intent, ' if replayed else ''}all accounts right"
    )
    assert scene.image is not None
    deadline = time.monotonic() + _PATIENCE_S
    while (reached := Ledger(bytearray(scene.image.read_bytes())).transfers) < restored + _CONTINUE_TRANSFERS:
        if time.monotonic() > deadline:
            raise RemusError(f"the worker did not continue: it is at transfer {reached} after {restored}")
        time.sleep(0.02)
    pid = int(scene.survivor.read_text().split()[0])
    _kill(pid)
    deadline = time.monotonic() + _PATIENCE_S
    while Path(f"/proc/{pid}/cwd").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    ledger = Ledger(bytearray(scene.image.read_bytes()))
    ledger.recover()
    if faults := ledger.faults():
        raise RemusError(f"the ledger is wrong after the worker continued: {'; '.join(faults)}")
    say(f"the worker there continued from it to transfer {ledger.transfers:,}: all accounts right")
    return {"restored_transfers": restored, "continued_to": ledger.transfers}
