"""Settings for every test: Hypothesis tries the same examples each time, no clock decides, long suites need --all."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from remus_ckpt.demo.brokers import Brokers

MARKERS = {
    "kill": ("ends real processes at random instants", "--all"),
    "hostile": ("peers that lie, stall or flood a real backup", "--all"),
    "brokers": ("starts NATS servers, some of which it kills", "--all"),
    "slow": ("tries very many cases, boots guest after guest, or runs commands on two hosts with a slow link", "--all"),
    "browser": ("drives Chromium; needs that of Debian, or is skipped", "--all"),
    "root": ("mounts file systems, makes cgroups and namespaces", "root"),
    "qemu": ("boots virtual machines", "qemu"),
    "node": ("compiles the grammar; tools/grammar.py names what that needs", "node"),
}
"""What the tests of each suite do, and what it takes to run them.

--all: they run too by -m, and where a file or test is named.
root, qemu, node: they are skipped where the machine lacks it.
"""
LONG = [name for name, (_, needs) in MARKERS.items() if needs == "--all"]
_left_out = pytest.StashKey[Counter[str]]()
_is_all = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help=f"run the {', '.join(LONG)} suites too, and try more cases")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """With -n auto: three for each core, since tests of services wait half of their time; very many would starve."""
    if config.option.dist == "no":
        config.option.dist = "worksteal"  # neighbours share fixtures, and none is left with the slow ones
    return min(3 * len(os.sched_getaffinity(0)), 8)


def pytest_configure(config: pytest.Config) -> None:
    global _is_all  # noqa: PLW0603 - decorators ask before there is a fixture
    _is_all = config.getoption("--all")
    if config.pluginmanager.has_plugin("cacheprovider"):
        # Each worker, and hundreds of children, would compile everything anew where the environment forbids to keep it.
        # It is a cache as that of pytest: with `-p no:cacheprovider` there is neither.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        sys.dont_write_bytecode = False
        _begin_elsewhere(config)
    # Children inherit which signals are ignored, and behind nohup and `&` tests send some of those. What is caught is
    # not inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    for name, (what, needs) in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {what}; needs {needs}")
    settings.register_profile(
        "same-every-time",
        derandomize=True,
        deadline=None,
        print_blob=False,
        max_examples=many(25, 100),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile("same-every-time")


def _begin_elsewhere(config: pytest.Config) -> None:
    """Have each worker of pytest-xdist begin to collect in another folder: in a fresh checkout, what one has compiled
    the others then find in the cache. `pytest_collection_modifyitems` puts the tests in the same order again."""
    here = Path(__file__).parent
    if [config.invocation_params.dir / one for one in config.args] != [here]:
        return
    folders = sorted({str(path.parent) for path in here.glob("*/test_*.py")})
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    begin = number * len(folders) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if begin:
        config.args[:] = folders[begin:] + folders[:begin]


def many(usual: int, full: int) -> int:
    """How many cases a test tries: usually, and with --all."""
    return full if _is_all else usual


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_chosen = _is_all or config.option.markexpr or any(".py" in name for name in config.args)
    items.sort(key=lambda item: item.path.parent)
    runs, left_out, suites = [], [], Counter[str]()
    for item in items:
        suite = None if is_chosen else next(filter(item.get_closest_marker, LONG), None)
        if suite is not None:
            suites[suite] += 1
            left_out.append(item)
            continue
        if os.geteuid() != 0 and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("qemu") and shutil.which("qemu-system-x86_64") is None:
            item.add_marker(pytest.mark.skip(reason="needs qemu-system-x86_64"))
        runs.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = runs
    config.stash[_left_out] = suites
    gc.collect()
    gc.freeze()  # ten thousand tests stay until the end: no collection need look at them again
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = dict(suites)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Whoever collects (a worker of pytest-xdist) is not who prints. Each worker leaves out the same tests."""
    if left_out := getattr(node, "workeroutput", {}).get("left_out"):
        node.config.stash[_left_out] = Counter(left_out)


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> Iterator[None]:
    """No test hides: the last lines say what did not run, and why."""
    yield
    skipped = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in skipped.items():
        terminalreporter.write_line(f"skipped: {count} ({reason.removeprefix('Skipped: ')})")
    if left_out := config.stash.get(_left_out, None):
        suites = ", ".join(f"{count} {name}" for name, count in left_out.items())
        terminalreporter.write_line(f"not run: {suites} (run with --all)")
    if not _is_all:
        terminalreporter.write_line("not run: most of the random cases (run with --all)")


@pytest.fixture(scope="session", autouse=True)
def no_memory_is_kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Images that backups have handed out in memory stay there as long as the machine runs: those of the tests go."""
    yield
    from remus_ckpt.store.warm import MemoryPlace

    for folder, _, names in os.walk(tmp_path_factory.getbasetemp()):
        if "store.json" in names:
            place = MemoryPlace(Path(folder), os.path.basename(folder))
            shutil.rmtree(place.directory, ignore_errors=True)
            place.remove()


@pytest.fixture(scope="session")
def brokers() -> Iterator[Brokers]:
    """Three NATS servers with a commit log. A test that ends one starts it again."""
    from remus_ckpt.demo.brokers import Brokers

    with Brokers() as them:
        them.make_log()
        yield them


@pytest.fixture(scope="session")
def grammar(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The class that the grammar compiles to, once for each process of the tests."""
    from grammar_trees import NO_COMPILER, TOOL

    out = tmp_path_factory.mktemp("grammar")
    ran = subprocess.run([sys.executable, str(TOOL), str(out)], capture_output=True, text=True, check=False)
    if ran.returncode == NO_COMPILER:
        pytest.skip(ran.stderr.strip())
    assert ran.returncode == 0, ran.stderr
    spec = importlib.util.spec_from_file_location("remus_stream", out / "remus_stream.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.RemusStream
