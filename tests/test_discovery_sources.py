"""Each kind of source alone, against real files, a real HTTP server and real DNS messages."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from beacon_proxy.config import load_settings
from beacon_proxy.config.backends import Discovery, split_resolver
from beacon_proxy.discovery.answer import ROWS_MOST, SIZE_MOST, NoAnswer, Source
from beacon_proxy.discovery.file import File
from beacon_proxy.discovery.rows import backends_of, derived_name
from beacon_proxy.discovery.sources import source_of
from beacon_proxy.plugins import build_provider

from .kit import closed_port
from .kit_dns import Zone
from .kit_proxy import plugins, written


@asynccontextmanager
async def source(**row: Any) -> AsyncIterator[Source]:
    made = source_of(Discovery.model_validate({"provider": "golem", **row}), "0")
    try:
        yield made
    finally:
        await made.close()


async def refusal(made: Source) -> str:
    with pytest.raises(NoAnswer) as caught:
        await made.look()
    return str(caught.value)


# Files


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'[{"url": "http://h', "is not JSON: "),
        (b"", "is not JSON: "),
        (b"{}", "is no JSON array"),
        (b"null", "is no JSON array"),
        (b"[" + b"0," * ROWS_MOST + b"0]", f"has {ROWS_MOST + 1} rows; {ROWS_MOST} are the most"),
        (b" " * (SIZE_MOST + 1), f"is longer than {SIZE_MOST} bytes"),
        (b"[" * 100_000, "is not JSON: "),
        (b'["\xff"]', "is not JSON: "),
    ],
)
async def test_file_when_its_content_is_no_answer_says_why(
    content: bytes, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "nodes.json"
    path.write_bytes(content)
    async with source(file=str(path)) as made:
        assert (await refusal(made)).startswith(why)
        path.write_bytes(b'["http://h"]')
        assert await made.look() == ["http://h"]


async def test_file_when_there_is_none_or_it_is_a_pipe_says_so(tmp_path: Path) -> None:
    """The open of a pipe waits for its other end: it would hold the thread for ever."""
    async with source(file=str(tmp_path / "none")) as made:
        assert await refusal(made) == "cannot be read: No such file or directory"
    async with source(file=str(tmp_path)) as made:
        assert await refusal(made) == "is no regular file"
    os.mkfifo(tmp_path / "pipe")
    async with source(file=str(tmp_path / "pipe")) as made:
        assert await refusal(made) == "is no regular file"
    async with source(file="a\0b") as made:
        assert (await refusal(made)).startswith("cannot be read: ")


async def test_file_when_its_bytes_are_the_same_says_nothing_new(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    path.write_text('["http://h"]')
    async with source(file=str(path)) as made:
        assert await made.look() == ["http://h"]
        assert await made.look() is None
        path.write_text('["http://h')
        assert (await refusal(made)).startswith("is not JSON: ")
        path.write_text('["http://h"]')
        assert await made.look() is None, "the last good answer is the same still"
        path.write_text("[]")
        assert await made.look() == []


async def test_rows_when_there_are_many_are_checked_with_the_loop_in_between() -> None:
    known = plugins()
    row = {"provider": "openai", "file": "/nodes.json"}
    with written({"server": {"port": 0}, "backends": [], "discovery": [row]}) as path:
        settings = load_settings(path, {}, known)
    providers = {name: build_provider(cls) for name, cls in known.providers.items()}
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other(), name="beside")
    answer = [f"http://127.0.0.1:{port}" for port in range(1, ROWS_MOST + 1)]
    found, problems = await backends_of(answer, settings.discovery[0], settings, providers)
    assert (len(found), problems) == (ROWS_MOST, [])
    assert turns >= ROWS_MOST / 20
    beside.cancel()


async def test_file_when_it_changes_while_it_rests_wakes_and_else_it_sleeps(
    tmp_path: Path,
) -> None:
    path = tmp_path / "nodes.json"
    path.write_text("[]")
    made = File(str(path))
    assert await made.look() == []
    loop = asyncio.get_running_loop()
    resting = asyncio.create_task(made.rest(60.0), name="rest")
    await asyncio.sleep(0.05)
    assert not resting.done()
    path.write_text('["http://h"]')
    async with asyncio.timeout(10.0):
        await resting
    assert await made.look() == ["http://h"]
    began = loop.time()
    await made.rest(0.05)
    assert loop.time() - began >= 0.04  # the clock of uvloop counts whole ms
    path.unlink()
    async with asyncio.timeout(10.0):
        await made.rest(60.0)
    await refusal(made)
    began = loop.time()
    await made.rest(0.6)  # that it is not there is known: no reason to look again and again
    assert loop.time() - began >= 0.59


# URLs


class Site:
    """A real HTTP server whose one page is what a test says."""

    def __init__(self) -> None:
        self.status = 200
        self.body: bytes = b"[]"
        self.headers: dict[str, str] = {}
        self.delay = 0.0
        self.requests: list[web.BaseRequest] = []
        self.url = ""

    async def page(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        await asyncio.sleep(self.delay)
        tag = self.headers.get("ETag")
        if tag is not None and request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers={"ETag": tag})
        return web.Response(status=self.status, body=self.body, headers=self.headers)


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    served = Site()
    runner = web.ServerRunner(web.Server(served.page), shutdown_timeout=0.1)
    await runner.setup()
    try:
        where = web.TCPSite(runner, "127.0.0.1", 0)
        await where.start()
        served.url = f"http://127.0.0.1:{runner.addresses[0][1]}/nodes?token=t0ps3cret"
        yield served
    finally:
        await runner.cleanup()


async def test_url_when_it_answers_gives_its_rows_and_asks_for_json() -> None:
    async with site() as served, source(url=served.url) as made:
        served.body = b'[{"url": "http://h"}, "http://i"]'
        assert await made.look() == [{"url": "http://h"}, "http://i"]
        (asked,) = served.requests
        assert asked.headers["Accept"] == "application/json"
        assert asked.headers["Accept-Encoding"] == "identity"
        assert asked.query["token"] == "t0ps3cret"
        assert "t0ps3cret" not in made.name
        assert made.name.startswith("url http://127.0.0.1:")


async def test_url_when_its_tag_is_the_same_says_nothing_new() -> None:
    async with site() as served, source(url=served.url) as made:
        served.headers, served.body = {"ETag": '"1"'}, b'["http://h"]'
        assert await made.look() == ["http://h"]
        assert await made.look() is None
        served.headers, served.body = {"ETag": '"2"'}, b"{}"
        assert await refusal(made) == "is no JSON array"
        served.body = b'["http://i"]'  # the tag of a bad answer was not kept
        assert await made.look() == ["http://i"]


async def test_url_when_its_bytes_are_the_same_says_nothing_new() -> None:
    """Many give no tag: a thousand rows that nobody changed cost the loop 0.1 s each time."""
    async with site() as served, source(url=served.url) as made:
        served.body = b'["http://h"]'
        assert await made.look() == ["http://h"]
        assert await made.look() is None
        served.body = b"["
        assert (await refusal(made)).startswith("is not JSON: ")
        served.body = b'["http://h"]'
        assert await made.look() is None, "the last good answer is the same still"
        served.body = b'["http://i"]'
        assert await made.look() == ["http://i"]


@pytest.mark.parametrize(
    ("status", "headers", "body", "why"),
    [
        (500, {}, b"[]", "says 500"),
        (204, {}, b"", "says 204"),
        (404, {}, b"[]", "says 404"),
        (302, {"Location": "http://127.0.0.1:9/"}, b"", "says 302 (redirects are not followed)"),
        (200, {}, b"<html>captive portal</html>", "is not JSON: "),
        (200, {}, b" " * (SIZE_MOST + 1), f"is longer than {SIZE_MOST} bytes"),
        (200, {"Content-Encoding": "gzip"}, b"\x1f\x8b", "is compressed, though it was asked not"),
    ],
)
async def test_url_when_its_answer_is_none_says_why_without_its_token(
    status: int, headers: dict[str, str], body: bytes, why: str
) -> None:
    async with site() as served, source(url=served.url) as made:
        served.status, served.headers, served.body = status, headers, body
        said = await refusal(made)
        assert said.startswith(why)
        assert "t0ps3cret" not in said
        assert len(served.requests) == 1
        served.status, served.headers, served.body = 200, {}, b"[]"
        assert await made.look() == []


async def test_url_when_nobody_listens_or_it_breaks_off_says_so_without_its_token() -> None:
    with closed_port() as port:
        async with source(url=f"http://127.0.0.1:{port}/?token=t0ps3cret", timeout=1) as made:
            assert await refusal(made) == "cannot be asked: ClientConnectorError"

    asked = 0

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[")
        writer.close()

    server = await asyncio.start_server(garbage, "127.0.0.1", 0)
    async with server, source(url=f"http://127.0.0.1:{_port(server)}/") as made:
        assert await refusal(made) == "cannot be asked: ClientPayloadError"
        assert asked == 1


def _port(server: asyncio.Server) -> int:
    return int(server.sockets[0].getsockname()[1])


# DNS

SRV = "_beacon._tcp.example"


async def test_dns_when_it_has_both_families_each_address_is_a_backend() -> None:
    """As Fly's `<app>.internal` has them, with an alias before."""
    records = {
        ("ollama.internal", "A"): ["127.0.0.2", "127.0.0.1"],
        ("ollama.internal", "AAAA"): ["fdaa::3"],
        ("six.internal", "AAAA"): ["fdaa::4"],
    }
    async with Zone(records) as zone:
        async with source(dns="ollama.internal", port=11434, resolver=zone.address) as made:
            rows = await made.look()
            assert rows is not None
            assert [row["url"] for row in rows] == [
                "http://127.0.0.1:11434",
                "http://127.0.0.2:11434",
                "http://[fdaa::3]:11434",
            ]
            assert made.name == "dns ollama.internal"
        async with source(dns="six.internal.", scheme="https", resolver=zone.address) as made:
            assert await made.look() == [{"url": "https://[fdaa::4]"}]


