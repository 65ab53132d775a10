"""What a certificate allows, by the entries that it holds."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remus_ckpt.link.rights import ACTIONS, EVERYTHING, Rights

MAY, NAME = "urn:remus-ckpt:may:", "urn:remus-ckpt:name:"


def allowed(rights: Rights) -> set[tuple[str, str]]:
    return {(what, name) for what in ACTIONS for name in ("orders", "desk") if rights.allows(what, name)}


ALL = set(itertools.product(ACTIONS, ("orders", "desk")))


@pytest.mark.parametrize(
    ("uris", "expected"),
    [
        ([], ALL),
        (["https://example.net/", "spiffe://a/b"], ALL),
        ([MAY + "protect"], {("protect", "orders"), ("protect", "desk")}),
        ([MAY + "read", MAY + "failover", NAME + "desk"], {("read", "desk"), ("failover", "desk")}),
        ([NAME + "orders"], {(what, "orders") for what in ACTIONS}),
        ([NAME + "orders", NAME + "desk"], ALL),
        ([NAME + "else"], set()),
        ([MAY + "protect", "https://example.net/"], {("protect", "orders"), ("protect", "desk")}),
    ],
)
def test_what_is_allowed(uris: list[str], expected: set[tuple[str, str]]) -> None:
    rights = Rights.of(uris)
    assert allowed(rights) == expected
    assert Rights.of(rights.uris) == rights


@pytest.mark.parametrize(
    "uri",
    [
        MAY + "prune",
        MAY,
        MAY + "Read",
        MAY + "read ",
        MAY + "read,failover",
        NAME,
        NAME + "a/b",
        NAME + "x" * 65,
        NAME + "orders\0",
        NAME + "*",
        "urn:remus-ckpt:",
        "urn:remus-ckpt:until:noon",
        "URN:Remus-Ckpt:may:read",
    ],
)
def test_an_entry_that_is_not_understood_allows_nothing(uri: str) -> None:
    for others in ([], [MAY + "read"], [NAME + "orders"]):
        rights = Rights.of([*others, uri])
        assert rights.unknown == (uri,)
        assert allowed(rights) == set()


@given(st.lists(st.text(max_size=12).map(lambda text: "urn:remus-ckpt:" + text) | st.text(max_size=30), max_size=4))
def test_no_entry_widens(uris: list[str]) -> None:
    assert allowed(Rights.of([MAY + "read", NAME + "desk", *uris])) <= {("read", "desk"), ("read", "orders")} | (
        ALL if any(uri.startswith((MAY, NAME)) for uri in uris) else set()
    )


def test_limits_that_are_no_limits_are_refused() -> None:
    assert Rights.limited([], []) == EVERYTHING
    assert Rights.limited(["read"], ["desk"]).uris == [MAY + "read", NAME + "desk"]
    for actions, names in ((["fly"], []), (["read", ""], []), ([], ["a b"]), ([], [""])):
        with pytest.raises(ValueError):
            Rights.limited(actions, names)


def test_the_specification_names_every_action() -> None:
    text = (Path(__file__).parents[2] / "specs" / "keys.md").read_text()
    assert [line.split("`")[1] for line in text.splitlines() if line.startswith(f"| `{MAY}")] == [
        MAY + action for action in ACTIONS
    ]
