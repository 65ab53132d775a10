"""When a backup takes over, and whom it lets in (specs/failover.md): pure decisions. No clock, no I/O, no memory.

The caller calls `decide` whenever something has changed, and at the time that `decide` named. `decide` returns what to
do now; the caller does it, notes it in the situation and calls again. No decision depends on earlier calls: a backup
that was killed between any two steps continues after its restart from what is durable (term, role, expects_primary,
takeover_done), and starts to count the silence anew.

    standby ── lease over ──> (Claim) ──> RunFence ── succeeded ──> Promote ──> RunTakeover ──> done
            └─ by hand ─────> (Claim) ────────────────────────────────┘

What must hold, whatever is interrupted:

- Automatic failover happens only where the user asked for it and gave a fence command or a commit log, after a
  committed checkpoint, when a primary that has not said goodbye was silent for a whole lease, and when a fence that
  began after that lease has succeeded. A sign of life before the promotion cancels the failover, ends the fence, and
  voids its result.
- Where there is a commit log, the takeover is in it before anything else is done. From then on nothing cancels it: the
  primary has lost the right to commit. The log stands in for the fence if the primary was let in as one whose commits
  go to the same log.
- The takeover command runs only once the promotion is durable. It is repeated until it has succeeded once: a backup
  that is killed while the command runs, runs it again.
- A promotion is permanent: only a primary of a higher term makes the store a standby again (`admit`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, StrEnum

FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0


class Role(StrEnum):
    """The role of a store: a standby of a primary, or promoted."""

    STANDBY = "standby"
    """It accepts the checkpoints of a primary."""
    PROMOTED = "promoted"
    """Work has continued from it: it accepts no checkpoints of this term."""


class Phase(Enum):
    """How far a command has got."""

    NOT_RUN = "not run"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Command:
    """One of the user's commands, and how its last run went.

    attempt: the number of the run, from 1; 0 before the first
    began_at, ended_at: when the last run began and ended, as far as it got; seconds on the caller's clock
    """

    phase: Phase = Phase.NOT_RUN
    attempt: int = 0
    began_at: float = 0.0
    ended_at: float = 0.0

    @staticmethod
    def begun(attempt: int, now: float) -> Command:
        """A command that has just been started."""
        return Command(Phase.RUNNING, attempt, now)

    def ended(self, succeeded: bool, now: float) -> Command:
        """The command after its run has ended; a run that took too long and was killed has failed."""
        return Command(Phase.SUCCEEDED if succeeded else Phase.FAILED, self.attempt, self.began_at, now)

    def retry_at(self) -> float:
        """When to try a failed command again: each pause is twice the one before, up to a minute."""
        return self.ended_at + min(FIRST_RETRY_S * 2.0 ** min(self.attempt - 1, 10), LONGEST_RETRY_S)


@dataclass(frozen=True, slots=True)
class ByHand:
    """A user's request to take over now.

    at: when it was made
    fence: run the fence command first, and continue only if it succeeds. Otherwise the user vouches for the old side
    """

    at: float
    fence: bool = False


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything a decision rests on, for one name. Times are seconds on one monotonic clock.

    Durable, in the store:
    term, role: of the store
    has_checkpoint: it holds a committed checkpoint
    expects_primary: a primary of this term was let in and has not said goodbye
    takeover_done: the takeover command has succeeded in this term
    is_logged: the primary that was let in last commits to the log that is used here

    Of this run of the backup:
    listening_since: when it started, or when it last resumed after being frozen or starved (`listening_since`)
    last_heard: when the primary was last heard, None if never
    fence: None without a fence command
    takeover: None without a takeover command
    by_hand: a request to take over, None without one
    claimed: the term of our takeover that is in the commit log, and that the store does not know yet; None if there is
        none. claimed_at: when that was found out

    Chosen by the user:
    lease_s: how long a primary may be silent
    automatic: take over without being told
    has_log: a takeover is recorded in a commit log first
    """

    term: int
    role: Role
    has_checkpoint: bool
    expects_primary: bool
    takeover_done: bool
    listening_since: float
    lease_s: float
    last_heard: float | None = None
    fence: Command | None = None
    takeover: Command | None = None
    by_hand: ByHand | None = None
    claimed: int | None = None
    claimed_at: float = 0.0
    automatic: bool = False
    has_log: bool = False
    is_logged: bool = False


@dataclass(frozen=True, slots=True)
class RunFence:
    """End the session of a silent primary; then start the fence command, which makes sure that the old primary no
    longer acts, and succeeds only then.

    The command may run more than once, and for a primary that is already gone. It is killed when its reason is gone
    (`needs_fence`), and before a primary is let in.
    """

    attempt: int


