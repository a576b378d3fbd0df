"""Modal: web functions and servers behind Modal's own edge.

The edge answers in plain text that begins with `modal-http:`; by that its words are told from the
app's. Any request to an app's URL is an input that starts a GPU container, billed for a minute at
least, so there is no check: real traffic alone tells how a backend is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from beacon_proxy.contracts import Backend, Call, Check, Fault, Headers, Prompt, Reading
from beacon_proxy.errors import ConfigError
from beacon_proxy.regions import canonical_region

from .checking import LOOK, judge_server
from .openai import CHAT, join_target, setting, url_problem
from .reading import ask_chat, read_answer

if TYPE_CHECKING:
    import aiohttp

_BASE, _TOKEN = "MODAL_API_BASE", "MODAL_API_TOKEN"
_EDGE = b"modal-http:"
_RESULT = b"__modal_function_call_id="


class Modal:
    """The provider `modal`."""

    name = "modal"
    price_per_second = 0.0003
    pool = "burst"
    kinds: tuple[str, ...] = ("auto", "function", "server")
    environment: tuple[str, ...] = (_BASE, _TOKEN)

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

    def judge(self, backend: Backend, status: int, headers: Headers, body: bytes) -> Fault | None:
        if status == 303 and _is_result(headers):
            return Fault.STATUS  # still running after 150 s: where the result will be, not a result
        if status == 503:
            # A server scaled to zero; this very request starts it. A function queues instead.
            warming = Fault.LOADING if backend.kind in ("auto", "server") else None
            return judge_server(backend, status, body) or warming
        said = body[:LOOK].lstrip().lower()
        if said.startswith(_EDGE):
            return _edge_fault(status) or judge_server(backend, status, body)
        if status == 408 and said.startswith(b"missing request"):
            return Fault.STATUS  # the container never got its input
        return judge_server(backend, status, body)

    async def check(self, backend: Backend, session: aiohttp.ClientSession) -> Check | None:
        return None

    def problem(self, backend: Backend) -> str | None:
        return None

    def ask(self, backend: Backend, prompt: Prompt) -> Call:
        return ask_chat(self.target(backend, CHAT), prompt)

    def read(self, backend: Backend, document: Mapping[str, Any]) -> Reading:
        return read_answer(document)


def _edge_fault(status: int) -> Fault | None:
    if status == 401:
        return Fault.UNAUTHORIZED  # proxy authorization, missing or wrong
    if status == 404:
        return Fault.GONE  # stopped app, unknown function, disabled workspace
    return Fault.STATUS if status >= 500 else None


def _is_result(headers: Headers) -> bool:
    return any(name.lower() == b"location" and _RESULT in value for name, value in headers)
