"""What the holder of a certificate may do on a backup: entries of its subjectAltName (specs/keys.md §2). No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from remus_ckpt.session.messages import NAME_CHARS, check_name

Action = Literal["protect", "read", "failover"]
ACTIONS: tuple[Action, ...] = get_args(Action)
_SCHEME = "urn:remus-ckpt:"
_MAY, _NAME = f"{_SCHEME}may:", f"{_SCHEME}name:"


@dataclass(frozen=True, slots=True)
class Rights:
    """What one certificate allows.

    actions: what its holder may do; None: everything, including what later versions add
    names: for which names; None: for any
    unknown: limits that this version does not understand. A certificate with any of them allows nothing: it may be more
        limited than we know
    """

    actions: frozenset[Action] | None = None
    names: frozenset[str] | None = None
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, uris: Iterable[str]) -> Rights:
        """The rights of a certificate with these URIs in its subjectAltName; foreign URIs mean nothing."""
        actions: set[Action] = set()
        names: set[str] = set()
        unknown = []
        for uri in uris:
            # Scheme and namespace of a URN have no case (RFC 8141): in capitals it is a limit too, an unknown one.
            if uri[: len(_SCHEME)].lower() != _SCHEME:
                continue
            if (word := uri.removeprefix(_MAY)) in ACTIONS:
                actions.add(word)
            elif uri.startswith(_NAME) and _is_name(uri.removeprefix(_NAME)):
                names.add(uri.removeprefix(_NAME))
            else:
                unknown.append(uri)
        return cls(frozenset(actions) or None, frozenset(names) or None, tuple(unknown))

    @classmethod
    def limited(cls, actions: Iterable[str], names: Iterable[str]) -> Rights:
        """Rights to these actions and names, or to all if none are given. Raises ValueError for anything else."""
        rights = cls.of([*(_MAY + action for action in actions), *(_NAME + name for name in names)])
        if rights.unknown:
            words = " and ".join(repr(uri.removeprefix(_MAY).removeprefix(_NAME)) for uri in rights.unknown)
            raise ValueError(
                f"{words}: what is allowed is {', '.join(ACTIONS)}; a name has 1…{NAME_CHARS} letters, digits, '.', '_'"
                " and '-', and begins with a letter or digit"
            )
        return rights

    @property
    def uris(self) -> list[str]:
        """The entries that say this in a certificate; none without limits."""
        return [_MAY + one for one in self._actions] + [_NAME + one for one in sorted(self.names or ())]

    @property
    def _actions(self) -> list[Action]:
        return [one for one in ACTIONS if one in (self.actions or ())]

    def allows(self, action: Action, name: str | None = None) -> bool:
        """Whether the holder may do that to the checkpoints of that name; None: of some name."""
        if self.unknown:
            return False
        is_named = name is None or self.names is None or name in self.names
        return is_named and (self.actions is None or action in self.actions)

    def __str__(self) -> str:
        """Such as "protect and read, for orders"."""
        if self.unknown:
            return f"nothing, since {' and '.join(map(repr, self.unknown))} is not understood here"
        actions = " and ".join(self._actions) or "everything"
        return f"{actions}, for {'any name' if self.names is None else ' and '.join(sorted(self.names))}"


EVERYTHING = Rights()
"""A certificate without limits; a peer without a certificate."""


def _is_name(text: str) -> bool:
    try:
        check_name(text)
    except ValueError:
        return False
    return True
