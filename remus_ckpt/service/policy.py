"""The settings of a backup: when to act, whom to serve, and what to keep."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from remus_ckpt.fleet.engine import Log
from remus_ckpt.service.reprotect import Elsewhere
from remus_ckpt.session.messages import MAX_LEASE_S, MIN_LEASE_S
from remus_ckpt.store import Retention

FENCE_S = 60.0
TAKEOVER_S = 3600.0
"""A takeover command may have to read all of a large memory from a slow disk; one that takes longer hangs."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings of a backup.

    lease_s: a primary that is silent for this long counts as gone
    automatic: take over then without being asked; requires `fence` or `commit_log`
    commit_log: where each takeover is recorded before it is anything else; it stands in for a fence
    fence: a shell command that makes sure that the primary writes and releases nothing more; it exits with 0 once that
        is certain
    fence_timeout_s: a fence that takes longer is killed, with all that it started, and counts as failed
    on_failover: a shell command that starts the work here; it exits once the work is running again
    run_vms: guests go on here, before `on_failover` runs
    vm_map: this host's TAP device for each of the primary's; those not named have the same name here
    reprotect: where guests that went on here are protected again; None for nowhere
    vm_disks: the folder for the images of their disks; None: .disks in the store
    takeover_timeout_s: a takeover command that takes longer is killed, with all that it started, and tried again
    retention: which old checkpoints are kept
    names: the names that may be protected; None for any
    max_names, max_connections, max_readers: how many of each are allowed; a reader counts as a connection too
    """

    lease_s: float = 5.0
    automatic: bool = False
    commit_log: Log | None = None
    fence: str | None = None
    fence_timeout_s: float = FENCE_S
    on_failover: str | None = None
    run_vms: bool = False
    vm_map: Mapping[str, str] = field(default_factory=dict)
    reprotect: Elsewhere | None = None
    vm_disks: Path | None = None
    takeover_timeout_s: float = TAKEOVER_S
    retention: Retention = field(default_factory=Retention)
    names: frozenset[str] | None = None
    max_names: int = 1000
    max_connections: int = 256
    max_readers: int = 16

    def __post_init__(self) -> None:
        least, most = MIN_LEASE_S, MAX_LEASE_S
        if not least <= self.lease_s <= most:
            raise ValueError(f"a lease of {self.lease_s:g} s; it has {least:g} s to {most:g} s")
        if self.automatic and not self.fence and self.commit_log is None:
            raise ValueError(
                "automatic failover needs a fencing command or a commit log: without one, two sides may go on at once"
            )
        for what, timeout_s in (("fence", self.fence_timeout_s), ("takeover", self.takeover_timeout_s)):
            if not 0 < timeout_s <= threading.TIMEOUT_MAX:
                raise ValueError(f"a {what} command with {timeout_s:g} s to end in")
