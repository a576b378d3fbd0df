"""When an alert begins and ends: hysteresis over any series of values, and what each rule reads."""

from __future__ import annotations

import asyncio
import heapq
import operator
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import inf, nan
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from beacon_proxy.alerts.alarm import FLAPS_WITHIN, Alarm, Change, Mark
from beacon_proxy.alerts.message import Message
from beacon_proxy.alerts.view import RECENT, Sources
from beacon_proxy.alerts.watch import Watch
from beacon_proxy.config.alerts import Alerts
from beacon_proxy.contracts import (
    Backend,
    Candidate,
    Exchange,
    Gauge,
    Live,
    Outcome,
    Stage,
    Verdict,
    Warmth,
)
from beacon_proxy.ops.windows import Windows
from middleware.cost import Cost

from .kit import eventually

LOOK = 5.0  # s between two looks
SLOW = [HealthCheck.too_slow]  # a busy machine is no reason to fail

# Hysteresis

VALUES = st.one_of(st.none(), st.sampled_from([0.0, 0.69, 0.7, 0.75, 0.8, 0.9, 1.0, nan, inf]))
# Runs of one value, so that what has to last does: as single values it hardly ever would.
SERIES = st.lists(st.tuples(VALUES, st.integers(1, 60)), max_size=40).map(
    lambda runs: [value for value, times in runs for _ in range(times)]
)
TIMES = st.sampled_from([0.0, 5.0, 30.0, 60.0])
MARKS = st.builds(
    Mark,
    begins=st.just(0.8),
    ends=st.sampled_from([0.7, 0.8]),
    for_=TIMES,
    clear_for=TIMES,
    past=st.sampled_from([operator.ge, operator.gt]),
)


def past(mark: Mark, value: float | None) -> bool:
    return value is not None and mark.past(value, mark.begins)


def clear(mark: Mark, value: float | None) -> bool:
    return value is None or (value <= mark.ends and not past(mark, value))


def history(alarm: Alarm, series: Iterable[float | None]) -> list[tuple[float, Change]]:
    told = []
    for number, value in enumerate(series):
        change = alarm.see(number * LOOK, value)
        if change is not None:
            told.append((number * LOOK, change))
    return told


@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(series=SERIES, mark=MARKS, pause=TIMES)
@example(series=[1.0, *[0.0] * 13, 1.0], mark=Mark(0.8, 0.7, 0.0, 0.0), pause=60.0)
def test_alarm_when_it_sees_anything_begins_and_ends_by_its_rules(
    series: list[float | None], mark: Mark, pause: float
) -> None:
    alarm = Alarm(mark, pause)
    told = history(alarm, series)
    assert [change for _, change in told] == [Change.BEGAN, Change.ENDED] * (len(told) // 2) + [
        Change.BEGAN
    ] * (len(told) % 2)
    assert alarm.active is bool(len(told) % 2)
    for at, change in told:
        end = int(at / LOOK) + 1
        if change is Change.BEGAN:
            lasted = series[end - 1 - int(mark.for_ / LOOK) : end]
            assert all(past(mark, value) for value in lasted)
        else:
            over = series[end - 1 - int(mark.clear_for / LOOK) : end]
            assert all(clear(mark, value) for value in over)
    for (before, _), (after, _) in pairwise(told):
        assert after - before >= pause


@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
@given(series=SERIES, mark=MARKS, pause=TIMES)
def test_alarm_when_it_lasts_begins_and_when_it_is_over_ends_whatever_was_before(
    series: list[float | None], mark: Mark, pause: float
) -> None:
    alarm = Alarm(mark, pause)
    history(alarm, series)
    now = len(series) * LOOK
    alarm.see(now, 1.0)
    change = alarm.see(now + max(mark.for_, pause), 1.0)
    assert alarm.active
    assert change in (Change.BEGAN, None)
    now += max(mark.for_, pause) + LOOK
    alarm.see(now, None)
    alarm.see(now + FLAPS_WITHIN, None)
    assert not alarm.active
    assert alarm.since is None
    assert not alarm.forgettable(now + FLAPS_WITHIN)
    assert alarm.forgettable(now + 3 * FLAPS_WITHIN)


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(
    high=st.integers(1, 120), low=st.integers(1, 120), mark=MARKS, pause=st.sampled_from([0, 60.0])
)
def test_alarm_when_it_flaps_for_a_day_tells_little(
    high: int, low: int, mark: Mark, pause: float
) -> None:
    """Each time it comes back it takes twice as long to end: 12 doublings, then one an hour."""
    cycle: list[float | None] = [*[1.0] * high, *[0.0] * low]
    day = cycle * int(86400 / LOOK / len(cycle))
    told = history(Alarm(mark, pause), day)
    assert len(told) <= 2 * (13 + 24)


