"""What RunPod bills for a job, as far as it says, and else by our clock.

Rule 1: `executionTime` is billed. Until it is told, so is the time since the job was seen to run.
Rule 2: the wait in the queue is not billed, but a worker's start is, the loading of the model
included, and RunPod counts both as `delayTime`. A job is held to have waited for a start where it
waited a second or more and no job of this endpoint had run here within `STAYS_WARM`.
Rule 3: what RunPod never took costs nothing: a wait for our own pace, a connection that is not
made, a refusal. What it may have taken, for its answer was lost, is counted by our clock.
Rule 4: what RunPod bills beside is of a worker and of no one request: the rest of a started second,
and its idle time after the last job.
"""

from __future__ import annotations

from beacon_proxy.contracts import Clock, Reply

from .endpoint import STAYS_WARM, Endpoint
from .job import Job

_START = 1.0  # s in the queue; what is shorter is the queue's own work
_LONGEST = 7 * 86_400.0  # s, the most that RunPod lets a job run or wait


class Bill:
    """The bill of one job, from before it is submitted."""

    def __init__(self, endpoint: Endpoint, reply: Reply, clock: Clock) -> None:
        self._endpoint = endpoint
        self._reply = reply
        self._clock = clock
        self._submitted = now = clock()
        self._cold = now - endpoint.last_ran >= STAYS_WARM
        self._ran_from: float | None = None
        self._delay: float | None = None  # s, as RunPod tells it

    def sent(self) -> None:
        """The submission goes out: from here on the job may be taken, and run."""
        self._submitted = self._clock()
        self._reply.billed(0.0, running=True)

    def refused(self) -> None:
        """RunPod did not take it."""
        self._reply.billed(0.0)

    def note(self, job: Job) -> None:
        """Tell what one look at the job says of it."""
        now = self._clock()
        told = _within(job.delay)
        if told is not None and self._delay is None:
            self._delay = told
            if start := self._start(told):
                self._reply.started_cold(start)
        if job.queued or not job.status:
            self._reply.billed(self._start(now - self._submitted), running=self._cold)
            return
        if job.ran is None and self._ran_from is None and job.final:
            return  # nobody saw it run: the core's clock has counted it from the submission on
        if self._ran_from is None:
            self._ran_from = now
        self._endpoint.last_ran = now
        waited = self._ran_from - self._submitted if self._delay is None else self._delay
        ran = _within(job.ran)
        if ran is None:
            ran = now - self._ran_from
        self._reply.billed(self._start(waited) + ran, running=not job.final)

    def _start(self, waited: float) -> float:
        """Seconds of a worker's start in a wait."""
        return waited if self._cold and waited >= _START else 0.0


def _within(seconds: float | None) -> float | None:
    """Seconds that a job can have taken; else RunPod has not told them."""
    return seconds if seconds is not None and 0 <= seconds <= _LONGEST else None
