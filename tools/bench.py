"""How fast the codecs run here, and beside what: tools/bench.py [--quick] [--json FILE] [--plot FILE.svg]

Everything that is compared is measured in one process, in rounds, each round in another random order: memory bandwidth
of a shared machine moves by tens of percent within minutes, and what ran first would be at a disadvantage. A figure is
the median of the rounds; the spread is that between the quartiles. Time is what the thread had of its CPU, except for
whole checkpoints, which go by the clock: so others on the machine count only as far as they take bandwidth and caches.
GB/s count the bytes of the pages that go in, so a pass that compares 20 GB/s reads 40. References are restored before
each measurement, outside it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import platform
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lz4.block
import numpy as np
from numpy.typing import NDArray

from remus_ckpt.codec import CODECS, get_codec, kernels, scan
from remus_ckpt.pages import PAGE_SIZE, PAGE_WORDS, Pages

try:
    import zstandard
except ImportError:  # an optional dependency
    zstandard = None  # type: ignore[assignment]

BATCH = 1024
"""Pages in one call: the longest batch of the stream. Its output goes into one buffer that is used again."""
_NEAR = 64
"""Pages that stay in the cache between a compare pass and the writing of them."""
TWICE = "compare, and write twice"
COLUMNS: dict[str, tuple[str, int]] = {
    "0": ("words", 0),
    "1": ("words", 1),
    "16": ("words", 16),
    "64": ("words", 64),
    "256": ("words", 256),
    "1024": ("words", 1024),
    "line": ("block", 16),
    "512 B": ("block", 128),
}
"""Name → changed 32-bit words a page: at random places, or side by side at a random multiple of their number."""

Job = Callable[[], object]
Figure = dict[str, float]


def aligned(pages: int) -> Pages:
    """uint8[pages, 4096] at a multiple of 2 MiB, in huge pages where the system has them."""
    huge = 2 << 20
    memory = mmap.mmap(-1, pages * PAGE_SIZE + huge)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.uint8)
    start = -whole.ctypes.data % huge
    array = whole[start : start + pages * PAGE_SIZE].reshape(pages, PAGE_SIZE)
    array[:] = 0
    return array


def change(pages: Pages, kind: str, words: int, random: np.random.Generator) -> None:
    """Change that many words of each page, in place."""
    view = pages.view(np.uint32)
    if not words:
        return
    for page in view:
        if kind == "words":
            places = random.permutation(PAGE_WORDS)[:words]
        else:
            places = np.arange(words) + words * random.integers(0, PAGE_WORDS // words)
        page[places] ^= random.integers(1, 1 << 32, words, dtype=np.uint32)


def measure(jobs: dict[str, tuple[int, Job]], rounds: int, before: Job) -> dict[str, Figure]:
    """GB/s of each job: name → (bytes of pages, what to run). `before` runs ahead of each, untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    random = np.random.default_rng(0)
    names = list(jobs)
    for _ in range(rounds):
        for i in random.permutation(len(names)):
            before()
            run = jobs[names[i]][1]
            start = time.thread_time()
            run()
            seconds[names[i]].append(time.thread_time() - start)
    figures = {}
    for name, times in seconds.items():
        low, median, high = np.percentile(np.divide(jobs[name][0] / 1e9, times), [25, 50, 75])
        figures[name] = {"median": float(median), "spread": float((high - low) / median)}
    return figures


def batches(n: int) -> Iterable[slice]:
    return (slice(start, min(start + BATCH, n)) for start in range(0, n, BATCH))


def encoder(codec: str, kernel: str, new: Pages, reference: Pages, out: NDArray[np.uint8], update: bool) -> Job:
    wanted = get_codec(codec, kernel=kernel)

    def run() -> None:
        for part in batches(len(new)):
            wanted.encode(new[part], reference[part], update=update, out=out)

    return run


def encode_all(codec: str, kernel: str, new: Pages, old: Pages) -> list[bytes]:
    wanted = get_codec(codec, kernel=kernel)
    return [bytes(wanted.encode(new[part], old[part], update=False)) for part in batches(len(new))]


