"""A tar scanner that is fast and survives damage.

    for found in scan(reader):            # Member or Damage, in the order of the file
        ...

Reads ustar, pax and GNU headers by hand (POSIX.1-2017 pax; the GNU long-name types) and yields where each file's bytes
stand, so that samples can be addressed by offset and length without being copied. A header that fails its checksum
costs its own member only: the scanner goes on at the next good header and reports what it passed over. Nothing is
ever extracted, and no size in a header is believed before it is compared with what is there.

Only plain tars have offsets: a compressed one is reported as damage as a whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol

BLOCK: Final = 512  # bytes
MAX_EXTENDED_HEADER: Final = 1 << 20  # bytes: a longer name or pax record is taken for damage
_ZERO_BLOCK: Final = bytes(BLOCK)
_REGULAR: Final = frozenset(b"0\0007")  # file, old-style file, contiguous file
_COMPRESSED: Final = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Reader(Protocol):
    """Random access to a file."""

    size: int  # bytes

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes from `offset`; fewer than `length` only at the end of the file."""
        ...


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # bytes from the start of the tar to its data
    size: int  # bytes


class Damage(NamedTuple):
    """A place where something could not be used; scanning went on behind it unless it was the end."""

    reason: str  # truncated_shard, damaged_shard, compressed_shard, unsafe_name, unsupported_member
    offset: int  # bytes from the start of the tar
    name: str | None  # the member, where it is known
    detail: str


def _number(field: bytes) -> int:
    """A size: octal digits, or base 256 if the first bit is set (GNU).

    Raises:
        ValueError: neither.
    """
    if field[0] & 0x80:
        if field[0] != 0x80:
            raise ValueError("negative")
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    if not text.isdigit():  # int() would also take signs and underscores
        if text:
            raise ValueError("not octal")
        return 0
    return int(text, 8)


def checksum_ok(header: bytes) -> bool:
    """Whether a header's checksum is right: the sum of its bytes with the checksum's own field as spaces."""
    try:
        stored = _number(header[148:156])
    except ValueError:
        return False
    # Adler-32's low half is 1 + the sum of the bytes modulo 65521, computed in C; a damaged header whose sum is off by
    # exactly 65521 would need more than 250 changed bytes.
    low = zlib.adler32(header[156:], zlib.adler32(header[:148])) & 0xFFFF
    if (low - 1 + 8 * 32 - stored) % 65521 == 0:
        return True
    unsigned = sum(header[:148]) + sum(header[156:]) + 256
    signed = unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    return stored in (unsigned, signed)  # some old tars summed signed bytes


def _text(data: bytes) -> str:
    """A name; bytes that are not UTF-8 are written as backslash escapes, so that different names stay different."""
    return data.decode("utf-8", "backslashreplace")