async def test_dns_when_records_are_srv_takes_the_first_priority_and_weighs_room() -> None:
    records = {
        (SRV, "SRV"): [
            "0 10 8080 b.example.",
            "0 5 8081 a.example.",
            "0 0 8082 gone.example.",
            "9 50 8083 standby.example.",
        ],
        ("a.example", "A"): ["127.0.0.1"],
        ("b.example", "A"): ["127.0.0.2", "127.0.0.3"],
        ("standby.example", "A"): ["127.0.0.9"],
    }
    async with Zone(records) as zone:
        row = {"dns": SRV, "resolver": zone.address, "backend": {"max_in_flight": 6}}
        async with source(**row) as made:
            assert await made.look() == [
                {"url": "http://127.0.0.1:8081", "max_in_flight": 3},
                {"url": "http://127.0.0.2:8080"},
                {"url": "http://127.0.0.3:8080"},
            ]
            zone.records[SRV, "SRV"] = ["9 50 8083 standby.example."]
            assert await made.look() == [{"url": "http://127.0.0.9:8083"}]
            zone.records[SRV, "SRV"] = ["0 0 0 ."]
            assert await made.look() == [], "RFC 2782: decidedly not available"
            zone.records[SRV, "SRV"] = ["0 0 1 gone.example."]
            assert "none of their targets has an address" in await refusal(made)
        async with source(**row, scheme="https") as made:
            zone.records[SRV, "SRV"] = ["0 5 443 a.example."]
            # Its certificate is for the name.
            assert await made.look() == [{"url": "https://a.example:443"}]


