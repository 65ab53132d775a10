"""The demo's worker: a ledger in shared memory. The number of transfers determines its whole state.

    python ledger.py FILE

Transfer number t moves an amount between two accounts, all three drawn from t itself. So after T transfers there is
exactly one right state, and `Ledger.faults` recomputes it. A transfer is several stores, and a pause may fall between
any two of them. Before the first store, the new values are written to an intent record; if that record is active when
the ledger is opened, they are written again.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = 0x52454D5553434B50
PAGE_WORDS = 512
ACCOUNTS = 1 << 15
JOURNAL = 1 << 17
# Where each part begins, in words of 64 bits: the head, the intent record, accounts and journal (entries of four).
_MAGIC, _SEED, _TRANSFERS = 0, 1, 2
INTENT_AT = PAGE_WORDS
ACTIVE_AT, COUNT_AT, STORES_AT = INTENT_AT, INTENT_AT + 1, INTENT_AT + 2
ACCOUNTS_AT = 2 * PAGE_WORDS
JOURNAL_AT = ACCOUNTS_AT + 4 * ACCOUNTS
WORDS = JOURNAL_AT + 4 * JOURNAL
BYTES = WORDS * 8
_MASK = (1 << 64) - 1


def _mix(value: Any) -> Any:
    """Scrambles a 64-bit number: an int, or an array of them."""
    if isinstance(value, int):
        value = value * 0x9E3779B97F4A7C15 & _MASK
        value = (value ^ value >> 31) * 0xBF58476D1CE4E5B9 & _MASK
        return value ^ value >> 29
    value = value * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ value >> np.uint64(31)) * np.uint64(0xBF58476D1CE4E5B9)
    return value ^ value >> np.uint64(29)


class Ledger:
    """A ledger in a buffer of `BYTES` bytes."""

    def __init__(self, buffer: Any) -> None:
        self._words = memoryview(buffer)[:BYTES].cast("B").cast("q")
        self._array: NDArray[np.int64] = np.frombuffer(buffer, dtype=np.int64, count=WORDS)

    def create(self, seed: int) -> None:
        """Begin a ledger: all balances are zero."""
        self._words[_SEED] = seed
        self._words[_MAGIC] = MAGIC

    @property
    def transfers(self) -> int:
        """How many have been made."""
        return self._words[_TRANSFERS]

    @property
    def in_transfer(self) -> bool:
        """Whether a transfer is unfinished."""
        return self._words[ACTIVE_AT] != 0

    def transfer(self) -> None:
        """Make the next transfer: intent first, then store by store."""
        words = self._words
        number = words[_TRANSFERS] + 1
        drawn = _mix(number ^ words[_SEED])
        source = drawn % ACCOUNTS
        target = (source + 1 + (drawn >> 20) % (ACCOUNTS - 1)) % ACCOUNTS
        amount = 1 + (drawn >> 40) % 1000
        source_at, target_at = ACCOUNTS_AT + 4 * source, ACCOUNTS_AT + 4 * target
        entry_at = JOURNAL_AT + 4 * (number % JOURNAL)
        stores = (
            (source_at, words[source_at] - amount),
            (source_at + 1, words[source_at + 1] + 1),
            (source_at + 3, number),
            (target_at, words[target_at] + amount),
            (target_at + 2, words[target_at + 2] + 1),
            (target_at + 3, number),
            (entry_at, number),
            (entry_at + 1, source),
            (entry_at + 2, target),
            (entry_at + 3, amount),
            (_TRANSFERS, number),
        )
        for i, (at, value) in enumerate(stores):
            words[STORES_AT + 2 * i] = at
            words[STORES_AT + 2 * i + 1] = value
        words[COUNT_AT] = len(stores)
        words[ACTIVE_AT] = number
        for at, value in stores:
            words[at] = value
        words[ACTIVE_AT] = 0

    def recover(self) -> bool:
        """Finish an unfinished transfer; returns whether there was one."""
        words = self._words
        if not words[ACTIVE_AT]:
            return False
        for i in range(words[COUNT_AT]):
            words[words[STORES_AT + 2 * i]] = words[STORES_AT + 2 * i + 1]
        words[ACTIVE_AT] = 0
        return True

    def faults(self) -> list[str]:
        """What is not as it must be after this number of transfers, recomputed from that number alone."""
        if self._words[_MAGIC] != MAGIC:
            return ["no ledger"]
        count = self.transfers
        numbers = np.arange(1, count + 1, dtype=np.uint64)
        drawn = _mix(numbers ^ np.uint64(self._words[_SEED]))
        source = (drawn % np.uint64(ACCOUNTS)).astype(np.int64)
        step = (drawn >> np.uint64(20)) % np.uint64(ACCOUNTS - 1)
        target = (source + 1 + step.astype(np.int64)) % ACCOUNTS
        amount = 1 + ((drawn >> np.uint64(40)) % np.uint64(1000)).astype(np.int64)
        expected = np.zeros((ACCOUNTS, 4), dtype=np.int64)
        expected[:, 0] = np.bincount(target, amount, ACCOUNTS) - np.bincount(source, amount, ACCOUNTS)
        expected[:, 1] = np.bincount(source, minlength=ACCOUNTS)
        expected[:, 2] = np.bincount(target, minlength=ACCOUNTS)
        both = np.stack([source, target], axis=1).reshape(-1)
        expected[both, 3] = np.repeat(numbers.astype(np.int64), 2)
        accounts = self._array[ACCOUNTS_AT:JOURNAL_AT].reshape(ACCOUNTS, 4)
        kept = slice(max(count - JOURNAL, 0), None)
        rows = numbers[kept].astype(np.int64)
        journal = self._array[JOURNAL_AT:].reshape(JOURNAL, 4)[rows % JOURNAL]
        entries = np.stack([rows, source[kept], target[kept], amount[kept]], axis=1)
        faults = []
        if accounts[:, 0].sum() != 0:
            faults.append(f"the balances come to {accounts[:, 0].sum()}, not to 0")
        if wrong := int((accounts != expected).any(axis=1).sum()):
            faults.append(f"{wrong} accounts are not what {count} transfers make of them")
        if wrong := int((journal != entries).any(axis=1).sum()):
            faults.append(f"{wrong} journal entries are wrong")
        return faults


def main() -> None:
    """Open the ledger, finish any unfinished transfer, and make transfers until killed."""
    with open(sys.argv[1], "r+b") as file:
        ledger = Ledger(mmap.mmap(file.fileno(), BYTES))
    ledger.recover()
    print("ready", flush=True)
    while True:
        ledger.transfer()


if __name__ == "__main__":
    main()
