"""The bytes of a zip file → the place of each of its entries, for `unpickle`; read strictly, since readers differ.

A hostile zip file shows different entries to different readers. `torch.save` writes one kind only: uncompressed
entries one after another, then the directory, then its end, without comment. All others are refused.
"""

from __future__ import annotations

from struct import error as StructError
from struct import unpack_from

from .stored import quoted

MOST_ENTRIES = 50_000
_LANGUAGE, _DESCRIPTOR = 1 << 11, 1 << 3  # flags: names in UTF-8; sizes follow the content
_ONES, _ALSO = 0xFFFFFFFF, 0xFFFF  # a number that did not fit and is elsewhere, in 64 bits


def entries(data: bytearray) -> dict[str, tuple[int, int]]:
    """Name → (first byte, size) of every entry.

    Raises `ValueError` for zip files that `torch.save` does not write: compressed, encrypted, overlapping or
    contradictory entries, bytes before or after them, several disks, over 50,000 entries.
    """
    try:
        return _entries(data)
    except (StructError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError("its zip directory is cut off or damaged") from error


def _entries(data: bytearray) -> dict[str, tuple[int, int]]:
    count, start, end = _directory(data)
    if count > MOST_ENTRIES:
        raise ValueError(f"it has {count} entries; at most {MOST_ENTRIES} are read")
    found: dict[str, tuple[int, int]] = {}
    spans = []
    at = start
    for _ in range(count):
        name, offset, size, after = _listed(data, at)
        if name in found:
            raise ValueError(f"{quoted(name)} is in its directory twice")
        begin = _content(data, name, offset, size)
        found[name] = begin, size
        spans.append((offset, begin + size))
        at = after
    if at != end:
        raise ValueError("its directory does not end where it says")
    spans.sort()
    limits = [0, *(stop for _, stop in spans)], [*(begin for begin, _ in spans), start]
    if any(stop > begin for stop, begin in zip(*limits, strict=True)):
        raise ValueError("its entries overlap")
    return found


def _directory(data: bytearray) -> tuple[int, int, int]:
    """Number of entries, first byte of the directory, first byte after it."""
    last = len(data) - 22
    if last < 0 or data[last : last + 4] != b"PK\5\6":
        raise ValueError("it does not end as zip files of torch.save do; it is cut off, or something follows")
    *disks, here, count, size, start, _comment = unpack_from("<4HLLH", data, last + 4)
    end = last
    if data[max(last - 20, 0) : max(last - 16, 0)] == b"PK\6\7":
        end = last - 20 - 56
        _, place, disks_64 = unpack_from("<LQL", data, last - 16)
        head, length, _, _, *more, here_64, count_64, size_64, start_64 = unpack_from("<4sQHHLLQQQQ", data, max(end, 0))
        if end < 0 or place != end or head != b"PK\6\6" or length != 44 or disks_64 > 1 or any(more):
            raise ValueError("its two ends of the directory contradict each other")
        pairs = ((here, here_64, _ALSO), (count, count_64, _ALSO), (size, size_64, _ONES), (start, start_64, _ONES))
        if any(short not in (long, ones) for short, long, ones in pairs):
            raise ValueError("its two ends of the directory contradict each other")
        here, count, size, start = here_64, count_64, size_64, start_64
    if any(disks) or here != count or start + size != end or count * 46 > size:
        raise ValueError("its directory is not where it says")
    return count, start, end


def _listed(data: bytearray, at: int) -> tuple[str, int, int, int]:
    """Name, first byte of the header and size of the entry that the directory lists at `at`, and where the next is."""
    fields = unpack_from("<4s6H3L5H2L", data, at)
    head, flags, method = fields[0], fields[3], fields[4]
    packed, size, name_length, extra_length, comment_length, disk = fields[8:14]
    offset = fields[16]
    name = data[at + 46 : at + 46 + name_length].decode()
    extra = at + 46 + name_length
    after = extra + extra_length + comment_length
    if head != b"PK\1\2" or disk or flags & ~(_LANGUAGE | _DESCRIPTOR):
        raise ValueError("its directory is damaged, or its entries are encrypted")
    if method:
        raise ValueError(f"{quoted(name)} is compressed, {size} bytes packed into {packed}; torch.save never does")
    large = [value == _ONES for value in (size, packed, offset)]
    if any(large):
        numbers = iter(_large(data, extra, extra + extra_length, sum(large)))
        size, packed, offset = (
            next(numbers) if is_large else value for value, is_large in zip((size, packed, offset), large, strict=True)
        )
    if packed != size:
        raise ValueError(f"{quoted(name)} is {size} bytes packed into {packed}; torch.save never does")
    return name, offset, size, after


def _large(data: bytearray, at: int, end: int, count: int) -> tuple[int, ...]:
    """The 64-bit numbers in the extra fields between `at` and `end`."""
    while at + 4 <= end:
        kind, length = unpack_from("<HH", data, at)
        if kind == 1 and length >= 8 * count and at + 4 + length <= end:
            return unpack_from(f"<{count}Q", data, at + 4)
        at += 4 + length
    raise ValueError("a size in its directory is missing")


def _content(data: bytearray, name: str, offset: int, size: int) -> int:
    """First byte of the entry's content, whose local header at `offset` must say what the directory says."""
    head, _, flags, method, *_, packed, unpacked, named, more = unpack_from("<4s5H3L2H", data, offset)
    known = {size, _ONES} | ({0} if flags & _DESCRIPTOR else set())
    if (
        head != b"PK\3\4"
        or method
        or flags & ~(_LANGUAGE | _DESCRIPTOR)
        or not {packed, unpacked} <= known
        or data[offset + 30 : offset + 30 + named] != name.encode()
    ):
        raise ValueError(f"{quoted(name)} is not where its directory says, or contradicts it")
    return offset + 30 + named + more
