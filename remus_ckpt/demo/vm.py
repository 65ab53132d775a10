"""The demo of a virtual machine: its host dies, it continues elsewhere, is protected again, and that host dies too.

Everything is real and on one machine: two hosts and a client (lan.py), the commands as users type them, an unpatched
QEMU with a guest (guest/), and a client that checks every byte of the guest's answers (client.py).
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from remus_ckpt.demo import client as client_program
from remus_ckpt.demo import guest
from remus_ckpt.demo.lan import GUEST, Host, Lan
from remus_ckpt.errors import RemusError
from remus_ckpt.link.address import INSECURE_OPTION, Address
from remus_ckpt.link.control import ask
from remus_ckpt.link.dial import connect
from remus_ckpt.service import keys
from remus_ckpt.service.vms import run_directory

NAME = "web"
LEASE = "1s"
PORT = 7411
_MAC = "52:54:00:83:14:01"
_BOOT_S = 180.0
_ANSWER_S = 2.0
_PATIENCE_S = 60.0
_MORE_ANSWERS = 200
_TOOLS = {
    "qemu-system-x86_64": "apt install qemu-system-x86",
    "ip": "apt install iproute2",
    "gcc": "apt install gcc libc6-dev",
}


def missing() -> list[str]:
    """What this machine lacks for the demo, and how to get it."""
    found = [] if os.geteuid() == 0 else ["root, for network namespaces and TAP devices: run it with sudo"]
    found += [f"{tool}: {how}" for tool, how in _TOOLS.items() if shutil.which(tool) is None]
    if not os.path.exists("/dev/net/tun"):
        found.append("/dev/net/tun: modprobe tun")
    return found


class Client:
    """client.py in a separate process, until `close`.

    inside: begins the command line that runs it somewhere else
    """

    def __init__(self, inside: Sequence[str], host: str = GUEST, seed: int = 1) -> None:
        program = [sys.executable, client_program.__file__, host, "7000", str(seed)]
        self._process = subprocess.Popen(
            [*inside, *program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def is_ready(self, timeout_s: float = 0.0) -> bool:
        """Whether it has had an answer; it reports that once. Raises RemusError if it has given up."""
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], timeout_s)[0]:
            return False
        if not (line := out.readline()):
            raise RemusError("the client has had no answer from the guest")
        return line == "ready\n"

    def status(self) -> dict[str, Any]:
        """What it has seen, and what is wrong."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended; its last words say why
            self._process.stdin.write("status\n")
            self._process.stdin.flush()
        return self._told(self._process.stdout.readline())

    def until_answers(self, more: int, timeout_s: float) -> dict[str, Any]:
        """Wait for that many more answers, at most that long. Returns the first status that has them, or the last one;
        its silence is the longest in that time."""
        told = self.status()
        wanted, deadline, silence_s = told["answers"] + more, time.monotonic() + timeout_s, told["silence_s"]
        while told["answers"] < wanted and not told["wrong"] and time.monotonic() < deadline:
            time.sleep(0.02)
            told = self.status()
            silence_s = max(silence_s, told["silence_s"])
        return {**told, "silence_s": silence_s}

    def end(self) -> dict[str, Any]:
        """Let it wait for outstanding answers, and end."""
        return self._told(self._process.communicate()[0])

    def _told(self, line: str) -> dict[str, Any]:
        if not line:
            raise RemusError("the client ended without a report")
        told: dict[str, Any] = json.loads(line)
        return told

    def close(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()


def protects(found: dict[str, Any]) -> bool:
    """Whether the backup with this status of the guest has committed checkpoints and a QEMU ready."""
    return bool(found) and found["health"]["state"] == "protected" and found["vm"] == "waiting"


class Scene:
    """Two hosts with their keys, and the commands on them, until `close`.

    folder: for stores, logs and sockets
    image: the folder of the guest
    append: to the command line of the guest's kernel
    vcpus, memory: of the guest
    interval: minimum time between pauses
    lease: of the backups
    has_tls: whether the hosts talk over TLS, or in plain TCP
    """

    def __init__(
        self,
        folder: Path,
        image: Path,
        *,
        interval: str,
        append: str = "",
        vcpus: int = 1,
        memory: str = "128M",
        lease: str = LEASE,
        has_tls: bool = True,
    ) -> None:
        self.folder = folder
        self._memory = memory
        self._lease = lease
        self._image = image
        self._append = append
        self._vcpus = vcpus
        self._interval = interval
        self._has_tls = has_tls
        self._processes: list[subprocess.Popen[bytes]] = []
        self._scratch = folder / "tmp"  # of processes that will be killed
        self._scratch.mkdir()
        self.lan = Lan()
        self.letters = {self.lan.a: "a", self.lan.b: "b"}
        keys.init(folder / "keys")
        for host, letter in self.letters.items():
            keys.issue(folder / "keys", letter, hosts=[host.address])

    def other(self, host: Host) -> Host:
        """The other host."""
        return self.lan.b if host is self.lan.a else self.lan.a

    def command(self, host: Host, *words: object) -> list[str]:
        """`remus-ckpt` there, as a user would type it."""
        return host.inside(sys.executable, "-m", "remus_ckpt", *words)

    def start(self, host: Host, log: str, words: Sequence[str]) -> subprocess.Popen[bytes]:
        """Start a command on a host. Its log is in the folder."""
        with open(self.folder / f"{log}-{self.letters[host]}.log", "ab") as said:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=os.environ | {"TMPDIR": str(self._scratch)} | self.environment(host),
            )
        self._processes.append(process)
        return process

    def environment(self, host: Host) -> dict[str, str]:
        """Extra environment variables for what runs on a host."""
        return {}

    def _at(self, host: Host, *, listen: bool = False) -> list[str]:
        where = f"{'tls' if self._has_tls else 'tcp'}://{host.address}:{PORT}"
        mine = host if listen else self.other(host)
        security = ["--tls-dir", str(self.folder / "keys" / self.letters[mine])] if self._has_tls else [INSECURE_OPTION]
        return [where, *security]

    def backup_words(self, host: Host) -> list[str]:
        """The command line of a host's backup, which protects its guests on the other host."""
        other, letter = self.other(host), self.letters[host]
        elsewhere = self._at(other)[0]
        return self.command(
            host, "backup", "--listen", *self._at(host, listen=True), "--listen", f"unix:{self.folder / letter}.sock",
            "--store", self.folder / f"store-{letter}", "--warm", self.folder / f"warm-{letter}", "--run-vms",
            "--vm-map", f"{other.tap}={host.tap}", "--lease", self._lease, "--auto-failover", "--fence", other.fence(),
            "--reprotect", elsewhere, "--reprotect-interval", self._interval, "--log-format", "json",
        )  # fmt: skip

    def run_words(self, host: Host) -> list[str]:
        """The command line that runs the guest on a host, protected by the other's backup."""
        image, append = self._image, f"console=ttyS0 quiet panic=-1 no_timer_check mitigations=off {self._append}"
        return self.command(
            host, "run", "--name", NAME, "--to", *self._at(self.other(host)), "--interval", self._interval,
            "--log-format", "json", "--",
            "qemu-system-x86_64", "-nodefaults", "-m", self._memory, "-smp", self._vcpus, "-accel", "tcg",
            "-serial", f"file:{self.folder / 'console'}", "-kernel", image / "kernel", "-initrd", image / "initramfs",
            "-append", append, "-nic", f"tap,ifname={host.tap},model=virtio,mac={_MAC}",
        )  # fmt: skip

    def backup(self, host: Host) -> subprocess.Popen[bytes]:
        """Start a host's backup, and wait until it answers. Raises RemusError."""
        process = self.start(host, "backup", self.backup_words(host))
        self.until("the backup listens", lambda: process.poll() is not None or self.report(host) is not None, _BOOT_S)
        if process.poll() is not None:
            raise RemusError(f"the backup did not start: {self.last_words('backup', host)}")
        return process

    def run(self, host: Host) -> subprocess.Popen[bytes]:
        """Start the guest on a host."""
        return self.start(host, "run", self.run_words(host))

    def report(self, host: Host) -> dict[str, Any] | None:
        """What a host's backup says; None if it does not answer."""
        with suppress(RemusError):
            address = Address.parse(f"unix:{self.folder / self.letters[host]}.sock")
            return ask(connect(address), "status", {}, timeout_s=_ANSWER_S)
        return None

    def status(self, host: Host) -> dict[str, Any]:
        """What a host's backup says of the guest; {} if it knows nothing of it, or does not answer."""
        found: dict[str, Any] = ((self.report(host) or {}).get("names") or {}).get(NAME) or {}
        return found

    def find(self, host: Host, what: str) -> list[int]:
        """The pids there of a kind: qemu, bridge, disk server, backup; primary, which is `run` or `protect`."""
        found = []
        for pid in host.pids():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                is_ours = words[1:3] == [b"-m", b"remus_ckpt"]
                if {
                    "qemu": words[0].startswith(b"qemu-system"),
                    "bridge": any(word.endswith(b"bridge_process.py") for word in words[:5]),
                    "disk server": words[1:3] == [b"-m", b"remus_ckpt.vm.disk_server"],
                    "backup": is_ours and words[3] == b"backup",
                    "primary": is_ours and words[3] in (b"run", b"protect"),
                }[what]:
                    found.append(pid)
        return found

    def is_protected(self, by: Host) -> bool:
        """Whether a host's backup has committed checkpoints, and a QEMU ready for the guest."""
        return protects(self.status(by))

    def until(self, what: str, condition: Callable[[], Any], patience_s: float = _PATIENCE_S) -> float:
        """Wait for something; returns how long that took. Raises RemusError, with the ends of the logs, if it does not
        happen."""
        begun = time.monotonic()
        while not condition():
            if time.monotonic() - begun > patience_s:
                logs = "; ".join(f"{path.name}: {self._last(path)}" for path in sorted(self.folder.glob("*.log")))
                raise RemusError(f"{what}: not within {patience_s:g} s; {logs}")
            time.sleep(0.01)
        return time.monotonic() - begun

    def last_words(self, log: str, host: Host) -> str:
        """The end of a log."""
        return self._last(self.folder / f"{log}-{self.letters[host]}.log")

    def _last(self, path: Path) -> str:
        return " / ".join(path.read_text(errors="replace").splitlines()[-3:])

    def close(self) -> None:
        """Kill all that runs on the hosts."""
        self.lan.close()
        for process in self._processes:
            process.wait()
        for letter in self.letters.values():
            shutil.rmtree(run_directory(self.folder / f"store-{letter}"), ignore_errors=True)