@dataclass(frozen=True, slots=True)
class Claim:
    """End the primary's session; then append the takeover to the commit log, with this term or a higher one.

    If the log denies it, another side goes on, or would lose less: nothing else may follow.
    """

    term: int


@dataclass(frozen=True, slots=True)
class Promote:
    """End the primary's session; then durably make the store promoted, with this term and `takeover_done` false."""

    term: int


@dataclass(frozen=True, slots=True)
class RunTakeover:
    """Start the takeover command; when it has succeeded, make `takeover_done` durable."""

    term: int
    attempt: int


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Do nothing before this time, unless something changes."""

    time: float


Action = RunFence | Claim | Promote | RunTakeover | WaitUntil


def decide(situation: Situation, now: float) -> list[Action]:
    """What to do now: at most one action. An empty list means: wait until something changes."""
    if situation.role is Role.PROMOTED:
        return _take_over(situation, now)
    if not situation.has_checkpoint:
        return []
    wish = situation.by_hand
    if situation.claimed is not None:
        # A user who vouches for the old side waits for no fence.
        needs_no_fence = situation.fence is None or (wish is not None and not wish.fence)
        return [_promotion(situation)] if needs_no_fence else _fence_and_promote(situation, situation.claimed_at, now)
    if wish is not None:
        is_next = situation.has_log or not wish.fence
        return [_promotion(situation)] if is_next else _fence_and_promote(situation, wish.at, now)
    if not (situation.automatic and situation.expects_primary):
        return []
    since = situation.listening_since
    if situation.last_heard is not None:
        since = max(since, situation.last_heard)
    due = since + situation.lease_s
    if now < due:
        return [WaitUntil(due)]
    if situation.has_log:
        return [_promotion(situation)] if situation.is_logged or situation.fence is not None else []
    return _fence_and_promote(situation, due, now)


def _promotion(situation: Situation) -> Claim | Promote:
    """The next step of a takeover that waits for no fence."""
    if situation.claimed is not None:
        return Promote(situation.claimed)
    return Claim(situation.term + 1) if situation.has_log else Promote(situation.term + 1)


def _fence_and_promote(situation: Situation, since: float, now: float) -> list[Action]:
    """Promote once a fence that began at `since` or later has succeeded."""
    fence = situation.fence
    if fence is None or fence.phase is Phase.RUNNING:
        return []
    if fence.phase is Phase.NOT_RUN or fence.began_at < since:
        return [RunFence(1)]
    if fence.phase is Phase.SUCCEEDED:
        return [_promotion(situation)]
    return [WaitUntil(fence.retry_at())] if now < fence.retry_at() else [RunFence(fence.attempt + 1)]


def needs_fence(situation: Situation, now: float) -> bool:
    """Whether a running fence still has a reason: without one, it must not go on to stop a primary."""
    return decide(replace(situation, fence=Command()), now) == [RunFence(1)]


def _take_over(situation: Situation, now: float) -> list[Action]:
    takeover = situation.takeover
    if takeover is None or situation.takeover_done or takeover.phase in {Phase.RUNNING, Phase.SUCCEEDED}:
        return []
    if takeover.phase is Phase.FAILED and now < takeover.retry_at():
        return [WaitUntil(takeover.retry_at())]
    return [RunTakeover(situation.term, takeover.attempt + 1)]


def listening_since(since: float, looked_at: float, now: float, lease_s: float) -> float:
    """Since when a backup has been listening, computed each time it looks at its clock.

    looked_at: when it last looked; it must look at least four times a lease
    A backup that was frozen or starved did not hear what arrived meanwhile: that gap must not count as the primary's
    silence.
    """
    return now if now - looked_at > lease_s / 2 else since


@dataclass(frozen=True, slots=True)
class Accepted:
    """The primary is let in, under this term: the store durably becomes its standby.

    If a session is still open, it has a lower term, and is ended first.
    """

    term: int


@dataclass(frozen=True, slots=True)
class FencedOff:
    """The primary must stop: another side has taken over, under this term."""

    term: int


@dataclass(frozen=True, slots=True)
class Busy:
    """A primary of this term is being served; the new one may try again once the open session has ended."""


def admit(store_term: int, role: Role, hello_term: int | None, busy: bool) -> Accepted | FencedOff | Busy:
    """Whether a primary that says hello is let in.

    hello_term: the term in its hello, None if it knows none
    busy: another session of a primary is open
    """
    if hello_term is not None and hello_term > store_term:
        return Accepted(hello_term)
    if role is Role.PROMOTED or (hello_term is not None and hello_term < store_term):
        return FencedOff(store_term)
    return Busy() if busy else Accepted(store_term)