async def test_dns_when_the_answer_is_cut_asks_over_tcp() -> None:
    many = [f"127.0.1.{n}" for n in range(1, 201)]
    async with Zone({("many.example", "A"): many}) as zone:
        zone.truncate = True
        async with source(dns="many.example", resolver=zone.address) as made:
            rows = await made.look()
            assert rows is not None
            assert len(rows) == 200
        assert zone.asked["many.example", "A", "udp"] == 1
        assert zone.asked["many.example", "A", "tcp"] == 1


@pytest.mark.parametrize("name", ["x.example", SRV])
async def test_dns_when_it_fails_or_is_empty_is_no_answer(name: str) -> None:
    async with Zone({("x.example", "TXT"): ["text"], (SRV, "TXT"): ["text"]}) as zone:
        row = {"dns": name, "resolver": zone.address, "timeout": 0.4}
        async with source(**row) as made:
            said = await refusal(made)
            assert "no A and no AAAA" in said or "does not contain an answer" in said
            zone.rcodes[name] = "SERVFAIL"
            assert "SERVFAIL" in await refusal(made)
            zone.rcodes[name] = "NXDOMAIN"
            assert "does not exist" in await refusal(made)
            del zone.rcodes[name]
            zone.silent.add(name)
            assert "lifetime expired" in await refusal(made)
    with closed_port() as port:
        async with source(**{**row, "resolver": f"127.0.0.1:{port}"}) as made:
            await refusal(made)


