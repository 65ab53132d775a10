"""A guest's network adapters on one host: their cables to QEMU, the bridge behind them, and which frames may leave.

A bridge counts up for good, while the number of a checkpoint is used again if a lost link takes it back. So each pause
has a number of its own here, and a commit releases up to that of the pause in which its checkpoint was taken.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from remus_ckpt.errors import BridgeError, VmError
from remus_ckpt.observe.log import log
from remus_ckpt.observe.metrics import Output
from remus_ckpt.vm.bridge import Bridge, BridgeStatus, guest_pair
from remus_ckpt.vm.bridge_process import LATENCY_S


class GuestNetwork:
    """The NICs of a guest, whose output waits for commits from the start.

    taps: names of this host's devices, in the order of the NICs; or a bridge that has the guest already
    listen: where others can ask the bridge for its status, and take it when we are gone; None for nowhere

    One thread calls `before_pause` and `drain`, another may call `committed`.
    Raises BridgeError if the devices or the bridge cannot be had.
    """

    def __init__(self, taps: Sequence[str] | Bridge, listen: Path | None = None) -> None:
        self._lock = threading.Lock()  # guards the next
        self._marks: dict[int, int] = {}  # checkpoint → number of its pause, not committed yet
        self._count = 0
        self._holds = True
        self._pairs = [] if isinstance(taps, Bridge) else [guest_pair() for _ in taps]
        try:
            self._bridge = taps if isinstance(taps, Bridge) else Bridge.start(taps, listen=listen)
        except BaseException:
            self._close_pairs()
            raise

    @classmethod
    def of_survivor(cls, path: Path) -> GuestNetwork:
        """That of a guest that went on, by the socket of its bridge: from its first pause on its output waits for
        commits. Until then nothing could be taken over, so that it need not wait.

        Raises BridgeError.
        """
        bridge = Bridge.connect(path)
        try:
            network = cls(bridge)
            status = bridge.status()
            network._count = status.marked or 0
            network._holds = status.mode == "hold"
        except BaseException:
            bridge.close()
            raise
        return network

    @property
    def taps(self) -> list[str]:
        """The names of its devices."""
        return [nic.tap for nic in self._bridge.status().nics]

    @property
    def sockets(self) -> list[int]:
        """The guest's ends of its cables, for QEMU to inherit."""
        return [theirs.fileno() for _, theirs in self._pairs]

    def plug_in(self) -> None:
        """QEMU has its ends: connect ours. Raises BridgeError."""
        pairs, self._pairs = self._pairs, []
        for number, (ours, theirs) in enumerate(pairs):
            theirs.close()
            self._bridge.attach(number, ours)

    def before_pause(self) -> None:
        """The guest is about to be stopped."""
        try:
            self._hold()
            self._bridge.make_room()
        except BridgeError as error:
            self._restart(error)

    def drain(self, epoch: int) -> None:
        """The guest is stopped: what it has sent belongs to this checkpoint. Raises VmError if the bridge is gone."""
        with self._lock:
            self._count += 1
            count = self._count
        try:
            self._bridge.mark(count)
        except BridgeError as error:
            self._restart(error)
            try:
                self._bridge.mark(count)
            except BridgeError as another:
                raise VmError(f"{another}; no checkpoint is taken without it") from another
        with self._lock:
            self._marks = {before: mark for before, mark in self._marks.items() if before < epoch} | {epoch: count}

    def committed(self, epoch: int) -> None:
        """This checkpoint is committed: what belongs to it may leave."""
        with self._lock:
            done = [mark for before, mark in self._marks.items() if before <= epoch]
            self._marks = {before: mark for before, mark in self._marks.items() if before > epoch}
        if done:
            try:
                self._bridge.release(max(done))
            except BridgeError as error:
                # The next pause puts another in its place; these frames are lost, as on a wire.
                log("the bridge is gone", level=logging.ERROR, reason=str(error))

    def _hold(self) -> None:
        if not self._holds:
            self._bridge.hold()
            self._holds = True

    def _restart(self, error: BridgeError) -> None:
        try:
            self._replace(error)
            self._hold()
        except BridgeError as another:
            raise VmError(f"{another}; no checkpoint is taken without the bridge") from another

    def _replace(self, error: BridgeError) -> None:
        """Start another bridge in the place of one that does not answer. One that refuses lives: others may own it."""
        if not self._bridge.is_lost:
            raise error
        log("the bridge is started again", level=logging.ERROR, reason=str(error))
        self._bridge.restart()

    def let_pass(self) -> None:
        """The guest is not protected: let through what it sends, also when we end. Raises BridgeError."""
        try:
            self._bridge.let_pass()
        except BridgeError as error:
            self._replace(error)
            self._bridge.let_pass()
        self._holds = False

    def go_on(self) -> None:
        """The guest continues here, unprotected: let its frames pass, and tell the network. Raises BridgeError."""
        self.let_pass()
        self._bridge.announce()

    def output(self) -> Output | None:
        """What the guest has sent, and how late that left; None while the bridge is gone. Any thread may call it."""
        try:
            return _output_of(self._bridge.status())
        except BridgeError:
            return None

    def status(self) -> dict[str, Any]:
        """The same for `status`: frames and bytes, and `output_latency_ms`; {} while the bridge is gone."""
        try:
            found = self._bridge.status()
        except BridgeError:
            return {}
        output = _output_of(found)
        fields = ("held_frames", "held_bytes", "released_frames", "released_bytes", "dropped_frames")
        latency = {f"p{percent}": found.latency_s(percent / 100) * 1e3 for percent in (50, 99)}
        return {field: getattr(output, field) for field in fields} | {"output_latency_ms": latency}

    def close(self) -> None:
        """Let go. Nothing that is held leaves any more; after `go_on`, the guest keeps its network."""
        self._close_pairs()
        self._bridge.close()

    def _close_pairs(self) -> None:
        for pair in self._pairs:
            for end in pair:
                end.close()
        self._pairs = []


def _output_of(found: BridgeStatus) -> Output:
    def total(count: str) -> int:
        return sum(getattr(nic, count) for nic in found.nics)

    return Output(
        held_frames=total("held_frames"),
        held_bytes=total("held_bytes"),
        released_frames=total("released_frames"),
        released_bytes=total("released_bytes"),
        dropped_frames=total("dropped_frames"),
        latency_bounds_s=LATENCY_S,
        latency_counts=found.latency_counts,
        latency_sum_s=found.latency_sum_s,
    )