def test_alarm_when_it_came_back_is_new_after_an_hour() -> None:
    alarm = Alarm(Mark(0.8, 0.7, 0.0, 60.0), 60.0)
    once = [1.0, *[0.0] * 13]
    rest: list[float | None] = [0.0] * int(FLAPS_WITHIN / LOOK + 1)
    assert [at for at, _ in history(alarm, [*once, *rest, *once])] == [0, 65, 3675, 3740]
    alarm = Alarm(Mark(0.8, 0.7, 0.0, 60.0), 60.0)
    back = history(alarm, [*once, *[0.0] * 11, 1.0, *[0.0] * 30])
    assert [at for at, _ in back] == [0, 65, 125, 250], "clear for 120 s now"


# What each rule reads


class Sent(list[Message]):
    """A sender that keeps everything."""

    def start(self) -> None: ...

    def send(self, message: Message) -> None:
        self.append(message)

    def gauges(self) -> Iterator[Gauge]:
        yield from ()

    def hurry(self) -> None: ...

    async def close(self) -> None: ...


@dataclass
class Scene:
    """A fleet and gauges set by hand, real windows, and everything told."""

    rules: dict[str, Any]
    rows: list[Candidate] = field(default_factory=list)
    gauges: list[Gauge] = field(default_factory=list)
    queue: tuple[int, int] = (0, 100)
    shed: int = 0
    lines_lost: int = 0
    limits: tuple[Callable[[Backend], int], ...] = ()
    tenant_budgets: frozenset[str] = frozenset()
    sources: dict[str, bool] = field(default_factory=dict)
    pause: float = 0.0
    now: float = 10_000.0
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    sent: Sent = field(default_factory=Sent)

    def __post_init__(self) -> None:
        only = dict.fromkeys(type(Alerts().rules).model_fields, False)
        self.windows = Windows(lambda: self.now)
        self.watch = Watch(
            Alerts.model_validate({"pause": self.pause, "rules": {**only, **self.rules}}),
            Sources(
                candidates=lambda: self.rows,
                gauges=lambda: self.gauges,
                recent=lambda: {(*place,): sums for place, sums in self.windows.places(5).items()},
                queue=lambda: self.queue,
                shed=lambda: self.shed,
                lines_lost=lambda: self.lines_lost,
                discovery=lambda: self.sources,
                limits=self.limits,
                tenant_budgets=self.tenant_budgets,
            ),
            region="us-east",
            clock=lambda: self.now,
            unix=lambda: self.now + 1.7e9,
            notify=lambda event, /, **fields: self.told.append((event, fields)),
            sender=self.sent,
        )

    def look(self, seconds: float = 0.0) -> list[str]:
        """Look now, then every 5 s for `seconds`; what began (+) and ended (-) meanwhile."""
        known = len(self.told)
        self.watch.look()
        for _ in range(int(seconds / LOOK)):
            self.now += LOOK
            self.watch.look()
        signs = {"alert.began": "+", "alert.ended": "-"}
        return [
            f"{signs[event]}{fields['rule']}/{fields['subject']}/{fields['severity']}"
            for event, fields in self.told[known:]
        ]

    def attempts(self, count: int, provider: str = "golem", **fields: Any) -> None:
        backend = a_backend("x", provider=provider, region="eu-west")
        exchange = Exchange("1", "POST", b"/", "/", (), self.now)
        for _ in range(count):
            outcome = Outcome(backend, 1, fields.get("verdict", Verdict.GOOD), Stage.DONE)
            self.windows.add(replace_outcome(outcome, fields), exchange.model)

    def active(self) -> dict[str, float]:
        return {
            dict(gauge.labels)["rule"]: gauge.value
            for gauge in self.watch.gauges()
            if gauge.name == "alert_active"
        }


def replace_outcome(outcome: Outcome, fields: dict[str, Any]) -> Outcome:
    return replace(outcome, **fields)  # type: ignore[type-var]  # a dataclass at run time


def a_backend(name: str, **fields: Any) -> Backend:
    made: dict[str, Any] = {"provider": "golem", "url": "http://h", "scheme": "http", "host": "h"}
    return Backend(name=name, port=80, **{**made, **fields})


def row(name: str, in_flight: int = 0, **fields: Any) -> Candidate:
    return Candidate(a_backend(name, max_in_flight=10, **fields), Live(in_flight=in_flight))


def run(scene: Scene, number: int, in_flight: int) -> None:
    """Let so many run there from now on, as the pipeline and the fleet write it down."""
    live = scene.rows[number].live
    live.occupied -= (in_flight - live.in_flight) * scene.now
    live.in_flight = in_flight


def labelled(name: str, value: float, /, **labels: str) -> Gauge:
    return Gauge(name, "", value, tuple(labels.items()))


