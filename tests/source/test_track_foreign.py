"""A userfaultfd over the memory of another process, which runs on as it was whatever happens to us."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tracking
from conftest import many
from tracking import in_fork, needs_compiler, needs_tracking, running, target_program  # noqa: F401

from remus_ckpt.errors import Untracked
from remus_ckpt.flag import Descriptor
from remus_ckpt.source.track import foreign, linux, seccomp
from remus_ckpt.source.track.written import Scanner, Userfault

pytestmark = [needs_tracking, needs_compiler]
THREADS = ["", "s", "r", "w", "srwt"]


def fetch(target: tracking.Target) -> Userfault:
    return Userfault(Descriptor(foreign.userfaultfd_of(target.pid, target.pidfd), "r+"))


@pytest.mark.parametrize("threads", THREADS)
def test_a_target_computes_on_as_if_nothing_had_been(threads: str, target_program: Path, tmp_path: Path) -> None:  # noqa: F811
    """It has its say about its registers, red zone, FPU, signal mask, and each blocking call."""
    with running(target_program, tmp_path / "memory", threads) as target:
        descriptors = sorted(os.listdir(f"/proc/{target.pid}/fd"))
        for _ in range(many(20, 200)):
            fetch(target).close()
            assert target.is_untouched()
        assert sorted(os.listdir(f"/proc/{target.pid}/fd")) == descriptors
        assert target.end() == "right"


def test_its_writes_are_found_from_outside(target_program: Path, tmp_path: Path) -> None:  # noqa: F811
    with running(target_program, tmp_path / "memory", "s") as target:
        userfault = fetch(target)
        rows = [line.split() for line in Path(f"/proc/{target.pid}/maps").read_text().splitlines()]
        start, stop = next(
            [int(word, 16) for word in row[0].split("-")] for row in rows if row[-1] == str(target.memory)
        )
        pagemap = os.open(f"/proc/{target.pid}/pagemap", os.O_RDONLY)
        userfault.register(start, stop)
        scanner = Scanner()
        scanner.arm(pagemap, start, stop)
        found: set[int] = set()
        deadline = time.monotonic() + 30
        while len(found) < tracking.TARGET_PAGES and time.monotonic() < deadline:
            for first, count in scanner.written(pagemap, start, stop).tolist():
                found.update(range(first - start // 4096, first - start // 4096 + count))
        assert found == set(range(tracking.TARGET_PAGES)), "it writes to one after the other"
        os.kill(target.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, target.pid, os.WSTOPPED)
        scanner.written(pagemap, start, stop)
        assert not len(scanner.written(pagemap, start, stop)), "a stopped process was seen to write"
        os.kill(target.pid, signal.SIGCONT)
        userfault.close()
        os.close(pagemap)
        assert target.end() == "right"


@pytest.mark.parametrize("threads", ["", "s", "srt"])
def test_it_runs_on_when_its_tracer_dies_at_any_step(threads: str, target_program: Path, tmp_path: Path) -> None:  # noqa: F811
    """Not a thread in epoll_wait: that ends after any stop, until the frame is laid that makes the call again."""
    with running(target_program, tmp_path / "memory", threads) as target:
        killed = 0
        for _ in range(many(1, 3)):
            for is_after in (False, True):
                for step in range(1, 60, many(3, 1)):
                    pid = os.fork()
                    if not pid:
                        linux.ptrace = tracking.Dying(step, is_after=is_after)
                        foreign.userfaultfd_of(target.pid, target.pidfd)
                        os._exit(0)
                    status = os.waitpid(pid, 0)[1]
                    assert target.process.poll() is None, f"killed after step {step}"
                    if not os.WIFSIGNALED(status):
                        break
                    killed += 1
                else:
                    pytest.fail("more steps than there are")
        assert killed >= many(8, 70)
        fetch(target).close()
        assert target.is_untouched()
        assert target.end() == "right"


def test_one_that_is_traced_is_left_alone(target_program: Path, tmp_path: Path) -> None:  # noqa: F811
    with running(target_program, tmp_path / "memory", "s") as target:
        linux.ptrace(linux.Request.SEIZE, target.pid)
        with pytest.raises(Untracked, match=str(os.getpid())):
            fetch(target)
        linux.ptrace(linux.Request.INTERRUPT, target.pid)
        os.waitpid(target.pid, linux.WALL)
        linux.ptrace(linux.Request.DETACH, target.pid)
        fetch(target).close()
        assert target.end() == "right"


def test_one_that_is_stopped_stays_so(target_program: Path, tmp_path: Path) -> None:  # noqa: F811
    with running(target_program, tmp_path / "memory", "s") as target:
        os.kill(target.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, target.pid, os.WSTOPPED)
        with pytest.raises(foreign.Stopped):
            fetch(target)
        assert f"{target.pid} (target) T " in Path(f"/proc/{target.pid}/stat").read_text()
        os.kill(target.pid, signal.SIGCONT)
        fetch(target).close()
        assert target.end() == "right"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_users_process_is_left_alone(target_program: Path, tmp_path: Path) -> None:  # noqa: F811
    def as_nobody() -> str:
        os.setresuid(65534, 65534, 65534)
        fetch(target).close()
        return "fetched"

    with running(target_program, tmp_path / "memory", "s") as target:
        assert in_fork(as_nobody).startswith("Untracked")
        assert target.end() == "right"


def test_one_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        pidfd = os.pidfd_open(process.pid)
    with pytest.raises(Untracked):
        foreign.userfaultfd_of(process.pid, pidfd)
    os.close(pidfd)


def test_on_other_machines_it_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(Untracked, match="riscv64"):
        foreign.userfaultfd_of(os.getppid(), 0)


USERFAULTFD, RT_SIGRETURN = tracking.CALLS.userfaultfd, tracking.CALLS.rt_sigreturn


@pytest.mark.parametrize(
    ("number", "answer"),
    [(USERFAULTFD, tracking.KILL), (USERFAULTFD, tracking.ERRNO | 1), (RT_SIGRETURN, tracking.KILL)],
)
def test_one_whose_filters_forbid_it_is_left_alone(number: int, answer: int) -> None:
    with filtered(tracking.filter_of(number, answer)) as process:
        pidfd = os.pidfd_open(process.pid)
        with pytest.raises(Untracked, match=str(number) if os.geteuid() == 0 else "filter"):
            foreign.userfaultfd_of(process.pid, pidfd)
        os.close(pidfd)
        check_filtered(process)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may read filters")
def test_filters_that_allow_it_do_not_matter() -> None:
    with filtered(tracking.filter_of(250, tracking.KILL)) as process:
        pidfd = os.pidfd_open(process.pid)
        os.close(foreign.userfaultfd_of(process.pid, pidfd))
        os.close(pidfd)
        check_filtered(process)


def filtered(program: bytes) -> subprocess.Popen[bytes]:
    """A process under a filter that echoes lines."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        f"import tracking; tracking.put_filter({program!r})\n"
        "while line := sys.stdin.buffer.readline(): sys.stdout.buffer.write(line); sys.stdout.flush()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    check_filtered(process)
    return process


