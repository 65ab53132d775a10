"""The steps of a takeover, each by itself or with real commands: the fence, the promotion, the command."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from limited import limit
from proxy import Proxy
from store_support import fill
from support import is_running
from test_service import LONG_S, Memory, backup_in, until
from test_standby import of

from remus_ckpt.errors import RemusError
from remus_ckpt.observe.metrics import Metrics
from remus_ckpt.service.durable import Durable
from remus_ckpt.service.failover import Command, Phase, Role, Situation
from remus_ckpt.service.policy import Policy
from remus_ckpt.service.takeover import Takeover
from remus_ckpt.store import PeerIdentity, Store


class Steps:
    """The steps of a takeover by themselves: a primary that has been silent, until somebody says otherwise."""

    def __init__(self, folder: Path, fence: str = "true") -> None:
        with Store(folder).writer("orders") as filled:
            fill(filled, 1)
        lock, metrics = threading.Condition(), Metrics()
        self.durable = Durable("orders", Store(folder).writer("orders"), metrics, lock, lambda: None)
        with self.durable.settling():
            self.durable.write(peer=asdict(PeerIdentity("a peer")))
        self.situation = Situation(
            term=0, role=Role.STANDBY, has_checkpoint=True, expects_primary=True, takeover_done=False,
            listening_since=0.0, lease_s=0.1, automatic=True, fence=Command(),
        )  # fmt: skip
        self.dismissed: list[str] = []
        self.on_dismiss: Callable[[], None] = lambda: None
        self.takeover = Takeover(
            self.durable,
            Policy(lease_s=0.1, automatic=True, fence=fence),
            metrics,
            lock,
            situation=lambda: self.situation,
            dismiss=self._dismiss,
        )

    def _dismiss(self, code: str, message: str) -> None:
        self.dismissed.append(code)
        self.on_dismiss()

    def hear(self) -> None:
        self.situation = replace(self.situation, last_heard=time.monotonic() + LONG_S)

    def fence(self) -> Phase:
        before, begun = Command(), Command.begun(1, time.monotonic())
        assert self.takeover.run_fence(before, begun)
        assert self.takeover.fence is not None
        self.situation = replace(self.situation, fence=self.takeover.fence)
        return self.takeover.fence.phase


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Steps]:
    steps = Steps(tmp_path / "store", fence=f"echo $REMUS_PEER >> {tmp_path}/fenced")
    yield steps
    steps.durable.close()


@pytest.mark.parametrize("at", ["before", "as its session is ended"])
def test_a_sign_of_life_behind_the_decision_to_promote(steps: Steps, at: str) -> None:
    assert steps.fence() is Phase.SUCCEEDED
    silent = steps.situation
    if at == "before":
        steps.hear()
    steps.on_dismiss = steps.hear
    assert steps.takeover.promote(1)
    assert (steps.durable.state.role, steps.takeover.given) == ("standby", None)
    steps.situation, steps.on_dismiss = silent, lambda: None
    assert steps.takeover.promote(1)
    assert steps.durable.state.role == "promoted"
    assert steps.takeover.given is not None


@pytest.mark.parametrize("at", ["before", "as its session is ended"])
def test_a_sign_of_life_behind_the_decision_to_fence(tmp_path: Path, steps: Steps, at: str) -> None:
    silent = steps.situation
    if at == "before":
        steps.hear()
    steps.on_dismiss = steps.hear
    assert steps.fence() is Phase.NOT_RUN
    assert steps.dismissed == ([] if at == "before" else ["timeout"])
    assert not (tmp_path / "fenced").exists()
    steps.situation, steps.on_dismiss = silent, lambda: None
    assert steps.fence() is Phase.SUCCEEDED
    assert (tmp_path / "fenced").read_text() == "a peer\n"


# Fences


def test_a_fence_is_dead_before_the_primary_is_let_in(tmp_path: Path) -> None:
    """Its reason is gone: nothing of it may shoot what is back, and it was no failure."""
    begun, lasting = tmp_path / "begun", f"sleep 60.{os.getpid()}"
    fence = f"touch {begun}; (setsid sh -c '{lasting}; touch {tmp_path}/shot' &); {lasting} | cat"
    with (
        backup_in(tmp_path / "store", lease_s=0.4, automatic=True, fence=fence) as backup,
        Proxy(backup.addresses[0]) as proxy,
        Memory(proxy.address) as memory,
    ):
        memory.step(1)
        proxy.silent.set()
        until(lambda: begun.exists() and is_running(lasting))
        proxy.silent.clear()
        memory.step(2)
        assert not is_running(lasting)
        found = of(backup)
        assert (found["role"], found["fence"]) == ("standby", "not run")
        memory.step(3)
        assert (
            backup.metrics.registry.get_sample_value(
                "remus_command_failures_total", {"name": "orders", "command": "fence"}
            )
            == 0
        )


def test_a_fence_that_takes_too_long_or_is_not_wanted_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, lasting = tmp_path / "begun", f"sleep 60.{os.getpid()}"
    fence = f"touch {begun}; ({lasting}; touch {tmp_path}/shot) 2>&1 | cat"
    for promotion_s, fence_s in ((60.0, 0.3), (0.3, 60.0)):
        limit(monkeypatch, promotion_s=promotion_s)
        with (
            backup_in(tmp_path / "store", fence=fence, fence_timeout_s=fence_s) as backup,
            Memory(backup.addresses[0]) as memory,
        ):
            memory.step(1)
            with pytest.raises(RemusError):
                backup.failover("orders", fence=True)
            assert begun.exists()
            until(lambda: of(backup)["fence"] != "running")
            assert not is_running(lasting)
            memory.step(2)


def test_the_end_of_the_backup_is_the_end_of_its_commands(tmp_path: Path) -> None:
    lasting = f"sleep 60.{os.getpid()}"
    takeover = f"(setsid sh -c '{lasting}; touch {tmp_path}/acted' &); exec sleep 30"
    with backup_in(tmp_path / "store", on_failover=takeover) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        backup.failover("orders")
        until(lambda: is_running(lasting))
    assert not is_running(lasting)


def test_a_takeover_that_does_not_end_is_killed_and_tried_again(tmp_path: Path) -> None:
    """Each run takes too long until the test lets one succeed: how many there are by then is the machine's affair."""
    runs, may_end, lasting = tmp_path / "runs", tmp_path / "may end", f"sleep 60.{os.getpid()}"
    takeover = f"echo run >> {runs}; test -e '{may_end}' || {{ (setsid {lasting} &); {lasting} | cat; }}"
    with backup_in(tmp_path / "store", on_failover=takeover, takeover_timeout_s=0.5) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        backup.failover("orders")
        until(lambda: is_running(lasting))
        until(lambda: of(backup)["takeover"] == "failed")
        assert "more than 0.5 s" in of(backup)["trouble"]
        may_end.touch()
        until(lambda: of(backup)["takeover"] == "succeeded")
        assert of(backup)["trouble"] is None
    assert len(runs.read_text().split()) > 1
    assert not is_running(lasting), "nothing of the first ones lives on"


def test_a_fence_that_cannot_be_started_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOO_LONG", "x")
    with backup_in(tmp_path / "store", fence="true " + "x" * (1 << 18)) as backup:
        with Memory(backup.addresses[0]) as memory:
            memory.step(1)
        with pytest.raises(RemusError) as caught:
            backup.failover("orders", fence=True)
        assert "cannot be started" in str(caught.value)
        found = of(backup)
        assert (found["role"], found["fence"]) == ("standby", "failed")