def applier(codec: str, kernel: str, encoded: list[bytes], pages: Pages, *, is_checked: bool = False) -> Job:
    """`is_checked`: as the restorer applies, which has checked the whole checkpoint before."""
    wanted = get_codec(codec, kernel=kernel)

    def run() -> None:
        for part, data in zip(batches(len(pages)), encoded, strict=True):
            wanted.apply(data, pages[part], checked=len(data) if is_checked else None)

    return run


def memcpy(target: Pages, source: Pages) -> Job:
    return lambda: ctypes.memmove(target.ctypes.data, source.ctypes.data, source.nbytes)


def limits(new: Pages, old: Pages, reference: Pages) -> dict[str, tuple[int, Job]]:
    """What nothing that looks at every byte, or writes every byte, gets past. The compare pass is a kernel's own, which
    prefetches as the encoders do; where there are two, the faster one counts. Who encodes pages of which everything
    has changed has to write them twice besides: into the stream, and into the reference."""
    jobs: dict[str, tuple[int, Job]] = {"memcpy": (new.nbytes, memcpy(reference, new))}
    for name, one in kernels.SCANS.items():
        jobs[f"compare {name}"] = new.nbytes, lambda c=one.compare: c(new, old)
        jobs[f"{TWICE} {name}"] = new.nbytes, write_twice(one.compare, new, reference)
    return jobs


def write_twice(compare: Callable[[Pages, Pages], object], new: Pages, reference: Pages) -> Job:
    out = aligned(_NEAR)

    def run() -> None:
        for start in range(0, len(new), _NEAR):
            part = slice(start, min(start + _NEAR, len(new)))
            compare(new[part], reference[part])
            np.copyto(out[: part.stop - start], new[part])
            np.copyto(reference[part], new[part])

    return run


def fold_limits(figures: dict[str, Figure]) -> dict[str, Figure]:
    best = {}
    for limit in ("compare", TWICE):
        found = [figures.pop(name) for name in list(figures) if name.startswith(f"{limit} ")]
        if found:
            best[limit] = max(found, key=lambda figure: figure["median"])
    return {**best, **figures}


def names() -> list[str]:
    return [name for name in kernels.KERNELS if name != "oracle"]


