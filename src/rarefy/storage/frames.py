"""Frames of zstd that say their length, and the error of what is no such frame."""

from __future__ import annotations

import zstandard

from rarefy.errors import FormatError

SMALL = 1 << 20
"""Up to this many bytes compression may take its time."""


def damaged(where: str, what: str) -> FormatError:
    """The error of a file that is not as it was written."""
    return FormatError(where, what, "The file is damaged; get it again or save it anew")


def compress(data: bytes) -> bytes:
    """``data`` as one zstd frame that says its length."""
    level = 19 if len(data) <= SMALL else 9
    return zstandard.ZstdCompressor(level=level, write_checksum=False).compress(data)


def decompress(data: bytes, size: int) -> bytes:
    """The content of one zstd frame, which must be of exactly ``size`` bytes.

    Raises:
        FormatError: it is no such frame.
    """
    try:
        declared = zstandard.frame_content_size(data)
        if declared != size:
            raise damaged("compressed bytes", f"{declared} bytes are declared, {size} expected")
        content = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=max(size, 1), allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise damaged("compressed bytes", f"they cannot be decompressed ({error})") from error
    if len(content) != size:
        raise damaged("compressed bytes", f"they hold {len(content)} bytes, {size} expected")
    return content
