"""Which URLs may be asked for: http and https at public addresses.

A table of URLs is anybody's text. A name is looked up once and the connection goes to the address that was checked,
for every redirect anew, so that no URL and no name server reaches the machine's own network.
"""

from __future__ import annotations

import ipaddress
import socket

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pipelines.web import Refused


class PrivateAddressError(OSError):
    """A host that has no public address."""


def is_public(text: str) -> bool:
    """Whether an IP address, as text, is one of the public network; what it wraps (IPv4 in IPv6) counts."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return address.is_global and not address.is_multicast


def check_url(text: str, allow_private: bool) -> URL | Refused:
    """The URL, or why it is not asked for; a host that is a name is judged by `PublicResolver`."""
    try:
        url = URL(text.strip())
        host = url.host
        port = url.port
    except ValueError as error:
        return Refused("bad_url", f"{text:.200}: {error}")
    if url.scheme not in ("http", "https") or not host or not port:
        return Refused("bad_url", f"{text:.200}")
    try:
        public = is_public(host)
    except ValueError:
        return url.with_fragment(None)  # a name
    return url.with_fragment(None) if public or allow_private else Refused("private_address", host)


class PublicResolver(AbstractResolver):
    """Looks names up and keeps the public addresses alone."""

    def __init__(self) -> None:
        self._inner = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        public = [each for each in found if is_public(each["host"])]
        if not public:
            raise PrivateAddressError(f"{host} is {', '.join(each['host'] for each in found)}")
        return public

    async def close(self) -> None:
        await self._inner.close()
