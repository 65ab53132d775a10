"""How well a name is protected, in one word and one sentence, decided from its status (specs/operations.md §1).

Pure: no clock, no I/O. What a primary says of itself is believed of nobody but itself, whatever its type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from remus_ckpt.plural import counted
from remus_ckpt.service.words import DAY_S, say_bytes, say_time

_CERTIFICATE_DAYS = 14
"""A certificate that expires sooner is a warning."""


_PART_CHARS = 300
"""Of what may come from a peer."""


_LAST_S = 1e12
"""No certificate is valid that long after 1970."""


class Level(IntEnum):
    """How bad it is: the exit code of `status --check`, and the value of `remus_health`."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


STATES: dict[str, tuple[Level, str]] = {
    "protected": (Level.OK, ""),
    "copying": (Level.WARNING, "wait until the first copy is committed"),
    "lagging": (Level.WARNING, "look at the link, and at the backup's disk"),
    "tracking": (Level.WARNING, "name every process that writes to the memory (--pid)"),
    "damaged": (Level.WARNING, "run `remus-ckpt verify` on the store"),
    "not ready": (Level.WARNING, "do what the reason says, so that the guest can go on here"),
    "certificate ends": (Level.WARNING, "renew it: `remus-ckpt keys issue … --renew`"),
    "disconnected": (Level.WARNING, "wait: a primary that lives reconnects by itself"),
    "ended": (Level.WARNING, "run `remus-ckpt protect` again if the memory is still in use"),
    "opening": (Level.WARNING, "wait; if it does not end, look at the backup's disk"),
    "taken over": (Level.WARNING, "protect the survivor: `remus-ckpt protect … --term`"),
    "empty": (Level.WARNING, "run `remus-ckpt protect` to protect something on this backup"),
    "unprotected": (Level.CRITICAL, "look at the primary; if it is gone, run `remus-ckpt failover`"),
    "refused": (Level.CRITICAL, "do what the reason says"),
    "store full": (Level.CRITICAL, "make room there, or keep less; protection then continues by itself"),
    "store failing": (Level.CRITICAL, "repair the backup's disk; protection then continues by itself"),
    "fencing": (Level.CRITICAL, "wait until the fence command has ended"),
    "fence failed": (Level.CRITICAL, "stop the old side yourself, then run `remus-ckpt failover`"),
    "taking over": (Level.CRITICAL, "wait until the takeover command has ended"),
    "takeover failed": (Level.CRITICAL, "see the backup's log, and repair the --on-failover command"),
    "certificate ended": (Level.CRITICAL, "renew it: `remus-ckpt keys issue … --renew`"),
    "absent": (Level.CRITICAL, "check the name, and whether `remus-ckpt protect` runs"),
    "fenced": (Level.CRITICAL, "stop the work here, and release nothing that was held back"),
    "unreachable": (Level.UNKNOWN, "check the address, the keys, and whether the backup runs"),
}
"""Each state, its level, and what to do next."""


@dataclass(frozen=True, slots=True)
class Health:
    """state: a key of STATES; words: a sentence that begins with it"""

    state: str
    words: str

    @property
    def level(self) -> Level:
        """How bad it is."""
        return STATES[self.state][0]

    @property
    def next(self) -> str:
        """What to do next; empty if nothing."""
        return STATES[self.state][1]

    def status(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"level": int(self.level), "state": self.state, "words": self.words, "next": self.next}


def _say(state: str, *parts: str | None) -> Health:
    told = ", ".join(part[:_PART_CHARS] for part in parts if part)
    return Health(state, f"{state}: {told}" if told else state)


def judge(found: Mapping[str, Any], lease_s: float, now: float) -> Health:
    """The health of one name.

    found: its status (`Standby.status`)
    now: Unix time
    """
    if found["role"] == "opening":
        return _say("opening", found["trouble"])
    if found["role"] == "promoted":
        return _promoted(found)
    if found["role"] == "unknown":
        return _store_fault(found, now)
    return _connected(found, lease_s, now) if found["connected"] else _left_alone(found, now)


