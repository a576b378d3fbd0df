"""Tokens of an answer: as its backend counts them, else by what passed.

Rule 1: a count is read from parsed JSON, at the place where the dialect has it. What a model or a
    client makes up, be it an object of tool arguments, stands elsewhere and is never taken for one.
Rule 2: input is all of the prompt. OpenAI's and Ollama's counts hold what came from a cache;
    Anthropic's `input_tokens` and llama.cpp's `prompt_n` do not, so it is added.
    What of it came from a cache, or was put there, is told beside it, never more than there is; of
    an input that is guessed nothing is known.
Rule 3: the last word holds: counts of a stream are cumulative. Choices that are counted each for
    itself add up in the output; the prompt is one, and was read by the one that found the least of
    it in a cache.
Rule 4: where the dialect is not known, the outermost counts of the events at either end are taken.
Rule 5: what a backend does not say is guessed from sizes, and called estimated.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from ..contracts import Usage
from .dialects import Shape

# Tokens of input and output, None: the backend did not say; and of the input those that came from
# its prompt cache and those that were put there, 0 where it did not say.
Told = tuple[int | None, int | None, int, int]
NOTHING: Told = (None, None, 0, 0)

# Tokens; a count that says more is none. The longest context of a model that one can rent holds 10
# million (Llama 4 Scout). What passed is no bound: thoughts that are billed and not shown, pictures
# by URL and conversations that a server keeps make a large count of a small body.
_MOST = 1 << 24
_EXACT = 1 << 53  # what JSON can say exactly
_CHOICES = 128  # OpenAI's bound of `n`
_LOADED = 1.0  # s; Ollama tells of milliseconds where the model was in memory already


def believed(value: Any) -> int | None:
    """A count of tokens as a backend says it; None: it is none."""
    return value if type(value) is int and 0 <= value < _MOST else None  # a bool is none


def told_of(usage: Usage) -> Told:
    """Tokens as a provider's `read` found them; an input of none is one that was not told."""
    given, made = believed(usage.input) or None, believed(usage.output)
    return _parted(given, made, believed(usage.cached) or 0, believed(usage.cache_written) or 0)


def _parted(given: int | None, made: int | None, cached: int, written: int) -> Told:
    """Counts whose parts are no more than the whole.

    Who says more has not counted it as input, or is mistaken. What was put into the cache goes
    first, for it is the dearer: a budget had better be reached too soon.
    """
    if given is None:
        return None, made, 0, 0
    written = min(written, given)
    return given, made, min(cached, given - written), written


def _of_usage(usage: dict[str, Any]) -> Told:
    """What a `usage` object says.

    Sources: OpenAI's API reference (`prompt_tokens_details.cached_tokens`; of Responses
    `input_tokens_details.cached_tokens`), OpenRouter's "Usage Accounting" (`cache_write_tokens`
    beside it), DeepSeek's (`prompt_cache_hit_tokens`, a part of `prompt_tokens`), Anthropic's
    (`input_tokens` holds neither what was read from a cache nor what was written).
    """
    given, made = believed(usage.get("prompt_tokens")), believed(usage.get("completion_tokens"))
    if given is not None or made is not None:  # OpenAI's
        details = _details(usage, "prompt_tokens_details")
        cached = believed(details.get("cached_tokens"))
        cached = cached or believed(usage.get("prompt_cache_hit_tokens")) or 0
        return _parted(given, made, cached, believed(details.get("cache_write_tokens")) or 0)
    given, made = believed(usage.get("input_tokens")), believed(usage.get("output_tokens"))
    if given is not None:  # Anthropic's, and those of OpenAI's Responses, which has no such caches
        cached = believed(usage.get("cache_read_input_tokens")) or 0
        written = believed(usage.get("cache_creation_input_tokens")) or 0
        given += cached + written
        details = _details(usage, "input_tokens_details")
        cached = cached or believed(details.get("cached_tokens")) or 0
        return _parted(given, made, cached, written)
    if made is not None:
        return None, made, 0, 0
    return believed(usage.get("total_tokens")), None, 0, 0  # of a reranking


def _details(usage: dict[str, Any], name: str) -> dict[str, Any]:
    """What a count is made of; vLLM has null there."""
    details = usage.get(name)
    return details if isinstance(details, dict) else {}


def _of_timings(timings: dict[str, Any]) -> Told:
    """What llama.cpp's `timings` say, which it sends where no usage was asked for."""
    given, cached = believed(timings.get("prompt_n")), believed(timings.get("cache_n")) or 0
    return _parted(
        None if given is None else given + cached, believed(timings.get("predicted_n")), cached, 0
    )