def test_pool_utilisation_when_it_is_over_for_a_minute_begins_and_ends_below_its_lower_mark() -> (
    None
):
    scene = Scene({"pool_utilisation": True}, [row("a", 8), row("b", 7), row("c", 0, pool="x")])
    assert scene.look(300) == [], "75 % is not much"
    run(scene, 1, 8)
    assert scene.look(55) == []
    assert scene.look(5) == ["+pool_utilisation/burst/warning"], "the mean of 60 s"
    assert scene.active() == {"pool_utilisation": 1}
    run(scene, 1, 7)
    assert scene.look(300) == [], "75 % is no end, either: that is at 72 %"
    run(scene, 1, 6)
    assert scene.look(95) == [], "clear for 60 s, from the 36 s on"
    assert scene.look(5) == ["-pool_utilisation/burst/warning"]
    assert scene.active() == {"pool_utilisation": 0}
    began, ended = scene.sent
    assert (began.value, began.threshold) == (pytest.approx(0.8), 0.8)
    assert began.says == "pool burst is 80 % full (alert from 80 %)"
    assert ended.since_unix == pytest.approx(began.since_unix)
    assert began.key == ended.key
    assert began.id != ended.id


def test_pool_utilisation_when_a_backend_is_set_aside_counts_the_others_alone() -> None:
    scene = Scene({"pool_utilisation": {"for": 0}}, [row("a", 9), row("b", 0)])
    assert scene.look() == []
    scene.rows[1].live.ejected_until = scene.now + 60
    assert scene.look() == ["+pool_utilisation/burst/warning"]


def test_pool_utilisation_when_less_may_run_than_configured_is_of_that() -> None:
    limits = (lambda backend: 5, lambda backend: 20)
    scene = Scene({"pool_utilisation": {"for": 0}}, [row("a", 4)], limits=limits)
    assert scene.look() == ["+pool_utilisation/burst/warning"]
    assert scene.sent[0].value == 0.8
    scene = Scene({"pool_utilisation": {"for": 0}}, [row("a", 4)], limits=(lambda backend: 0,))
    assert scene.look() == [], "no slot at all is another trouble"


def small(slots: int, in_flight: int) -> Candidate:
    return Candidate(a_backend("a", max_in_flight=slots), Live(in_flight=in_flight))


@pytest.mark.parametrize("slots", [1, 4])
def test_pool_utilisation_when_a_small_pool_is_full_waits_for_somebody_who_waits(
    slots: int,
) -> None:
    """One stream of some minutes fills a single slot, which is there to be used."""
    scene = Scene({"pool_utilisation": True}, [small(slots, slots)])
    assert scene.look(3600) == []
    scene.queue = (1, 100)
    assert scene.look(40) == []
    assert scene.look(20) == ["+pool_utilisation/burst/warning"]
    assert scene.sent[0].says == "pool burst is 100 % full (alert from 80 %)"
    scene.queue = (0, 100)
    assert scene.look(60) == []
    assert scene.look(20) == ["-pool_utilisation/burst/warning"]
    assert scene.sent[1].says == "pool burst is 100 % full, and nobody waits"


def test_pool_utilisation_when_a_small_pool_without_a_queue_refuses_begins() -> None:
    scene = Scene({"pool_utilisation": True}, [small(1, 1)], queue=(0, 0))
    assert scene.look(600) == []
    scene.shed = 1
    assert scene.look(60) == ["+pool_utilisation/burst/warning"]
    assert scene.look(600) == ["-pool_utilisation/burst/warning"]
    scene.rows, scene.shed = [small(1, 0)], 2
    assert scene.look(600) == [], "it has room now"


def test_pool_utilisation_when_a_pool_could_warn_before_it_is_full_does_so() -> None:
    scene = Scene({"pool_utilisation": True}, [small(5, 4)])
    assert scene.look(60) == ["+pool_utilisation/burst/warning"]


def traffic(scene: Scene, seed: int, share: Callable[[float], float], hours: float) -> float:
    """Requests of a second or so that come by chance, as many as fill that share of the pool.

    Who finds no room waits. Returns the share that was taken in all.
    """
    rng, rows = random.Random(seed), scene.rows
    slots, began = sum(each.backend.max_in_flight for each in rows), scene.now
    end, busy, look = began + hours * 3600, 0.0, began
    ends: list[tuple[float, int]] = []
    waiting, comes = 0, began
    while scene.now < end:
        scene.now = at = min(comes, look, ends[0][0] if ends else inf)
        if at == look:
            scene.watch.look()
            look += LOOK
        elif ends and at == ends[0][0]:
            done = heapq.heappop(ends)[1]
            run(scene, done, rows[done].live.in_flight - 1)
        else:
            waiting += 1
            rate = slots * share(at - began)
            comes = at + rng.expovariate(rate)
        for number, each in enumerate(rows):
            while waiting and each.live.in_flight < each.backend.max_in_flight:
                waiting -= 1
                took = rng.uniform(0.5, 1.5)
                busy += took
                heapq.heappush(ends, (at + took, number))
                run(scene, number, each.live.in_flight + 1)
    return busy / slots / (end - began)


