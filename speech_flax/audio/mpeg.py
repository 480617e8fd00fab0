"""MP3 files that do not say how long they are: their frames are counted, and the number is written before them."""

import functools
import io

#: Where the first frame is looked for, behind the tags (bytes).
_HEAD = 4096
#: Samples per second of MPEG 1, by their code; MPEG 2 has half of it, MPEG 2.5 a quarter.
_RATES = (44_100, 48_000, 32_000)
#: Codes of the versions of MPEG, and by what they divide the rates.
_VERSIONS = {3: 1, 2: 2, 0: 4}
#: Thousands of bits per second, by their code from 1 on: of MPEG 1, and of its later versions for low rates.
_BITRATES = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_LOW_BITRATES = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)


def with_frame_count(stream: io.BufferedIOBase) -> bytes | None:
    """An MP3 file (MPEG audio, layer III) behind a Xing header, which says how many frames follow.

    Decoders guess the length of a file without such a header from the size of its first frame, which is wrong for
    variable bit rates. Of a file that has one, the first bytes are read and no more.

    Args:
        stream: The file, at its beginning.

    Returns:
        The file without its leading tags; ``None`` when it says its number of frames itself, or none can be found.
    """
    _skip_tags(stream)
    head = stream.read(_HEAD)
    start = _first_frame(head)
    if start is None or _says_length(head[start:]):
        return None
    content = head[start:] + stream.read()
    return _xing_frame(content, _count_frames(content)) + content


def _skip_tags(stream: io.BufferedIOBase) -> None:
    """Moves behind the ID3v2 tags at the beginning."""
    while (tag := stream.read(10))[:3] == b"ID3" and len(tag) == 10:
        size = sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
        footer = 10 if tag[5] & 0x10 else 0
        stream.seek(size + footer, io.SEEK_CUR)
    stream.seek(-len(tag), io.SEEK_CUR)


def _first_frame(content: bytes) -> int | None:
    """Where a frame begins that another one, or nothing, follows."""
    at = content.find(b"\xff")
    while at >= 0:
        sizes = _frame_sizes(content[at : at + 3])
        end = at + sizes.get(content[at : at + 3], 0)
        if end > at and (end == len(content) or content[end : end + 3] in sizes):
            return at
        at = content.find(b"\xff", at + 1)
    return None


def _count_frames(content: bytes) -> int:
    """Whole frames of a stream that begins with one; what lies between frames is passed over."""
    sizes = _frame_sizes(content[:3])
    at = count = 0
    while at >= 0:
        size = sizes.get(content[at : at + 3])
        if size is None:
            at = content.find(b"\xff", at + 1)
        else:
            at += size
            count += at <= len(content)
    return count


def _frame_sizes(start: bytes) -> dict[bytes, int]:
    """Bytes of a frame by the first three of its header, for all frames of the version and rate of a frame that begins
    with ``start``; empty when no frame of layer III does."""
    if len(start) < 3 or start[0] != 0xFF:
        return {}
    return _sizes(start[1] & 0xFE, start[2] & 0x0C)


@functools.cache
def _sizes(kind: int, rate_bits: int) -> dict[bytes, int]:
    version, layer, rate_code = kind >> 3 & 3, kind >> 1 & 3, rate_bits >> 2
    if kind < 0xE0 or version not in _VERSIONS or layer != 1 or rate_code >= len(_RATES):
        return {}
    rate = _RATES[rate_code] // _VERSIONS[version]
    bytes_per_second, bitrates = (144_000, _BITRATES) if version == 3 else (72_000, _LOW_BITRATES)
    return {
        bytes((0xFF, kind | checksum, code << 4 | rate_bits | padding << 1 | private)): (
            bytes_per_second * bitrate // rate + padding
        )
        for code, bitrate in enumerate(bitrates, 1)
        for padding in (0, 1)
        for private in (0, 1)
        for checksum in (0, 1)
    }


def _side_information(frame: bytes) -> int:
    """Bytes between the header of a frame and the place of the Xing header."""
    mono = frame[3] >> 6 == 3
    if frame[1] >> 3 & 3 == 3:
        return 17 if mono else 32
    return 9 if mono else 17


def _says_length(frame: bytes) -> bool:
    header = frame[4 + _side_information(frame) :][:12]
    return header[:4] in (b"Xing", b"Info") and bool(header[7:8] and header[7] & 1) and any(header[8:])


def _xing_frame(first: bytes, count: int) -> bytes:
    """A frame of the kind of the ``first``, with the largest bit rate and no sound, that announces ``count`` more."""
    header = bytes((0xFF, first[1] | 1, 0xE0 | first[2] & 0x0C, first[3]))
    content = header + bytes(_side_information(first)) + b"Xing" + (1).to_bytes(4, "big") + count.to_bytes(4, "big")
    return content.ljust(_frame_sizes(header)[header[:3]], b"\0")
