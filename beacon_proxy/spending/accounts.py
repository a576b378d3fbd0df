"""One budget: its window, its accounts, and what the attempts that run hold of them.

A window is one of the calendar, in UTC. An account is what is counted in: one of the whole budget,
or one a tenant. See `budgets` for the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from math import inf
from typing import NamedTuple, Protocol

from ..contracts import Backend, Exchange, Permit

Estimate = tuple[str | None, ...]  # what names one: its backend, and the work if that is known
HAIR = 1e-12  # USD that a sum of floats may be off by
_LENGTHS = {"minute": 60.0, "hour": 3600.0, "day": 86_400.0}  # s
TENANTS = 10_000  # whose accounts are remembered, a budget; clients make them up
_AT_ONCE = 10  # one in so many is forgotten at once: to look for them takes milliseconds
SOON = 5.0  # s, to who finds no room only for what runs


class Terms(Protocol):
    """A budget as configured."""

    @property
    def name(self) -> str: ...

    @property
    def scope(self) -> str:
        """`all`, `tenant`, or `pool:`, `provider:`, `backend:` or `region:` and a name."""
        ...

    @property
    def per(self) -> str:
        """`minute`, `hour`, `day` or `month`."""
        ...

    @property
    def usd(self) -> float: ...


class Past(Protocol):
    """What was spent at one backend before this process began."""

    @property
    def pool(self) -> str: ...

    @property
    def provider(self) -> str: ...

    @property
    def backend(self) -> str: ...

    @property
    def region(self) -> str: ...

    @property
    def usd(self) -> float: ...


def window(per: str, unix: float) -> tuple[float, float]:
    """The calendar window in UTC that `unix` (s) lies in: its start and its end, unix s."""
    if per == "month":
        start = datetime.fromtimestamp(unix, UTC).replace(
            day=1, hour=0, minute=0, second=0, microsecond=0
        )
        end = (start + timedelta(days=32)).replace(day=1)
        return start.timestamp(), end.timestamp()
    length = _LENGTHS[per]
    begun = unix // length * length
    return begun, begun + length


class Remembered(NamedTuple):
    """The window before, and what was spent in it."""

    begun: float  # unix s
    ends: float
    told: bool = False
    spent: Mapping[str, float] = {}


class Account:
    """USD spent in a window and held for what runs."""

    __slots__ = ("held", "refused", "running", "spent")

    def __init__(self) -> None:
        self.spent = self.held = 0.0
        self.running = 0  # attempts that hold some of it
        # USD, the least estimate that was turned away since somebody was let in; inf: none was.
        self.refused = inf

    def refuse(self, usd: float, limit: float) -> None:
        """Turn an estimate away. One from before that would fit by now says nothing any more."""
        if usd < self.refused or not self.refuses(limit):
            self.refused = usd

    def refuses(self, limit: float) -> bool:
        """Whether what was turned away would be turned away again."""
        return limit + HAIR < self.spent + self.held + self.refused < inf

    def give_back(self, usd: float) -> None:
        self.running -= 1
        self.held = self.held - usd if self.running else 0.0  # a sum of floats must not drift


_UNTOUCHED = Account()


class Budget:
    """One budget and its accounts, in the window that is now.

    Attributes:
        begun, ends: of the window, unix s.
        told: somebody was turned away in it.
    """

    def __init__(self, terms: Terms, unix: float) -> None:
        self.name, self.scope, self.per, self.usd = terms.name, terms.scope, terms.per, terms.usd
        self._kind, _, self._of = terms.scope.partition(":")
        self.each_tenant = self._kind == "tenant"
        # The field of a backend that it goes by; "": any backend.
        self._field = "name" if self._kind == "backend" else self._kind if self._of else ""
        self._accounts: dict[str, Account] = {}
        self.begun, self.ends = window(self.per, unix)
        self.told = False
        self._before: Remembered | None = None  # the one that was left

    def covers(self, backend: Backend) -> bool:
        return not self._field or getattr(backend, self._field) == self._of

    def covers_past(self, past: Past) -> bool:
        return not self._field or getattr(past, self._kind) == self._of

    def roll(self, unix: float) -> None:
        """Begin anew if the window is over.

        A clock that was ahead for a moment, or is set back, finds what was spent in the window that
        it left. Set back a little beyond that it begins nothing.
        """
        if self.begun <= unix < self.ends:
            return
        to = self._before
        if to is None or not to.begun <= unix < to.ends:
            if 2 * self.begun - self.ends <= unix < self.begun:
                return
            to = Remembered(*window(self.per, unix))
        accounts = self._accounts
        spent = {key: each.spent for key, each in accounts.items() if each.spent}
        self._before = Remembered(self.begun, self.ends, self.told, spent)
        self._accounts = {key: each for key, each in accounts.items() if each.running}
        for account in self._accounts.values():
            account.spent, account.refused = 0.0, inf
        self.begun, self.ends, self.told = to.begun, to.ends, to.told
        for key, usd in to.spent.items():
            self._accounts.setdefault(key, Account()).spent = usd

    def look(self, tenant: str | None) -> Account:
        """The account as it stands, to be read only."""
        return self._accounts.get((tenant or "") if self.each_tenant else "", _UNTOUCHED)

    def is_untouched(self, tenant: str | None) -> bool:
        """Whether nothing of it is spent or held in this window."""
        account = self.look(tenant)
        return not (account.spent or account.held)

    def account(self, tenant: str | None) -> Account:
        key = (tenant or "") if self.each_tenant else ""
        account = self._accounts.get(key)
        if account is None:
            if len(self._accounts) >= TENANTS:
                self._forget()
            account = self._accounts[key] = Account()
        return account

    def _forget(self) -> None:
        """Drop the accounts in which least was spent, but for those that hold for what runs."""
        idle = [key for key, each in self._accounts.items() if not each.running]
        idle.sort(key=lambda key: self._accounts[key].spent)
        for key in idle[: TENANTS // _AT_ONCE + 1]:
            del self._accounts[key]

    def fullest(self) -> Account:
        """The account of which most is used; to be read only."""
        each = self._accounts.values()
        return max(each, key=lambda account: account.spent + account.held, default=_UNTOUCHED)

    def wait(self, tenant: str | None, usd: float, unix: float) -> float:
        """Seconds until there may be room for `usd`."""
        left = self.ends - unix
        # Where it is only for what runs, that ends before the window does, as a rule.
        return left if self.look(tenant).spent + usd > self.usd + HAIR else min(left, SOON)


class Hold:
    """What one running attempt holds; a second release changes nothing."""

    __slots__ = ("_key", "_running", "accounts", "number", "price", "started", "usd")

    def __init__(
        self, running: dict[int, Hold], exchange: Exchange, accounts: tuple[Account, ...]
    ) -> None:
        self.accounts = accounts
        self.number = len(exchange.attempts)  # its place among them, once it has ended
        self.usd = self.price = self.started = 0.0
        self._running, self._key = running, id(exchange)
        running[self._key] = self

    def take(self, usd: float, price: float, now: float) -> None:
        """Hold the estimate of an attempt that begins now (monotonic s), at `price` a second."""
        self.usd, self.price, self.started = usd, price, now
        for account in self.accounts:
            account.held += usd
            account.running += 1
            account.refused = inf

    def look(self, now: float) -> None:
        """Hold what it has cost so far, where that is more."""
        more = (now - self.started) * self.price - self.usd
        if more > 0:
            self.usd += more
            for account in self.accounts:
                account.held += more

    def release(self) -> None:
        accounts, self.accounts = self.accounts, ()
        if accounts:
            del self._running[self._key]
        for account in accounts:
            account.give_back(self.usd)


class Trial:
    """The attempt that an estimate is tried by; a second release changes nothing."""

    __slots__ = ("_estimate", "_permit", "_tried", "until")

    def __init__(
        self, tried: dict[Estimate, Trial], estimate: Estimate, permit: Permit, until: float
    ) -> None:
        """`tried` are those that are being tried; `permit` is what else the attempt holds.

        No other is made before `until` (monotonic s), unless it ends earlier.
        """
        self._tried, self._estimate, self._permit = tried, estimate, permit
        self.until = until
        tried[estimate] = self

    def release(self) -> None:
        if self._tried.get(self._estimate) is self:
            del self._tried[self._estimate]
        if isinstance(self._permit, Hold):
            for account in self._permit.accounts:
                account.refused = inf  # what was turned away meanwhile was so for this one
        self._permit.release()
