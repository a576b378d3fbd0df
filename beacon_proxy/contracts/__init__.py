"""The words that every part of beacon-proxy shares, and the shapes of its plugins.

An *exchange* is one client request. It makes one or more *attempts*, each at one *backend*; the
record of an attempt is its *outcome*. A *candidate* is a backend still in the running for the next
attempt, a *permit* a slot taken on a backend, and *commit* the moment the first content of an
answer goes to the client: from there on nothing is retried.

Rule 1: this package imports the standard library and multidict alone, so that a plugin outside this
tree depends on nothing but it and `errors`.
Rule 2: plugins decide, the core moves bytes. No phase sees a body piece of an answer.
Rule 3: times are float seconds of the monotonic clock unless a name says `unix`; sizes are int
bytes; money is USD.
"""

from .backend import (
    WARMING_TIME,
    Backend,
    Candidate,
    Candidates,
    Capacity,
    Check,
    ColdStarts,
    Live,
    Recent,
    Timeouts,
    TokenPrice,
    Typical,
)
from .exchange import NO_SLOT, OTHER_POST, Exchange, Outcome, Permit, Prompt, Usage
from .phases import (
    Admit,
    Fleet,
    Gauge,
    Lifespan,
    Limits,
    Measures,
    Observe,
    Prepare,
    QueueLimits,
    QueueRule,
    Retry,
    Select,
)
from .provider import (
    CLEAN_UP,
    Call,
    Carries,
    Fields,
    Hop,
    Hops,
    Provider,
    Reading,
    Reply,
    Scales,
    Submission,
    Takes,
    Wakes,
    Workers,
)
from .words import (
    Clock,
    Dialect,
    End,
    Fault,
    Finding,
    Headers,
    Notify,
    Stage,
    Verdict,
    Warmth,
    canonical_model,
    tell_nobody,
)

__all__ = [
    "CLEAN_UP",
    "NO_SLOT",
    "OTHER_POST",
    "WARMING_TIME",
    "Admit",
    "Backend",
    "Call",
    "Candidate",
    "Candidates",
    "Capacity",
    "Carries",
    "Check",
    "Clock",
    "ColdStarts",
    "Dialect",
    "End",
    "Exchange",
    "Fault",
    "Fields",
    "Finding",
    "Fleet",
    "Gauge",
    "Headers",
    "Hop",
    "Hops",
    "Lifespan",
    "Limits",
    "Live",
    "Measures",
    "Notify",
    "Observe",
    "Outcome",
    "Permit",
    "Prepare",
    "Prompt",
    "Provider",
    "QueueLimits",
    "QueueRule",
    "Reading",
    "Recent",
    "Reply",
    "Retry",
    "Scales",
    "Select",
    "Stage",
    "Submission",
    "Takes",
    "Timeouts",
    "TokenPrice",
    "Typical",
    "Usage",
    "Verdict",
    "Wakes",
    "Warmth",
    "Workers",
    "canonical_model",
    "tell_nobody",
]
