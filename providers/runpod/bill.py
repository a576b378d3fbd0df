"""What RunPod bills for a job, as far as it says, and else by our clock.

Rule 1: `executionTime` is billed. Until it is told, so is the time since the job was seen to run;
where looks at it bring nothing, or it ends without a word, the time since it last was seen to wait.
Rule 2: the wait in the queue is not billed, but a worker's start is, the loading of the model
included, and RunPod counts both as `delayTime`. A job is held to have waited for a start where it
waited a second or more, no job of this endpoint had run here within `STAYS_WARM`, and no check had
found a worker that others keep up. While a check finds none that could start, none does.
Rule 3: it was a start once a worker has taken the job. Until then it is charged as it lasts, for
who leaves has caused it, but for no longer than starts of this endpoint usually take; a job that
ends without having run has waited for none.
Rule 4: what RunPod never took costs nothing: a wait for our own pace, a connection that is not
made, a refusal. What it may have taken, for its answer was lost, is counted by our clock.
Rule 5: what RunPod bills beside is of a worker and of no one request: the rest of a started second,
and its idle time after the last job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from beacon_proxy.contracts import Clock, Reply

from .endpoint import Endpoint
from .job import Job

_START = 1.0  # s in the queue; what is shorter is the queue's own work
_LONGEST = 7 * 86_400.0  # s, the most that RunPod lets a job run or wait
_LATE = 1.0  # s for a look to be answered, until it counts as one that brings nothing


class Bill:
    """The bill of one job, from before it is submitted."""

    def __init__(self, endpoint: Endpoint, reply: Reply, clock: Clock) -> None:
        self._endpoint = endpoint
        self._reply = reply
        self._clock = clock
        self._cold = endpoint.cold
        self._submitted = self._waited_at = clock()  # when it went out; was last known to wait
        self._ran_from: float | None = None  # None: it waits, as far as is known
        self._taken = False  # by a worker
        self._delay: float | None = None  # s, as RunPod tells it

    def sent(self) -> None:
        """The submission goes out: from here on the job may be taken, and run."""
        self._submitted = self._waited_at = self._clock()
        self._reply.billed(0.0, running=True)

    def refused(self) -> None:
        """RunPod did not take it."""
        self._reply.billed(0.0)

    def note(self, job: Job) -> None:
        """Tell what one look at the job says of it."""
        now = self._clock()
        if job.queued or not job.status:
            self._waited_at, self._ran_from, self._taken = now, None, False
            start, goes_on = self._waiting(now)
            self._reply.billed(start, running=goes_on)
            return
        told, ran = _within(job.delay), _within(job.ran)
        if not self._taken:
            self._ran_from = self._began(job, told, now)
            self._taken = not job.final or job.status == "COMPLETED" or bool(ran)
        assert self._ran_from is not None
        if told is not None and self._delay is None:
            self._delay = told
            if self._taken and (start := self._start(told)):
                self._endpoint.starts.note(start)
                self._reply.started_cold(start)
        start = 0.0
        if self._taken:
            self._endpoint.last_ran = now
            waited = self._ran_from - self._submitted if self._delay is None else self._delay
            start = self._start(waited)
        if ran is None:
            ran = now - self._ran_from
        self._reply.billed(start + ran, running=not job.final)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Stand around a look: while it brings nothing the job may run."""
        late = asyncio.get_running_loop().call_later(_LATE, self._lost)
        try:
            yield
        except Exception:
            self._lost()
            raise
        finally:
            late.cancel()

    def _lost(self) -> None:
        if self._ran_from is None:
            self._ran_from = self._waited_at
            start, _ = self._waiting(self._waited_at)
            self._reply.billed(start + self._clock() - self._waited_at, running=True)

    def _began(self, job: Job, delay: float | None, now: float) -> float:
        """When a job began that is seen for the first time not to wait (monotonic s)."""
        if delay is not None:
            return min(max(self._waited_at, self._submitted + delay), now)
        unseen = job.final or self._ran_from is not None
        return self._waited_at if unseen else now

    def _waiting(self, now: float) -> tuple[float, bool]:
        """What a job that waits has cost so far, and whether it goes on."""
        if not self._cold or self._endpoint.barred:
            return 0.0, False
        start, usual = self._start(now - self._submitted), self._endpoint.starts.quantile(0.95)
        return (start, True) if usual is None or start < usual else (usual, False)

    def _start(self, waited: float) -> float:
        """Seconds of a worker's start in a wait."""
        waited -= max(self._endpoint.barred_at - self._submitted, 0.0)
        return waited if self._cold and waited >= _START else 0.0


def _within(seconds: float | None) -> float | None:
    """Seconds that a job can have taken; else RunPod has not told them."""
    return seconds if seconds is not None and 0 <= seconds <= _LONGEST else None
