"""QEMU streams: how fast the sender is beside memcpy, and the reader beside cp: `python tools/bench_qemu.py --help`.

Sender: rounds of 8,192 pages (32 MiB) that lie in memory one after the other, through a cache that holds them all; look
up, zero test, encoding, framing, cache brought up to date; nothing is written anywhere. In each measurement the pages
are those of the round before but for the words of the column. Beside it, memcpy of the same pages; interleaved, in
random order, by the thread's CPU time. GB/s count the bytes of the pages.

QEMU's figures are those of its AVX-512 encoder (v8 and later) with the two copies that its sender makes for each page,
as shares of memcpy, measured on an EPYC with AVX-512: see QEMU below. They are given so that ratios can be compared;
this machine's own vector width counts for ours. "as QEMU" is its way on this machine: each page is copied, the copy is
encoded, and copied into the cache if it has changed, with our encoder and 256 pages a call, so that it is faster than
QEMU's would be; looking up, zero test and records are left out.

Reader: a stream of a guest of --mib MiB, whose later rounds are XBZRLE pages, in the page cache; read, checked and
applied, as `verify` does, by the clock and by CPU time. GB/s count the guest memory that the stream's pages stand for.
Beside it, cp of the file to /dev/null.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench import COLUMNS, aligned, change, measure

from remus_ckpt.codec import get_codec, kernels
from remus_ckpt.codec.page_cache import PageCache, room_for
from remus_ckpt.codec.xbzrle import MAX_PAGE_BYTES
from remus_ckpt.files import StreamFile
from remus_ckpt.limits import MIB
from remus_ckpt.machines import Machine
from remus_ckpt.pages import PAGE_SIZE, Pages
from remus_ckpt.qemu_sender import CALL_PAGES, Part, QemuSender
from remus_ckpt.restorer import Anonymous
from remus_ckpt.wire.qemu import events

QEMU = {"0": 0.83, "1": 0.75, "16": 0.44, "64": 0.17, "256": 0.095, "1024": 0.39, "line": 0.63, "512 B": 0.54}
"""Encoder with two copies ÷ memcpy, by column: 14.3 ÷ 17.2, 11.7 ÷ 15.6 and so on, GB/s."""
WANTED = 1.5
"""How many times QEMU's share ours is to be."""