def pool_of(slots: int) -> Scene:
    rows = [Candidate(a_backend(f"b{n}", max_in_flight=slots // 2), Live()) for n in range(2)]
    return Scene({"pool_utilisation": True}, rows)


@pytest.mark.parametrize(("slots", "share"), [(8, 0.92), (20, 0.9), (50, 0.87), (200, 0.83)])
def test_pool_utilisation_when_the_mean_of_traffic_is_over_begins_after_about_a_minute(
    slots: int, share: float
) -> None:
    """One moment in ten is below the mark, so twelve in a row that are not came late or never."""
    scene = pool_of(slots)
    begun = scene.now
    taken = traffic(scene, 7, lambda _: share, hours=1)
    assert taken == pytest.approx(share, abs=0.02)
    assert scene.sent[0].type == "alert.began"
    assert 60 <= scene.sent[0].unix - 1.7e9 - begun <= 90
    assert len(scene.sent) == 1, "and stays"


@pytest.mark.parametrize("slots", [100, 200])
def test_pool_utilisation_when_spikes_fill_a_pool_whose_mean_is_below_says_nothing(
    slots: int,
) -> None:
    """20 s nearly full, 40 s at two thirds: all is taken again and again, for seconds."""
    scene = pool_of(slots)
    taken = traffic(scene, 7, lambda at: 0.95 if at % 60 < 20 else 0.65, hours=1)
    assert taken == pytest.approx(0.75, abs=0.01)
    assert scene.sent == []


def test_provider_down_when_none_of_its_backends_can_be_used_is_critical() -> None:
    scene = Scene({"provider_down": True}, [row("a"), row("b"), row("c", provider="modal")])
    assert scene.look(60) == []
    scene.rows[0].live.healthy = False
    scene.rows[1].live.ejected_until = inf
    scene.rows[2].live.healthy = False
    assert scene.look(25) == []
    assert sorted(scene.look(5)) == [
        "+provider_down/golem/critical",
        "+provider_down/modal/critical",
    ]
    assert scene.sent[0].says == "provider golem: 0 of 2 backends are up"
    scene.rows[0].live.healthy = True
    del scene.rows[2]  # discovery says that it is gone
    assert scene.look(25) == []
    assert sorted(scene.look(5)) == [
        "-provider_down/golem/critical",
        "-provider_down/modal/critical",
    ]
    assert scene.sent[-1].says == "nothing is known of modal any more"
    assert scene.sent[-1].value is None


def test_provider_down_when_its_backends_rest_says_nothing() -> None:
    """A 429 with a long `Retry-After` is an answer; /health calls the same backend healthy."""
    scene = Scene({"provider_down": {"for": 0}}, [row("a"), row("b")])
    for each in scene.rows:
        each.live.resting_until = inf
    assert scene.look(600) == []
    for each in scene.rows:
        each.live.healthy = False
    assert scene.look() == ["+provider_down/golem/critical"], "rest or not"


def test_provider_down_when_its_backend_only_starts_says_nothing() -> None:
    scene = Scene({"provider_down": {"for": 0}}, [row("a")])
    live = scene.rows[0].live
    live.healthy, live.resting_until = False, inf
    live.learn_warmth(Warmth.WARMING, scene.now + 600)
    assert scene.look(590) == []
    assert scene.look(60) == ["+provider_down/golem/critical"], "it was believed long enough"


def refusing(**rule: Any) -> Scene:
    return Scene({"provider_refuses": {"for": 60, **rule}}, [row("a", region="eu-west")])


def minutes(scene: Scene, count: int, busy: int, **fields: Any) -> list[str]:
    """So many attempts a minute that are pushed back."""
    told = []
    for _ in range(count):
        scene.attempts(busy, verdict=Verdict.BUSY, **fields)
        told += scene.look(60)
    return told


def test_provider_refuses_when_it_only_pushes_back_is_critical_until_it_answers() -> None:
    """A quota that is used up, a dead engine behind a live /v1/models: no strike, and no answer."""
    scene = refusing()
    scene.attempts(50)
    assert scene.look(60) == []
    assert minutes(scene, 5, 20) == [], "it answered well in the last 5 minutes"
    assert minutes(scene, 3, 20) == ["+provider_refuses/golem/eu-west/critical"]
    assert scene.sent[0].says == (
        "golem in eu-west: none of 100 attempts in 5 minutes was good, 100 were pushed back"
        " (429, 503)"
    )
    scene.attempts(1)
    assert scene.look(90) == ["-provider_refuses/golem/eu-west/critical"]
    assert scene.sent[1].says == "golem in eu-west: 1 attempts in 5 minutes were good"


def test_provider_refuses_when_it_is_at_its_limit_and_answers_says_nothing() -> None:
    scene = refusing()
    for _ in range(30):
        scene.attempts(1)
        assert minutes(scene, 1, 200) == []


def test_provider_refuses_when_few_were_pushed_back_waits_for_more_or_for_a_long_rest() -> None:
    """Who asks for minutes of rest is hardly asked: that none may be asked says as much."""
    scene = refusing()
    scene.attempts(4, verdict=Verdict.BUSY)
    assert scene.look(300) == []
    assert minutes(scene, 4, 1, status=503) == []
    assert minutes(scene, 3, 1) == ["+provider_refuses/golem/eu-west/critical"]
    scene = refusing()
    scene.attempts(1, verdict=Verdict.BUSY)
    scene.rows[0].live.resting_until = scene.now + 300
    assert scene.look(120) == ["+provider_refuses/golem/eu-west/critical"]
    scene.rows[0].live.resting_until = 0.0
    assert scene.look(120) == ["-provider_refuses/golem/eu-west/critical"], "it may be asked"


def test_provider_refuses_when_it_fails_without_a_push_back_leaves_it_to_the_others() -> None:
    scene = refusing()
    for verdict in (Verdict.STRIKE, Verdict.CALLER, Verdict.NEUTRAL):
        scene.attempts(50, verdict=verdict)
    assert scene.look(120) == []
    scene.attempts(1, verdict=Verdict.BUSY)
    assert scene.look(120) == ["+provider_refuses/golem/eu-west/critical"]
    assert "none of 51 attempts" in scene.sent[0].says, "strikes and push-backs"


def test_provider_refuses_when_it_starts_is_believed_for_as_long_as_a_start_takes() -> None:
    scene = refusing()
    live = scene.rows[0].live
    told = []
    for _ in range(10):
        live.learn_warmth(Warmth.WARMING, scene.now + 600)
        told += minutes(scene, 1, 20)
    assert told == []
    live.learn_warmth(Warmth.WARMING, scene.now + 600)
    assert minutes(scene, 3, 20) == ["+provider_refuses/golem/eu-west/critical"]


def test_provider_refuses_when_nobody_asks_any_more_or_it_left_ends() -> None:
    for leaves in (False, True):
        scene = refusing()
        assert minutes(scene, 2, 20) == ["+provider_refuses/golem/eu-west/critical"]
        if leaves:
            scene.rows.clear()
        assert scene.look(120 if leaves else 600) == ["-provider_refuses/golem/eu-west/critical"]


def test_success_rate_when_few_attempts_say_so_says_nothing() -> None:
    scene = Scene({"success_rate": {"for": 0, "clear_for": 0}})
    scene.attempts(19, verdict=Verdict.STRIKE)
    assert scene.look(RECENT) == []
    scene.attempts(1, verdict=Verdict.STRIKE)
    assert scene.look(RECENT) == ["+success_rate/golem/eu-west/warning"]
    assert scene.sent[0].says == (
        "golem in eu-west: 0 % of 20 attempts in 5 minutes were good (alert below 90 %)"
    )
    scene.attempts(240)
    assert scene.look(RECENT) == [], "92 % is better, but not yet good"
    scene.attempts(240)
    assert scene.look(RECENT) == ["-success_rate/golem/eu-west/warning"]


@pytest.mark.parametrize("verdict", [Verdict.CALLER, Verdict.BUSY, Verdict.NEUTRAL])
def test_success_rate_when_most_attempts_say_nothing_of_a_backend_leaves_them_out(
    verdict: Verdict,
) -> None:
    """A client's own 4xx among them: of 20 and one strike the rate is that of the one strike."""
    scene = Scene({"success_rate": {"for": 0}})
    scene.attempts(200, verdict=verdict)
    scene.attempts(19, verdict=Verdict.STRIKE)
    assert scene.look(RECENT) == []
    scene.attempts(1)
    assert scene.look(RECENT) == ["+success_rate/golem/eu-west/warning"]
    assert "5 % of 20 attempts" in scene.sent[0].says


def test_success_rate_when_nobody_asks_any_more_ends() -> None:
    scene = Scene({"success_rate": {"for": 0}})
    scene.attempts(40, verdict=Verdict.STRIKE)
    scene.look(RECENT)
    assert scene.look(600) == ["-success_rate/golem/eu-west/warning"]
    assert scene.look(2 * FLAPS_WITHIN) == []
    assert [gauge.name for gauge in scene.watch.gauges()] == ["alert_active"], "forgotten"


def test_ttft_when_it_is_twice_that_of_the_hour_before_begins() -> None:
    scene = Scene({"ttft_p95": {"for": 0, "clear_for": 0}})
    for _ in range(60):
        scene.attempts(60, ttft=0.8)
        scene.attempts(60, provider="modal", ttft=0.1)
        assert scene.look(60) == []
    for _ in range(7):
        scene.attempts(900, ttft=2.4)
        scene.attempts(900, provider="modal", ttft=0.5)  # five times as long, and still quick
        scene.now += 60
        if scene.look():
            break
    (began,) = scene.sent
    assert (began.rule, began.subject) == ("ttft_p95", "golem/eu-west")
    assert began.value == pytest.approx(3.0, rel=0.2)
    for _ in range(8):
        scene.attempts(900, ttft=0.8)
        scene.look(60)
    assert [message.type for message in scene.sent] == ["alert.began", "alert.ended"]


def test_ttft_when_few_attempts_have_one_says_nothing() -> None:
    """Neither of the recent minutes nor of the past: failed attempts and 4xx have no TTFT."""
    scene = Scene({"ttft_p95": {"for": 0}})
    for _ in range(30):
        scene.attempts(60, ttft=0.8)
        assert scene.look(60) == []
    scene.now += 360
    for _ in range(6):
        scene.attempts(60, verdict=Verdict.CALLER)
        scene.attempts(1, ttft=9.0)
        assert scene.look(60) == []
    scene = Scene({"ttft_p95": {"for": 0}})
    for _ in range(30):  # its past would be what one attempt a minute was like
        scene.attempts(60, verdict=Verdict.CALLER)
        scene.attempts(1, ttft=0.8)
        scene.look(60)
    scene.attempts(600, ttft=9.0)
    assert scene.look(60) == []


def test_ttft_when_there_is_no_past_says_nothing() -> None:
    scene = Scene({"ttft_p95": {"for": 0}})
    for _ in range(13):
        scene.attempts(60, ttft=5.0)
        assert scene.look(60) == []
        scene.attempts(600, ttft=50.0)


def test_ttft_when_its_past_is_shorter_than_ten_minutes_says_nothing() -> None:
    """The five recent minutes are no past: they are what is held against it."""
    scene = Scene({"ttft_p95": {"for": 0}})
    for ttft in [*[0.8] * 11, *[8.0] * 3]:
        scene.attempts(600, ttft=ttft)
        assert scene.look(60) == []
    assert scene.look(60) == ["+ttft_p95/golem/eu-west/warning"]


def test_budget_when_it_fills_begins_twice_each_with_its_own_severity() -> None:
    scene = Scene({"budget": True})
    said = []
    for used in (0.0, 0.79, 0.8, 0.99, 1.0, 1.2):
        scene.gauges = [
            labelled("budget_used_ratio", used, budget="daily"),
            labelled("budget_used_ratio", 0.1, budget="hourly"),
        ]
        said.append(scene.look())
    assert said == [[], [], ["+budget/daily/warning"], [], ["+budget/daily/critical"], []]
    scene.gauges = [labelled("budget_used_ratio", 0.0, budget="daily")]
    assert scene.look(55) == []
    assert sorted(scene.look(5)) == ["-budget/daily/critical", "-budget/daily/warning"]
    assert scene.sent[0].key != scene.sent[1].key


def test_budget_when_it_is_one_of_each_tenant_is_a_warning_at_most() -> None:
    scene = Scene({"budget": True}, tenant_budgets=frozenset({"each"}))
    scene.gauges = [
        labelled("budget_usd", 1.0, budget="each"),
        labelled("budget_used_ratio", 1.2, budget="each"),
        labelled("budget_used_ratio", 0.1, budget="daily"),
    ]
    assert scene.look(60) == ["+budget/each/warning"]
    assert scene.sent[0].says == "budget each of one tenant is used up to 120 %"
    assert {g.labels[-1] for g in scene.watch.gauges() if ("subject", "each") in g.labels} == {
        ("severity", "warning")
    }
    scene.gauges = [labelled("budget_used_ratio", 0.0, budget="each")]
    assert scene.look(60) == ["-budget/each/warning"]
    scene = Scene({"budget": {"warning": None}}, tenant_budgets=frozenset({"each"}))
    scene.gauges = [labelled("budget_used_ratio", 1.2, budget="each")]
    assert scene.look(60) == []


def test_budget_when_it_is_of_nothing_says_nothing() -> None:
    """It refuses from its first request to the end of its window: it was made to."""
    scene = Scene({"budget": True})
    scene.gauges = [
        labelled("budget_usd", 0.0, budget="rented"),
        labelled("budget_used_ratio", 1.0, budget="rented"),
    ]
    assert scene.look(600) == []


def test_budget_when_a_severity_is_null_has_the_other_alone() -> None:
    scene = Scene({"budget": {"warning": None}})
    scene.gauges = [labelled("budget_used_ratio", 1.0, budget="daily")]
    assert scene.look() == ["+budget/daily/critical"]


class Blended(Scene):
    """The gauges of a real cost middleware, and requests that it is told of."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cost = Cost()
        self.pools = {name: a_backend(name, pool=name) for name in ("baseline", "burst")}

    def serve(self, count: int, baseline: float | None = None, **fields: Any) -> None:
        """`count` requests: where the blend sends them, or that share of them to baseline."""
        for number in range(count):
            exchange = Exchange("1", "POST", b"/", "/", (), self.now, **fields)
            if baseline is None:
                rows = [Candidate(backend, Live()) for backend in self.pools.values()]
                backend = self.cost.select(exchange, rows)[0].backend
            else:
                backend = self.pools["baseline" if number < count * baseline else "burst"]
            self.cost.observe(exchange, Outcome(backend, 1, Verdict.GOOD, Stage.DONE, sent=True))
        self.gauges = list(self.cost.gauges())


def test_blend_when_a_pool_is_off_by_ten_points_is_one_alert() -> None:
    scene = Blended({"blend_off_target": {"for": 0}})
    scene.serve(99, 0.55)
    assert scene.look(RECENT) == [], "of so few nothing can be said"
    scene.serve(1, 0.0)
    assert scene.look(RECENT) == ["+blend_off_target/blend/warning"]
    assert scene.sent[0].value == pytest.approx(15.0, abs=1.0)
    assert re.fullmatch(
        r"pool baseline has 5\d(\.\d)? % of the traffic, 70 % is its target"
        r" \(alert from 10 points\)",
        scene.sent[0].says,
    )


def test_blend_when_it_decides_next_to_nothing_says_nothing() -> None:
    """Who asks for cost or latency goes where it wants; two others are no split."""
    scene = Blended({"blend_off_target": {"for": 0}})
    scene.serve(400, 1.0, cost_priority=True)
    scene.serve(2, 0.5)
    assert scene.look(600) == []
    scene.serve(97, 0.0)
    assert scene.look(600) == [], "99"


def test_blend_when_it_decides_no_more_ends() -> None:
    scene = Blended({"blend_off_target": {"for": 0}})
    scene.serve(200, 0.2)
    assert scene.look() == ["+blend_off_target/blend/warning"]
    for _ in range(10):
        scene.serve(200, 0.0, cost_priority=True)
        scene.look(60)
    assert [message.type for message in scene.sent] == ["alert.began", "alert.ended"]


def test_blend_when_a_pool_never_serves_begins() -> None:
    """One pushes back whatever it is asked from the start on, so the other carries all."""
    scene = Blended({"blend_off_target": True})
    assert minutes_of(scene, 10, 1.0) == [], "one pool alone has nothing to split"
    refused = Outcome(scene.pools["burst"], 1, Verdict.BUSY, Stage.DONE, sent=True)
    scene.cost.observe(Exchange("1", "POST", b"/", "/", (), scene.now), refused)
    assert minutes_of(scene, 6, 1.0) == ["+blend_off_target/blend/warning"]
    assert scene.sent[0].says.startswith("pool burst has 0 % of the traffic, 30 % is its target")


def minutes_of(scene: Blended, minutes: int, baseline: float | None = None) -> list[str]:
    """A request a second, as the blend decides or with that share to baseline."""
    told = []
    for _ in range(minutes * 12):
        scene.serve(5, baseline)
        told += scene.look(LOOK)
    return told


def test_blend_when_its_outage_is_over_ends_in_minutes_and_stays_so() -> None:
    """The share of the last 500 to 1000 requests is off for longer."""
    scene = Blended({"blend_off_target": True})
    assert minutes_of(scene, 40) == []
    assert minutes_of(scene, 15, 0.0) == ["+blend_off_target/blend/warning"]
    over = scene.now
    assert minutes_of(scene, 6) == []
    assert minutes_of(scene, 2) == ["-blend_off_target/blend/warning"]
    assert 360 < scene.sent[-1].unix - 1.7e9 - over <= 420
    shares = {dict(g.labels)["pool"]: g.value for g in scene.gauges if g.name == "blend_share"}
    assert shares["baseline"] < 0.6
    assert minutes_of(scene, 60) == []


def test_blend_when_a_spike_spills_for_a_minute_says_nothing() -> None:
    scene = Blended({"blend_off_target": True})
    assert minutes_of(scene, 20) == []
    assert minutes_of(scene, 1, 0.0) == []
    assert minutes_of(scene, 60) == []


def test_ledger_when_it_cannot_be_written_or_loses_rows_begins() -> None:
    scene = Scene({"ledger": {"for": 0}})
    scene.gauges = [labelled("ledger_healthy", 1), labelled("ledger_rows_lost", 0)]
    assert scene.look(60) == []
    scene.gauges = [labelled("ledger_healthy", 0), labelled("ledger_rows_lost", 3)]
    assert scene.look() == ["+ledger/ledger/critical", "+ledger/rows/critical"]
    scene.gauges = [labelled("ledger_healthy", 1), labelled("ledger_rows_lost", 3)]
    assert scene.look(120) == ["-ledger/ledger/critical"]
    assert scene.look(300) == ["-ledger/rows/critical"], "the loss is five minutes old"


def test_queue_when_half_of_it_is_taken_begins() -> None:
    scene = Scene({"queue": True}, queue=(50, 100))
    assert scene.look(25) == []
    assert scene.look(5) == ["+queue/queue/warning"]
    scene.queue = (50, 0)  # there is none
    assert scene.look(60) == ["-queue/queue/warning"]


def test_discovery_when_a_source_cannot_be_asked_for_long_begins() -> None:
    scene = Scene({"discovery": True}, sources={"discovery[0]": True, "discovery[1]": False})
    assert scene.look(295) == []
    assert scene.look(5) == ["+discovery/discovery[1]/warning"]
    scene.sources["discovery[1]"] = True
    assert scene.look() == ["-discovery/discovery[1]/warning"]


def test_log_when_lines_are_lost_begins_and_ends_when_no_more_are() -> None:
    scene = Scene({"log_lines_lost": True})
    assert scene.look() == []
    scene.lines_lost = 7
    assert scene.look() == ["+log_lines_lost/log/warning"]
    assert scene.sent[0].says == "7 log lines could not be written in 5 minutes"
    assert scene.look(295) == []
    assert scene.look(65) == ["-log_lines_lost/log/warning"]


def test_rules_when_nothing_is_known_say_nothing() -> None:
    """No gauge, no traffic, no backend: the state of a proxy that has just been started."""
    scene = Scene(dict.fromkeys(type(Alerts().rules).model_fields, True))
    assert scene.look(7200) == []
    assert set(scene.active().values()) == {0}
    assert len(scene.active()) == 11


def test_rules_when_all_are_off_show_nothing() -> None:
    scene = Scene({}, [row("a", 10)])
    assert scene.look(600) == []
    assert list(scene.watch.gauges()) == []


def test_alert_when_it_is_active_is_listed_with_its_beginning() -> None:
    scene = Scene({"queue": True}, queue=(99, 100))
    scene.look(30)
    (alert,) = scene.watch.active()
    assert alert == {
        "rule": "queue",
        "subject": "queue",
        "severity": "warning",
        "since": "2023-11-15T01:00:00.000Z",
    }
    assert [(g.name, g.value) for g in scene.watch.gauges()][1:] == [("alert_subject_active", True)]


def test_subjects_when_there_are_too_many_are_bounded() -> None:
    scene = Scene({"budget": True})
    scene.gauges = [labelled("budget_used_ratio", 0.1, budget=f"b{n}") for n in range(5000)]
    scene.look()
    assert len(list(scene.watch.gauges())) <= 2001


async def test_watch_when_a_source_fails_goes_on_and_tells_once() -> None:
    scene = Scene({"queue": {"for": 0}}, queue=(99, 100))
    scene.watch._settings = scene.watch._settings.model_copy(update={"interval": 0.001})
    scene.queue = None  # type: ignore[assignment]
    scene.watch.start()
    await eventually(lambda: scene.told)
    await asyncio.sleep(0.02)
    assert [event for event, _ in scene.told] == ["alerts.failed"]
    assert scene.told[0][1]["error"].startswith("TypeError at rules.py:")
    scene.queue = (99, 100)
    await eventually(lambda: scene.sent)
    await scene.watch.close()


def test_look_when_there_are_a_thousand_backends_costs_few_calls_each() -> None:
    """Counted, for others share this machine; in time it is 2 ms (docs/alerts.md)."""
    scene = Scene(dict.fromkeys(type(Alerts().rules).model_fields, True))
    scene.rows = [row(f"b{n}", 1, provider=f"p{n % 4}") for n in range(1000)]
    scene.gauges = [labelled("utilisation", 0.1, backend=f"b{n}") for n in range(1000)]
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    scene.watch.look()
    sys.setprofile(count)
    try:
        scene.watch.look()
    finally:
        sys.setprofile(None)
    assert calls < 12_000
