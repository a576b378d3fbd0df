"""A real model behind the stub of Modal's edge, asked by a real client: the run of the issue.

The edge is `kit_modal`'s; what it brings is llama.cpp's own answer, byte for byte.
"""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import openai
import pytest

from .kit import proxy
from .kit_modal import App, Call, Function
from .real import MODEL, Child

pytest_plugins = ["tests.real"]

ASK = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Count from one to ten."}],
    "max_tokens": 40,
    "temperature": 0.0,
    "seed": 1,
}


def brings(child: Child, cuts: int) -> App:
    """A function that takes `cuts` times 150 s to start, and then asks llama.cpp."""
    place = urlsplit(child.llama_url)

    async def app(call: Call) -> None:
        await call.until_cut(cuts)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        head = call.received.raw_head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        writer.write(head + call.received.body)
        while piece := await reader.read(65536):
            call.answer(piece)
        writer.close()

    return app


def client_of(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=30)


@pytest.mark.parametrize("stream", [False, True], ids=["document", "stream"])
async def test_real_model_when_it_starts_for_two_cuts_says_what_it_says_directly(
    llama: Child, stream: bool
) -> None:
    """What is paid for is counted at the edge: one POST, however long it took."""
    edge = Function(brings(llama, cuts=2))
    async with edge, proxy({"provider": "modal", "kind": "function", "url": edge.url}) as p:
        texts = []
        for url in (llama.llama_url, f"http://127.0.0.1:{p.port}"):
            async with client_of(url) as client:
                texts.append(await (streamed if stream else whole)(client))
        (done,) = await p.exchanges(1)
    assert texts[0] == texts[1]
    assert len(texts[0]) > 20
    assert [each.method for each in edge.posts] == ["POST"]
    assert {each.method for each in edge.gets} == {"GET"}
    assert len(edge.gets) >= 2  # the model's own time may be cut, too
    assert (done["end"], len(done["attempts"])) == ("complete", 1)


async def whole(client: openai.AsyncOpenAI) -> str:
    raw = await client.chat.completions.with_raw_response.create(**ASK)  # type: ignore[call-overload]
    assert raw.status_code == 200
    return str(raw.parse().choices[0].message.content)


async def streamed(client: openai.AsyncOpenAI) -> str:
    pieces = await client.chat.completions.create(stream=True, **ASK)  # type: ignore[call-overload]
    return "".join([each.choices[0].delta.content or "" async for each in pieces if each.choices])
