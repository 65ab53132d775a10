"""The settings that every test runs under: no test hides."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest
from conftest import many
CASES = many(2, 5)
@pytest.mark.kill
def test_kill(): pass
@pytest.mark.kill
def test_kill_again(): pass
@pytest.mark.slow
def test_slow(): pass
@pytest.mark.root
def test_root(): pass
@pytest.mark.parametrize("case", range(CASES))
def test_case(case): pass
def test_skipped(): pytest.skip("no such machine")
"""


@pytest.mark.parametrize(
    ("options", "user", "passed", "expected"),
    [
        (
            ["-n", "2"],
            1000,
            2,
            [
                "skipped: 1 (needs root)",
                "skipped: 1 (no such machine)",
                "not run: 2 kill, 1 slow (run with --all)",
                "not run: most of the random cases (run with --all)",
            ],
        ),
        (["--all"], 0, 9, ["skipped: 1 (no such machine)"]),
        (["-m", "kill"], 0, 2, ["not run: most of the random cases (run with --all)"]),
    ],
)
def test_what_is_not_run_is_said(
    pytester: pytest.Pytester, options: list[str], user: int, passed: int, expected: list[str]
) -> None:
    conftest = (Path(__file__).parent / "conftest.py").read_text()
    pytester.makeconftest(f"{conftest}\nos.geteuid = lambda: {user}\n")
    pytester.makepyfile(test_one=TESTS)
    pytester.makeini("[pytest]\naddopts = --strict-markers\nfilterwarnings = error\npythonpath = .\n")
    done = pytester.runpytest_subprocess(*options)
    said = [line for line in done.outlines if line.startswith(("skipped: ", "not run: "))]
    assert sorted(said) == sorted(expected)
    assert done.parseoutcomes()["passed"] == passed