def judge_primary(status: Mapping[str, Any], ended: str, now: float) -> Health:
    """The health of what a primary protects, as it sees that itself.

    status: its own (`Primary.status`); ended: why it has ended, empty while it runs
    now: Unix time
    """
    epoch = status["committed_epoch"]
    at = "nothing is committed yet" if epoch is None else f"epoch {epoch} is committed"
    since = _ago(status.get("last_commit_at"), now)
    since = since and f"the last commit {since}"
    if status.get("fenced"):
        return _say("fenced", "another side has taken over", at)
    if ended:
        return _say("ended", f"this primary has ended ({ended})", at)
    if not status.get("connected"):
        return _say("disconnected", "there is no link to the backup", at, since)
    if epoch is None or status["copy_share"] is not None:
        share = status["copy_share"]
        return _say("copying", at, "" if share is None else f"{share:.0%} of memory is sent")
    if status.get("missed_pages"):
        return _say("tracking", f"the kernel missed {status['missed_pages']} pages, and all memory is compared since")
    expires = status.get("certificate_expires")
    if (certificate := _certificate(expires, "the primary's certificate", now)) is not None:
        return certificate
    return _say("protected", at, since)


def overall(report: Mapping[str, Any], name: str | None, now: float) -> Health:
    """The worst of a backup's status, or of one of its names and the backup itself.

    report: from `Backup.status`, with the health of each name in it
    now: Unix time
    """
    names = report["names"]
    if name is not None:
        names = {name: names[name]} if name in names else {}
    found = [
        (Health(one["health"]["state"], f"{key} {one['health']['words']}"), key)
        for key, one in names.items()
        if one["health"]["state"] in STATES
    ]
    ranked = [health for health, _ in sorted(found, key=lambda item: (-item[0].level, item[1]))]
    if (certificate := _certificate(report.get("certificate_expires"), "the backup's certificate", now)) is not None:
        ranked.append(certificate)
    if not names:
        if name is not None:
            ranked.append(_say("absent", f"this backup knows nothing under the name {name!r}"))
        else:
            ranked.append(_say("empty", "nothing is protected on this backup"))
    worst = max(ranked, key=lambda health: health.level)
    others = sum(health.level > Level.OK for health in ranked) - (worst.level > Level.OK)
    if worst.level is Level.OK and len(names) > 1:
        return _say("protected", f"all {len(names)} names")
    return Health(worst.state, f"{worst.words}; {others} more with a fault" if others else worst.words)


def _certificate(expires: Any, whose: str, now: float) -> Health | None:
    """The health of a certificate that will expire soon. expires: Unix time, or whatever a peer has said"""
    if not isinstance(expires, float) or not abs(expires) < _LAST_S or expires - now >= _CERTIFICATE_DAYS * DAY_S:
        return None
    if expires <= now:
        return _say("certificate ended", f"{whose} expired {say_time(now - expires)} ago")
    return _say("certificate ends", f"{whose} expires in {say_time(expires - now)}")


def _promoted(found: Mapping[str, Any]) -> Health:
    epoch = f"at epoch {found['epoch']} under term {found['term']}"
    if found["store_fault"] is not None:
        return _say("takeover failed", f"taken over {epoch}", found["trouble"])
    if found["takeover"] == "failed":
        retry_s = found["takeover_retry_s"]
        again = "" if retry_s is None else f"the command is tried again in {retry_s:.0f} s"
        return _say("takeover failed", f"taken over {epoch}", found["trouble"], again)
    if found["takeover"] in ("running", "not run"):
        return _say("taking over", epoch, "the takeover command has not ended")
    where = found.get("vm_protection")
    if where is not None and where["state"] == "protected":
        return _say("protected", f"taken over {epoch}", f"the guest runs here, and {where['to']} says: {where['why']}")
    if where is not None and where["state"] == "copying":
        return _say("taken over", epoch, f"the guest runs here, and {where['to']} gets a first copy: {where['why']}")
    survivor = {
        "running": "the guest runs here, and nothing protects it",
        "ended": "the guest that went on here has ended",
    }.get(found.get("vm") or "", "nothing protects the survivor here")
    return _say("taken over", epoch, survivor, where and f"{where['to']} does not yet: {where['why']}")


def _connected(found: Mapping[str, Any], lease_s: float, now: float) -> Health:
    if found["store_fault"] is not None:
        return _store_fault(found, now)
    if found["first_copy"] is not None or found["epoch"] is None:
        return _say("copying", *_copy(found))
    since = _ago(found.get("last_commit_at"), now)
    at = f"epoch {found['epoch']}"
    if found["arriving_s"] is not None and found["arriving_s"] > lease_s:
        return _say(
            "lagging", f"a checkpoint has been arriving for {say_time(found['arriving_s'])}", f"{at} is committed"
        )
    if found.get("vm") == "refused":
        return _say("not ready", f"no QEMU waits for the guest: {found['vm_why']}", f"{at} is committed")
    primary = found["primary"]
    if isinstance(trouble := primary.get("disk_trouble"), str):
        return _say(
            "not ready", f"a disk of the guest is not in sync, the primary says: {trouble}", f"{at} is committed"
        )
    missed = primary.get("missed_pages")
    if isinstance(missed, int) and missed > 0:
        return _say(
            "tracking",
            f"the kernel missed {counted(missed, 'page')}, the primary says, and it compares all memory since",
        )
    expires = primary.get("certificate_expires")
    if (certificate := _certificate(expires, "the primary's certificate, it says,", now)) is not None:
        return certificate
    if found["warnings"]:
        return _say("damaged", *found["warnings"][:1])
    return _say("protected", f"{at} is committed", since and f"the last commit {since}")