def made_up(pages: int, rounds: int) -> dict[str, dict[str, Figure]]:
    """Contiguous pages with known changes: column → job → figure."""
    random = np.random.default_rng(1)
    old, new, reference = aligned(pages), aligned(pages), aligned(pages)
    old[:] = random.integers(0, 256, old.shape, dtype=np.uint8)
    out = aligned(BATCH + 8).reshape(-1)
    table = {}
    for column, (kind, words) in COLUMNS.items():
        new[:] = old
        change(new, kind, words, random)
        jobs = limits(new, old, reference)
        for codec in CODECS:
            encoded = encode_all(codec, names()[0], new, old)
            for kernel in names():
                some = slice(0, pages if kernel != "numpy" else min(pages, BATCH))
                size = new[some].nbytes
                jobs[f"{codec} {kernel} encode"] = size, encoder(codec, kernel, new[some], reference[some], out, True)
                jobs[f"{codec} {kernel} encode only"] = size, encoder(codec, kernel, new[some], old[some], out, False)
                parts = encoded[: -(-len(new[some]) // BATCH)]
                jobs[f"{codec} {kernel} apply"] = size, applier(codec, kernel, parts, reference[some])
        table[column] = fold_limits(measure(jobs, rounds, lambda: np.copyto(reference, old)))
        progress(f"contiguous, {column}")
    return table


def scattered(region: int, pages: int, rounds: int) -> dict[str, dict[str, Figure]]:
    """Pages in random order in a large region, source and reference both."""
    random = np.random.default_rng(2)
    memory, reference = aligned(region), aligned(region)
    memory[:] = np.resize(random.integers(0, 256, 1 << 20, dtype=np.uint8), memory.shape)
    index = random.permutation(region)[:pages]
    out, copies = aligned(BATCH + 8).reshape(-1), aligned(pages)
    table = {}
    for column in ("0", "1", "16", "64"):
        kind, words = COLUMNS[column]
        np.copyto(reference, memory)
        changed = memory[index]
        change(changed, kind, words, random)
        memory[index] = changed
        old = reference[index]
        size = pages * PAGE_SIZE
        jobs: dict[str, tuple[int, Job]] = {
            "memcpy page by page": (size, lambda: memory.take(index, axis=0, out=copies, mode="clip")),
        }
        for name, one in kernels.SCANS.items():
            jobs[f"gather {name}"] = size, lambda gather=one.gather: gather(memory, index, copies)
            jobs[f"scatter {name}"] = size, lambda put=one.scatter, pages=changed: put(memory, index, pages)
        for codec in CODECS:
            for kernel in names():
                some = index if kernel != "numpy" else index[:BATCH]
                wanted = get_codec(codec, kernel=kernel)

                def run(wanted: Any = wanted, some: NDArray[np.int64] = some) -> None:
                    for part in batches(len(some)):
                        wanted.encode(memory, reference, index=some[part], reference_index=some[part], out=out)

                jobs[f"{codec} {kernel} encode"] = len(some) * PAGE_SIZE, run
                encoded = [
                    bytes(wanted.encode(memory, reference, index=some[p], reference_index=some[p], update=False))
                    for p in batches(len(some))
                ]

                def back(wanted: Any = wanted, some: NDArray[np.int64] = some, encoded: list[bytes] = encoded) -> None:
                    for part, data in zip(batches(len(some)), encoded, strict=True):
                        wanted.apply(data, reference, index=some[part])

                jobs[f"{codec} {kernel} apply"] = len(some) * PAGE_SIZE, back

        def restore(old: Pages = old) -> None:
            reference[index] = old

        table[column] = measure(jobs, rounds, restore)
        progress(f"scattered, {column}")
    return table


def read_corpus(path: Path) -> tuple[Pages, Pages]:
    with path.open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file).read()
    (n,) = struct.unpack_from("<Q", data, 8)
    both = np.frombuffer(data, dtype=np.uint8, offset=16 + 8 * n).reshape(2, n, PAGE_SIZE)
    old, new = aligned(n), aligned(n)
    old[:], new[:] = both
    return old, new


def compressors() -> dict[str, Callable[[Any], bytes]]:
    second: dict[str, Callable[[Any], bytes]] = {"lz4": lambda data: lz4.block.compress(data, store_size=False)}
    if zstandard:
        second["zstd"] = zstandard.ZstdCompressor(level=1).compress
    return second


def real(path: Path, rounds: int) -> dict[str, Any]:
    """The pages of a real process, before and after."""
    old, new = read_corpus(path)
    n = len(new)
    reference, out, difference = aligned(n), aligned(BATCH + 8).reshape(-1), np.empty((BATCH, PAGE_SIZE), np.uint8)
    jobs = limits(new, old, reference)
    percent: dict[str, float] = {}
    for codec in CODECS:
        for kernel in names():
            encoded = encode_all(codec, kernel, new, old)
            percent[codec] = 100 * sum(map(len, encoded)) / new.nbytes
            jobs[f"{codec} {kernel} encode"] = new.nbytes, encoder(codec, kernel, new, reference, out, True)
            jobs[f"{codec} {kernel} apply"] = new.nbytes, applier(codec, kernel, encoded, reference)
            checked = applier(codec, kernel, encoded, reference, is_checked=True)
            jobs[f"{codec} {kernel} apply checked"] = new.nbytes, checked
    for name, compress in compressors().items():

        def raw(compress: Callable[[Any], bytes] = compress) -> int:
            return sum(len(compress(new[part])) for part in batches(n))

        def xored(compress: Callable[[Any], bytes] = compress) -> int:
            size = 0
            for part in batches(n):
                delta = np.bitwise_xor(new[part], old[part], out=difference[: len(new[part])])
                size += len(compress(delta))
            return size

        jobs[f"raw + {name}"] = new.nbytes, raw
        jobs[f"xor + {name}"] = new.nbytes, xored
        percent[f"raw + {name}"], percent[f"xor + {name}"] = (100 * run() / new.nbytes for run in (raw, xored))
        for codec in CODECS:
            wanted = get_codec(codec)

            def both(wanted: Any = wanted, compress: Callable[[Any], bytes] = compress) -> int:
                return sum(len(compress(wanted.encode(new[p], reference[p], out=out))) for p in batches(n))

            np.copyto(reference, old)
            percent[f"{codec} + {name}"] = 100 * both() / new.nbytes
            jobs[f"{codec} + {name}"] = new.nbytes, both
    figures = fold_limits(measure(jobs, rounds, lambda: np.copyto(reference, old)))
    progress(path.name)
    return {"pages": n, "percent": percent, "figures": figures}


def whole_scan(pages: int, rounds: int) -> dict[str, Figure]:
    """Compare-with-shadow of memory that did not change, beside memcmp."""
    memory, shadow = aligned(pages), aligned(pages)
    libc = ctypes.CDLL(None)
    libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    jobs: dict[str, tuple[int, Job]] = {
        "memcmp": (memory.nbytes, lambda: libc.memcmp(memory.ctypes.data, shadow.ctypes.data, memory.nbytes))
    }
    for kernel in names():
        jobs[f"dirty_pages {kernel}"] = memory.nbytes, lambda k=kernel: scan.dirty_pages(memory, shadow, kernel=k)
    return measure(jobs, rounds, lambda: None)


def checkpoint(pages: int, rounds: int) -> dict[str, dict[str, float]]:
    """Scan, gather, encode, write: of a region in which a share of the pages changed in 16 words. Milliseconds.

    The source stands still during the first two, which are the pause; it runs on during the other two."""
    random = np.random.default_rng(3)
    memory, shadow = aligned(pages), aligned(pages)
    memory[:] = np.resize(random.integers(0, 256, 1 << 20, dtype=np.uint8), memory.shape)
    np.copyto(shadow, memory)
    codec = get_codec("rle")
    table = {}
    for share in (0.001, 0.01, 0.1):
        count = int(pages * share)
        buffer, out = aligned(count), aligned(count + count // 400 + 1).reshape(-1)
        times: list[list[float]] = []
        with tempfile.TemporaryFile() as file:
            for _ in range(rounds):
                touched = np.sort(random.permutation(pages)[:count])
                changed = memory[touched]
                change(changed, "words", 16, random)
                memory[touched] = changed
                stamps = [time.perf_counter()]
                found = scan.dirty_pages(memory, shadow)
                stamps.append(time.perf_counter())
                data = scan.gather(memory, found, buffer)
                stamps.append(time.perf_counter())
                encoded = codec.encode(data, shadow, reference_index=found, out=out)
                stamps.append(time.perf_counter())
                file.seek(0)
                file.write(encoded)
                file.flush()
                stamps.append(time.perf_counter())
                assert len(found) == count
                times.append(list(np.diff(stamps) * 1000))
        scan_ms, gather_ms, encode_ms, write_ms = (float(x) for x in np.median(times, axis=0))
        totals = np.sum(times, axis=1)
        table[f"{share:.1%}"] = {
            "pages": count, "scan": scan_ms, "gather": gather_ms, "encode": encode_ms, "write": write_ms,
            "pause": float(np.median(np.sum(np.array(times)[:, :2], axis=1))), "total": float(np.median(totals)),
        }  # fmt: skip
        progress(f"checkpoint, {share:.1%}")
    return table


def call(rounds: int) -> dict[str, float]:
    """What a call on four pages costs beyond its work, in µs, for the fastest kernel."""
    random = np.random.default_rng(4)
    pages = random.integers(0, 256, (4, PAGE_SIZE), dtype=np.uint8)
    reference, nothing = pages.copy(), pages[:0]
    change(pages, "words", 1, random)
    codec = get_codec("delta")
    out = np.empty(4 * codec.max_page_bytes, dtype=np.uint8)
    encode = codec._kernel.encode

    def best(run: Job) -> float:
        # Short laps, of which the quietest counts: what else the machine does is no part of a call.
        laps = []
        for _ in range(rounds * 30):
            start = time.perf_counter()
            for _ in range(200):
                run()
            laps.append((time.perf_counter() - start) / 200 * 1e6)
        return min(laps)

    call_us = best(lambda: codec.encode(pages, reference, update=False, out=out))
    kernel_us = best(lambda: encode(pages, None, reference, None, None, False, out))
    empty_us = best(lambda: encode(nothing, None, nothing, None, None, False, out))
    work_us = kernel_us - empty_us
    return {"work": work_us, "kernel call": kernel_us - work_us, "Codec.encode": call_us - work_us}


def machine() -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = models[0] if models else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "load": os.getloadavg()[0],
        "kernels": kernels.report(),
    }


def progress(text: str) -> None:
    print(f"… {text}", file=sys.stderr, flush=True)


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join([row[0].ljust(widths[0]), *cells]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def by_column(figures: dict[str, dict[str, Figure]], rows: list[str]) -> str:
    columns = list(figures)
    cells = [
        [row, *(f"{figures[c][row]['median']:.1f}" for c in columns),
         f"{np.median([figures[c][row]['spread'] for c in columns]):.0%}"]
        for row in rows
    ]  # fmt: skip
    return table(["GB/s", *columns, "spread"], cells)


def ratios(figures: dict[str, dict[str, Figure]], rows: list[str], to: str) -> str:
    columns = list(figures)
    cells = [[row, *(f"{figures[c][row]['median'] / figures[c][to]['median']:.2f}" for c in columns)] for row in rows]
    return table([f"÷ {to}", *columns], cells)


def show(results: dict[str, Any]) -> str:
    parts = []
    m = results["machine"]
    seen = " ".join(name for name, has in m["kernels"]["features"].items() if has)
    parts.append(
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['system']}, Python {m['python']}, "
        f"numpy {m['numpy']}; load {m['load']:.1f} at the start.\n"
        f"Kernel: {m['kernels']['kernel']} ({m['kernels']['why']}); CPU features seen: {seen}."
    )
    if "contiguous" in results:
        figures = results["contiguous"]
        rows = list(next(iter(figures.values())))
        encodes = [r for r in rows if r.endswith(" encode")]
        only = [r for r in rows if r.endswith(" encode only")]
        parts += [
            "### Contiguous pages: encode, reference updated",
            by_column(figures, [r for r in ("compare", "memcpy", TWICE) if r in rows] + encodes),
            "### Contiguous pages: encode, reference not updated",
            by_column(figures, only),
            "### Contiguous pages: apply (check included)",
            by_column(figures, [r for r in rows if r.endswith(" apply")]),
        ]
        if "compare" in rows:
            native = [r for r in encodes + only if "numpy" not in r]
            parts += ["### Share of the compare pass", ratios(figures, native, "compare")]
    if "scattered" in results:
        figures = results["scattered"]
        rows = list(next(iter(figures.values())))
        parts += [
            "### Scattered pages: random order, source and reference in 1 GiB each",
            by_column(figures, rows),
            ratios(figures, [r for r in rows if "encode" in r and "numpy" not in r], "memcpy page by page"),
        ]
    if "corpora" in results:
        corpora = results["corpora"]
        figures = {name: one["figures"] for name, one in corpora.items()}
        rows = list(next(iter(figures.values())))
        parts += [
            "### Pages of real processes",
            by_column(figures, rows),
            "Apply, as a share of memcpy:",
            ratios(figures, [r for r in rows if " apply" in r and "numpy" not in r], "memcpy"),
            "Percent of the raw bytes @ GB/s from end to end:",
        ]
        best = results["machine"]["kernels"]["kernel"]
        methods = list(next(iter(corpora.values()))["percent"])
        cells = []
        for method in methods:
            job = method if "+" in method else f"{method} {best} encode"
            cells.append([method, *(f"{one['percent'][method]:.1f} @ {one['figures'][job]['median']:.1f}"
                                    for one in corpora.values())])  # fmt: skip
        parts.append(table(["%  @  GB/s", *corpora], cells))
    if "scan" in results:
        cells = [[name, f"{one['median']:.1f}", f"{one['median'] / results['scan']['memcmp']['median']:.2f}"]
                 for name, one in results["scan"].items()]  # fmt: skip
        parts += ["### Looking for dirty pages where there are none", table(["GB/s", "", "÷ memcmp"], cells)]
    if "checkpoint" in results:
        head = ["dirty", "pages", "scan", "gather", "encode", "write", "pause", "total"]
        cells = [[share, str(one["pages"]), *(f"{one[key]:.2f}" for key in head[2:])]
                 for share, one in results["checkpoint"].items()]  # fmt: skip
        size = results["checkpoint_mib"]
        title = f"### A checkpoint of {size} MiB, rle, 16 words changed in a dirty page: ms; pause is scan and gather"
        parts += [title, table(head, cells)]
    if "call" in results:
        cells = [[name, f"{value:.2f}"] for name, value in results["call"].items()]
        parts += ["### A call on four pages: its work, and what comes on top, in µs", table(["", "µs"], cells)]
    return "\n\n".join(parts)


def plot(results: dict[str, Any], path: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "bench",
                         "svg.fonttype": "none"})  # fmt: skip
    colours = {"delta": "#1b6ca8", "rle": "#c8553d", "xbzrle": "#588b3a", "xbzrle-fold": "#8a5fa8"}
    best = results["machine"]["kernels"]["kernel"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2))

    figures = results["contiguous"]
    columns = list(figures)
    speeds = lambda row: [figures[c][row]["median"] for c in columns]  # noqa: E731
    for row, style in (("compare", "-"), ("memcpy", ":")):
        if row in figures[columns[0]]:
            left.plot(columns, speeds(row), style, color="#666666", linewidth=1.5, label=row)
    for codec in ("delta", "rle", "xbzrle"):
        for kernel, style, width in ((best, "o-", 1.5), ("numpy", "--", 1)):
            row = f"{codec} {kernel} encode"
            left.plot(columns, speeds(row), style, color=colours[codec], linewidth=width, label=f"{codec}, {kernel}")
    left.set(title="Encode, reference updated", xlabel="changed 32-bit words in a page", ylabel="GB/s of pages",
             ylim=(0, None))  # fmt: skip
    left.legend(fontsize=7, ncols=2, frameon=False)

    corpora = results.get("corpora", {})
    markers = dict(zip(corpora, "os^Dv", strict=False))
    for name, one in corpora.items():
        for method, percent in one["percent"].items():
            plain = "+" not in method
            row = f"{method} {best} encode" if plain else method
            if "fold" in method or (not plain and method.split(" ")[0] in ("delta", "xbzrle")):
                continue
            colour = colours.get(method.split(" ")[0], "#666666")
            right.plot(one["figures"][row]["median"], percent, markers[name], color=colour, markersize=6,
                       markerfacecolor=colour if plain else "none")  # fmt: skip
            if name == next(iter(corpora)):
                right.annotate(method, (one["figures"][row]["median"], percent), fontsize=7, xytext=(5, 3),
                               textcoords="offset points")  # fmt: skip
    for name, marker in markers.items():
        right.plot([], [], marker, color="#666666", label=name)
    right.set(title="Pages of real processes: low and to the right is good", xscale="log", yscale="log",
              xlabel="GB/s of pages, one thread", ylabel="percent of the raw bytes")  # fmt: skip
    right.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.endswith(".svg") else None)


