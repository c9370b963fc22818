"""What a host says about the use of its images: robots.txt (RFC 9309), X-Robots-Tag and TDM-Reservation headers."""

from __future__ import annotations

from collections.abc import Iterable

from multidict import MultiMapping
from protego import Protego

# Directives that have a value of their own behind a colon; any other name there is that of a crawler.
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
TDM = "tdm-reservation"
ROBOTS_BYTES = 512 << 10  # of robots.txt that count; RFC 9309 asks for 500 KiB at least


def crawler_name(user_agent: str) -> str:
    """The name by which robots.txt and headers speak to us: the product of the user agent."""
    return user_agent.partition("/")[0].strip().lower()


def opted_out(headers: MultiMapping[str], crawler: str, directives: Iterable[str]) -> str | None:
    """The header that forbids the use, or None.

    Args:
        directives: of X-Robots-Tag, such as noai, for all crawlers or this one; `tdm-reservation` for the header of
            that name (TDM Reservation Protocol, W3C community group) with the value 1.
    """
    wanted = {each.lower() for each in directives}
    if TDM in wanted and headers.get(TDM, "").strip() == "1":
        return f"{TDM}: 1"
    for value in headers.getall("X-Robots-Tag", []):
        rest = value.lower()
        name, colon, behind = rest.partition(":")
        if colon and "," not in name and name.strip() not in _VALUED:
            if name.strip() != crawler:
                continue
            rest = behind
        if wanted & {each.partition(":")[0].strip() for each in rest.split(",")}:
            return f"X-Robots-Tag: {value:.200}"
    return None


class Robots:
    """The rules of one host for one crawler."""

    def __init__(self, text: bytes, crawler: str) -> None:
        self._rules = Protego.parse(text[:ROBOTS_BYTES].decode("utf-8", "replace"))
        self._crawler = crawler

    def allows(self, url: str) -> bool:
        return bool(self._rules.can_fetch(url, self._crawler))

    @property
    def delay(self) -> float:
        """Seconds between requests that the host asks for."""
        return float(self._rules.crawl_delay(self._crawler) or 0.0)