def _copy(found: Mapping[str, Any]) -> list[str]:
    """How far a first copy has got, as it was counted here; only the number of the pass is the primary's word."""
    copy, number = found["first_copy"], found["primary"].get("copy_pass")
    parts = ["nothing is committed yet" if found["epoch"] is None else f"only epoch {found['epoch']} is committed"]
    if copy is not None:
        done = copy["memory_bytes"] if copy["data_bytes"] is None else copy["data_bytes"]
        part = f"{copy['done']:.0%} of {say_bytes(done)} at {say_bytes(copy['bytes_s'])}/s"
        if copy["done"] < 1 and copy["left_s"] is not None:
            part += f" with about {say_time(copy['left_s'])} left"
        parts.append(part)
    if type(number) is int and number > 1:
        parts.append(f"in pass {number} over what was written meanwhile, the primary says")
    return parts


def _left_alone(found: Mapping[str, Any], now: float) -> Health:
    refused = found["refused"]
    if refused is not None and refused["code"] == "store":
        return _store_fault(found, now)
    if found["fence"] == "running":
        return _say("fencing", *_absence(found, now), "the fence command runs")
    if found["fence"] == "failed" and found["lease_left_s"] == 0:
        return _say("fence failed", *_absence(found, now), found["trouble"])
    if refused is not None:
        return _say("refused", f"{_who(refused)} is there and is refused ({refused['code']})", refused["reason"])
    if found["store_fault"] is not None and found["lease_left_s"] is None:
        return _store_fault(found, now)
    if found["lease_left_s"] is None and found["epoch"] is not None:
        return _say("ended", *_absence(found, now))
    if found["lease_left_s"]:
        return _say("disconnected", *_absence(found, now), f"{found['lease_left_s']:.1f} s of the lease are left")
    return _say("unprotected", *_absence(found, now), "the lease is over" if found["lease_left_s"] == 0 else None)


def _absence(found: Mapping[str, Any], now: float) -> list[str]:
    """That no primary is connected, since when, and its last words."""
    end = found["last_end"]
    if end is not None:
        how = f"it said goodbye ({end['reason']})" if end["goodbye"] else f"it said no goodbye ({end['reason']})"
        return [f"no primary for {say_time(now - end['at'])}", how]
    if found["silent_s"] is not None:
        return [f"no primary is connected, and none was heard for {say_time(found['silent_s'])}"]
    how = "the last one said goodbye" if found["lease_left_s"] is None and found["epoch"] is not None else ""
    return ["no primary has connected since this backup started", *([how] if how else [])]


def _store_fault(found: Mapping[str, Any], now: float) -> Health:
    """A store that cannot store: what failed, since when, the room, and the primary that waits for it."""
    refused, room = found["refused"], found["room"]
    is_full = found["store_fault"] == "full" or (refused is not None and refused["is_full"])
    began = found["trouble_since"] or (refused and refused["since"])
    trouble = str(found["trouble"] or (refused and refused["reason"]))
    parts = [trouble, "" if found["epoch"] is None else f"epoch {found['epoch']} is committed"]
    if began is not None:
        parts.append(f"for {say_time(now - began)} now")
    if room is not None and room["needed_bytes"] > room["free_bytes"]:
        needed = say_bytes(room["needed_bytes"])
        parts.append(
            "" if needed in trouble else f"a full copy needs {needed}, {say_bytes(room['free_bytes'])} are free"
        )
    if found["connected"]:
        parts.append("the primary is connected and tries again" if found["first_copy"] else "the primary is connected")
    elif refused is not None:
        parts.append(f"{_who(refused)} is there, and its checkpoints are refused")
        parts.append(f"it tries again in {refused['next_s']:.1f} s")
    return _say("store full" if is_full else "store failing", *parts)


def _who(refused: Mapping[str, Any]) -> str:
    return f"a primary ({refused['peer']})"


def _ago(at: float | None, now: float) -> str:
    return "" if at is None else f"{say_time(now - at)} ago"
