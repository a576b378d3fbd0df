"""What is known of one endpoint's queue, and of the workers behind it."""

from __future__ import annotations

from math import inf

from beacon_proxy.contracts import Clock

from .pace import Budget, Operation

STAYS_WARM = 5.0  # s, RunPod's default idle timeout


class Endpoint:
    """One endpoint: its budgets, and how it wants to be asked.

    Attributes:
        calls: that are open, or still being stopped.
        last_ran: when a job was last seen to run, or to have run (monotonic s).
    """

    def __init__(self, url: str, clock: Clock) -> None:
        self.url = url
        self.budgets = {operation: Budget(operation, clock) for operation in Operation}
        self.posts = False  # the SDK's local server takes POST alone, also for `/status`
        self.calls = 0
        self.last_ran = -inf

    @property
    def idle(self) -> bool:
        return not self.calls and all(budget.idle for budget in self.budgets.values())
