"""What some attempts add up to: sums, and sketches of what the good ones took."""

from __future__ import annotations

from math import inf, isfinite

from .sketch import Sketch


class Totals:
    """Sums over some attempts, and how long the good ones among them took.

    Attributes:
        attempts, good, strikes, busy: how many, that ended well, that are held against a backend,
            that it pushed back (429, 503).
        seconds: in attempts. billed: s that were paid for. usd: what they cost.
        tokens_in, tokens_out: as backends count them; tokens_estimated: those of both that they did
            not count themselves.
        paced_tokens, paced_seconds: output tokens of good attempts, and the time they came in.
        ttft, duration: s of good attempts to first content and to the end, less a cold start.
        starts: s of cold starts; None before the first.
    """

    __slots__ = (
        "attempts",
        "billed",
        "busy",
        "duration",
        "good",
        "paced_seconds",
        "paced_tokens",
        "seconds",
        "starts",
        "strikes",
        "tokens_estimated",
        "tokens_in",
        "tokens_out",
        "ttft",
        "usd",
    )

    def __init__(self) -> None:
        self.attempts = self.good = self.strikes = self.busy = 0
        self.seconds = self.billed = self.usd = self.paced_seconds = 0.0
        self.tokens_in = self.tokens_out = self.tokens_estimated = self.paced_tokens = 0
        self.ttft = Sketch()
        self.duration = Sketch()
        self.starts: Sketch | None = None

    def add(self, other: Totals) -> None:
        self.attempts += other.attempts
        self.good += other.good
        self.strikes += other.strikes
        self.busy += other.busy
        self.seconds += other.seconds
        self.billed += other.billed
        self.usd += other.usd
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.tokens_estimated += other.tokens_estimated
        self.paced_tokens += other.paced_tokens
        self.paced_seconds += other.paced_seconds
        self.ttft.merge(other.ttft)
        self.duration.merge(other.duration)
        if other.starts is not None:
            if self.starts is None:
                self.starts = Sketch()
            self.starts.merge(other.starts)

    def started(self, seconds: float, ttft: float | None) -> float | None:
        """Count a cold start; `ttft` without it, None where no more than the start is known."""
        if not 0 <= seconds < inf:  # as its provider told it: anything may have come
            return None
        if self.starts is None:
            self.starts = Sketch()
        self.starts.waiting.append(seconds)
        return ttft - seconds if ttft is not None and ttft > seconds else None

    def fold(self) -> None:
        """Make room for further attempts; due once in 512 of them."""
        self.ttft.fold()
        self.duration.fold()
        if self.starts is not None:
            self.starts.fold()

    def pack(self) -> None:
        """Take less room, and less time to be added up, where no more is to come."""
        self.ttft.pack()
        self.duration.pack()
        if self.starts is not None:
            self.starts.pack()

    def ttft_quantile(self, q: float) -> float | None:
        """Seconds to first content that the share `q` of good answers did not exceed."""
        return self.ttft.quantile(q)

    def duration_quantile(self, q: float) -> float | None:
        """Seconds to the end, likewise."""
        return self.duration.quantile(q)

    def start_quantile(self, q: float) -> float | None:
        """Seconds of cold starts, likewise."""
        return None if self.starts is None else self.starts.quantile(q)

    def success_rate(self) -> float | None:
        """Good attempts of those that say something about their backend; None without any."""
        return _ratio(self.good, self.good + self.strikes)

    def tokens_per_second(self) -> float | None:
        """How fast good answers came: see `Windows.add`."""
        return _ratio(self.paced_tokens, self.paced_seconds)

    def cost_per_second(self) -> float | None:
        """USD for a second that was paid for, over all attempts."""
        return _ratio(self.usd, self.billed)

    def cost_per_million_tokens(self) -> float | None:
        """USD for a million tokens, in or out; what attempts without a token cost is in it, too."""
        return _ratio(self.usd * 1e6, self.tokens_in + self.tokens_out)

    def estimated_share(self) -> float | None:
        """Of all tokens, those that no backend counted: 0..1."""
        return _ratio(self.tokens_estimated, self.tokens_in + self.tokens_out)


def _ratio(part: float, whole: float) -> float | None:
    share = part / whole if whole > 0 else inf
    return share if isfinite(share) else None
