"""Images from the web, politely and safely: tables of URLs in, samples out (`clew download`)."""

from __future__ import annotations

from typing import Final, NamedTuple

# Reasons of the quarantine beyond those of `pipelines.readers`; besides, `http_404` and so on for an answer's status.
REASONS: Final = {
    "missing_url": "the row has no URL",
    "missing_key": "the row has no value in the column of keys",
    "missing_hash": "the row has no hash to check the bytes against",
    "bad_url": "no http or https URL",
    "private_address": "the host is no public one: the own machine or network, a link-local or reserved address",
    "robots_disallowed": "the host's robots.txt forbids it, or could not be asked",
    "opted_out": "the answer's headers forbid the use",
    "unreachable": "no such host, no connection, or a broken one",
    "timeout": "no whole answer in time",
    "too_many_redirects": "a chain of redirects, or a circle",
    "too_large": "more bytes than an image may have",
    "wrong_hash": "the bytes are not those that the table names",
}


class Refused(NamedTuple):
    """Why there are no bytes."""

    reason: str
    detail: str | None = None
