"""Checks Ogg pages: damaged or missing pages, and the links of a chain, split a stream into runs that are decoded
separately. FFmpeg silently drops a page with a wrong checksum, which shifts all later audio."""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from .byte_source import ByteSource
from .containers import MAX_TAG_BYTES, MAX_TAGS

MAX_HEADER_PAGES = 300  # 20 MB of comments and codebooks
MAX_LOST_PAGES = 1 << 20
_CONTINUED, _FIRST, _LAST = 1, 2, 4
_NO_GRANULE = b"\xff" * 8
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_AUDIO = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")
_DECODED = _AUDIO[:3]


@dataclass
class Page:
    """One page, from the capture pattern to the end of its last segment."""

    data: bytes

    @property
    def flags(self) -> int:
        return self.data[5]

    @property
    def serial(self) -> bytes:
        return self.data[14:18]

    @property
    def sequence(self) -> int:
        return int.from_bytes(self.data[18:22], "little")

    @property
    def lacing(self) -> bytes:
        return self.data[27 : 27 + self.data[26]]

    @property
    def body(self) -> bytes:
        return self.data[27 + self.data[26] :]


class OggFile:
    """The first audio stream of an Ogg file: `read` returns the pages of one run, `next_run` starts the next.

    A run ends before missing or damaged pages and at the end of a link. `warnings` lists the defects so far.
    """

    def __init__(self, source: ByteSource, start: int):
        self._pages = _pages(source, start, self)
        self._held: Page | None = None  # read, but not yet used
        self._headers: list[Page] = []
        self._given = bytearray()
        self._expected = 0  # sequence number of the next page
        self._serial = b""
        self._last_seen = False
        self._over = self._run_is_over = False
        self._begun = False  # a page of audio was seen in this link
        self.damaged = False  # bytes that are no intact page were seen in this link
        self.start_lost = False  # the damage came before the first page of audio
        self._lost, self.cut = 0, False
        self.streams = 0  # of audio, in the first link
        self.position: int | None = None  # of the first sample of the run, if FFmpeg cannot determine it
        self.same_link = False  # whether this run is in the same link as the previous one

    @property
    def warnings(self) -> list[str]:
        notes = []
        if self._lost:
            notes.append(
                f"{self._lost} page{'s' * (self._lost > 1)} of the Ogg stream damaged or missing; silence in its place"
            )
        if self._over and (self.cut or not self._last_seen):
            notes.append("the file is cut short: its Ogg stream ends without the mark of its end")
        return notes

    def next_run(self) -> bool:
        """Begin the next run; False at the end of the file."""
        page = self._take()
        if page is None:
            self._over = True
            return False
        self._run_is_over, self.position = False, None
        self.same_link = bool(self._headers) and not page.flags & _FIRST
        if not self.same_link:
            self._begin_link(page)
            return True
        self._expected = page.sequence + 1
        if page.flags & _LAST:  # FFmpeg knows a page's time only if it is not the last one
            page = Page(_sealed(page.data[:5] + bytes([page.flags & ~_LAST]) + page.data[6:]))
            self._last_seen = True
        self.position = _flac_position(page, self._headers[0])
        self._given += b"".join(header.data for header in self._headers) + page.data
        return True

    def read(self, size: int) -> bytes:
        """Up to `size` bytes of this run."""
        while not self._given and (page := self._page_of_run()):
            self._given += page.data
        data = bytes(self._given[:size])
        del self._given[:size]
        return data

    def _take(self) -> Page | None:
        page, self._held = self._held or next(self._pages, None), None
        return page

    def _page_of_run(self) -> Page | None:
        while not self._run_is_over:
            page = self._take()
            if page is None:
                self._run_is_over = self._over = True
                break
            if page.serial != self._serial and not page.flags & _FIRST:
                continue
            lost = page.sequence - self._expected
            if not self._begun and not page.flags & _FIRST:  # a recording may begin in the middle of a broadcast
                self.start_lost = lost > 0 and self.damaged
                self._lost += lost if self.start_lost else 0
                lost = 0
            if page.flags & _FIRST or 0 < lost < MAX_LOST_PAGES:
                self._lost += 0 if page.flags & _FIRST else lost
                self._held, self._run_is_over = page, True
                break
            self._expected, self._begun = page.sequence + 1, True
            self._last_seen = bool(page.flags & _LAST)
            return page
        return None

    def _begin_link(self, page: Page | None) -> None:
        """Collect the header pages of a link: those of its first decodable audio stream."""
        firsts = []
        while page is not None and page.flags & _FIRST:
            firsts.append(page)
            page = self._take()
        audio = [first for first in firsts if first.body.startswith(_AUDIO)]
        self.streams = self.streams or len(audio)
        decoded = [first for first in audio if first.body.startswith(_DECODED)]
        candidates = decoded or audio or firsts or [page for page in [page] if page]
        self._last_seen = self._begun = self.start_lost = self.damaged = False
        self._serial, self._headers = candidates[0].serial, [candidates[0]]
        wanted, complete = _header_packets(candidates[0].body), 1
        while page is not None and complete < wanted and len(self._headers) < MAX_HEADER_PAGES:
            if page.flags & _FIRST:
                break
            if page.serial == self._serial:
                self._headers.append(page)
                complete += sum(segment < 255 for segment in page.lacing)
            page = self._take()
        self._held = page
        self._expected = self._headers[-1].sequence + 1
        packets = _packets(self._headers)
        if any(_has_many_tags(packet) for packet in packets):
            self._headers = _paginated([_without_tags(packet) for packet in packets], self._headers)
        self._given += b"".join(header.data for header in self._headers)


