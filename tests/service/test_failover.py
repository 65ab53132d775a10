"""When a backup takes over and whom it lets in: by tables, and by walking through all that can happen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from remus_ckpt.service.failover import (
    Accepted,
    Action,
    Busy,
    ByHand,
    Claim,
    Command,
    FencedOff,
    Phase,
    Promote,
    Role,
    RunFence,
    RunTakeover,
    Situation,
    WaitUntil,
    admit,
    decide,
    listening_since,
)

LEASE = 2.0
NOT_RUN = Command()
QUIET = Situation(
    term=5,
    role=Role.STANDBY,
    has_checkpoint=True,
    expects_primary=True,
    takeover_done=False,
    listening_since=0.0,
    lease_s=10.0,
    last_heard=100.0,
    fence=NOT_RUN,
    takeover=NOT_RUN,
    automatic=True,
)
"""Automatic failover, a primary last heard at 100."""
RUNNING = Command.begun(1, 111.0)
FENCED = RUNNING.ended(True, 112.0)
FAILED = RUNNING.ended(False, 112.0)
FAILED_TWICE = Command.begun(2, 113.0).ended(False, 114.0)
PROMOTED = replace(QUIET, term=6, role=Role.PROMOTED)
LOGGED = replace(QUIET, fence=None, has_log=True, is_logged=True)
HAND = ByHand(200.0)
HAND_FENCED = ByHand(200.0, fence=True)


@pytest.mark.parametrize(
    ("situation", "now", "actions"),
    [
        (QUIET, 105.0, [WaitUntil(110.0)]),
        (QUIET, 110.0, [RunFence(1)]),
        (replace(QUIET, fence=RUNNING), 111.5, []),
        (replace(QUIET, fence=FENCED), 112.0, [Promote(6)]),
        (replace(QUIET, fence=FAILED), 112.5, [WaitUntil(113.0)]),
        (replace(QUIET, fence=FAILED), 113.0, [RunFence(2)]),
        (replace(QUIET, fence=FAILED_TWICE), 115.0, [WaitUntil(116.0)]),
        (replace(QUIET, fence=Command.begun(99, 113.0).ended(False, 114.0)), 173.0, [WaitUntil(174.0)]),
        # not asked for, or nothing to go on from, or nobody who could be missed, or no way to fence
        (replace(QUIET, automatic=False), 1e9, []),
        (replace(QUIET, has_checkpoint=False), 1e9, []),
        (replace(QUIET, expects_primary=False), 1e9, []),
        (replace(QUIET, fence=None), 1e9, []),
        # the backup itself has started again, or was frozen: a full lease
        (replace(QUIET, last_heard=None, listening_since=200.0), 209.0, [WaitUntil(210.0)]),
        (replace(QUIET, last_heard=None, listening_since=200.0), 210.0, [RunFence(1)]),
        (replace(QUIET, listening_since=200.0), 209.0, [WaitUntil(210.0)]),
        # a sign of life: what the fence said is worth nothing, and one that still runs is waited for
        (replace(QUIET, last_heard=112.5, fence=FENCED), 113.0, [WaitUntil(122.5)]),
        (replace(QUIET, last_heard=112.5, fence=FENCED), 122.5, [RunFence(1)]),
        (replace(QUIET, last_heard=112.5, fence=FAILED_TWICE), 122.5, [RunFence(1)]),
        (replace(QUIET, last_heard=112.5, fence=RUNNING), 122.5, []),
        # by hand
        (replace(QUIET, by_hand=HAND, last_heard=200.0), 200.0, [Promote(6)]),
        (replace(QUIET, by_hand=HAND, automatic=False, expects_primary=False, fence=None), 200.0, [Promote(6)]),
        (replace(QUIET, by_hand=HAND, has_checkpoint=False), 200.0, []),
        (replace(QUIET, by_hand=HAND_FENCED, automatic=False), 200.0, [RunFence(1)]),
        (replace(QUIET, by_hand=HAND_FENCED, fence=FENCED), 200.0, [RunFence(1)]),
        (replace(QUIET, by_hand=HAND_FENCED, fence=Command.begun(1, 200.0)), 201.0, []),
        (replace(QUIET, by_hand=HAND_FENCED, fence=Command.begun(1, 200.0).ended(False, 203.0)), 204.0, [RunFence(2)]),
        (replace(QUIET, by_hand=HAND_FENCED, fence=Command.begun(1, 200.0).ended(True, 203.0)), 204.0, [Promote(6)]),
        (replace(QUIET, by_hand=HAND_FENCED, fence=None), 204.0, []),
        # with a commit log, the takeover is in it first; the log stands in for a fence where the primary uses it too
        (LOGGED, 105.0, [WaitUntil(110.0)]),
        (LOGGED, 110.0, [Claim(6)]),
        (replace(LOGGED, is_logged=False), 110.0, []),
        (replace(LOGGED, fence=NOT_RUN), 110.0, [Claim(6)]),
        (replace(LOGGED, fence=NOT_RUN, is_logged=False), 110.0, [Claim(6)]),
        (replace(LOGGED, automatic=False), 1e9, []),
        (replace(LOGGED, by_hand=HAND, is_logged=False), 200.0, [Claim(6)]),
        (replace(LOGGED, by_hand=HAND_FENCED, fence=NOT_RUN), 200.0, [Claim(6)]),
        # once it is there, nothing cancels it
        (replace(LOGGED, claimed=9, claimed_at=111.0, last_heard=112.0), 112.0, [Promote(9)]),
        (replace(LOGGED, claimed=9, claimed_at=111.0, expects_primary=False, automatic=False), 112.0, [Promote(9)]),
        (replace(LOGGED, claimed=9, claimed_at=111.0, fence=NOT_RUN, last_heard=112.0), 112.0, [RunFence(1)]),
        (replace(LOGGED, claimed=9, claimed_at=111.0, fence=FENCED), 112.0, [Promote(9)]),
        (replace(LOGGED, claimed=9, claimed_at=112.5, fence=FENCED), 113.0, [RunFence(1)]),
        (replace(LOGGED, claimed=9, claimed_at=111.0, fence=FAILED), 112.5, [WaitUntil(113.0)]),
        (replace(LOGGED, claimed=9, claimed_at=111.0, fence=NOT_RUN, by_hand=HAND), 200.0, [Promote(9)]),
        (replace(LOGGED, claimed=9, claimed_at=111.0, fence=NOT_RUN, by_hand=HAND_FENCED), 200.0, [RunFence(1)]),
        # promoted
        (PROMOTED, 112.0, [RunTakeover(6, 1)]),
        (replace(PROMOTED, has_checkpoint=False, automatic=False), 112.0, [RunTakeover(6, 1)]),
        (replace(PROMOTED, takeover=None), 112.0, []),
        (replace(PROMOTED, takeover=RUNNING), 112.0, []),
        (replace(PROMOTED, takeover=FAILED), 112.5, [WaitUntil(113.0)]),
        (replace(PROMOTED, takeover=FAILED), 113.0, [RunTakeover(6, 2)]),
        (replace(PROMOTED, takeover=FENCED), 113.0, []),
        (replace(PROMOTED, takeover_done=True), 113.0, []),
        (replace(PROMOTED, by_hand=HAND, takeover_done=True), 1e9, []),
    ],
)
def test_decisions(situation: Situation, now: float, actions: list[Action]) -> None:
    assert decide(situation, now) == actions


@pytest.mark.parametrize(
    ("store_term", "role", "hello_term", "busy", "answer"),
    [
        (5, Role.STANDBY, None, False, Accepted(5)),
        (5, Role.STANDBY, None, True, Busy()),
        (5, Role.STANDBY, 4, False, FencedOff(5)),
        (5, Role.STANDBY, 4, True, FencedOff(5)),
        (5, Role.STANDBY, 5, False, Accepted(5)),
        (5, Role.STANDBY, 5, True, Busy()),
        (5, Role.STANDBY, 6, False, Accepted(6)),
        (5, Role.STANDBY, 6, True, Accepted(6)),
        (5, Role.PROMOTED, None, False, FencedOff(5)),
        (5, Role.PROMOTED, None, True, FencedOff(5)),
        (5, Role.PROMOTED, 4, False, FencedOff(5)),
        (5, Role.PROMOTED, 4, True, FencedOff(5)),
        (5, Role.PROMOTED, 5, False, FencedOff(5)),
        (5, Role.PROMOTED, 5, True, FencedOff(5)),
        (5, Role.PROMOTED, 6, False, Accepted(6)),
        (5, Role.PROMOTED, 9, True, Accepted(9)),
    ],
)
def test_who_is_let_in(store_term: int, role: Role, hello_term: int | None, busy: bool, answer: object) -> None:
    assert admit(store_term, role, hello_term, busy) == answer


def test_a_backup_that_was_frozen_listens_anew() -> None:
    assert listening_since(3.0, 100.0, 104.0, lease_s=10.0) == 3.0
    assert listening_since(3.0, 100.0, 106.0, lease_s=10.0) == 106.0


# All that can happen


@dataclass(frozen=True)
class World:
    """A backup, and what is true outside of it. The time is always 0: what has been lies before it."""

    seen: Situation
    has_fallen: bool = False
    """A promotion of this term is durable."""
    silence: float = 0.0
    """Of the primary, or of the backup itself if it started later."""
    is_fenced: bool = False
    """The last fence began after a whole lease of silence, has succeeded, and nothing has been heard since."""
    fence_counts: bool = False
    """The one that runs began after a whole lease of silence, and nothing has been heard since."""


def older(command: Command | None, by: float) -> Command | None:
    """A command, with times that no longer make a difference all made the same."""
    if command is None or command.phase is Phase.NOT_RUN:
        return command
    began = max(command.began_at - by, -2 * LEASE)
    ended = max(command.ended_at - by, -2 * LEASE) if command.phase is Phase.FAILED else 0.0
    return Command(command.phase, min(command.attempt, 2), began, ended)


def later(world: World, by: float) -> World:
    seen = world.seen
    heard = None if seen.last_heard is None else max(seen.last_heard - by, -LEASE)
    wish = seen.by_hand and replace(seen.by_hand, at=max(seen.by_hand.at - by, -2 * LEASE))
    return replace(
        world,
        silence=min(world.silence + by, LEASE),
        seen=replace(
            seen,
            listening_since=max(seen.listening_since - by, -LEASE),
            last_heard=heard,
            fence=older(seen.fence, by),
            takeover=older(seen.takeover, by),
            by_hand=wish,
        ),
    )


def restarted(world: World) -> World:
    """Killed, and started again: it has what was durable."""
    seen = replace(
        world.seen,
        listening_since=0.0,
        last_heard=None,
        by_hand=None,
        fence=None if world.seen.fence is None else NOT_RUN,
        takeover=None if world.seen.takeover is None else NOT_RUN,
    )
    return replace(world, seen=seen, silence=0.0, is_fenced=False, fence_counts=False)


def frozen(world: World) -> World:
    """Stopped for two leases: whatever came meanwhile it has not heard."""
    after = later(world, 2 * LEASE)
    since = listening_since(after.seen.listening_since, -2 * LEASE, 0.0, LEASE)
    return replace(after, silence=0.0, seen=replace(after.seen, listening_since=since))


def done(world: World, action: Action) -> World:
    """The world after an action, which must have been lawful."""
    seen = world.seen
    match action:
        case WaitUntil(time):
            assert time > 0, "it waits for what has been"
            return world
        case RunFence():
            assert seen.role is Role.STANDBY
            assert seen.fence is not None
            assert seen.fence.phase is not Phase.RUNNING, "two fences at a time"
            assert seen.by_hand is not None or world.silence >= LEASE, "a living primary is fenced"
            fence = Command.begun(min(action.attempt, 2), 0.0)
            return replace(world, seen=replace(seen, fence=fence), fence_counts=True, is_fenced=False)
        case Promote(term):
            assert not world.has_fallen, "promoted twice"
            assert seen.role is Role.STANDBY
            assert term == seen.term + 1
            assert seen.has_checkpoint
            if seen.by_hand is None:
                assert seen.automatic and seen.expects_primary and world.is_fenced and world.silence >= LEASE
            elif seen.by_hand.fence:
                assert seen.fence is not None and seen.fence.began_at >= seen.by_hand.at
                assert seen.fence.phase is Phase.SUCCEEDED
            return replace(world, has_fallen=True, seen=replace(seen, term=term, role=Role.PROMOTED))
        case RunTakeover(term, attempt):
            assert world.has_fallen and seen.role is Role.PROMOTED, "the command runs before the promotion is durable"
            assert term == seen.term
            assert seen.takeover is not None and seen.takeover.phase is not Phase.RUNNING
            assert not seen.takeover_done
            return replace(world, seen=replace(seen, takeover=Command.begun(min(attempt, 2), 0.0)))


def acted(world: World) -> World:
    actions = decide(world.seen, 0.0)
    assert len(actions) <= 1
    return done(world, actions[0]) if actions else world


def fence_ended(world: World, succeeded: bool) -> World:
    assert world.seen.fence is not None
    seen = replace(world.seen, fence=world.seen.fence.ended(succeeded, 0.0))
    return replace(world, seen=seen, is_fenced=succeeded and world.fence_counts)


def takeover_ended(world: World, succeeded: bool, durable: bool = True) -> World:
    assert world.seen.takeover is not None
    seen = replace(world.seen, takeover=world.seen.takeover.ended(succeeded, 0.0))
    return replace(world, seen=replace(seen, takeover_done=succeeded and durable))


def happenings(world: World) -> Iterator[World]:
    """Whatever can happen next, to the backup and in it."""
    seen = world.seen
    yield acted(world)
    yield later(world, 1.0)
    yield frozen(world)
    # Killed before anything else, or with an action done and nothing noted but what is durable.
    yield restarted(world)
    yield restarted(acted(world))
    if seen.fence is not None and seen.fence.phase is Phase.RUNNING:
        yield fence_ended(world, True)
        yield fence_ended(world, False)
    if seen.takeover is not None and seen.takeover.phase is Phase.RUNNING:
        yield takeover_ended(world, True)
        yield takeover_ended(world, False)
        yield restarted(takeover_ended(world, True, durable=False))
    if seen.role is Role.PROMOTED:
        yield replace(world, seen=replace(seen, last_heard=0.0))  # from one who does not know yet
    else:
        heard = replace(world, silence=0.0, is_fenced=False, fence_counts=False)
        if seen.expects_primary:
            yield replace(heard, seen=replace(seen, last_heard=0.0))
            yield replace(heard, seen=replace(seen, last_heard=0.0, has_checkpoint=True))
            yield replace(heard, seen=replace(seen, last_heard=0.0, expects_primary=False))  # goodbye
        else:
            yield replace(heard, seen=replace(seen, last_heard=0.0, expects_primary=True))
        for fence in (False, True):
            if seen.by_hand is None:
                yield replace(world, seen=replace(seen, by_hand=ByHand(0.0, fence)))


def everything(start: World) -> set[World]:
    worlds = {start}
    waiting = [start]
    while waiting:
        world = waiting.pop()
        for after in happenings(world):
            if after not in worlds:
                # Whatever happened: promoted is for good, and what is durable of it agrees.
                assert after.has_fallen == (after.seen.role is Role.PROMOTED)
                assert after.has_fallen or not world.has_fallen
                assert after.seen.term - start.seen.term == after.has_fallen
                worlds.add(after)
                waiting.append(after)
    return worlds


def left_alone(world: World) -> World:
    """One step without any more trouble: commands succeed, the primary is silent, time goes by."""
    for command, end in ((world.seen.fence, fence_ended), (world.seen.takeover, takeover_ended)):
        if command is not None and command.phase is Phase.RUNNING:
            return end(world, True)
    after = acted(world)
    return later(world, 1.0) if after == world else after


START = replace(
    QUIET, has_checkpoint=False, expects_primary=False, last_heard=None, lease_s=LEASE, fence=NOT_RUN, takeover=NOT_RUN
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [{"automatic": True}, {"automatic": True, "fence": None}, {"automatic": False}, {"takeover": None}],
    ids=str,
)
def test_whatever_happens_it_is_lawful_and_goes_on(choices: dict[str, Any]) -> None:
    """`done` checks each action in each state that can be reached; from each, left alone, it comes to its end."""
    worlds = everything(World(replace(START, **choices)))
    assert {world.has_fallen for world in worlds} == {False, True}
    ends: dict[World, World] = {}
    for world in worlds:
        path = [world]
        while path[-1] not in ends and (after := left_alone(path[-1])) not in path:
            path.append(after)
        end = ends.get(path[-1], path[-1])
        ends.update(dict.fromkeys(path, end))

        seen = world.seen
        can_fence = seen.fence is not None
        if seen.by_hand is not None:
            falls = seen.has_checkpoint and (can_fence or not seen.by_hand.fence)
        else:
            falls = seen.has_checkpoint and seen.automatic and seen.expects_primary and can_fence
        assert end.has_fallen == (world.has_fallen or falls)
        assert end.seen.takeover_done == (end.has_fallen and seen.takeover is not None)


@pytest.mark.slow
def test_the_walk_meets_every_kind_of_interruption() -> None:
    """It would be worth nothing if it did not get there."""
    worlds = everything(World(START))
    met = {(world.seen.role, world.seen.fence and world.seen.fence.phase, decided(world)) for world in worlds}
    for phase in Phase:
        assert any(role is Role.STANDBY and fence is phase for role, fence, _ in met)
    for action in (RunFence, Promote, RunTakeover, WaitUntil, None):
        assert any(kind is action for _, _, kind in met)
    assert any(world.seen.role is Role.PROMOTED and world.seen.takeover == NOT_RUN for world in worlds)
    cancelled = [w for w in worlds if w.seen.fence and w.seen.fence.phase is Phase.SUCCEEDED and not w.is_fenced]
    assert any(w.seen.role is Role.STANDBY and w.seen.by_hand is None for w in cancelled)


def decided(world: World) -> type | None:
    actions = decide(world.seen, 0.0)
    return type(actions[0]) if actions else None
