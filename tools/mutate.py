#!/usr/bin/env python3
"""Changes one thing in the package at a time, runs the tests that come to that line, and lists what no test noticed.

    mutate.py [--only FILE|FOLDER/]... [--tests PATH]... [--sample N] [--seed N] [--jobs N] [--all] [--list]
              [--json FILE]

First the suite runs once under coverage.py (which must be installed), so that it is known which tests reach which
line, also in the processes that they start, and how long each takes. A change is then tried by the tests that reach its
line, 15 seconds' worth from as many test files as there are. The first that fails kills the change; one whose tests
take three times as long as usual has timed out; any other survives. A survivor is either a promise that no test keeps,
or a change that makes no difference: somebody has to look. All of it works on copies of the checkout. General tools
remove no statements, or run the tests inside one process; here many tests start processes, and a lost fsync is what
matters.

Tests that fail without any change are named and left out. Exit codes: 0 nothing survives, 1 something does.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "remus_ckpt"
BUDGET_S = 15
"""So long may the tests of one change have taken when they were measured, one at least."""
MEASURE = """
import json, time, coverage, pytest

took, failed = {}, set()

@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    measured, begin = coverage.Coverage.current(), time.monotonic()
    measured.stop()
    measured.start()  # a test may have put its own tracer there
    measured.switch_context(item.nodeid)
    try:
        return (yield)
    finally:
        took[item.nodeid] = time.monotonic() - begin
        measured.switch_context("")

def pytest_runtest_logreport(report):
    if report.failed:
        failed.add(report.nodeid)

def pytest_unconfigure():
    with open("took.json", "w") as file:
        json.dump([{name: s for name, s in took.items() if name not in failed}, sorted(failed)], file)
"""
"""A plugin of pytest: whose lines are whose, and how long each test takes."""
SETTINGS = f"""
[run]
source = {PACKAGE}
parallel = true
data_file = covered/data
context = ${{PYTEST_CURRENT_TEST-}}
patch = subprocess
disable_warnings = trace-changed, no-data-collected, module-not-measured, no-contexts, couldnt-parse, already-imported
"""
MARK = "REMUS_MUTATE"
"""An environment variable: processes that outlive their test are found by it."""

COMPARE = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
SIGN = re.compile(r"not\s+in\b|is\s+not\b|[<>=!]=|[<>]|\bis\b|\bin\b")
SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any"}
QUIET = re.compile(r"_?log(ger)?\b|self\._?log\b")
"""Statements that only tell somebody something are left alone."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change. start, end: in the bytes of the file"""

    file: str
    line: int
    start: int
    end: int
    new: str
    what: str


