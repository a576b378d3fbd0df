"""What may be spent: budgets over calendar windows, and the limit of a single request.

An *account* is what a budget counts in: one of the whole budget, or one a tenant. It knows what was
`spent` in the window that is now, and what is `held` for the attempts that run.
Rule 1: an attempt is made only if every budget that covers its backend has room for its estimate,
    which is held from then on. Look and hold are one synchronous step: no two take the same room.
Rule 2: an attempt that runs on beyond its estimate holds what it has cost so far. That is worked
    out anew by who asks for room, once a second at most.
Rule 3: when it ends, what it held is given back and what it cost is spent, in one synchronous step,
    all of it in the window that is then. Before a window is new, it holds what still runs.
Rule 4: what costs nothing fits, even where all is spent.
Rule 5: nothing that runs is cut.
Rule 6: no estimate shuts a door for good: what is refused by it is never made, and would never
    correct it. So it is believed less and less once it had no news for a minute: by the operator's
    price limit, and by a budget that is smaller than it and of which nothing is spent or held. A
    client's own limit means what it says. Who fits only so is a *trial*: made where nobody as well
    fits without, and for each estimate one at a time, or one a minute where it lasts for longer,
    whoever asks.
So `spent + held` passes a budget only by what attempts cost beyond what was held for them when the
last one was let in: by no more than one estimate each where none costs over twice its estimate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from math import inf
from typing import NamedTuple

from ..contracts import (
    NO_SLOT,
    OTHER_POST,
    Backend,
    Candidate,
    Candidates,
    Clock,
    Exchange,
    Gauge,
    Live,
    Notify,
    Outcome,
    Permit,
    tell_nobody,
)
from ..errors import BudgetExceeded, Limited
from .accounts import HAIR, SOON, TENANTS, Budget, Estimate, Hold, Past, Terms, Trial

_LOOK_PAUSE = 1.0  # s between two looks at what runs
_NEWS = 60.0  # s that an estimate stands without news; see rule 6
_HALF_LIFE = 300.0  # s, from then on
_UNCHANGING = 60.0  # s, to who asks for less than anybody is expected to cost

Expected = Callable[[Backend, Live, str | None, float], float]  # `Estimates.usd`


class Refused(NamedTuple):
    """A candidate that would cost too much."""

    candidate: Candidate
    usd: float  # that it is expected to cost
    budgets: tuple[Budget, ...]  # that have no room for it; (): more than one request may cost
    waits: bool = False  # only for an attempt that runs now; see rule 6


class Budgets:
    """Keeps what is spent within the budgets, and each request within its limit.

    Attributes:
        bounded: there is a budget or a limit that holds for every exchange.
    """

    def __init__(
        self,
        terms: Iterable[Terms],
        expected: Expected,
        *,
        max_price: float | None = None,
        clock: Clock = time.monotonic,
        unix: Clock = time.time,
        notify: Notify = tell_nobody,
        look_pause: float = _LOOK_PAUSE,
    ) -> None:
        """`max_price` is what one request may cost, USD; `look_pause`: see rule 2, s."""
        now = unix()
        self._budgets = tuple(Budget(each, now) for each in terms)
        self._expected = expected
        self._max_price = max_price
        self._clock, self._unix, self._notify = clock, unix, notify
        self._since = clock()
        self._look_pause, self._looked = look_pause, -inf
        self.bounded = bool(self._budgets) or max_price is not None
        self._running: dict[int, Hold] = {}  # by the id() of the exchange
        self._planned: dict[str, float] = {}  # USD by backend, of the last plan
        self._trials: dict[str, Estimate] = {}  # by backend, of the last plan; see rule 6
        self._tried: dict[Estimate, Trial] = {}  # by a trial that runs

    # -- before an attempt -----------------------------------------------------------------------

    def part(
        self, exchange: Exchange, candidates: Candidates
    ) -> tuple[list[Candidate], list[Refused]]:
        """Tell those that fit into every limit, in their order, from those that do not."""
        work, now = exchange.work, self._clock()
        own = self._left(exchange.max_price, exchange)
        limit = self._left(self._max_price, exchange)
        rooms = self._rooms(exchange, now)
        least = min([own, limit, *(room for _, room in rooms)])
        expected = self._expected
        planned = self._planned = {}
        self._trials = {}
        fitting: list[Candidate] = []
        refused: list[Refused] = []
        faded: dict[str, Refused] = {}  # those that fit only by an estimate that is not believed
        for candidate in candidates:
            backend = candidate.backend
            usd = planned[backend.name] = expected(backend, candidate.live, work, now)
            if usd <= least:
                fitting.append(candidate)
                continue
            short = [b for b, room in rooms if usd > room and b.covers(backend)]
            if usd <= own and usd <= limit and not short:
                fitting.append(candidate)
                continue
            believed = usd * self._believed(candidate, work, now)
            tenant = exchange.tenant
            full = [b for b in short if believed > b.usd or not b.is_untouched(tenant)]
            if usd > own or believed > limit:
                refused.append(Refused(candidate, usd, ()))
            elif full:
                held = all(believed <= b.usd and not b.look(tenant).spent for b in full)
                refused.append(Refused(candidate, usd, tuple(full), held))
            else:
                fitting.append(candidate)
                faded[backend.name] = Refused(candidate, usd, tuple(short))
        if faded:
            fitting = self._with_trials(fitting, faded, refused, work, now)
        if refused and self._is_first(exchange):
            self._note_closed(exchange.tenant, fitting, refused)
        return fitting, refused

    def _with_trials(
        self,
        fitting: list[Candidate],
        faded: dict[str, Refused],
        refused: list[Refused],
        work: str | None,
        now: float,
    ) -> list[Candidate]:
        """Those of `fitting` that are sure, and who of the `faded` may be tried; see rule 6.

        The others are added to `refused`.
        """
        sure = [c for c in fitting if c.backend.name not in faded]
        for name, each in faded.items():
            candidate = each.candidate
            # Clients make up models: what is new there is expected to be as any is, once for all.
            own = work is None or work in candidate.live.typical
            estimate = (name, work) if own else (name,)
            running = self._tried.get(estimate)
            if any(candidate.last_resort or not c.last_resort for c in sure):
                refused.append(each)  # there is no need
            elif running is not None and now < running.until:
                refused.append(each._replace(waits=True))
            else:
                self._trials[name] = estimate
        return [c for c in fitting if c.backend.name not in faded or c.backend.name in self._trials]

    def _is_first(self, exchange: Exchange) -> bool:
        """Whether no attempt was made yet; a later plan lacks those that were tried."""
        return not exchange.attempts and id(exchange) not in self._running

    def _note_closed(
        self, tenant: str | None, fitting: list[Candidate], refused: list[Refused]
    ) -> None:
        """Note the budgets that let nobody in, be it that who they do not cover takes the request.

        Not those of nothing: they refuse whatever costs anything, as they were made to.
        """
        budgets = {b for each in refused for b in each.budgets if b.usd}
        open_ = {b for b in budgets if any(b.covers(each.backend) for each in fitting)}
        self._note_refusals(tenant, refused, budgets - open_)

    def _note_refusals(
        self, tenant: str | None, refused: Iterable[Refused], of: Collection[Budget]
    ) -> None:
        least: dict[Budget, float] = {}
        for each in refused:
            for budget in each.budgets:
                if budget in of:
                    least[budget] = min(each.usd, least.get(budget, inf))
        for budget, usd in least.items():
            self._note_refusal(budget, tenant, usd)

    def _believed(self, candidate: Candidate, work: str | None, now: float) -> float:
        """How much of an estimate is believed, 0..1; see rule 6."""
        live = candidate.live
        typical = live.typical.get(work)
        if typical is None and work is not None and work != OTHER_POST:
            typical = live.usual  # news of inference is none of what is not known to be one
        at = max(self._since, candidate.backend.joined) if typical is None else typical.at
        return float(0.5 ** (max(now - at - _NEWS, 0.0) / _HALF_LIFE))

    def _left(self, limit: float | None, exchange: Exchange) -> float:
        """USD that the next attempt of an exchange may cost by such a limit of a request."""
        if limit is None:
            return inf
        return max(limit - sum([each.usd for each in exchange.attempts]), 0.0) + HAIR

    def _rooms(self, exchange: Exchange, now: float) -> list[tuple[Budget, float]]:
        """USD that each budget has left for the next attempt of an exchange."""
        self._look(now)
        unix, tenant = self._unix(), exchange.tenant
        own, ended = self._running.get(id(exchange)), exchange.attempts
        rooms = []
        for budget in self._budgets:
            budget.roll(unix)
            account = budget.look(tenant)
            room = budget.usd - account.spent - account.held
            # Whether to try again is asked when an attempt has ended, but still holds its estimate.
            if own is not None and own.number < len(ended) and account in own.accounts:
                room += own.usd - ended[own.number].usd
            rooms.append((budget, max(room, 0.0) + HAIR))
        return rooms

    def _look(self, now: float) -> None:
        """See rule 2."""
        if now - self._looked >= self._look_pause:
            self._looked = now
            for hold in self._running.values():
                hold.look(now)

    def limited(self, exchange: Exchange, refused: Iterable[Refused], soon: float = inf) -> Limited:
        """What to tell a client of which every candidate would cost too much; there are some.

        `soon`: s until there may be another candidate.
        """
        tenant, unix = exchange.tenant, self._unix()
        refused = list(refused)
        if any(each.waits for each in refused):
            soon = min(soon, SOON)
        by_budget = [each for each in refused if each.budgets]
        if not by_budget:
            return self._too_dear(exchange, soon)
        if self._is_first(exchange):
            self._note_refusals(tenant, by_budget, {b for each in by_budget for b in each.budgets})
        # A candidate waits for the last of its budgets, the client for the first candidate.
        wait, name = min(
            max((budget.wait(tenant, each.usd, unix), budget.name) for budget in each.budgets)
            for each in by_budget
        )
        message = f"the budget {name!r} has no room for this request"
        return BudgetExceeded(message, retry_after=round(min(wait, soon), 3))

    def _too_dear(self, exchange: Exchange, soon: float) -> Limited:
        own, limit = exchange.max_price, self._max_price
        named = own is not None and (limit is None or own <= limit)
        what = "X-Beacon-Max-Price" if named else "limits.max_price_per_request"
        message = f"no backend is expected to answer within {what}"
        return Limited(message, retry_after=round(min(_UNCHANGING, soon), 3))

    def _note_refusal(self, budget: Budget, tenant: str | None, usd: float) -> None:
        account = budget.account(tenant)
        account.refuse(usd, budget.usd)
        if budget.told:
            return
        budget.told = True
        self._notify(
            "budget.exhausted",
            budget=budget.name,
            scope=budget.scope,
            per=budget.per,
            usd=budget.usd,
            spent_usd=round(account.spent, 9),
            reserved_usd=round(account.held, 9),
            begins_anew_s=round(budget.ends - self._unix(), 3),
            **({"tenant": tenant} if budget.each_tenant else {}),
        )

    # -- phases of the chain ---------------------------------------------------------------------

    def admit(self, exchange: Exchange, backend: Backend) -> Permit:
        """Hold the estimate; the plan has seen that there is room, in this same step."""
        permit, estimate = self._hold(exchange, backend), self._trials.get(backend.name)
        if estimate is None:
            return permit
        return Trial(self._tried, estimate, permit, self._clock() + _NEWS)

    def _hold(self, exchange: Exchange, backend: Backend) -> Permit:
        usd, price = self._planned[backend.name], backend.price_per_second
        covering = [budget for budget in self._budgets if budget.covers(backend)]
        if not covering or not (usd or price):
            return NO_SLOT
        accounts = tuple([budget.account(exchange.tenant) for budget in covering])
        hold = Hold(self._running, exchange, accounts)
        hold.take(usd, price, self._clock())
        return hold

    def observe(self, exchange: Exchange, outcome: Outcome) -> None:
        usd = outcome.usd
        if not usd:
            return
        unix = self._unix()
        for budget in self._budgets:
            if budget.covers(outcome.backend):
                budget.roll(unix)
                budget.account(exchange.tenant).spent += usd

    def gauges(self) -> Iterator[Gauge]:
        """Of a budget for each tenant: that of the tenant who has used most."""
        self._look(self._clock())
        unix = self._unix()
        for budget in self._budgets:
            budget.roll(unix)
            account, limit = budget.fullest(), budget.usd
            used = account.spent + account.held
            ratio = used / limit if limit else float(used > 0)
            label = (("budget", budget.name),)
            yield Gauge("budget_usd", "What may be spent in a window.", limit, label)
            yield Gauge("budget_spent_usd", "Spent in this window.", account.spent, label)
            yield Gauge("budget_reserved_usd", "Held for what runs now.", account.held, label)
            yield Gauge(
                "budget_used_ratio",
                "Spent and held, of what may be spent; at least 1 while it lets nobody in.",
                max(ratio, 1.0) if account.refuses(limit) else ratio,
                label,
            )

    # -- over a restart --------------------------------------------------------------------------

    def windows(self) -> list[float]:
        """When the windows that are now began: unix s, each once."""
        unix = self._unix()
        for budget in self._budgets:
            budget.roll(unix)
        return sorted({budget.begun for budget in self._budgets})

    def names(self, windows: Iterable[float]) -> list[str]:
        """The budgets that such a window is now of; see `windows`."""
        begun = {*windows}
        return [budget.name for budget in self._budgets if budget.begun in begun]

    @property
    def tenants(self) -> int:
        """Of how many tenants it is of use to know the past."""
        return TENANTS if any(budget.each_tenant for budget in self._budgets) else 0

    def restore(
        self,
        since_unix: float,
        places: Iterable[Past] = (),
        tenants: Iterable[tuple[str | None, float]] = (),
    ) -> None:
        """Count what others spent since one of `windows`, beside what this process spends.

        `places` are for the budgets that do not go by tenants, `tenants` (and USD) for those that
        do. Either may come in pieces; each takes time in proportion to its length.
        """
        unix, by_place, by_tenant = self._unix(), list(places), list(tenants)
        for budget in self._budgets:
            budget.roll(unix)
            if budget.begun != since_unix:  # it is over by now
                continue
            if budget.each_tenant:
                for tenant, usd in by_tenant:
                    budget.account(tenant).spent += usd
            else:
                for past in by_place:
                    if budget.covers_past(past):
                        budget.account(None).spent += past.usd