async def test_dns_when_one_family_fails_its_last_good_addresses_hold() -> None:
    """A server that now and then cannot say AAAA must not take half of the fleet away."""
    records = {("x.example", "A"): ["127.0.0.1"], ("x.example", "AAAA"): ["::1"]}
    async with Zone(records) as zone, source(dns="x.example", resolver=zone.address) as made:
        both = [{"url": "http://127.0.0.1"}, {"url": "http://[::1]"}]
        zone.rcodes["x.example", "AAAA"] = "SERVFAIL"
        assert await made.look() == both[:1]
        zone.rcodes.clear()
        assert await made.look() == both
        zone.rcodes["x.example", "AAAA"] = "SERVFAIL"
        assert await made.look() is None, "the same"
        assert await made.look() is None
        zone.records.pop(("x.example", "AAAA"))
        zone.rcodes.clear()
        assert await made.look() == both[:1], "that there is none is an answer"


async def test_dns_when_a_target_cannot_be_looked_up_the_whole_look_fails() -> None:
    """Else a moment's trouble with one name would take its backend away."""
    records = {
        (SRV, "SRV"): ["0 0 1 a.example.", "0 0 2 b.example."],
        ("a.example", "A"): ["127.0.0.1"],
        ("b.example", "A"): ["127.0.0.2"],
    }
    async with Zone(records) as zone, source(dns=SRV, resolver=zone.address) as made:
        zone.rcodes["b.example"] = "SERVFAIL"
        assert "SERVFAIL" in await refusal(made)


async def test_dns_when_no_resolver_is_named_asks_the_systems(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """/etc/resolv.conf, read anew for each look; here another file in its place."""
    from dns import asyncresolver

    conf, read = tmp_path / "resolv.conf", asyncresolver.Resolver.read_resolv_conf
    async with Zone({("x.example", "A"): ["127.0.0.1"]}) as zone:

        def reading(resolver: asyncresolver.Resolver, _: object) -> None:
            resolver.port = zone.port  # port 53 is nothing a test may listen on
            read(resolver, str(conf))

        monkeypatch.setattr(asyncresolver.Resolver, "read_resolv_conf", reading)
        async with source(dns="x.example") as made:
            conf.write_text("")
            assert "no nameservers" in await refusal(made)
            conf.write_text("nameserver 127.0.0.1\n")
            assert await made.look() == [{"url": "http://127.0.0.1"}]


# Names


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://10.0.0.1:11434", "golem-10.0.0.1-11434"),
        ("http://10.0.0.1", "golem-10.0.0.1-80"),
        ("https://h.example/", "golem-h.example-443"),
        ("https://h.example/v1/x", "golem-h.example-443-v1-x-MARK"),
        ("http://h.example:443", "golem-h.example-443-MARK"),
        ("https://h.example:8443", "golem-h.example-8443-MARK"),
        ("http://[fdaa:0:1::3]:80", "golem-fdaa-0-1--3-80"),
        ("ftp://h", "unnamed"),
        (None, "unnamed"),
    ],
)
def test_name_when_a_row_has_none_says_where_it_is(url: object, name: str) -> None:
    derived = derived_name("golem", url)
    assert re.sub(r"(?<=-)[0-9a-f]{8}$", "MARK", derived) == name
    assert derived_name("golem", url) == derived


def test_names_when_places_differ_by_what_no_name_may_hold_differ_too() -> None:
    places = ["h", "h/a-b", "h/a/b", "h/%61", "h:1/2", "h-1:2"]
    urls = [f"{scheme}://{place}" for scheme in ("http", "https") for place in places]
    urls += [f"http://h:443{path}" for path in ("", "/a-b", "/a/b", "/%61")]
    assert len({derived_name("golem", url) for url in urls}) == len(urls)
    assert derived_name("golem", "HTTPS://H/") == derived_name("golem", "https://h:443")


def test_name_when_it_would_be_too_long_is_cut_and_still_one_of_its_own() -> None:
    one, two = (derived_name("golem", f"http://{'h' * 60}.{'h' * 60}/{n}") for n in (1, 2))
    assert len(one) == len(two) == 100
    assert one != two


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("10.0.0.2", ("10.0.0.2", 53)),
        ("10.0.0.2:5353", ("10.0.0.2", 5353)),
        ("fdaa::3", ("fdaa::3", 53)),
        ("[fdaa::3]", ("fdaa::3", 53)),
        ("[fdaa::3]:5353", ("fdaa::3", 5353)),
    ],
)
def test_resolver_when_it_is_split_gives_address_and_port(
    text: str, split: tuple[str, int]
) -> None:
    assert split_resolver(text) == split


@pytest.mark.parametrize(
    "text",
    ["dns.example", "", "10.0.0.2:0", "10.0.0.2:x", "10.0.0.2:65536", "[::1]x", "[::1", "[::1]:"],
)
def test_resolver_when_it_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be an IP address"):
        split_resolver(text)