class Finder(ast.NodeVisitor):
    """The changes that can be made to one file."""

    def __init__(self, file: str, source: str) -> None:
        self.file = file
        self.found: list[Mutant] = []
        self._bytes = source.encode()
        self._starts = [0]
        for line in self._bytes.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self.visit(ast.parse(source))

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self._starts[node.lineno - 1] + node.col_offset,
            self._starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self._bytes[start:end].decode()

    def _put(self, node: ast.AST, start: int, end: int, new: str) -> None:
        first, last = self._span(node)
        old = self._bytes[first:last].decode()
        became = (self._bytes[first:start] + new.encode() + self._bytes[end:last]).decode()
        what = f"{' '.join(old.split())[:70]} → {' '.join(became.split())[:70]}"
        self.found.append(Mutant(self.file, node.lineno, start, end, new, what))

    def _replace(self, node: ast.AST, new: str) -> None:
        self._put(node, *self._span(node), new)

    def _negate(self, node: ast.expr) -> None:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._replace(node, f"({self._text(node.operand)})")
        elif not (
            isinstance(node, ast.Compare)
            and len(node.ops) == 1
            and not isinstance(node.ops[0], ast.Lt | ast.Gt | ast.LtE | ast.GtE)
        ):
            self._replace(node, f"(not ({self._text(node)}))")

    def generic_visit(self, node: ast.AST) -> None:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    def visit_Assert(self, node: ast.Assert) -> None:
        """An assertion is about our own faults; no test trips it."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Wording is not tested."""

    def visit_MatchValue(self, node: ast.MatchValue) -> None:
        """A pattern takes no expression."""

    def visit_Raise(self, node: ast.Raise) -> None:
        self._replace(node, "pass")

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in self._text(node.test):
            return
        self._negate(node.test)
        self.generic_visit(node)

    visit_While = visit_IfExp = visit_If

    def visit_Compare(self, node: ast.Compare) -> None:
        for operator, before, after in zip(node.ops, [node.left, *node.comparators], node.comparators, strict=False):
            start, end = self._span(before)[1], self._span(after)[0]
            gap = self._bytes[start:end].decode()  # the sign, and parentheses that belong to neither side
            self._put(node, start, end, SIGN.sub(COMPARE[type(operator)], gap, count=1))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for position, value in enumerate(node.values):
            rest = [f"({self._text(other)})" for number, other in enumerate(node.values) if number != position]
            word = " and " if isinstance(node.op, ast.And) else " or "
            self._replace(node, f"({word.join(rest)})")
            self.visit(value)
        word = " or " if isinstance(node.op, ast.And) else " and "
        self._replace(node, f"({word.join(f'({self._text(value)})' for value in node.values)})")

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, ast.Add | ast.Sub):
            word = "-" if isinstance(node.op, ast.Add) else "+"
            self._replace(node, f"(({self._text(node.left)}) {word} ({self._text(node.right)}))")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            if QUIET.match(self._text(node.value.func)):
                return
            self._replace(node, "pass")
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, ast.Attribute) for target in node.targets):
            self._replace(node, "pass")
        if not any(isinstance(target, ast.Name) and target.id.startswith("__") for target in node.targets):
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._replace(node, "pass")
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self._replace(node, "return None")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self._replace(node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace(node, "break")

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in SWAPPED:
            self._replace(node.func, SWAPPED[node.func.id])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace(node, str(not node.value))
        elif isinstance(node.value, int):
            self._replace(node, f"({self._text(node)} + 1)")
        elif isinstance(node.value, float):
            self._replace(node, f"({self._text(node)} * 10)")


def mutants_of(root: Path, only: list[str]) -> Iterator[Mutant]:
    """All changes. only: files and folders of the package; all of TESTS where it is empty"""
    for path in sorted((root / PACKAGE).rglob("*.py")):
        file = str(path.relative_to(root / PACKAGE))
        if not only or file.startswith(tuple(only)):
            yield from Finder(file, path.read_text()).found


class Reached:
    """Which tests come to which lines, and what they cost. Made by Tree.measure."""

    def __init__(self, directory: Path) -> None:
        from coverage import CoverageData

        self._took: dict[str, float]
        self._took, self.failed = json.loads((directory / "took.json").read_text())
        data = CoverageData(str(directory / "covered/data"))
        data.read()
        self._lines: dict[str, dict[int, set[str]]] = {}
        for name in data.measured_files():
            file = str(Path(name).relative_to(directory / PACKAGE))
            # A process that a test has started says "name (call)", after the variable that pytest sets.
            self._lines[file] = {
                line: {context.split(" (")[0].split("|")[-1] for context in contexts} & self._took.keys()
                for line, contexts in data.contexts_by_lineno(name).items()
            }

    def tests(self, mutant: Mutant) -> tuple[list[str], float]:
        """The tests to try, cheapest first, and the seconds that they usually take. What only runs when the module is
        read is tried by the tests of its other lines."""
        lines = self._lines.get(mutant.file, {})
        found = next((lines[line] for line in range(mutant.line, 0, -1) if line in lines), set())
        files: dict[str, list[str]] = {}
        for name in sorted(found or set().union(*lines.values()), key=self._took.__getitem__):
            files.setdefault(name.split("::")[0], []).append(name)
        chosen: list[str] = []
        seconds = 0.0
        for name in (name for row in zip_longest(*files.values()) for name in row if name):
            if not chosen or seconds + self._took[name] <= BUDGET_S:
                chosen.append(name)
                seconds += self._took[name]
        return sorted(chosen, key=self._took.__getitem__), seconds


class Tree:
    """A copy of the checkout, in which one change at a time is tried."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        native = [str(path.relative_to(ROOT)) for path in (ROOT / PACKAGE).rglob("*.so")]
        for name in filter(None, [*names, *native]):
            if (ROOT / name).is_file():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, directory / name)
        compileall.compile_dir(directory, quiet=2)

    def measure(self, tests: list[str], marked: bool) -> Reached:
        """Run the tests once, and write down what they reach."""
        (self.directory / "measure.py").write_text(MEASURE)
        (self.directory / "measure.ini").write_text(SETTINGS)
        warnings = ["-W", "ignore::coverage.exceptions.CoverageWarning"]
        self.run(tests, marked, 7200, ["coverage", "run", "--rcfile=measure.ini", "-m"], ["-p", "measure", *warnings])
        combine = [sys.executable, "-m", "coverage", "combine", "-q", "--rcfile=measure.ini"]
        subprocess.run(combine, cwd=self.directory, check=True)
        return Reached(self.directory)

    def attempt(self, mutant: Mutant, tests: list[str], marked: bool, timeout_s: float) -> str:
        """What became of it: "survives", "timed out", or the test that failed."""
        path = self.directory / PACKAGE / mutant.file
        source = path.read_bytes()
        # A file of the same second and size would be taken from the cache.
        for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            cached.unlink()
        path.write_bytes(source[: mutant.start] + mutant.new.encode() + source[mutant.end :])
        try:
            return self.run(tests, marked, timeout_s)
        finally:
            path.write_bytes(source)

    def run(
        self, tests: list[str], marked: bool, timeout_s: float, under: Sequence[str] = (), more: Sequence[str] = ()
    ) -> str:
        """The same, of the tree as it is. under: a module that runs pytest"""
        temporary = self.directory / "temporary"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        command = [sys.executable, "-m", *under, "pytest", "-rfE", "--tb=no", "-p", "no:cacheprovider", *more]
        command += [
            f"--basetemp={temporary / 'pytest'}",
            *(["--all"] if marked else ["-m", "not kill and not hostile and not slow"]),
            *tests,
        ]
        mark = str(self.directory)
        environment = os.environ | {
            "PYTHONPATH": mark, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(temporary), MARK: mark,
        }  # fmt: skip
        with subprocess.Popen(
            command, cwd=mark, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                out, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # so that it ends what it has started
                try:
                    process.communicate(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    end_marked(mark)  # whoever holds the pipe
                    process.communicate()
                return "timed out"
            finally:
                end_marked(mark)
        if process.returncode == 0:
            return "survives"
        failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", out, re.MULTILINE)
        return failed[1] if failed else f"pytest ends with {process.returncode}: {out.strip()[-200:]}"


def end_marked(mark: str) -> None:
    """Kill what the tests of one copy have left behind."""
    needle = f"{MARK}={mark}".encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if int(name) != os.getpid() and needle in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                os.kill(int(name), signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FILE",
        help="store/writer.py, or all of store/; repeatable",
    )
    parser.add_argument(
        "--tests", action="append", metavar="PATH", help="the tests that may notice; all by default; repeatable"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="so many of the changes, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--all", action="store_true", help="run the long suites too: many times as long")
    parser.add_argument("--list", action="store_true", help="list the changes, and try none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there too")
    options = parser.parse_args()
    mutants = list(mutants_of(ROOT, options.only))
    total = len(mutants)
    if options.sample is not None and options.sample < total:
        mutants = sorted(
            random.Random(options.seed).sample(mutants, options.sample), key=lambda one: (one.file, one.start)
        )
    if options.list:
        print(*(f"{one.file}:{one.line}  {one.what}" for one in mutants), f"{len(mutants)} of {total}", sep="\n")
        return 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="remus-mutate-") as temporary, ThreadPoolExecutor(options.jobs) as pool:
        trees: Queue[Tree] = Queue()
        for number in range(options.jobs):
            (Path(temporary) / str(number)).mkdir()
            trees.put(Tree(Path(temporary) / str(number)))

        tree = trees.get()
        reached = tree.measure(options.tests or ["tests"], options.all)
        print(f"measured in {time.monotonic() - begin:.0f} s; fail without any change:", *reached.failed, flush=True)
        trees.put(tree)

        def attempt(mutant: Mutant) -> str:
            tests, seconds = reached.tests(mutant)
            if not tests:
                return "survives"
            tree = trees.get()
            try:
                return tree.attempt(mutant, ["-x", *tests], options.all, 3 * seconds + 20)
            finally:
                trees.put(tree)

        futures = {pool.submit(attempt, one): one for one in mutants}
        results: dict[Mutant, str] = {}
        for future in as_completed(futures):
            one = futures[future]
            results[one] = future.result()
            print(f"{one.file}:{one.line:<5} {one.what}  [{results[one]}]", flush=True)
    report(results, time.monotonic() - begin)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) | {"verdict": results[one]} for one in mutants], indent=1))
    return 1 if "survives" in results.values() else 0


def report(results: dict[Mutant, str], seconds: float) -> None:
    """What survives, as a table, and the counts of each file."""
    survivors = sorted((one for one in results if results[one] == "survives"), key=lambda one: (one.file, one.line))
    print(f"\n{'survives':32} change")
    for one in survivors:
        print(f"{f'{one.file}:{one.line}':32} {one.what}")
    print(f"\n{'file':32} {'changes':>8} {'killed':>8} {'timed out':>10} {'survive':>8}")
    for file in [*sorted({one.file for one in results}), ""]:
        verdicts = [verdict for one, verdict in results.items() if file in ("", one.file)]
        survive, late = verdicts.count("survives"), verdicts.count("timed out")
        killed = len(verdicts) - survive - late
        print(f"{file or 'all':32} {len(verdicts):8} {killed:8} {late:10} {survive:8}")
    print(f"{seconds:,.0f} s")


if __name__ == "__main__":
    sys.exit(main())