def _until_null(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def is_unsafe(name: str) -> bool:
    """Whether a member's name would leave the folder it is unpacked in, or is none."""
    return not name or name.startswith("/") or "\0" in name or ".." in name.split("/")


def _pax_records(data: bytes) -> dict[str, bytes]:
    """Records of the form `length key=value`, each ended by a line feed.

    Raises:
        ValueError: a record does not have that form.
    """
    records = {}
    position = 0
    while position < len(data) and data[position] != 0:
        space = data.index(b" ", position, position + 20)
        length = int(data[position:space])
        record = data[space + 1 : position + length]
        if length <= space - position or not record.endswith(b"\n"):
            raise ValueError("bad length")
        key, equals, value = record[:-1].partition(b"=")
        if not equals:
            raise ValueError("no equals sign")
        records[_text(key)] = value
        position += length
    return records


class _Pending:
    """What extended headers said about the member to come."""

    __slots__ = ("name", "size", "sparse", "start")

    def __init__(self) -> None:
        self.name: bytes | None = None
        self.size: int | None = None
        self.sparse = False
        self.start: int | None = None  # offset of the first extended header

    def read(self, kind: int, data: bytes) -> None:
        """Take over an extended header's data.

        Raises:
            ValueError: it is damaged.
        """
        if kind == ord("L"):
            self.name = _until_null(data)
        elif kind == ord("x"):
            records = _pax_records(data)
            self.name = records.get("path", self.name)
            self.sparse = any(key.startswith("GNU.sparse") for key in records)
            if "size" in records:
                if not records["size"].isdigit():
                    raise ValueError("size is not a number")
                self.size = int(records["size"])


def scan(reader: Reader) -> Iterator[Member | Damage]:
    """Every regular file of a tar, and every place that is damaged, in order.

    Links, devices and sparse files are reported as `unsupported_member`, folders are passed over in silence.
    """
    size = reader.size
    head = reader.read_at(0, 8)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            yield Damage(
                "compressed_shard", 0, None, f"compressed with {name}; samples are addressed by offset in plain tars"
            )
            return
    position = 0
    pending = _Pending()
    while True:
        header = reader.read_at(position, BLOCK)
        if len(header) < BLOCK:
            detail = "ends without an end marker" if not header else "ends in the middle of a header"
            yield Damage("truncated_shard", position, None, f"the tar {detail} at byte {position}")
            return
        if header == _ZERO_BLOCK:
            resumed = _next_data(reader, position)
            if resumed is None:
                return
            yield Damage(
                "damaged_shard", position, None, f"zeros from byte {position} to {resumed}, but more behind them"
            )
            position, pending = resumed, _Pending()
            continue
        problem, kind, data_size = _check(header, pending)
        data_start = position + BLOCK
        if problem is None and data_start + data_size > size:
            name = _name(header, pending)
            missing = data_start + data_size - size
            yield Damage(
                "truncated_shard", position, name, f"{missing} of {data_size} bytes are missing at byte {size}"
            )
            resumed = _next_header(reader, data_start)
            if resumed is None:
                return
            position, pending = resumed, _Pending()
            continue
        if problem is not None:
            resumed = _next_header(reader, data_start)
            end = size if resumed is None else resumed
            yield Damage("damaged_shard", position, None, f"{problem} at byte {position}; passed over to byte {end}")
            if resumed is None:
                return
            position, pending = resumed, _Pending()
            continue
        position = data_start + (data_size + BLOCK - 1) // BLOCK * BLOCK
        if kind in b"xLKg":
            start = data_start - BLOCK if pending.start is None else pending.start
            try:
                pending.read(kind, reader.read_at(data_start, data_size))
            except ValueError as error:
                pending = _Pending()
                yield Damage("damaged_shard", data_start, None, f"extended header at byte {data_start}: {error}")
            pending.start = start
            continue
        name = _name(header, pending)
        sparse, pending = pending.sparse, _Pending()
        if kind == ord("5") or (kind in _REGULAR and name.endswith("/")):
            continue
        if is_unsafe(name):
            yield Damage(
                "unsafe_name", data_start - BLOCK, name, f"the name {name[:200]!r} leaves the folder of the tar"
            )
        elif kind not in _REGULAR or sparse:
            what = "sparse file" if sparse or kind == ord("S") else f"type {chr(kind)!r} (link or device)"
            yield Damage("unsupported_member", data_start - BLOCK, name, what)
        else:
            yield Member(name, data_start, data_size)


def _check(header: bytes, pending: _Pending) -> tuple[str | None, int, int]:
    """What is wrong with a header or None, its type, and the bytes of data behind it."""
    kind = header[156]
    if not checksum_ok(header):
        return "a header with a wrong checksum", kind, 0
    try:
        size = _number(header[124:136])
    except ValueError as error:
        return f"a header whose size is {error}", kind, 0
    if kind in b"xLKg":
        if size > MAX_EXTENDED_HEADER:
            return f"an extended header of {size} bytes", kind, 0
        return None, kind, size
    if kind in b"123456" and pending.size is None:  # links, devices and folders have no data, whatever the field says
        size = 0 if kind != ord("1") else size
    return None, kind, size if pending.size is None else pending.size


def _name(header: bytes, pending: _Pending) -> str:
    if pending.name is not None:
        return _text(pending.name)
    name = _until_null(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:  # GNU headers keep times where POSIX has the prefix
        name = _until_null(header[345:500]) + b"/" + name
    return _text(name)


def _next_data(reader: Reader, position: int) -> int | None:
    """The block of the first byte that is not zero, or None if there are only zeros to the end."""
    while position < reader.size:
        data = reader.read_at(position, 1 << 20)
        rest = data.lstrip(b"\0")
        if rest:
            return position + (len(data) - len(rest)) // BLOCK * BLOCK
        position += len(data)
    return None


def _next_header(reader: Reader, position: int) -> int | None:
    """The next block that is a header with a right checksum, or None."""
    while position < reader.size:
        data = reader.read_at(position, 1 << 20)
        found = data.find(b"ustar")
        while found >= 0:
            start = found - 257
            if (
                start >= 0
                and start % BLOCK == 0
                and start + BLOCK <= len(data)
                and checksum_ok(data[start : start + BLOCK])
            ):
                return position + start
            found = data.find(b"ustar", found + 1)
        position += len(data)  # a multiple of BLOCK, except at the end
    return None


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix by the webdataset rule: the base name is cut at its first dot, the folder stays in the key."""
    folder, slash, base = name.rpartition("/")
    if folder == ".":
        folder, slash = "", ""
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()
