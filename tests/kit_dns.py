"""A small DNS server of the tests, on loopback: real messages over UDP and TCP (RFC 1035).

    async with Zone({("ollama.internal", "AAAA"): ["::1"]}) as zone:
        ...  # resolver: zone.address

It knows the records it is given and no others: a name without any is NXDOMAIN, a name that lacks
the type asked for has an empty answer. The messages are built by dnspython's `dns.message`.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from types import TracebackType
from typing import Any, Self

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

Records = dict[tuple[str, str], list[str]]  # (name, type): what each record says


class Zone:
    """A server for `records`, which may change while it runs.

    Attributes:
        records: by name and type, e.g. `("_x._tcp.example", "SRV"): ["0 5 8080 a.example."]`.
        rcodes: names, or (name, type), answered with an error: `{"example": "SERVFAIL"}`.
        silent: names that get no answer at all.
        truncate: an answer over UDP is cut, so that the client must ask over TCP.
        asked: how often by (name, type, transport).
    """

    def __init__(self, records: Records | None = None) -> None:
        self.records = dict(records or {})
        self.rcodes: dict[Any, str] = {}
        self.silent: set[str] = set()
        self.truncate = False
        self.asked: Counter[tuple[str, str, str]] = Counter()
        self.port = 0
        self._udp: asyncio.DatagramTransport | None = None
        self._tcp: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        # The same port for both: one that TCP got may be taken for UDP, but seldom twice.
        for _ in range(20):
            self._tcp = await asyncio.start_server(self._stream, "127.0.0.1", 0)
            self.port = self._tcp.sockets[0].getsockname()[1]
            try:
                self._udp, _ = await loop.create_datagram_endpoint(
                    lambda: _Datagrams(self), local_addr=("127.0.0.1", self.port)
                )
            except OSError:
                self._tcp.close()
                continue
            return self
        raise OSError("no port is free for both UDP and TCP")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._udp is not None
        assert self._tcp is not None
        self._udp.close()
        self._tcp.close()
        await self._tcp.wait_closed()

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            (size,) = struct.unpack("!H", await reader.readexactly(2))
            answer = self.answer(await reader.readexactly(size), "tcp")
            if answer is not None:
                writer.write(struct.pack("!H", len(answer)) + answer)
                await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    def answer(self, data: bytes, transport: str) -> bytes | None:
        """The answer to one message; None: silence."""
        query = dns.message.from_wire(data)
        (question,) = query.question
        name = question.name.to_text(omit_final_dot=True)
        kind = dns.rdatatype.to_text(question.rdtype)
        self.asked[name, kind, transport] += 1
        if name in self.silent:
            return None
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.AA | dns.flags.RA
        wrong = self.rcodes.get((name, kind)) or self.rcodes.get(name)
        texts = self.records.get((name, kind), [])
        if wrong is not None:
            answer.set_rcode(dns.rcode.from_text(wrong))
        elif texts and self.truncate and transport == "udp":
            answer.flags |= dns.flags.TC
        elif texts:
            answer.answer.append(dns.rrset.from_text(question.name, 5, "IN", kind, *texts))
        elif not any(known == name for known, _ in self.records):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        return bytes(answer.to_wire())


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, zone: Zone) -> None:
        self._zone = zone

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        answer = self._zone.answer(data, "udp")
        if answer is not None:
            self._transport.sendto(answer, address)
