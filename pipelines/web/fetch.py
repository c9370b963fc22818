"""One URL in, its bytes or a reason out, bounded in time, size, redirects, connections and requests a second.

async with Client(options, directives) as client:
    found = await client.fetch("https://example.org/a.jpg")     # bytes | Refused
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import time
from collections import defaultdict
from typing import NamedTuple

import aiohttp
from pydantic import Field
from yarl import URL

from cl import __version__
from cl.config import Config
from pipelines.web import Refused
from pipelines.web.addresses import PrivateAddressError, PublicResolver, check_url
from pipelines.web.consent import ROBOTS_BYTES, Robots, crawler_name, opted_out

AGAIN = (408, 429, 500, 502, 503, 504)  # answers that another try may better
CHUNK = 64 << 10


class FetchConfig(Config):
    """How hosts are asked."""

    concurrency: int = Field(64, ge=1, description="requests at a time of each process")
    host_connections: int = Field(8, ge=1, description="requests at a time to one host, of each process")
    host_rate: float = Field(
        10.0, gt=0, description="requests a second to one host, all processes together (each takes its share)"
    )
    timeout: float = Field(30.0, gt=0, description="seconds for an answer, from the connection to the last byte")
    retries: int = Field(2, ge=0, description="further tries after a timeout, a broken connection, 408, 429 or 5xx")
    backoff: float = Field(1.0, gt=0, description="seconds before the second try, doubled for each further one")
    max_wait: float = Field(
        60.0,
        gt=0,
        description="seconds between tries or requests that a host may ask for; if it asks for more, no more",
    )
    max_bytes: int = Field(32 << 20, gt=0, description="bytes of one image at most")
    max_redirects: int = Field(5, ge=0, description="redirects followed from one URL")
    user_agent: str = Field(f"clew/{__version__}", min_length=1, description="as hosts see it; its product is our name")
    robots: bool = Field(True, description="honour robots.txt")
    opt_out: tuple[str, ...] = Field(
        ("noai", "noimageai", "noindex", "noimageindex", "tdm-reservation"),
        description="directives of X-Robots-Tag, and the header tdm-reservation, that forbid the use of an image",
    )
    allow_private: bool = Field(
        False, description="ask hosts of private, loopback and reserved addresses too; only for tables that you trust"
    )

    def what(self) -> dict[str, object]:
        """The settings that decide which images are kept, as opposed to how fast they come."""
        return self.model_dump(include={"max_bytes", "max_redirects", "robots", "opt_out", "allow_private"})


class _Redirect(NamedTuple):
    to: str


class _Again(NamedTuple):
    """A failure that another try may better, and the seconds that the host asks for."""

    refused: Refused
    wait: float | None = None


class _Host:
    """The pace at which one host is asked."""

    def __init__(self, connections: int, interval: float) -> None:
        self.open = asyncio.Semaphore(connections)
        self.interval = interval  # seconds between requests
        self._order = asyncio.Lock()
        self._next = 0.0

    async def turn(self) -> None:
        """Wait for the next slot, in the order of asking."""
        async with self._order:
            while (wait := self._next - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            self._next = time.monotonic() + self.interval

    def hold(self, seconds: float) -> None:
        """Ask nothing for a while."""
        self._next = max(self._next, time.monotonic() + seconds)


class Client:
    """Asks hosts; used as an async context manager, within one event loop."""

    def __init__(self, config: FetchConfig, processes: int = 1) -> None:
        """`processes`: how many share the rate of a host."""
        self.config = config
        self._crawler = crawler_name(config.user_agent)
        self._slots = asyncio.Semaphore(config.concurrency)
        self._hosts: defaultdict[str, _Host] = defaultdict(
            lambda: _Host(config.host_connections, processes / config.host_rate)
        )
        self._robots: dict[URL, asyncio.Future[Robots | Refused]] = {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        resolver = None if self.config.allow_private else PublicResolver()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, resolver=resolver),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout),
            headers={"User-Agent": self.config.user_agent, "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # what is packed all the same is no image, and no bomb
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def fetch(self, text: str) -> bytes | Refused:
        """The bytes behind a URL."""
        return await self._follow(text, self.config.max_bytes, image=True)

    async def _follow(self, text: str, limit: int, image: bool) -> bytes | Refused:
        for _ in range(self.config.max_redirects + 1):
            url = check_url(text, self.config.allow_private)
            if isinstance(url, Refused):
                return url
            if image and self.config.robots:
                robots = await self._robots_of(url)
                if isinstance(robots, Refused):
                    return robots
                if not robots.allows(str(url)) or robots.delay > self.config.max_wait:
                    return Refused("robots_disallowed", str(url.with_query(None))[:200])
            found = await self._ask(url, limit, image)
            if not isinstance(found, _Redirect):
                return found
            text = found.to
        return Refused("too_many_redirects", f"more than {self.config.max_redirects}, the last to {text:.200}")

    async def _robots_of(self, url: URL) -> Robots | Refused:
        origin = url.origin()
        if origin not in self._robots:
            self._robots[origin] = asyncio.ensure_future(self._read_robots(origin))
        return await self._robots[origin]

    async def _read_robots(self, origin: URL) -> Robots | Refused:
        """The rules of a host; one that cannot be asked allows nothing (RFC 9309, 2.3.1)."""
        found = await self._follow(str(origin / "robots.txt"), ROBOTS_BYTES, image=False)
        if isinstance(found, Refused):
            if not found.reason.startswith("http_"):
                return found
            if not found.reason.startswith("http_4") or found.reason == "http_429":
                return Refused("robots_disallowed", f"robots.txt: {found.reason}")
            found = b""  # there are no rules
        robots = Robots(found, self._crawler)
        host = self._hosts[str(origin)]
        host.interval = max(host.interval, min(robots.delay, self.config.max_wait))
        return robots

    async def _ask(self, url: URL, limit: int, image: bool) -> bytes | Refused | _Redirect:
        """Ask one URL, again where that may help."""
        host = self._hosts[str(url.origin())]
        for attempt in range(self.config.retries + 1):
            await host.turn()
            async with host.open, self._slots:
                found = await self._ask_once(url, limit, image)
            if not isinstance(found, _Again):
                return found
            wait = max(self.config.backoff * 2**attempt, found.wait or 0.0)
            if attempt == self.config.retries or wait > self.config.max_wait:
                break
            if found.wait is not None:
                host.hold(wait)
            await asyncio.sleep(wait)
        assert isinstance(found, _Again)
        return found.refused

    async def _ask_once(self, url: URL, limit: int, image: bool) -> bytes | Refused | _Redirect | _Again:
        assert self._session is not None
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                status, headers = response.status, response.headers
                if status in (301, 302, 303, 307, 308) and "Location" in headers:
                    return _Redirect(str(url.join(URL(headers["Location"]))))
                if status != 200:
                    refused = Refused(f"http_{status}", f"{response.reason or ''}"[:200] or None)
                    return _Again(refused, retry_after(headers.get("Retry-After"))) if status in AGAIN else refused
                why = opted_out(headers, self._crawler, self.config.opt_out) if image else None
                if why is not None:
                    return Refused("opted_out", why)
                data = bytearray()
                async for chunk in response.content.iter_chunked(CHUNK):
                    data += chunk
                    if len(data) > limit:
                        return Refused("too_large", f"more than {limit} bytes") if image else bytes(data[:limit])
                return bytes(data)
        except TimeoutError:
            return _Again(Refused("timeout", f"{self.config.timeout:g} s"))
        except aiohttp.ClientConnectorError as error:
            if isinstance(error.os_error, PrivateAddressError):
                return Refused("private_address", str(error.os_error))
            return _Again(Refused("unreachable", str(error)[:200]))
        except aiohttp.InvalidURL as error:
            return Refused("bad_url", str(error)[:200])
        except (aiohttp.ClientError, ValueError) as error:
            return _Again(Refused("unreachable", f"{type(error).__name__}: {error}"[:200]))


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(float(value), 0.0)
    with contextlib.suppress(ValueError, TypeError):
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    return None
