"""Modal: web functions and servers behind Modal's own edge.

The edge answers in plain text that begins with `modal-http:`; by that its words are told from the
app's. What it does with a request that takes long differs by the kind of thing behind the URL:

Function: it holds the request, the start of a container included, for 150 s; then it answers 303
    with the address where the result will be. A GET there waits as long again, and so on. The work
    goes on meanwhile and is paid for once: it is never posted a second time.
Server: while no container is ready it answers 503 at once, and that request starts one; it is asked
    again, with backoff, until the limit of a cold start.

Nothing in a 503 tells the two apart, and repeating that of a function buys its work again. So a
kind of `auto` goes by the host: `*.modal.direct` is a Server, `*.modal.run` a function, and at a
domain of one's own no 503 is repeated. Whoever says `kind: server` says that its 503s mean this.

Any request to an app's URL is an input: it starts a GPU container where none runs, which then stays
for its scaledown window, a minute by default. So a check is sent only while traffic keeps the
backend warm, and once in `_ASK_AGAIN` at most: it costs no more than one such window in that time.
Where `control_url` names the function (`modal://APP/FUNCTION`), its control plane is asked instead,
which wakes nothing; see `stats`.

A workspace at its spend limit is back-pressure until the next midnight (UTC), as far as clients are
told; health rests it for its `max_ejection_time` at a time, so that a raised limit is soon found.

Source: https://modal.com/docs/guide/webhook-timeouts, /webhook-proxy-auth, /servers; the words of
the edge as its users report them.
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import time
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes, urlsplit

from beacon_proxy.contracts import (
    Backend,
    Call,
    Check,
    Exchange,
    Fault,
    Finding,
    Headers,
    Hop,
    Prompt,
    Reading,
    Verdict,
    Workers,
)
from beacon_proxy.errors import ConfigError
from beacon_proxy.regions import canonical_region

from ..checking import LOOK, bounded, judge_server, listed_models, plain
from ..openai import CHAT, join_target, setting, url_problem
from ..reading import ask_chat, read_answer
from .stats import check_stats, stats_problem
from .workers import kept_containers, set_containers

if TYPE_CHECKING:
    import aiohttp

_BASE, _TOKEN = "MODAL_API_BASE", "MODAL_API_TOKEN"
_EDGE = b"modal-http:"
_RESULT = "__modal_function_call_id="
_SECRET = secrets.token_bytes(32)
_SESSION = b"Modal-Session-ID"
_DIGITS = re.compile("[0-9]+")  # str.isdigit takes a superscript, too
_VISIBLE = re.compile(rb"[!-~]+")
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 5.0  # s, the bounds of the first backoff and of any
_PLAIN_HOPS = 4  # results in a row that are asked for at once; the edge takes 150 s for each
_LOST_MOST = 5  # times in a row that a result may be called expired
_ASK_AGAIN = 3600.0  # s between two checks that reach the app
_CHECK_TIME = 3.0  # s; less than health gives a check, whose end would be a strike
_DAY = 86_400.0  # s
_KIND_OF_DOMAIN = ((".modal.direct", "server"), (".modal.run", "function"))

# status, words of the edge: what it means. The first that fits is taken.
_EDGE_SAYS: tuple[tuple[int, bytes, Fault, str], ...] = (
    (401, b"", Fault.UNAUTHORIZED, "proxy authorization is missing or wrong"),
    (404, b"is stopped", Fault.GONE, "the app is stopped"),
    (404, b"invalid function call", Fault.GONE, "there is no such function or call"),
    (404, b"is disabled", Fault.GONE, "the workspace is disabled"),
    (404, b"", Fault.GONE, "Modal has nothing behind this url"),
    (429, b"spend limit", Fault.BUSY, "the workspace has reached its spend limit"),
    (500, b"terminated by signal", Fault.STATUS, "the container was killed"),
    (500, b"lost track of input", Fault.STATUS, "Modal lost the input"),
    (500, b"waited too long for port", Fault.STATUS, "the app's server did not start"),
)


_Key = tuple[str, str, float | None]  # name, url, joined


class Modal:
    """The provider `modal`."""

    name = "modal"
    price_per_second = 0.0003
    pool = "burst"
    kinds: tuple[str, ...] = ("auto", "function", "server")
    environment: tuple[str, ...] = (_BASE, _TOKEN)
    control_schemes: tuple[str, ...] = ("modal",)
    cold_start = 600.0  # s
    reads_session = True
    stays_warm = 60.0  # s, Modal's default scaledown window
    scales = True

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        unix: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._clock = clock
        self._unix = unix
        self._rng = random.Random() if rng is None else rng
        self._asked: dict[_Key, float] = {}  # when a check last reached that app

    def from_environment(self, env: Mapping[str, str], region: str) -> list[dict[str, Any]]:
        """One row once `url` or `url|region` is set; without a region it is that of this instance.

        A token alone waits for the URL, as secrets come in any order.
        """
        token = setting(env, _TOKEN)
        url, _, place = (part.strip() for part in setting(env, _BASE).partition("|"))
        if not url:
            return []
        if problem := url_problem(url):
            raise ConfigError(f"{_BASE}: {problem}")
        place = canonical_region(place or region)
        row = {"name": f"modal-{place}", "provider": self.name, "url": url, "region": place}
        return [row | ({"api_key": token} if token else {})]

    def target(self, backend: Backend, target: bytes) -> bytes:
        return join_target(backend.base_path, target)

    def credentials(self, backend: Backend) -> Headers:
        """`wk-…:ws-…` is a proxy token, in headers of its own; anything else a bearer token."""
        key = backend.api_key.encode()
        if not key:
            return ()
        token, colon, secret = key.partition(b":")
        if colon and token.startswith(b"wk-") and secret.startswith(b"ws-"):
            pair = ((b"Modal-Key", token), (b"Modal-Secret", secret))
            return (*pair, (b"Authorization", b""), (b"X-Api-Key", b""))
        return ((b"Authorization", b"Bearer " + key), (b"X-Api-Key", b""))

    def takes(self, backend: Backend, exchange: Exchange) -> bool:
        """Keep out a client that names a result: behind our own token, that may be another's.

        Nobody needs to: results are fetched for the client (`hop`).
        """
        return not backend.api_key or b"?" not in (target := exchange.target) or not _named(target)

    def fields(self, backend: Backend, exchange: Exchange) -> Headers:
        """Name the session, by which a Server keeps it on one container as far as it can.

        A client's own name for it is passed on; of any other only a keyed hash leaves this house.
        """
        if exchange.session is None or _kind(backend) == "function":
            return ()
        wanted = _SESSION.lower()
        own = tuple(pair for pair in exchange.headers if pair[0].lower() == wanted)
        return own or ((_SESSION, _session_id(exchange.session, backend.api_key)),)

    def hop(
        self, backend: Backend, status: int, headers: Headers, body: bytes, target: bytes, hops: int
    ) -> Hop | None:
        """Follow a pending result, or ask a server again that is starting; see `Hops`."""
        at_result = _RESULT.encode() in target
        if status == 303:
            place = _result(backend, headers)
            wait = self._backoff(hops - _PLAIN_HOPS) if hops >= _PLAIN_HOPS else 0.0
            return Hop(place, wait) if place else None
        if status == 408 and at_result:
            return Hop(target, self._backoff(hops)) if hops < _LOST_MOST else None
        # Behind a result's address a 503 is the app's own last word: the work is done.
        if status == 503 and not at_result and _is_starting(backend, body):
            return Hop(None, max(self._backoff(hops), self._retry_after(headers)))
        return None

    def judge(
        self, backend: Backend, status: int, headers: Headers, body: bytes
    ) -> Fault | Finding | None:
        if status == 303:
            return _of_303(backend, headers)
        if status == 503 and _is_starting(backend, body):
            return Fault.LOADING
        said = body[:LOOK].lstrip().lower()
        if said.startswith(_EDGE) and (found := self._of_edge(status, said)) is not None:
            return found
        if status == 408 and said.startswith(b"missing request"):
            return Finding(Fault.STATUS, "the container never got its input")
        return judge_server(backend, status, body)

    def _of_edge(self, status: int, said: bytes) -> Finding | None:
        for code, words, fault, detail in _EDGE_SAYS:
            if status == code and words in said:
                wait = _DAY - self._unix() % _DAY if fault is Fault.BUSY else None
                return Finding(fault, detail, wait)
        return Finding(Fault.STATUS, "an error of Modal's own") if status >= 500 else None

    def wakes(self, backend: Backend) -> bool:
        return not backend.control_url

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> Check | None:
        """Ask the control plane where that is configured, else for the models, and that seldom."""
        if backend.control_url:
            return await check_stats(backend.control_url, _CHECK_TIME)
        if backend.models is not None:
            return None  # each question is a paid input, and this one has its answer already
        if not self._may_ask(backend):
            return None
        url = backend.origin + backend.base_path.removesuffix("/v1") + "/v1/models"
        fields = plain(self.credentials(backend) + backend.headers)
        try:
            async with (
                asyncio.timeout(_CHECK_TIME),
                session.get(url, headers=fields, allow_redirects=False) as response,
            ):
                answer = await bounded(response)
        except TimeoutError:
            # It may have been scaled down just now, and what was to cost nothing starts it.
            return Check(Verdict.NEUTRAL, fault=Fault.TIMEOUT, detail="no answer in time")
        return self._by_models(
            backend, answer.status, answer.body, listed_models(answer.document())
        )

    def _may_ask(self, backend: Backend) -> bool:
        """Whether its app was not asked for long; another app of the same name is another one."""
        now = self._clock()
        self._asked = {key: at for key, at in self._asked.items() if now - at < _ASK_AGAIN}
        key = (backend.name, backend.url, backend.joined)
        if key in self._asked:
            return False
        self._asked[key] = now
        return True

    def _by_models(
        self, backend: Backend, status: int, body: bytes, models: tuple[str, ...] | None
    ) -> Check:
        """Its warmth stays as it was: a check that renewed it would keep it warm for ever."""
        if status == 200:
            return Check(Verdict.GOOD if models is not None else Verdict.NEUTRAL, models=models)
        found = self.judge(backend, status, (), body)
        if status == 404 and found is None:
            return Check(Verdict.GOOD, detail="the app answers; it lists no models (404)")
        fault = found.fault if isinstance(found, Finding) else found
        verdict = Verdict.STRIKE if fault is Fault.GONE else Verdict.NEUTRAL
        detail = found.detail if isinstance(found, Finding) else f"says {status}"
        return Check(verdict, fault=fault or Fault.STATUS, detail=detail)

    def problem(self, backend: Backend) -> str | None:
        return stats_problem(backend.control_url) if backend.control_url else None

    def scalable(self, backend: Backend) -> str | None:
        needed = "control_url: must be modal://APP/FUNCTION to scale it"
        return None if backend.control_url else needed

    async def kept(self, backend: Backend, session: aiohttp.ClientSession, seconds: float) -> int:
        return await kept_containers(backend.control_url, seconds)

    async def scale(
        self, backend: Backend, workers: Workers, session: aiohttp.ClientSession, seconds: float
    ) -> None:
        await set_containers(backend.control_url, workers, seconds)

    def ask(self, backend: Backend, prompt: Prompt) -> Call:
        return ask_chat(self.target(backend, CHAT), prompt)

    def read(self, backend: Backend, document: Mapping[str, Any]) -> Reading:
        return read_answer(document)

    def _backoff(self, times: int) -> float:
        """Seconds, after as many waits in a row: so that many clients do not come in step."""
        bound = min(_FIRST_WAIT * 2.0 ** min(times, 16), _LONGEST_WAIT)
        return self._rng.uniform(bound / 2, bound)

    def _retry_after(self, headers: Headers) -> float:
        """Seconds of the Retry-After field, in either form (RFC 9110 10.2.3); 0 without one."""
        said = next((value for name, value in headers if name.lower() == b"retry-after"), b"")
        text = said.decode("latin-1").strip()
        if _DIGITS.fullmatch(text):
            return min(float(text), _DAY)
        try:
            until = parsedate_to_datetime(text)
            if until.tzinfo is None:
                until = until.replace(tzinfo=UTC)
            return min(max(0.0, until.timestamp() - self._unix()), _DAY)
        except (ValueError, TypeError, OverflowError):
            return 0.0


def _session_id(session: str, key: str) -> bytes:
    """A name for a session that cannot be guessed back without a secret.

    That is the backend's own key, so that all instances of the proxy name it alike, and a restart
    changes nothing. Without a key it lasts as long as this process.
    """
    named = session.encode("utf-8", "surrogateescape")
    secret = blake2b(key.encode()).digest() if key else _SECRET
    return blake2b(named, key=secret, digest_size=16, person=b"modal-session").hexdigest().encode()


def _named(target: bytes) -> bool:
    """Whether the query names a result, spelled in any way that may be read so."""
    query = target.partition(b"?")[2].replace(b"+", b" ")
    return _RESULT.rstrip("=").encode() in unquote_to_bytes(query).lower()


def _location(headers: Headers) -> bytes:
    return next((value for name, value in headers if name.lower() == b"location"), b"")


def _result(backend: Backend, headers: Headers) -> bytes | None:
    """The target of a pending result; None where there is none on this very origin.

    Another host is not followed: it would get the request's fields, credentials among them.
    """
    location = _location(headers)
    if not _VISIBLE.fullmatch(location):
        return None
    try:
        parts = urlsplit(location.decode("ascii"))
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme or backend.scheme)
    except ValueError:
        return None
    if _RESULT not in parts.query or "@" in parts.netloc:
        return None
    if parts.netloc:
        there = (parts.scheme or backend.scheme, parts.hostname, port)
        if there != (backend.scheme, backend.host, backend.port):
            return None
    elif parts.scheme or not parts.path.startswith("/"):
        return None  # Modal names the whole URL
    return f"{parts.path or '/'}?{parts.query}".encode()


def _of_303(backend: Backend, headers: Headers) -> Finding | None:
    if _RESULT.encode() not in _location(headers):
        return None  # the app's own redirect
    if _result(backend, headers) is None:
        return Finding(Fault.STATUS, "the result is at another host, where it is not asked for")
    return Finding(Fault.STATUS, "the result is still pending")


def _is_starting(backend: Backend, body: bytes) -> bool:
    """Whether a 503 says that the model is not up yet, by the app's words or by the kind."""
    fault = judge_server(backend, 503, body)
    return fault is Fault.LOADING or (fault is None and _kind(backend) == "server")


def _kind(backend: Backend) -> str:
    """What stands behind the URL; `auto` where neither the configuration nor the host says it."""
    if backend.kind == "auto":
        for domain, kind in _KIND_OF_DOMAIN:
            if backend.host.lower().endswith(domain):
                return kind
    return backend.kind
