"""What is known of one endpoint: how its queue may be asked, and how its workers are.

Both belong to this process; other instances of the proxy, and others, may use the endpoint as well.
"""

from __future__ import annotations

from math import inf

from beacon_proxy.contracts import Check, Clock, ColdStarts, Fault, Verdict

from .pace import Budget, Operation

STAYS_WARM = 5.0  # s, RunPod's default idle timeout
_BELIEVED = 60.0  # s for which a check is believed; the next one comes after 30


class Endpoint:
    """One endpoint.

    Attributes:
        calls: that are open, or still being stopped.
        last_ran: when a job of this process was last seen to run, or to have run (monotonic s).
        starts: what workers took to start.
        barred_at: when a check last found no worker that could start (monotonic s): all throttled,
            crashed, or none at all.
        barred: the last check found that.
    """

    def __init__(self, url: str, clock: Clock) -> None:
        self.url = url
        self.budgets = {operation: Budget(operation, clock) for operation in Operation}
        self.posts = False  # the SDK's local server takes POST alone, also for `/status`
        self.calls = 0
        self.last_ran = self.barred_at = -inf
        self.barred = False
        self.starts = ColdStarts()
        self._clock = clock
        self._checked_at = -inf
        self._kept_until = -inf  # others keep a worker up, as far as was seen

    def note(self, check: Check) -> None:
        """Learn from what RunPod counts of the workers."""
        if check.capacity is None:
            return
        now = self._checked_at = self._clock()
        self.barred = check.verdict is not Verdict.GOOD and check.fault is not Fault.LOADING
        if self.barred:
            self.barred_at = now
        if not check.capacity.running:
            self._kept_until = -inf
        elif not self.calls and now - self.last_ran >= STAYS_WARM:
            self._kept_until = now + _BELIEVED  # it does not run for a job of ours

    @property
    def cold(self) -> bool:
        """Whether a job that is submitted now is held to wait for a worker to start."""
        now = self._clock()
        return now - self.last_ran >= STAYS_WARM and now >= self._kept_until

    @property
    def idle(self) -> bool:
        """Nobody asks it, and nothing is to be remembered."""
        if self.calls or self._clock() - max(self.last_ran, self._checked_at) < _BELIEVED:
            return False
        return all(budget.idle for budget in self.budgets.values())