def run_vm_demo(*, seconds: float, interval: str, seed: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it.

    seconds: about how long the guest is protected before its host dies, each time
    interval: minimum time between pauses
    say: called with each line of the account
    Returns the account's figures. Raises RemusError if a claim does not hold, or if this machine lacks something.
    """
    if lacks := missing():
        raise RemusError("the demo of a virtual machine needs " + "; ".join(lacks))
    rng = random.Random(seed)
    image = guest.cache()
    if not (image / "kernel").exists():
        say(f"guest: preparing its kernel in {image}, once")
    try:
        guest.build(image)
    except OSError as error:
        raise RemusError(f"the guest cannot be built: {error}") from error
    with ExitStack() as stack:
        shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="remus-demo-", dir=shared)))
        scene = Scene(folder, image, interval=interval)
        stack.callback(scene.close)
        here, there = scene.lan.a, scene.lan.b
        scene.backup(there)
        say(f"host b, {there.address}: remus-ckpt backup --run-vms --auto-failover, with mutual TLS, lease {LEASE}")
        run = scene.run(here)
        say(f"host a, {here.address}: remus-ckpt run --name {NAME} -- qemu-system-x86_64 -m 128M … -nic tap,…")
        client = stack.enter_context(closing(Client(scene.lan.client.inside(), seed=rng.getrandbits(16))))
        scene.until("the guest answers", lambda: client.is_ready(0.1) or run.poll() is not None, _BOOT_S)
        if run.poll() is not None:
            raise RemusError(f"the guest did not start: {scene.last_words('run', here)}")
        scene.until("the guest is protected", lambda: scene.is_protected(there))
        say(f"client, {scene.lan.client.address}: checks every byte that the guest, {GUEST}, answers")
        failovers = [_kill(scene, client, here, there, seconds * rng.uniform(0.8, 1.2), say)]
        say("host b: the guest runs on unprotected; what it sends leaves at once")
        scene.backup(here)
        again_s = scene.until("the guest is protected again", lambda: _is_protected_again(scene, there, here))
        say(f"host a is back, with a backup: the guest is protected again, {again_s:.2f} s later")
        failovers.append(_kill(scene, client, there, here, seconds * rng.uniform(0.8, 1.2), say))
        told = client.end()
        if told["wrong"] or told["faults"]:
            raise RemusError(f"the guest is not as it was: {told['wrong'] or told['faults']}")
        say(
            f"the client: {told['answers']:,} answers, {told['bytes']:,} bytes, over one connection and two dead "
            "hosts: none lost, none twice, every byte right"
        )
        say(f"the guest: {told['pages']:,} pages written and read back, all unchanged")
    return {
        "failovers": failovers,
        "protected_again_s": again_s,
        "answers": told["answers"],
        "bytes": told["bytes"],
        "pages": told["pages"],
    }


def _is_protected_again(scene: Scene, here: Host, there: Host) -> bool:
    again = scene.status(here).get("vm_protection") or {}
    return again.get("state") == "protected" and scene.is_protected(there)


def _kill(
    scene: Scene, client: Client, here: Host, there: Host, after_s: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Kill the guest's host, and wait until the client hears from the guest on the other host."""
    told = client.until_answers(_MORE_ANSWERS, _PATIENCE_S)
    time.sleep(after_s)
    before, found = client.status(), scene.status(there)
    pause, latency = found["primary"].get("pause_ms") or {}, found["primary"].get("output_latency_ms") or {}
    if pause and latency:
        say(
            f"protected: epoch {found['epoch']} is committed; pauses of {pause['p50']:.1f} ms (p99 "
            f"{pause['p99']:.1f}), output held for up to {latency['p50']:.0f} ms (p99 {latency['p99']:.0f})"
        )
    killed = here.kill()
    begun = time.monotonic()
    scene.until("the guest goes on", lambda: scene.status(there).get("vm") == "running")
    seconds = time.monotonic() - begun
    told = client.until_answers(_MORE_ANSWERS, _PATIENCE_S)
    if told["wrong"] or told["answers"] < before["answers"] + _MORE_ANSWERS:
        raise RemusError(f"the client has heard something wrong, or too little: {told}")
    names = scene.letters
    say(
        f"host {names[here]} dies: {killed} processes are killed at once; on host {names[there]} the lease "
        f"runs out, it fences the old side, and the guest continues there after {seconds:.2f} s"
    )
    say(f"the client heard nothing for {told['silence_s']:.2f} s, then the answers it was waiting for")
    return {"takeover_s": seconds, "silence_s": told["silence_s"], "answers_before": before["answers"]}
