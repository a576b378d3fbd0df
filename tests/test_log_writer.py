"""The thread behind the log: on real pipes, with readers that stall, leave or come late."""

from __future__ import annotations

import fcntl
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from beacon_proxy.ops import writer as writer_module
from beacon_proxy.ops.lines import JsonLines
from beacon_proxy.ops.telemetry import Telemetry
from beacon_proxy.ops.writer import LineWriter

SMALL = 4096  # bytes, the least that a pipe holds


class Pipe:
    """A pipe as small as there is, and its two ends as files."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, SMALL)
        self.reader: BinaryIO = os.fdopen(reading, "rb", buffering=0)
        self.writer: BinaryIO = os.fdopen(writing, "wb", buffering=0)

    def read_lines(self, count: int) -> list[bytes]:
        data = b""
        while data.count(b"\n") < count:
            piece = self.reader.read(1 << 16)
            assert piece
            data += piece
        return data.splitlines()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.reader.close()  # first: it frees a thread that is stuck in its write
    made.writer.close()


def test_lines_come_whole_and_in_order_and_at_once(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer)
    writer.info(b"first")
    assert pipe.read_lines(1) == [b"first"]
    for n in range(100):
        writer.msg(b"%d" % n)
    assert writer.flush()
    assert pipe.read_lines(100) == [b"%d" % n for n in range(100)]
    assert writer.close()
    assert writer.lost == 0


def test_lines_when_nobody_reads_hold_nobody_up_and_are_counted(pipe: Pipe) -> None:
    """Written on the event loop, a stalled `| less` once stopped every exchange."""
    writer = LineWriter(pipe.writer, max_lines=100)
    line = b"x" * SMALL
    writer.msg(line)
    writer.msg(line)
    began = time.monotonic()
    assert not writer.flush(0.05)
    for _ in range(1000):
        writer.msg(line)
    assert not writer.close(0.05)
    assert time.monotonic() - began < 20.0
    assert 898 <= writer.lost <= 902  # what the thread holds is not among the hundred
    kept = 1002 - writer.lost
    assert pipe.read_lines(kept) == [line] * kept
    assert writer.flush()


def test_lines_when_many_bytes_wait_are_dropped_however_few_they_are(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer, max_bytes=10 * SMALL)
    writer.msg(b"x" * 4 * SMALL)
    assert not writer.flush(0.03)  # it is the thread's now, and stuck
    for _ in range(50):
        writer.msg(b"x" * SMALL)
    assert 39 <= writer.lost <= 40


@pytest.mark.parametrize("bound", [{"max_lines": 100}, {"max_bytes": 1000}])
def test_lines_past_the_bound_are_dropped_each_and_counted(
    bound: dict[str, int], pipe: Pipe
) -> None:
    writer = LineWriter(pipe.writer, **bound)
    writer.msg(b"x" * 2 * SMALL)
    pipe.reader.read(1)  # the thread has taken it, and is stuck
    for n in range(250):
        writer.msg(b"%010d" % n)
    assert writer.lost == 150
    assert pipe.read_lines(101)[1:] == [b"%010d" % n for n in range(100)]
    assert writer.close()
    assert writer.lost == 150


def test_lines_when_logged_faster_than_read_are_each_written_in_order_or_counted(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "PAUSE", 0.0)
    writer = LineWriter(pipe.writer, max_lines=50)
    read: list[int] = []
    reader = threading.Thread(target=lambda: read.extend(map(int, pipe.reader.readlines())))
    reader.start()
    for n in range(20_000):
        writer.msg(b"%d" % n)
    assert writer.close(10.0)
    pipe.writer.close()
    reader.join()
    assert read == sorted(set(read))
    assert len(read) + writer.lost == 20_000


def test_lines_after_each_silence_wake_the_thread(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that comes just as the thread goes to sleep must not lie there until the next."""
    monkeypatch.setattr(writer_module, "PAUSE", 0.0)
    writer = LineWriter(pipe.writer)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for n in range(2000):
            writer.msg(b"%d" % n)
            assert pipe.read_lines(1) == [b"%d" % n]
    finally:
        sys.setswitchinterval(interval)
    assert writer.close()


def test_lines_when_who_reads_is_gone_are_lost_and_counted(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer)
    pipe.reader.close()
    for _ in range(3):
        writer.msg(b"line")
    assert writer.flush()
    writer.msg(b"line")
    assert writer.close()
    assert writer.lost == 4


def test_lines_when_the_descriptor_does_not_block_wait_for_room(pipe: Pipe) -> None:
    """A terminal shared with a program that made it so."""
    os.set_blocking(pipe.writer.fileno(), False)
    writer = LineWriter(pipe.writer)
    lines = [b"%d" % n * 1000 for n in range(10)]
    for line in lines:
        writer.msg(line)
    assert pipe.read_lines(10) == lines
    assert writer.close()
    assert writer.lost == 0


def test_lines_when_the_disk_was_full_begin_anew_on_their_own(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, write = LineWriter(pipe.writer), os.write
    begun, both_wait = threading.Event(), threading.Event()
    room = iter([6, 7, 0])  # bytes: the first line, some of the next two, none of the rest

    def filling(number: int, data: memoryview) -> int:
        begun.set()
        both_wait.wait()
        if not (left := next(room)):
            raise OSError(28, "No space left on device")
        return write(number, data[:left])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", filling)
        writer.msg(b"first")
        begun.wait()
        writer.msg(b"12345")
        writer.msg(b"67890")
        both_wait.set()
        assert writer.flush()
    writer.msg(b"whole")
    assert writer.close()
    assert pipe.read_lines(4) == [b"first", b"12345", b"6", b"whole"]
    assert writer.lost == 1


def test_lines_after_the_close_are_lost_and_counted(pipe: Pipe) -> None:
    writer = LineWriter(pipe.writer)
    assert writer.close(), "nothing was ever written"
    writer.msg(b"late")
    assert writer.close()
    assert writer.lost == 1


def test_lines_to_a_file_in_memory_are_written_too() -> None:
    file = io.BytesIO()
    writer = LineWriter(file)
    JsonLines(writer).logger.warning("backend.ejected", backend="a")
    assert writer.close()
    assert file.getvalue().endswith(b'"event":"backend.ejected","backend":"a"}\n')


@pytest.mark.parametrize("closed", [True, False])
def test_telemetry_when_there_is_no_stdout_counts_what_it_could_not_say(
    closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    file.close()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=file) if closed else None)
    telemetry = Telemetry(region="us-east", access_log=True)
    telemetry.notify("server.started")
    telemetry.close()
    assert b"beacon_log_lines_lost_total 1.0" in telemetry.render([])[0]


PROGRAM = """
from beacon_proxy.ops.telemetry import Telemetry
telemetry = Telemetry(region="us-east", access_log=True)
for n in range({count}):
    telemetry.notify("plugin.told", n=n)
"""


def test_process_when_it_ends_has_written_all_its_lines() -> None:
    program = [sys.executable, "-c", PROGRAM.format(count=3)]
    done = subprocess.run(program, capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, b"")
    assert [b'"n":%d}' % n in line for n, line in enumerate(done.stdout.splitlines())] == [True] * 3


def test_process_when_nobody_reads_ends_all_the_same(pipe: Pipe) -> None:
    """A thread that holds the lock of a buffered stdout kills the interpreter at its end."""
    program = [sys.executable, "-c", PROGRAM.format(count=5000)]
    with subprocess.Popen(program, stdout=pipe.writer, stderr=subprocess.PIPE) as process:
        assert process.wait(timeout=20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