def told_by(document: dict[str, Any]) -> Told:
    """Tokens as a whole answer, or one event that stands for one, counts them."""
    usage = document.get("usage")
    if isinstance(usage, dict):
        given, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if (
            type(given) is int
            and type(made) is int
            and 0 <= given < _MOST
            and 0 <= made < _MOST
            and "prompt_tokens_details" not in usage
            and "timings" not in document
            and "prompt_cache_hit_tokens" not in usage
        ):
            return given, made, 0, 0  # the usual case, on every answer's way: no word of a cache
        told = _of_usage(usage)
        if told != NOTHING:
            given, made, cached, written = told
            if cached or written or "timings" not in document:
                return told
            # A llama.cpp that has no such details yet.
            cached = believed(_details(document, "timings").get("cache_n")) or 0
            return _parted(given, made, cached, 0)
    timings = document.get("timings")
    if isinstance(timings, dict):
        return _of_timings(timings)
    # Ollama's, which takes from its cache and does not say how much.
    given, made = document.get("prompt_eval_count"), document.get("eval_count")
    return believed(given), believed(made), 0, 0


def load_of(document: dict[str, Any]) -> float | None:
    """Seconds that Ollama spent on loading the model, by the last part of its answer.

    None where it had not to (docs/api.md: `load_duration`, in ns).
    """
    spent = document.get("load_duration")
    seconds = spent / 1e9 if type(spent) is int and 0 <= spent < _EXACT else 0.0
    return seconds if seconds >= _LOADED else None


class Tally:
    """What one stream says of its tokens, event by event.

    Attributes:
        told: for all of the answer, as far as it was said.
        finished: a choice has, since the last counts that came without one.
    """

    __slots__ = ("_choices", "_summed", "finished", "told")

    def __init__(self) -> None:
        self.told = NOTHING
        self.finished = False
        self._choices: dict[int, Told] = {}  # counts that came with a choice
        self._summed = False  # there were any without one

    def read(self, shape: Shape, event: dict[str, Any]) -> None:
        """Take the counts out of one event, if it has any."""
        if shape is _CHAT:
            self._read_chat(event)
        elif shape is _OLLAMA:
            self._take(told_by(event))
        elif shape is _MESSAGES:
            usage, message = event.get("usage"), event.get("message")
            if isinstance(usage, dict):
                self._take(_of_usage(usage))
            elif isinstance(message, dict) and isinstance(usage := message.get("usage"), dict):
                self._take(_begun(_of_usage(usage)))
        elif isinstance(response := event.get("response"), dict):
            told = told_by(response)
            self._take(told if told != NOTHING else told_by(event))

    def _take(self, told: Told) -> None:
        self.told = _then(self.told, told)

    def _read_chat(self, event: dict[str, Any]) -> None:
        choices = event.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        told = told_by(event)
        if told == NOTHING:
            return
        if isinstance(choice, dict):
            if not self._summed:
                self._read_choice(choice.get("index"), told)
            return
        # llama.cpp counts each choice for itself, in an event behind its end; all others count all
        # of them in one.
        self.told = _both(self.told, told) if self._summed and self.finished else told
        self._summed, self.finished = True, False

    def _read_choice(self, index: Any, told: Told) -> None:
        counted = self._choices
        if type(index) is not int or (index not in counted and len(counted) >= _CHOICES):
            index = 0
        counted[index] = told
        both = NOTHING
        for each in counted.values():
            both = _both(both, each)
        self.told = both


def _begun(told: Told) -> Told:
    """Counts of a message that only starts: it has yet to answer."""
    given, _, cached, written = told
    return given, None, cached, written


def _then(before: Told, told: Told) -> Told:
    """What holds once more was said; who says the input says with it what it is made of."""
    given, made, cached, written = told
    if given is None:
        given, _, cached, written = before
    return given, before[1] if made is None else made, cached, written


def _both(one: Told, other: Told) -> Told:
    """Counts of two choices of one answer: they have one prompt."""
    given = [each for each in (one, other) if each[0] is not None]
    made = [each[1] for each in (one, other) if each[1] is not None]
    return (
        max((each[0] for each in given if each[0] is not None), default=None),
        sum(made) if made else None,
        min((each[2] for each in given), default=0),
        max((each[3] for each in given), default=0),
    )


