"""Reading a file in large blocks: one forward pass costs one read of each block, local or remote."""

from __future__ import annotations

from types import TracebackType
from typing import Final

from cl.storage import is_local, open_fs

BLOCK_BYTES: Final = 8 << 20


class BlockReader:
    """A `pipelines.tar.Reader` that keeps one block in memory.

    Bytes are copied out rather than mapped, because a mapped file that shrinks meanwhile kills the process.
    """

    def __init__(self, url: str, block_bytes: int = BLOCK_BYTES) -> None:
        fs, path = open_fs(url)
        self._file = fs.open(path, "rb", **({} if is_local(url) else {"cache_type": "none"}))
        self._file.seek(0, 2)
        self.size: int = self._file.tell()
        self._block_bytes = block_bytes
        self._start = 0
        self._block = b""

    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes from `offset`; fewer than `length` only at the end of the file."""
        start = offset - self._start
        if start >= 0 and start + length <= len(self._block):
            return self._block[start : start + length]
        length = max(0, min(length, self.size - offset))
        if length > self._block_bytes:
            return self._read(offset, length)
        if start < 0 or start + length > len(self._block):
            self._block = self._read(offset, min(self._block_bytes, max(self.size - offset, 0)))
            self._start, start = offset, 0
        return self._block[start : start + length]

    def _read(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        parts = []
        while length > 0:
            part = self._file.read(length)
            if not part:
                break
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
