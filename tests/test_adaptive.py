"""The adaptive limit finds what a server takes, follows it, and rests.

`Server` is a queueing model on a clock of its own, in two kinds as they were seen of real servers:
one that lets wait what it cannot run yet (llama.cpp, vLLM), and one that says 503 (vLLM with
`--max-num-queued-reqs`, TGI with 429). Clients always want more than it takes, unless a test says
otherwise, so its true limit is also the best one.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from beacon_proxy.contracts import (
    Backend,
    Exchange,
    Fault,
    Outcome,
    Permit,
    Prompt,
    Stage,
    Verdict,
)
from middleware.capacity import Adaptive, Capacity
from middleware.capacity.adaptive import Learner

from .kit import (
    Answer,
    BackendConn,
    RawBackend,
    RawClient,
    chat,
    each_request,
    json_answer,
    json_bytes,
    proxy,
)

BACKEND = Backend("b", "openai", url="", scheme="http", host="h", port=1, max_in_flight=64)


@dataclass
class Server:
    """A server with room for `slots`, its clients, and the gate before it.

    Times of work vary by half either way; `sizes` are those of the requests, and the time to the
    first content grows with them from `prefill`, that of 200 bytes.
    """

    slots: int
    refuses: bool = False
    stream_part: float = 1.0  # of the requests
    prefill: float = 0.1  # s
    work: float = 2.0  # s from the first content to the end
    clients: int = 100
    sizes: tuple[int, ...] = (200,)
    backend: Backend = BACKEND
    seed: int = 1
    rest: float = 1.0  # s that it is left alone after it refused, as health does
    leave: float = 0.0  # the part of clients that leave before the end
    now: float = 0.0
    limits: list[tuple[float, int]] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.gate = Capacity(adaptive=Adaptive(enabled=True), clock=lambda: self.now)
        self._rng = random.Random(self.seed)
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._waiting: deque[Callable[[], None]] = deque()
        self._running = 0
        self._rests_until = 0.0

    @property
    def limit(self) -> int:
        return self.gate.concurrency_limit(self.backend)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        self._admit()
        while self._events and self._events[0][0] < until:
            self.now, _, event = heapq.heappop(self._events)
            event()
            self._admit()
            if not self.limits or self.limits[-1][1] != self.limit:
                self.limits.append((self.now, self.limit))
        self.now = until

    def mean(self, since: float = 0.0) -> float:
        """Of the limit, over time."""
        told = [*self.limits, (self.now, self.limit)]
        spans = [(max(a, since), b, limit) for (a, limit), (b, _) in itertools.pairwise(told)]
        spans = [(b - a, limit) for a, b, limit in spans if b > a]
        return sum(s * limit for s, limit in spans) / sum(s for s, _ in spans)

    def band(self, since: float = 0.0) -> tuple[int, int]:
        """The least and the greatest limit since then."""
        before = [limit for at, limit in self.limits if at <= since][-1:]
        seen = [*before, *(limit for at, limit in self.limits if at > since)]
        return min(seen), max(seen)

    def _at(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))

    def _admit(self) -> None:
        while self.clients > 0 and self.now >= self._rests_until:
            asked = Exchange(
                id=str(next(self._numbers)),
                method="POST",
                target=b"/",
                path="/",
                headers=(),
                started=self.now,
                inference=True,
                model="m",
                stream=self._rng.random() < self.stream_part,
                body=bytes(self._rng.choice(self.sizes)),
            )
            permit = self.gate.admit(asked, self.backend)
            if permit is None:
                return
            self.clients -= 1
            self._ask(asked, permit)

    def _ask(self, asked: Exchange, permit: Permit) -> None:
        started = self.now
        if self._running < self.slots:
            self._work(asked, permit, started)
        elif self.refuses:
            busy = Outcome(self.backend, 1, Verdict.BUSY, Stage.DONE, Fault.BUSY, 503)
            self._at(0.01, lambda: self._end(asked, permit, replace(busy, started=started)))
        else:
            self._waiting.append(lambda: self._work(asked, permit, started))

    def _work(self, asked: Exchange, permit: Permit, started: float) -> None:
        self._running += 1
        size = len(asked.body or b"")
        first = self.prefill * size / 200 * self._rng.uniform(1.0, 1.3)
        rest = self.work * self._rng.uniform(0.5, 1.5)
        whole = self.now - started + first + rest
        good = Outcome(
            self.backend,
            1,
            Verdict.GOOD,
            Stage.DONE,
            status=200,
            sent=True,
            started=started,
            ttft=self.now - started + first if asked.stream else whole,
            duration=whole,
            bytes_in=int(rest * 1000),
        )
        if self._rng.random() < self.leave:
            good = replace(good, verdict=Verdict.NEUTRAL, fault=Fault.CLIENT_CLOSED)
        self._at(first + rest, lambda: self._done(asked, permit, good))

    def _done(self, asked: Exchange, permit: Permit, outcome: Outcome) -> None:
        self._running -= 1
        while self._waiting and self._running < self.slots:
            self._waiting.popleft()()
        self._end(asked, permit, outcome)

    def _end(self, asked: Exchange, permit: Permit, outcome: Outcome) -> None:
        self.clients += 1
        self.ends[outcome.verdict] += 1
        asked.body = None  # as the core does where the answer was committed
        permit.release()
        assert self.gate.observe is not None
        self.gate.observe(asked, outcome)
        if outcome.verdict is Verdict.BUSY:
            self._rests_until = self.now + self.rest
            self._at(self.rest, lambda: None)


# -- it converges, and rests

STEADY = 1200.0  # s after it has settled
SETTLED = 300.0


@pytest.mark.parametrize("slots", [2, 8, 30])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_limit_when_the_server_lets_wait_rests_near_what_it_runs(slots: int, seed: int) -> None:
    """Stated band, of streams: never below 3/4 of the true limit, never above it by half + 1."""
    server = Server(slots, seed=seed)
    server.run(SETTLED + STEADY)
    least, most = server.band(since=SETTLED)
    assert slots * 0.75 <= least <= most <= slots * 1.5 + 1
    assert abs(server.mean(since=SETTLED) - slots) <= max(1.0, slots * 0.15)


@pytest.mark.parametrize("slots", [2, 8, 30])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_limit_when_the_server_refuses_rests_at_what_it_takes(slots: int, seed: int) -> None:
    server = Server(slots, refuses=True, seed=seed)
    server.run(SETTLED)
    before = Counter(server.ends)
    server.run(STEADY)
    least, most = server.band(since=SETTLED)
    assert slots - 1 <= least <= most <= slots + 1
    late = server.ends - before
    assert late[Verdict.BUSY] < 0.01 * late[Verdict.GOOD]


def test_limit_when_documents_are_asked_for_is_not_lowered_by_how_long_they_take() -> None:
    """The first content of a document is its last, too: it tells how much was written."""
    server = Server(8, stream_part=0.0, backend=replace(BACKEND, max_in_flight=16))
    server.run(SETTLED)
    assert server.band() == (16, 16)


def test_limit_costs_no_throughput() -> None:
    """Against the same server behind a gate that knows its true limit."""
    found, known = Server(8), Server(8, backend=replace(BACKEND, max_in_flight=8))
    for server in (found, known):
        server.run(SETTLED + STEADY)
    assert found.ends[Verdict.GOOD] > 0.97 * known.ends[Verdict.GOOD]


def test_limit_is_the_operators_where_the_server_takes_more() -> None:
    server = Server(200, backend=replace(BACKEND, max_in_flight=16))
    server.run(SETTLED)
    assert server.band() == (16, 16)


# -- it follows


@pytest.mark.parametrize("refuses", [False, True], ids=["lets wait", "refuses"])
@pytest.mark.parametrize(("before", "after", "within"), [(16, 4, 120.0), (8, 24, 480.0)])
def test_limit_when_the_server_changes_follows(
    before: int, after: int, within: float, refuses: bool
) -> None:
    server = Server(before, refuses=refuses)
    server.run(900.0)
    server.slots = after
    server.run(within)
    assert server.limit == pytest.approx(after, rel=0.3, abs=1)
    changed = server.now
    server.run(900.0)
    assert server.mean(since=changed) == pytest.approx(after, rel=0.2, abs=1)


@pytest.mark.parametrize("part", [0.0, 0.05, 0.5], ids=["documents", "few streams", "half"])
def test_limit_when_it_was_refused_grows_again_whatever_is_asked_for(part: float) -> None:
    """Documents tell nothing of a wait, but that they went well."""
    server = Server(4, refuses=True, stream_part=part)
    server.run(SETTLED)
    assert server.limit <= 5
    server.slots = 16
    server.run(1200.0)
    assert 12 <= server.limit <= 17


def test_limit_when_half_are_documents_is_found_by_the_streams() -> None:
    server = Server(8, stream_part=0.5)
    server.run(SETTLED + STEADY)
    assert server.mean(since=SETTLED) == pytest.approx(8, abs=1.5)


def test_limit_when_the_server_is_slower_for_good_recovers() -> None:
    """Four times slower, with as much room: a measure kept for ever would hold it down."""
    server = Server(200, backend=replace(BACKEND, max_in_flight=16), clients=16)
    server.run(SETTLED)
    server.prefill, server.work = 0.4, 8.0
    server.run(1800.0)
    assert server.mean(since=server.now - 300.0) > 12


# -- it is not fooled


def alone(**more: Any) -> Server:
    """A server that is never full: whatever the gate learns of it below 16 is wrong."""
    return Server(200, backend=replace(BACKEND, max_in_flight=16), **more)


def test_limit_when_prompts_are_of_all_lengths_is_not_lowered() -> None:
    server = alone(sizes=(100, 200, 5000, 100_000), prefill=0.02)
    server.run(SETTLED)
    assert server.band() == (16, 16)


def test_limit_when_all_prompts_become_long_is_not_lowered() -> None:
    server = alone(sizes=(200,))
    server.run(SETTLED)
    server.sizes = (20_000,)
    server.run(SETTLED)
    assert server.band() == (16, 16)


def test_limit_when_a_cache_answers_some_at_once_is_not_lowered() -> None:
    """The very quickest is no measure where one in twenty needs no work at all."""
    server, rng = alone(), random.Random(5)
    usual = server._work

    def cached(asked: Exchange, permit: Permit, started: float) -> None:
        server.prefill = 0.002 if rng.random() < 0.05 else 0.1
        usual(asked, permit, started)

    server._work = cached  # type: ignore[method-assign]
    server.run(600.0)
    assert server.mean(since=300.0) > 14


def test_limit_when_clients_leave_is_not_lowered() -> None:
    server = alone(leave=0.5)
    server.run(SETTLED)
    assert server.band() == (16, 16)


def test_limit_does_not_grow_while_less_than_half_of_it_is_in_use() -> None:
    server = Server(8)
    server.run(SETTLED)
    found = server.limit
    server.clients -= 97  # three are left
    server.slots = 200
    server.run(3600.0)
    assert server.limit == found
    server.clients += 97
    server.run(600.0)
    assert server.limit > 2 * found


# -- one outcome at a time


class Hand:
    """A learner that is told of attempts by hand, one a second."""

    def __init__(self, **options: Any) -> None:
        self.learner = Learner(Adaptive(enabled=True, **options))
        self.now = 1000.0

    def tell(self, running: int, asked: Exchange | None = None, **facts: Any) -> int:
        """An attempt that began beside `running - 1` others has ended; the limit then, of 64."""
        self.now += 1.0
        asked = asked or exchange()
        self.learner.ended = self.learner.take(asked, running)
        asked.body = None  # as the core does once the answer is committed
        usual: dict[str, Any] = {"started": self.now - 0.5, "duration": 0.5}
        outcome = Outcome(**{"backend": BACKEND, "number": 1, "verdict": Verdict.GOOD,
                             "stage": Stage.DONE, **usual, **facts})  # fmt: skip
        self.learner.observe(asked, outcome, self.now)
        return self.learner.bound(64)


def exchange(**more: Any) -> Exchange:
    asked = Exchange(id="x", method="POST", target=b"/", path="/", headers=(), started=0.0)
    asked.inference, asked.model, asked.stream, asked.body = True, "m", True, b"x" * 100
    for name, value in more.items():
        setattr(asked, name, value)
    return asked


BUSY = {"verdict": Verdict.BUSY, "fault": Fault.BUSY, "status": 429}
TIMEOUT = {"verdict": Verdict.STRIKE, "fault": Fault.TIMEOUT, "stage": Stage.HEAD}


def test_busy_lowers_to_three_quarters_or_to_what_ran_well() -> None:
    hand = Hand()
    assert hand.tell(40, **BUSY) == 30
    assert hand.tell(29, ttft=0.1) == 30
    assert hand.tell(30, **BUSY) == 29


@pytest.mark.parametrize(
    "facts",
    [
        pytest.param({**BUSY, "started": 900.0}, id="it met the limit of before"),
        pytest.param({**BUSY, "fault": Fault.LOADING, "status": 503}, id="its model is loading"),
        pytest.param({**TIMEOUT, "stage": Stage.CONNECT}, id="it was not reached"),
        pytest.param({"verdict": Verdict.CALLER, "status": 400}, id="the request was at fault"),
        pytest.param({**TIMEOUT, "verdict": Verdict.NEUTRAL, "fault": Fault.DEADLINE}, id="hurry"),
        pytest.param({"verdict": Verdict.STRIKE, "fault": Fault.STATUS, "status": 500}, id="500"),
    ],
)
def test_limit_when_it_was_for_another_reason_stays(facts: dict[str, Any]) -> None:
    hand = Hand()
    hand.tell(1, ttft=0.1)
    assert hand.tell(40, **BUSY) == 30
    assert hand.tell(30, **facts) == 30


def test_server_that_says_no_to_all_lowers_the_limit_once() -> None:
    """An outage behind a load balancer is 503 for every number; it must not end at a limit of 1."""
    hand = Hand()
    assert [hand.tell(running, **BUSY) for running in (40, 30, 30, 9, 1)] == [30] * 5
    hand.tell(1)
    assert hand.tell(30, **BUSY) == 22


def test_timeout_lowers_only_while_the_backend_is_known_to_be_warm() -> None:
    hand = Hand()
    assert hand.tell(40, **TIMEOUT) == 64, "it may have to start first"
    hand.tell(1, ttft=0.1)
    assert hand.tell(40, **TIMEOUT) == 30
    hand.now += 600.0
    assert hand.tell(30, **TIMEOUT) == 30


def test_429_that_is_about_the_clients_own_quota_lowers_nothing() -> None:
    own = exchange(headers=((b"Authorization", b"Bearer sk-own"),))
    assert Hand().tell(40, own, **BUSY) == 64
    assert Hand().tell(40, own, **{**BUSY, "status": 503}) == 30
    keyed = replace(BACKEND, api_key="sk-ours")
    assert Hand().tell(40, own, **BUSY, backend=keyed) == 30


@pytest.mark.parametrize(
    ("asked", "facts"),
    [
        pytest.param({}, {"cold_start": 29.0}, id="cold starts"),
        pytest.param({"inference": False}, {}, id="no inference"),
        pytest.param({}, {"ttft": None}, id="no first content"),
        pytest.param({}, {"verdict": Verdict.NEUTRAL}, id="clients that left"),
        pytest.param({"model": "other"}, {}, id="another model"),
        pytest.param({"body": b"x" * 9000}, {}, id="longer prompts"),
        pytest.param({"prompt": Prompt("m", "x" * 9000), "body": None}, {}, id="prompts inside"),
        pytest.param({"stream": False}, {}, id="documents"),
    ],
)
def test_first_contents_of_another_kind_lower_nothing(
    asked: dict[str, Any], facts: dict[str, Any]
) -> None:
    hand = Hand()
    for _ in range(40):
        hand.tell(20, ttft=0.1)
    late = {"ttft": 30.0, "duration": 60.0, **facts}
    for _ in range(40):
        assert hand.tell(20, exchange(**asked), **late) == 64


def test_first_contents_that_come_late_for_their_kind_lower_it_to_what_was_worked_on() -> None:
    hand = Hand()
    for _ in range(17):  # the first of its kind is held against nothing
        hand.tell(20, ttft=0.1)
    limits = [hand.tell(20, ttft=0.6, duration=2.0) for _ in range(16)]
    assert limits == [64] * 15 + [15], "a quarter of their time they waited"


def test_first_contents_that_differ_by_a_jitter_lower_nothing() -> None:
    hand = Hand()
    for _ in range(16):
        hand.tell(20, ttft=0.001)
    for _ in range(40):
        assert hand.tell(20, ttft=0.04) == 64


def test_limit_never_goes_below_its_least_and_learns_there_anew() -> None:
    hand = Hand(min=4)
    for running in (40, 30, 22, 16, 12, 9, 6, 4, 4, 4):
        hand.tell(1)
        hand.tell(running, **BUSY)
    assert hand.learner.bound(64) == 4
    assert hand.learner.bound(2) == 2, "the operator's word is over it"


def test_kinds_are_bounded_though_clients_make_up_sizes_and_models() -> None:
    hand = Hand()
    for number in range(2000):
        hand.tell(1, exchange(model=f"m{number}"), ttft=0.1)
    assert len(hand.learner._kinds) <= 256


def test_outcome_of_an_attempt_past_the_gate_is_not_taken_for_anothers() -> None:
    hand = Hand()
    hand.learner.ended = hand.learner.take(exchange(id="other"), 40)
    hand.learner.observe(exchange(), Outcome(BACKEND, 1, **{"stage": Stage.DONE, **BUSY}), 0.0)
    assert hand.learner.bound(64) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min": 0}, "min: must be >= 1, got 0"),
        ({"tolerance": 1.0}, "tolerance: must be > 1 and finite, got 1.0"),
        ({"probe_interval": 0.0}, "probe_interval: must be > 0 and finite, got 0.0"),
    ],
)
def test_options_when_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Adaptive(**options)


# -- through the proxy

GOOD = {"object": "chat.completion", "choices": [{"message": {"content": "whole"}}]}


class Narrow:
    """A backend that answers 429 while it works on `slots` requests."""

    def __init__(self, slots: int) -> None:
        self.slots, self.running = slots, 0
        self.statuses: list[int] = []

    async def script(self, conn: BackendConn) -> None:
        async for _ in each_request(conn):
            if self.running >= self.slots:
                self.statuses.append(429)
                error = {"error": {"message": "Model is overloaded", "type": "overloaded"}}
                await conn.send(json_bytes(error, 429))
                continue
            self.running += 1
            try:
                await asyncio.sleep(0.005)
            finally:
                self.running -= 1
            self.statuses.append(200)
            await conn.send(json_bytes(GOOD))


async def load(port: int, clients: int, each: int) -> Counter[int]:
    async def client() -> list[Answer]:
        async with RawClient(port) as asks:
            return [await asks.ask(chat(), timeout=30) for _ in range(each)]

    answers = await asyncio.gather(*(client() for _ in range(clients)))
    return Counter(answer.status for several in answers for answer in several)


def chain(**options: Any) -> list[dict[str, Any]]:
    capacity = {"queue_timeout": 60, "max_queue": 1000, **options}
    # Without health nothing rests: each 429 comes of the limit alone.
    return [{"cost": {}}, {"capacity": capacity}]


async def test_proxy_when_a_backend_answers_429_finds_its_limit() -> None:
    """A backend with 4 slots that was said to have 16: without it most requests fail."""
    refused = {}
    for adaptive in (False, True):
        narrow = Narrow(4)
        middleware = chain(adaptive={"enabled": adaptive})
        async with RawBackend(narrow.script) as server:
            row = {"url": server, "max_in_flight": 16}
            async with proxy(row, middleware=middleware) as p:
                await load(p.port, 16, 15)
                narrow.statuses.clear()
                told = await load(p.port, 16, 40)
                assert sum(told.values()) == len(narrow.statuses) == 640
                if adaptive:
                    async with RawClient(p.port) as asks:
                        head = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: text/plain\r\n\r\n"
                        text = (await asks.ask(head)).body.decode()
                    (line,) = [x for x in text.splitlines() if "_limit{" in x]
                    name, _, value = line.partition(" ")
                    assert name == 'beacon_concurrency_limit{backend="b0"}'
                    assert 2 <= float(value) <= 5
                    assert 'beacon_room{name="b0",of="backend"}' in text
        refused[adaptive] = narrow.statuses.count(429) / len(narrow.statuses)
    assert refused[False] > 0.5
    assert refused[True] < 0.02


async def test_proxy_when_it_is_off_shows_no_limit_and_learns_nothing() -> None:
    async with RawBackend(json_answer(GOOD)) as server, proxy(server) as p:
        async with RawClient(p.port) as asks:
            assert (await asks.ask(chat())).status == 200
        assert not [g for g in p.app.telemetry.gauges() if g.name == "concurrency_limit"]
