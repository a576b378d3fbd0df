"""Backends from the DNS: SRV records, or A and AAAA. Loaded only where they are asked for.

Of SRV records (RFC 2782) those with the lowest priority number count; the others stand by until
these have left the DNS. The one with the greatest weight gets the whole `max_in_flight`, the others
their part of it. A target is looked up here, by the same server, and each of its addresses is a
backend; over https the target's name itself is, for that is what its certificate is for.

The interval alone says when to look again: whoever answers keeps what it knows by the TTL.
"""

from __future__ import annotations

import asyncio
from typing import Any

import dns.asyncresolver
import dns.exception
import dns.rdatatype
import dns.resolver

from ..config.backends import SERVICE, Discovery, split_resolver
from .answer import ROWS_MOST, NoAnswer

_Kind = tuple[str, dns.rdatatype.RdataType]  # a name, A or AAAA
_FAMILIES = (dns.rdatatype.A, dns.rdatatype.AAAA)
_SAID_MOST = 200  # characters of an error in the log


class Records:
    """A name in the DNS."""

    def __init__(self, settings: Discovery) -> None:
        assert settings.dns is not None
        self.name = f"dns {settings.dns}"
        self._asked = settings.dns
        self._settings = settings
        self._known: dict[_Kind, list[str]] = {}  # the last good answers
        self._used: dict[_Kind, list[str]] = {}  # of them, those of the look under way
        self._rows: list[dict[str, Any]] | None = None  # the last good answer of all

    async def look(self) -> list[Any] | None:
        self._used = {}
        try:
            resolver = self._resolver()
            if SERVICE.fullmatch(self._asked):
                rows = await self._of_services(resolver)
            else:
                port = self._settings.port
                rows = [
                    {"url": self._url(address, port)}
                    for address in sorted(await self._addresses(resolver, self._asked))
                ]
        except (dns.exception.DNSException, OSError) as exc:
            raise NoAnswer(" ".join(str(exc).split())[:_SAID_MOST]) from None
        if len(rows) > ROWS_MOST:
            raise NoAnswer(f"has {len(rows)} backends; {ROWS_MOST} are the most")
        self._known = self._used
        if rows == self._rows:
            return None
        self._rows = rows
        return rows

    def _resolver(self) -> dns.asyncresolver.Resolver:
        """Made anew for each look: the system's may have changed."""
        server = self._settings.resolver
        resolver = dns.asyncresolver.Resolver(configure=server is None)
        if server is not None:
            address, resolver.port = split_resolver(server)
            resolver.nameservers = [address]
        # A look asks twice at most, one after the other.
        resolver.lifetime = self._settings.timeout / 2
        return resolver

    async def _of_services(self, resolver: dns.asyncresolver.Resolver) -> list[dict[str, Any]]:
        answer = await resolver.resolve(self._asked, dns.rdatatype.SRV)
        records = [(r.priority, r.target.to_text(True), r.port, r.weight) for r in answer]
        if [target for _, target, _, _ in records] == ["."]:
            return []  # RFC 2782: the service is decidedly not available
        first = min(records)[0]
        chosen = sorted(record for record in records if record[0] == first)
        places = await asyncio.gather(*(self._places(resolver, each[1]) for each in chosen))
        heaviest = max(weight for *_, weight in chosen)
        found: dict[str, dict[str, Any]] = {}
        for (_, _, port, weight), hosts in zip(chosen, places, strict=True):
            for host in hosts:
                row: dict[str, Any] = {"url": self._url(host, port)}
                if weight != heaviest:
                    most: int = getattr(self._settings.backend, "max_in_flight")  # noqa: B009
                    row["max_in_flight"] = max(1, round(most * weight / heaviest))
                found.setdefault(row["url"], row)
        if not found:
            raise NoAnswer("has SRV records, but none of their targets has an address")
        return list(found.values())

    async def _places(self, resolver: dns.asyncresolver.Resolver, target: str) -> list[str]:
        """Where a target is; nowhere where the DNS says that it has no address."""
        if self._settings.scheme == "https":
            return [target]
        try:
            return sorted(await self._addresses(resolver, target))
        except (dns.resolver.NXDOMAIN, NoAnswer):
            return []

    async def _addresses(self, resolver: dns.asyncresolver.Resolver, name: str) -> list[str]:
        """The addresses of a name, of both families.

        Where one of the two cannot be had, its last good answer holds.
        """
        answers = await asyncio.gather(
            *(resolver.resolve(name, kind, raise_on_no_answer=False) for kind in _FAMILIES),
            return_exceptions=True,
        )
        failed: list[BaseException] = []
        found: list[str] = []
        for kind, answer in zip(_FAMILIES, answers, strict=True):
            key = name, kind
            if isinstance(answer, BaseException):
                failed.append(answer)
                if key not in self._known:
                    continue
                self._used[key] = self._known[key]
            else:
                self._used[key] = [record.address for record in answer.rrset or ()]
            found += self._used[key]
        if len(failed) == len(_FAMILIES):
            raise failed[0]
        if not found:
            raise failed[0] if failed else NoAnswer("has no A and no AAAA record")
        return list(dict.fromkeys(found))

    def _url(self, host: str, port: int | None) -> str:
        shown = f"[{host}]" if ":" in host else host
        return f"{self._settings.scheme}://{shown}" + (f":{port}" if port else "")

    async def rest(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """There is nothing to close."""