def check_filtered(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"there?\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"there?\n"


ASM = """
#ifdef __x86_64__
__asm__(".globl _start\\n_start: mov $1, %edi\\n lea text(%rip), %rsi\\n mov $6, %edx\\n mov $1, %eax\\n syscall\\n"
        "1: mov $34, %eax\\n syscall\\n jmp 1b\\n text: .ascii \\"ready\\\\n\\"\\n ret");
#else
__asm__(".globl _start\\n_start: mov $4, %eax\\n mov $1, %ebx\\n mov $text, %ecx\\n mov $6, %edx\\n int $0x80\\n"
        "1: mov $29, %eax\\n int $0x80\\n jmp 1b\\n text: .ascii \\"ready\\\\n\\"\\n");
#endif
"""


@pytest.mark.parametrize(("bits", "reason"), [("-m32", "32-bit"), ("-m64", "signal")])
def test_a_program_of_32_bits_or_without_a_c_library_is_refused(bits: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "bare.c").write_text(ASM)
    flags = [bits, "-nostdlib", "-static", "-fno-pie", "-no-pie", "-o", str(tmp_path / "bare")]
    if subprocess.run(["cc", *flags, str(tmp_path / "bare.c")], capture_output=True, check=False).returncode:
        pytest.skip(f"the compiler does not know {bits}")
    with subprocess.Popen([str(tmp_path / "bare")], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            pidfd = os.pidfd_open(process.pid)
            with pytest.raises(Untracked, match=reason):
                foreign.userfaultfd_of(process.pid, pidfd)
            os.close(pidfd)
            assert process.poll() is None
        finally:
            process.kill()


# Filters, read


@pytest.mark.parametrize("argument", [None, 0xC018AA3F])
def test_a_filter_is_followed_as_the_kernel_does(argument: int | None) -> None:
    program = tracking.filter_of(16, tracking.ERRNO | 22, argument=argument)
    audit = linux.CALLS["x86_64"].audit
    assert not seccomp.allows(program, audit, 16, (5, 0xC018AA3F))
    assert seccomp.allows(program, audit, 16, (5, 1)) == (argument is not None)
    assert seccomp.allows(program, audit, 17)


def test_what_is_no_program_kills() -> None:
    random = np.random.default_rng(7)
    verdicts = {seccomp.verdict(random.bytes(8 * 30), bytes(64)) for _ in range(300)}
    assert seccomp.KILL in verdicts
    assert seccomp.verdict(b"", bytes(64)) == seccomp.KILL
    endless = tracking.INSTRUCTION.pack(0x05, 0, 0, 0xFFFFFFFF)
    assert seccomp.verdict(endless, bytes(64)) == seccomp.KILL


def test_arithmetic_of_a_filter() -> None:
    """(arch + 5) * 2 >> 1 ^ x, stored and loaded again."""
    code = [
        (0x20, 0, 0, 4),  # ld arch
        (0x04, 0, 0, 5),  # add 5
        (0x24, 0, 0, 2),  # mul 2
        (0x74, 0, 0, 1),  # rsh 1
        (0x07, 0, 0, 0),  # tax
        (0x02, 0, 0, 3),  # st M[3]
        (0x00, 0, 0, 7),  # ld 7
        (0x61, 0, 0, 3),  # ldx M[3]
        (0xAC, 0, 0, 0),  # xor x
        (0x84, 0, 0, 0),  # neg
        (0x16, 0, 0, 0),  # ret a
    ]
    program = b"".join(tracking.INSTRUCTION.pack(*row) for row in code)
    data = struct.pack("=iIQ6Q", 1, 100, 0, *[0] * 6)  # struct seccomp_data
    assert seccomp.verdict(program, data) == -((100 + 5) ^ 7) & 0xFFFFFFFF