def sender(pages: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each column."""
    random = np.random.default_rng(1)
    old, new, target = aligned(pages), aligned(pages), aligned(pages)
    old[:] = random.integers(1, 256, old.shape, dtype=np.uint8)
    numbers, out = np.arange(pages), np.empty(room_for(CALL_PAGES), dtype=np.uint8)
    codec, copy, room = get_codec("xbzrle"), aligned(CALL_PAGES), out[: CALL_PAGES * MAX_PAGE_BYTES]
    rows = []
    for column, (kind, words) in COLUMNS.items():
        new[:] = old
        change(new, kind, words, random)
        cache = PageCache(pages)
        cache.pages = aligned(pages)

        def before(cache: PageCache = cache) -> None:
            cache.pages[:], cache.held[:] = old, numbers

        def send(cache: PageCache = cache) -> None:
            for at in range(0, pages, CALL_PAGES):
                cache.records(new[at : at + CALL_PAGES], None, numbers[at : at + CALL_PAGES], 0, out, encodes=True)

        def as_qemu(cache: PageCache = cache, is_changed: bool = words > 0) -> None:
            for at in range(0, pages, CALL_PAGES):
                held = cache.pages[at : at + CALL_PAGES]
                copy[:] = new[at : at + CALL_PAGES]
                codec.encode(copy, held, update=False, out=room)
                if is_changed:
                    held[:] = copy

        jobs: dict[str, tuple[int, Callable[[], object]]] = {
            "memcpy": (new.nbytes, lambda: ctypes.memmove(target.ctypes.data, new.ctypes.data, new.nbytes)),
            "sender": (new.nbytes, send),
            "as_qemu": (new.nbytes, as_qemu),
            "compare": (new.nbytes, lambda: kernels.SCANS[kernels.wanted()].compare(new, old)),
        }
        found = measure(jobs, rounds, before)
        share = found["sender"]["median"] / found["memcpy"]["median"]
        rows.append(
            {
                "column": column,
                **{name: round(figure["median"], 2) for name, figure in found.items()},
                "share": round(share, 3),
                "qemu_share": QEMU[column],
                "times_qemu": round(share / QEMU[column], 2),
                "times_here": round(found["sender"]["median"] / found["as_qemu"]["median"], 2),
            }
        )
    return rows


def write_stream(path: Path, mib: int, later: int) -> dict[str, int]:
    """A guest's migration with some rounds in which a third of memory changes in a few words a page."""
    random = np.random.default_rng(2)
    pages = mib * MIB // PAGE_SIZE
    memory: Pages = np.zeros((pages, PAGE_SIZE), dtype=np.uint8)
    memory[pages // 4 :] = random.integers(0, 256, (pages - pages // 4, PAGE_SIZE), dtype=np.uint8)
    block = events.RamBlock(name="pc.ram", size=mib * MIB, page_size=PAGE_SIZE)
    machine = events.Configuration(machine="pc-i440fx-10.0")
    with QemuSender([block], configuration=machine, cache_bytes=mib * MIB, is_fixed=True) as sending:
        with open(path, "wb") as file:
            file.write(sending.begin())
            for number in range(later + 1):
                numbers = np.arange(pages) if number == 0 else np.sort(random.choice(pages, pages // 3, replace=False))
                if number:
                    for at in random.integers(0, PAGE_SIZE // 4, 16):
                        memory.view(np.uint32)[numbers, at] += np.uint32(1)
                parts = [Part(block.name, numbers, memory, numbers)]
                for buffer in sending.end(None, parts) if number == later else sending.round(parts):
                    file.write(buffer)
        counts = sending.statistics()
    cache = counts["xbzrle-cache"]
    return {"pages": counts["normal"] + counts["duplicate"], "xbzrle": cache["pages"] - cache["overflow"]}


def reader(mib: int, rounds: int) -> dict[str, Any]:
    """Speeds of reading a stream, each the median of some rounds that take turns."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("REMUS_BENCH_DIR")) as folder:
        path = Path(folder) / "stream"
        counts = write_stream(path, mib, 6)
        guest_bytes = (counts["pages"] + counts["xbzrle"]) * PAGE_SIZE
        times: dict[str, list[tuple[float, float]]] = {"read": [], "cp": []}

        def read() -> None:
            with Machine(StreamFile(str(path)), [], home=lambda _: Anonymous()) as machine:
                machine.read()
                assert machine.blocks.counts["xbzrle"] == counts["xbzrle"] and machine.blocks.is_whole

        def cp() -> None:
            with open(path, "rb", buffering=0) as file:
                room = bytearray(MIB)
                while file.readinto(room):
                    pass

        for _ in range(rounds):
            for name, run in (("read", read), ("cp", cp)):
                wall, spent = time.monotonic(), time.process_time()
                run()
                times[name].append((time.monotonic() - wall, time.process_time() - spent))
        size = path.stat().st_size
    walls = {name: float(np.median([one[0] for one in found])) for name, found in times.items()}
    spent = {name: float(np.median([one[1] for one in found])) for name, found in times.items()}
    return {
        "stream_bytes": size,
        "guest_bytes": guest_bytes,
        **counts,
        "read_gb_s": round(guest_bytes / 1e9 / walls["read"], 2),
        "read_gb_s_cpu": round(guest_bytes / 1e9 / spent["read"], 2),
        "cp_gb_s": round(size / 1e9 / walls["cp"], 2),
        "cp_gb_s_cpu": round(size / 1e9 / spent["cp"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run?")
    parser.add_argument("--mib", type=int, default=512, help="memory of the guest whose stream is read")
    parser.add_argument("--only", choices=("sender", "reader"))
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    rounds = 3 if options.quick else 15
    print(f"{platform.processor() or platform.machine()}, kernel {kernels.wanted()}, load {os.getloadavg()[0]:.1f}")
    report: dict[str, Any] = {"kernel": kernels.wanted()}
    if options.only != "reader":
        report["sender"] = rows = sender(1024 if options.quick else 8192, rounds)
        print("| words | memcpy | compare | sender | ÷ memcpy | QEMU ÷ memcpy | times QEMU | as QEMU | times that |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
        for row in rows:
            names = ("column", "memcpy", "compare", "sender", "share", "qemu_share", "times_qemu")
            names += ("as_qemu", "times_here")
            print(f"| {' | '.join(str(row[name]) for name in names)} |")
        times = np.array([row["times_qemu"] for row in rows])
        print(f"geometric mean {np.exp(np.log(times).mean()):.2f} times QEMU; wanted {WANTED}")
    if options.only != "sender":
        report["reader"] = found = reader(64 if options.quick else options.mib, 3 if options.quick else 5)
        print(json.dumps(found))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
