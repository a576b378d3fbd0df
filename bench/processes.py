"""A process and all that descends from it: started on one core, counted, and stopped for sure.

CPU time comes from the kernel's own clock of each process (`clock_getcpuclockid(3)`): it has
nanoseconds, where /proc/PID/stat has ticks of 10 ms, and it holds the time of threads that ended.
What children that ended took stands in their parent's /proc/PID/stat alone, in ticks.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")  # s
_SCHED = 2  # CPUCLOCK_SCHED of the kernel: the clock that counts what the scheduler gave
_PDEATHSIG = 1  # PR_SET_PDEATHSIG
_ASKED_TO_END = {signal.SIGINT, signal.SIGTERM}
_LIBC = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """A process that did not do what it was started for; the text says what it said last."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a process tree. RSS counts pages that processes share once for each."""

    rss: int
    pss: int
    peak: int  # the highest RSS since `Tree.forget_peak`, or since the start


class Tree:
    """The process `root` and every other of its session, which it must lead."""

    def __init__(self, root: int) -> None:
        self.root = root

    def pids(self) -> list[int]:
        return [pid for pid in _all_pids() if _in_session(pid, self.root)]

    def cpu(self) -> float:
        """CPU seconds that the tree has used so far."""
        return sum(_cpu(pid) for pid in self.pids())

    def memory(self) -> Memory:
        rss = pss = peak = 0
        for pid in self.pids():
            with suppress(OSError):  # it ended meanwhile
                rolled, status = _fields(pid, "smaps_rollup"), _fields(pid, "status")
                rss += rolled.get("Rss", 0)
                pss += rolled.get("Pss", 0)
                peak += status.get("VmHWM", 0)
        return Memory(rss, pss, peak)

    def rss(self) -> int:
        """Bytes; cheaper to ask for than `memory`."""
        pages = 0
        for pid in self.pids():
            with suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def forget_peak(self) -> None:
        """Let the peak begin anew at what the tree has now."""
        for pid in self.pids():
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def descriptors(self) -> int:
        total = 0
        for pid in self.pids():
            with suppress(OSError):
                total += len(os.listdir(f"/proc/{pid}/fd"))
        return total

    def threads(self) -> int:
        total = 0
        for pid in self.pids():
            with suppress(OSError):
                total += len(os.listdir(f"/proc/{pid}/task"))
        return total

    def kill(self, number: int) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold spaces: state, ppid, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _in_session(pid: int, leader: int) -> bool:
    try:
        fields = _stat(pid)
    except OSError:
        return False
    return int(fields[3]) == leader and fields[0] not in "ZX"


def _cpu(pid: int) -> float:
    try:
        fields = _stat(pid)
        own = time.clock_gettime_ns((~pid << 3) | _SCHED) / 1e9
    except OSError:
        return 0.0
    return own + (int(fields[13]) + int(fields[14])) * TICK


def _fields(pid: int, name: str) -> dict[str, int]:
    """The lines `Name:  12 kB` of a file of /proc/PID, in bytes."""
    found = {}
    for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            found[words[0].rstrip(":")] = int(words[1]) << 10
    return found


def raise_descriptor_limit() -> int:
    """Allow as many open files as the system lets us; children inherit it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def _set_up(core: int) -> Callable[[], None]:
    parent = os.getpid()

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKED_TO_END)
        _LIBC.prctl(_PDEATHSIG, signal.SIGKILL)  # should we die without a word
        if os.getppid() != parent:
            os._exit(1)
        os.sched_setaffinity(0, {core})

    return in_child


@contextmanager
def running(
    argv: Sequence[str | Path],
    *,
    core: int,
    log: Path,
    env: Mapping[str, str],
    cwd: Path,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program on one core, its output in `log`; whatever comes of its tree, none is left.

    At the end it gets SIGTERM and 5 s, then SIGKILL.
    """
    process = None
    try:
        with log.open("wb") as output, _undisturbed():
            process = subprocess.Popen(
                [os.fspath(word) for word in argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
                preexec_fn=_set_up(core),
            )
        yield process
    finally:
        if process is not None:
            stop(process)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off Ctrl-C: during a fork Python would lose it, or we would lose the child."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED_TO_END)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKED_TO_END)


def stop(process: subprocess.Popen[bytes], patience: float = 5.0) -> None:
    """End a process and its session: asked first, then made to, within `patience` + 1 s."""
    tree = Tree(process.pid)
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    finally:  # who is asked to end once more while it waits still leaves nobody behind
        with _undisturbed():
            left = _kill(process, tree)
    if left:
        raise Failed(f"processes that do not die: {left}")


def _kill(process: subprocess.Popen[bytes], tree: Tree) -> Sequence[int]:
    """Kill what is left, for at most 1 s; returns what is left then."""
    deadline = time.monotonic() + 1
    while (left := tuple(tree.pids())) and time.monotonic() < deadline:
        tree.kill(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    process.poll()
    return left


def tail(log: Path, size: int = 2000) -> str:
    """The last `size` bytes of a log, for who must be told what went wrong."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return file.read().decode("utf-8", "replace")
