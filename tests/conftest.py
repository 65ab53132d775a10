"""Settings for every test: Hypothesis tries the same examples each time, no clock decides, long suites need --all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

LONG = ("kill", "hostile", "slow")
"""Markers of suites that take minutes. They run with --all, by -m, or where a file or test is named."""
_left_out = pytest.StashKey[int]()
_is_all = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help=f"run the {', '.join(LONG)} suites too, and try more cases")


def pytest_configure(config: pytest.Config) -> None:
    global _is_all  # noqa: PLW0603 - decorators ask before there is a fixture
    _is_all = config.getoption("--all")
    settings.register_profile(
        "same-every-time",
        derandomize=True,
        deadline=None,
        print_blob=False,
        max_examples=many(25, 100),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile("same-every-time")


def many(usual: int, full: int) -> int:
    """How many cases a test tries: usually, and with --all."""
    return full if _is_all else usual


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_chosen = config.getoption("--all") or config.option.markexpr or any(".py" in name for name in config.args)
    left_out = [] if is_chosen else [item for item in items if any(item.get_closest_marker(name) for name in LONG)]
    config.stash[_left_out] = len(left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        chosen = set(items) - set(left_out)
        items[:] = [item for item in items if item in chosen]


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    yield
    if count := config.stash.get(_left_out, 0):
        terminalreporter.write_line(
            f"not run: {count} tests of the {', '.join(LONG)} suites, and most of the random cases; --all runs them too"
        )
