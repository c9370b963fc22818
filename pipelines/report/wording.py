"""How numbers and foreign text are written for a reader, the same in the page and on the terminal."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

KEEP = {"\n", "\t"}
# Characters that turn the direction of everything after them.
BIDI = {chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F)}


def clean(text: Any, limit: int = 240) -> str:
    """Text of a data set made fit to be shown: no control characters, at most `limit` characters."""
    shown = "".join(
        "�" if unicodedata.category(c) in ("Cc", "Cs") and c not in KEEP else c
        for c in str(text)[: limit * 2]
        if c not in BIDI
    )
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 1].rstrip() + "…"


def count(value: Any) -> str:
    """A whole number with thousands apart: 12,345."""
    return f"{int(value):,}" if _finite(value) else "-"


def number(value: Any, digits: int = 3) -> str:
    """A number with about `digits` significant digits, never in a form like 1.2e+03 where 1,200 would do."""
    if not _finite(value):
        return "-" if not isinstance(value, (int, float)) else str(value)
    value = float(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    size = abs(value)
    if size >= 1e6 or size < 1e-4:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    power = int(f"{size:.{digits - 1}e}".split("e")[1])  # after rounding: 99.96 has three digits before the point
    return f"{value:,.{max(digits - 1 - power, 0)}f}"


def brief(value: Any, digits: int = 3) -> str:
    """`number` without the zeros that only keep columns in line: 0.05, not 0.0500."""
    text = number(value, digits)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def percent(value: Any, digits: int = 1) -> str:
    """A share as a percentage: 0.123 is 12.3 %."""
    return f"{float(value) * 100:.{digits}f} %" if _finite(value) else "-"


def duration(seconds: Any) -> str:
    """Seconds as a person says them."""
    if not _finite(seconds):
        return "-"
    seconds = float(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def words(name: Any) -> str:
    """A name of the code as words: `too_few_words` is `too few words`."""
    return str(name).replace("_", " ").strip()


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