def main() -> None:
    here = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and few: to see that it runs, not to quote")
    parser.add_argument("--rounds", type=int, help="how often everything is measured")
    parser.add_argument("--only", help="of contiguous,scattered,corpora,scan,checkpoint,call: those to run")
    corpora_here = here.parent / "shared" / "corpora"
    parser.add_argument("--corpora", type=Path, default=corpora_here, help="the directory of the *.pgpair.zst")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing; show and plot these figures")
    parser.add_argument("--plot", metavar="FILE.svg|png", help="draw them (needs the extra `bench`)")
    options = parser.parse_args()
    if options.from_json:
        results = json.loads(options.from_json.read_text())
    else:
        rounds = options.rounds or (3 if options.quick else 11)
        gib = (64 << 20 if options.quick else 1 << 30) // PAGE_SIZE
        pages = 1024 if options.quick else 8192
        corpora = sorted(options.corpora.glob("*.pgpair.zst")) if zstandard else []
        sections: dict[str, Callable[[], Any]] = {
            "contiguous": lambda: made_up(pages, rounds),
            "scattered": lambda: scattered(gib, pages, rounds),
            "corpora": lambda: {path.name.split(".")[0]: real(path, rounds) for path in corpora},
            "scan": lambda: whole_scan(gib // 4, rounds),
            "checkpoint": lambda: checkpoint(gib, min(rounds, 7)),
            "call": lambda: call(rounds),
        }
        if not corpora:
            progress(f"no corpora: no *.pgpair.zst in {options.corpora}, or no zstandard")
            del sections["corpora"]
        results = {"machine": machine(), "rounds": rounds, "checkpoint_mib": gib * PAGE_SIZE >> 20}
        for name, run in sections.items():
            if not options.only or name in options.only.split(","):
                results[name] = run()
    print(show(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