class Ends:
    """The two ends of an answer, or an event, that is too long to be kept, or not held whole.

    Counts stand before what is long or behind it. A key is proven to be one of the outermost object
    by parsing: what stands before it, closed there, is a whole document; or what stands from it to
    the end, opened there, is.

    Attributes:
        size: bytes that have passed.
    """

    __slots__ = ("_head", "_tail", "size")

    def __init__(self, data: bytes = b"") -> None:
        self._head = b""
        self._tail = bytearray()
        self.size = 0
        if data:
            self.feed(data)

    def feed(self, piece: bytes) -> None:
        if len(self._head) < _END:
            self._head += piece[: _END - len(self._head)]
        self._tail += piece[-_END:]
        if len(self._tail) > 2 * _END:
            del self._tail[:-_END]
        self.size += len(piece)

    def document(self, inside: bytes = b"") -> dict[str, Any]:
        """As much of the document as holds the counts; empty where they are not found.

        `inside`: the key of the outermost object whose object has them.
        """
        if self.size <= _END:
            return _parsed(self._head) or {}
        tail = bytes(self._tail[-_END:])
        return _end_of(tail, inside) or _start_of(self._head, inside) or {}

    def last_word(self) -> Told:
        """What the events at either end say, of a stream of whatever dialect; JSON lines, too."""
        lines, events = self._head.splitlines(), []
        if self.size > _END:  # the events at the cuts are longer than what is kept of them
            begun = lines.pop().removeprefix(b"data:").lstrip() if lines else b""
            cut, *rest = bytes(self._tail[-_END:]).splitlines() or [b""]
            for inside in (b"", b"response"):
                events += [_start_of(begun, inside), _end_of(cut.rstrip(), inside)]
            lines += rest
        events += [_parsed(line.removeprefix(b"data:")) for line in lines if _KEY.search(line)]
        told = NOTHING
        for event in events:
            if event:
                told = _then(told, _told_inside(event))
        return told


def _end_of(tail: bytes, inside: bytes) -> dict[str, Any] | None:
    """The end of a long document, from the first key of counts on; see `Ends.document`."""
    opened = b'{"%b":{' % inside if inside else b"{"
    for found in list(_KEY.finditer(tail))[-_TRIES:]:  # the first has the others behind it
        if document := _parsed(opened + tail[found.start(1) :]):
            return document
    return None


def _start_of(head: bytes, inside: bytes) -> dict[str, Any] | None:
    """The start of a long document, up to the last counts; see `Ends.document`."""
    for found in list(_COUNTS.finditer(head))[_TRIES::-1]:
        if document := _parsed(head[: found.end()] + (b"}}" if inside else b"}")):
            return document
    return None


def _told_inside(event: dict[str, Any]) -> Told:
    """Counts of an event of whatever dialect; a message that only starts has yet to answer."""
    for place in (event, event.get("response")):
        if isinstance(place, dict) and (told := told_by(place)) != NOTHING:
            return told
    message = event.get("message")
    return _begun(told_by(message)) if isinstance(message, dict) else NOTHING


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


_END = 16 << 10  # bytes; behind the counts OpenAI's Responses has up to 16 pairs of metadata
_TRIES = 8  # parses; only a made-up answer has more such keys near an end
# Inside a string a quote is escaped, so this is a key, of whatever object.
_KEY = re.compile(rb'[{,]\s*("(?:usage|timings|load_duration|prompt_eval_count|eval_count)"\s*:)')
_COUNTS = re.compile(
    rb'[{,]\s*"(?:(?:usage|timings)"\s*:\s*\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}'
    rb'|(?:prompt_)?eval_count"\s*:\s*\d+(?=\D))'
)


# -- guesses -----------------------------------------------------------------------------------

_BYTES_A_TOKEN = 4  # of English text, by OpenAI's rule of thumb
# gzip of a stream that is flushed at each event: measured, llama.cpp's chunks of one token.
_CODED_BYTES_AN_EVENT = 13
_MEDIA = 1000  # tokens of one picture, about
_MEDIA_MOST = 1000  # that are looked for in one body
_GUESS_MOST = 131_072  # tokens of a prompt
LARGE = 64 << 10  # bytes of a body from which on it is looked at for pictures


def text_size(body: bytes) -> int:
    """The size of a large body, its pictures and sounds (data URLs) counted as what they cost."""
    size, end = len(body), 0
    for _ in range(_MEDIA_MOST):
        at = body.find(b";base64,", end)
        if at < 0:
            break
        end = body.find(b'"', at)
        end = len(body) if end < 0 else end
        size += min(0, at - end + _MEDIA * _BYTES_A_TOKEN)
    return size


def guess_input(size: int) -> int:
    """Tokens of a prompt of `size` bytes."""
    return min(-(-size // _BYTES_A_TOKEN), _GUESS_MOST)


def guess_output(size: int, coded: bool) -> int:
    """Tokens of an answer of `size` bytes that could not be read."""
    return size // (_CODED_BYTES_AN_EVENT if coded else _BYTES_A_TOKEN)


# Reaching a member through its class runs Python code in 3.11, ten times the cost of a name.
_CHAT, _MESSAGES, _OLLAMA = Shape.CHAT, Shape.MESSAGES, Shape.OLLAMA
