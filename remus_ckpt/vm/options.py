"""How the values of QEMU's options are written: "a,b=c,…", or a JSON object.

Source: QEMU, util/keyval.c and util/qemu-option.c.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from remus_ckpt.errors import VmError


def chardev_of(short: str) -> str:
    """A character device in the long form, from the short one: unix:PATH,server=on → socket,path=PATH,server=on."""
    kind, colon, rest = short.partition(":")
    return f"{'socket' if kind == 'unix' else kind},path={rest}" if colon else short


def escaped(text: str) -> str:
    """A value that may have commas in it."""
    return text.replace(",", ",,")


def pairs_of(value: str, first: str, *, may_be_json: bool = False) -> Iterator[tuple[str, str]]:
    """The keys and values of "a,b=c,…", in which two commas mean one.

    first: the key of a first value without one
    may_be_json: QEMU reads this option as a JSON object too; in others it would find other keys in one than we do
    Raises VmError for a JSON object where there can be none, or with more than plain values.
    """
    if value.startswith("{"):
        if not may_be_json:
            raise VmError(f"{value!r:.80}: this option cannot be JSON: write key=value,…")
        try:
            found = json.loads(value)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not all(isinstance(one, (str, int, bool)) for one in found.values()):
            raise VmError(f"{value!r:.80}: this form of an option is not supported: write key=value,…")
        for key, one in found.items():
            yield key, ("on" if one else "off") if isinstance(one, bool) else str(one)
        return
    parts = re.findall(r"(?:[^,]|,,)+", value)
    for number, part in enumerate(parts):
        key, equals, rest = part.replace(",,", ",").partition("=")
        if equals:
            yield key, rest
        elif number == 0 and first:
            yield first, key
        else:
            yield (key[2:], "off") if key.startswith("no") and len(key) > 2 else (key, "on")


def joined(pairs: Mapping[str, str]) -> str:
    """The form that `pairs_of` reads."""
    return ",".join(f"{key}={escaped(one)}" for key, one in pairs.items())


def is_on(pairs: Mapping[str, str], *keys: str) -> bool:
    """Whether any of these is switched on."""
    return any(pairs.get(key) in ("on", "yes", "true", "y") for key in keys)