def _pages(source: ByteSource, start: int, file: OggFile) -> Iterator[Page]:
    """The intact pages from `start` on; for a page cut by the end of the file, its complete packets."""
    offset = start
    granules: dict[bytes, bytes] = {}  # of the last page of each stream
    while True:
        source.forget(offset)
        head = source.exactly(offset, 27)
        if len(head) == 27 and head.startswith(b"OggS\0"):
            lacing = source.exactly(offset + 27, head[26])
            size = 27 + head[26] + sum(lacing)
            data = source.exactly(offset, size)
            if len(data) == size and data[22:26] == _checksum(data):
                granules[data[14:18]] = data[6:14]
                yield Page(data)
                offset += size
                continue
            if len(data) < size:
                file.cut = True
                if part := _whole_packets(data, granules):
                    yield part
        elif not head:
            return
        file.damaged = True
        found = _capture(source, offset + 1)
        if found is None:
            return
        offset = found


def _capture(source: ByteSource, offset: int) -> int | None:
    """Where the next page may begin, from `offset` on."""
    while len(data := source.exactly(offset, 1 << 16)) >= 5:
        source.check()
        found = data.find(b"OggS\0")
        if found >= 0:
            return offset + found
        offset += len(data) - 4
        source.forget(offset)
    return None


def _whole_packets(data: bytes, granules: dict[bytes, bytes]) -> Page | None:
    """The page that begins with `data` and is cut by the end of the file, without incomplete packets. Its position is
    that of the previous page, from `granules`: it is not needed, but FFmpeg refuses pages without one."""
    if len(data) < 27 + data[26]:
        return None
    kept, size, have = 0, 0, len(data) - 27 - data[26]
    end = 0
    for index, segment in enumerate(data[27 : 27 + data[26]]):
        size += segment
        if size > have:
            break
        if segment < 255:
            kept, end = index + 1, size
    if not kept:
        return None
    head = data[:5] + bytes([data[5] & ~_LAST]) + granules.get(data[14:18], bytes(8)) + data[14:26] + bytes([kept])
    return Page(_sealed(head + data[27 : 27 + kept] + data[27 + data[26] :][:end]))


def _packets(pages: list[Page]) -> list[bytes]:
    """The complete packets in `pages` of one stream."""
    packets, packet = [], b""
    for page in pages:
        position, body = 0, page.body
        for segment in page.lacing:
            packet += body[position : position + segment]
            position += segment
            if segment < 255:
                packets.append(packet)
                packet = b""
    return packets


