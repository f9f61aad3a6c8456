"""Chunks of any size, read by so many bytes at a time."""

from __future__ import annotations

from collections.abc import Iterator


class ByteStream:
    """What comes out of an archive, as something to read from."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._held = b""
        self._at = 0
        self.consumed = 0
        """Bytes that were read."""

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer at the end."""
        if self._at + size <= len(self._held):
            piece = self._held[self._at : self._at + size]
            self._at += size
            self.consumed += size
            return piece
        parts = [self._held[self._at :]]
        have = len(parts[0])
        while have < size and (piece := next(self._chunks, b"")):
            parts.append(piece)
            have += len(piece)
        whole = b"".join(parts)
        self._held, self._at = whole[size:], 0
        self.consumed += min(size, have)
        return whole[:size]

    def close(self) -> None:
        """Close what the chunks come from."""
        close = getattr(self._chunks, "close", None)
        if close is not None:
            close()