def _flac_position(page: Page, first: Page) -> int | None:
    """Position of the first sample of the first complete frame on `page`, from its header; None for other codecs."""
    start = 0
    if page.flags & _CONTINUED:
        for segment in page.lacing:
            start += segment
            if segment < 255:
                break
    frame = page.body[start : start + 12]
    if not first.body.startswith(b"\x7fFLAC") or len(frame) < 12 or frame[0] != 0xFF or frame[1] & 0xFC != 0xF8:
        return None
    ones = 8 - (frame[4] ^ 0xFF).bit_length()  # the number is encoded like a UTF-8 character, in up to seven bytes
    number = frame[4] & 0x7F >> ones
    for byte in frame[5 : 4 + max(1, ones)]:
        number = number << 6 | byte & 0x3F
    return number if frame[1] & 1 else number * int.from_bytes(first.body[19:21], "big")


def _header_packets(first: bytes) -> int:
    """Number of packets before the audio in a stream that begins with the packet `first`."""
    if first.startswith(b"OpusHead"):
        return 2
    if first.startswith(b"\x7fFLAC") and len(first) > 9:
        return 1 + max(1, int.from_bytes(first[7:9], "big"))
    return 3 if first.startswith(b"\x01vorbis") else 2


def _comments_at(packet: bytes) -> int | None:
    """Where the comments of a header packet begin; None if it has none."""
    for magic in (b"\x03vorbis", b"OpusTags"):
        if packet.startswith(magic):
            return len(magic)
    return 4 if packet[:1] in (b"\x04", b"\x84") else None


def _has_many_tags(packet: bytes) -> bool:
    start = _comments_at(packet)
    if start is None or len(packet) < MAX_TAG_BYTES:
        return False
    vendor = int.from_bytes(packet[start : start + 4], "little")
    return int.from_bytes(packet[start + 4 + vendor : start + 8 + vendor], "little") > MAX_TAGS


def _without_tags(packet: bytes) -> bytes:
    start = _comments_at(packet)
    if start is None or not _has_many_tags(packet):
        return packet
    if start == 4:
        return packet[:1] + b"\0\0\x08" + bytes(8)
    return packet[:start] + bytes(8) + b"\1" * packet.startswith(b"\x03vorbis")


def _paginated(packets: list[bytes], pages: list[Page]) -> list[Page]:
    """`packets` on new pages, numbered so that they end where `pages` end."""
    made: list[tuple[int, bytes, bytes, bytes]] = []
    for packet in packets:
        segments = [255] * (len(packet) // 255) + [len(packet) % 255]
        for start in range(0, len(segments), 255):
            lacing = bytes(segments[start : start + 255])
            flags = (_CONTINUED if start else 0) | (0 if made else _FIRST)
            granule = bytes(8) if lacing[-1] < 255 else _NO_GRANULE
            body = packet[start * 255 : start * 255 + sum(lacing)]
            made.append((flags, granule, lacing, body))
    first = pages[-1].sequence + 1 - len(made)
    return [
        Page(
            _sealed(
                b"OggS\0" + bytes([flags]) + granule + pages[0].serial + struct.pack("<I", first + index & 0xFFFFFFFF)
                + bytes(4) + bytes([len(lacing)]) + lacing + body
            )
        )
        for index, (flags, granule, lacing, body) in enumerate(made)
    ]  # fmt: skip


def _sealed(page: bytes) -> bytes:
    """`page` with its correct checksum."""
    return page[:22] + _checksum(page) + page[26:]


def _checksum(page: bytes) -> bytes:
    """CRC-32 of the polynomial 0x04C11DB7, most significant bit first, of a page with its own checksum set to zero.
    Computed by zlib, which takes the least significant bit first and inverts at both ends, on reversed bits."""
    bits = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    return (zlib.crc32(bits, 0xFFFFFFFF) ^ 0xFFFFFFFF).to_bytes(4, "little").translate(_REVERSED)[::-1]


def stated_seconds(source: ByteSource, rate: int) -> float | None:
    """Length of a file of `rate` samples per second, by the granule position of its last page."""
    if source.size is None:
        return None
    start = max(0, source.size - (1 << 17))
    tail = source.exactly(start, 1 << 17)
    position = tail.rfind(b"OggS\0")
    granule = int.from_bytes(tail[position + 6 : position + 14], "little", signed=True) if position >= 0 else 0
    return granule / rate if granule > 0 else None
