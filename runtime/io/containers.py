"""Reads file headers without FFmpeg: where the samples and the file end, and which tags to hide from FFmpeg, whose tag
dictionary takes time quadratic in the number of tags."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from .byte_source import ByteSource, View

MAX_TAG_BYTES = 1 << 16  # larger ones are hidden, whatever they contain
MAX_TAGS = 1000
MAX_CHUNKS = 1000  # of one file
STREAMED = 0x7FFFF000  # writers that cannot seek back leave this size or a larger one in a 32-bit header
_W64_RIFF = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
_W64_DATA = b"data" + bytes.fromhex("f3acd3118cd100c04f8edb8a")
_MATROSKA, _SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")
_ASF, _ASF_DATA = (bytes.fromhex(f"{first}26b2758e66cf11a6d900aa0062ce6c") for first in ("30", "36"))
_ASF_INDICES = tuple(  # of times, of streams, of objects, of time codes
    bytes.fromhex(guid)
    for guid in (
        "90080033b1e5cf1189f400a0c90349cb",
        "d329e2d6da35d111903400a0c90349be",
        "f803b1fead12644c840f2a1d2f7ad48c",
        "d03fb73c4a0c0348953dedf7b6228f0c",
    )
)
_SYNC = 0x47  # the first byte of an MPEG transport packet
_TRANSPORT_PACKETS = ((188, 0), (192, 4), (204, 0))  # size, and offset of the sync byte: plain, with times, with parity


@dataclass
class Layout:
    """The layout of one file in a source; offsets are relative to the source.

    `samples`: where the samples start and, by the header, end; `end`: where the file ends by its header, None if
    unknown; `patches`: bytes to replace, by their offsets. `next_tag`: where a stream may have another ID3 tag.
    `mp3_seconds`: the length that a header frame (Xing, Info or VBRI) states, padding included.
    """

    samples: tuple[int, int] | None = None
    end: int | None = None
    patches: dict[int, bytes] = field(default_factory=dict)
    next_tag: int | None = None
    mp3_seconds: float | None = None

    def view(self, source: ByteSource, start: int) -> View:
        """FFmpeg's view of the file that starts at `start`."""
        if self.next_tag is None:
            return View(source, start, self.end, self.patches)
        return _TaggedStream(source, start, self, self.next_tag)


def layout(source: ByteSource, start: int) -> Layout:
    """The layout of the file that begins at `start`. Unknown formats are left to FFmpeg."""
    tags = _id3_tags(source, start)
    inner = tags[-1][1] if tags and source.size is not None else start
    magic = source.exactly(inner, 16)
    found = Layout()
    if magic[:4] in (b"RIFF", b"RF64", b"BW64") and magic[8:12] == b"WAVE":
        found = _wav(source, inner)
    elif magic[:4] == b"RIFF" and magic[8:12] == b"AVI ":
        found = _avi(source, inner)
    elif magic[:4] == _MATROSKA and source.size is not None:
        found.end = _matroska_end(source, inner)
    elif magic[:4] == b"FORM" and magic[8:12] in (b"AIFF", b"AIFC"):
        found = _aiff(source, inner)
    elif magic[:4] == b".snd":
        found = _au(source, inner)
    elif magic[:4] == b"caff":
        found = _caf(source, inner)
    elif magic == _W64_RIFF:
        found = _w64(source, inner)
    elif magic[:4] == b"fLaC":
        found.patches = _flac_comments(source, inner)
    elif magic[:1] == b"\xff" or inner > start:
        found.mp3_seconds = _mp3_seconds(source.exactly(inner, 4096))
    elif magic[4:8] == b"ftyp" and source.size is not None:
        found.end = _joined_boxes(source, inner)
    elif magic == _ASF and source.size is not None:
        found.end = _asf_end(source, inner)
    elif source.size is not None and (packet := _transport_packet(source, inner)):
        found.end = _transport_end(source, inner, source.size, *packet)
    if sum(end - begin for begin, end in tags) > MAX_TAG_BYTES:
        for begin, _ in tags:
            found.patches |= _without_frames(begin)
    if tags and source.size is None:
        found.next_tag = tags[-1][1]
    return found


def _without_frames(tag: int) -> dict[int, bytes]:
    """Patches that clear the flags of the ID3 tag at `tag` and turn its contents into padding."""
    return {tag + 5: b"\0", tag + 10: bytes(4)}


class _TaggedStream(View):
    """A stream that begins with an ID3 tag. Tags that arrive after it are hidden, too."""

    def __init__(self, source: ByteSource, start: int, found: Layout, next_tag: int):
        super().__init__(source, start, found.end, found.patches)
        self._next_tag: int | None = next_tag

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none past the beginning of a tag that has not been checked."""
        position = self._start + self._position
        if position == self._next_tag:
            tags = _id3_tags(self._source, position)
            self._next_tag = tags[0][1] if tags else None
            if tags:
                self.patch(_without_frames(position))
        if self._next_tag is not None and position < self._next_tag:
            size = min(size, self._next_tag - position)
        return super().read(size)


def starts_a_file(data: bytes) -> bool:
    """Whether `data`, at least 16 bytes, is the beginning of a format whose end `layout` can find."""
    return (
        (data[:4] in (b"RIFF", b"RF64", b"BW64") and data[8:12] in (b"WAVE", b"AVI "))
        or (data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"))
        or data[:4] in (b".snd", b"caff", b"fLaC", b"OggS", _MATROSKA)
        or data[4:8] == b"ftyp"
        or data[:16] in (_W64_RIFF, _ASF)
    )


def are_tags(data: bytes) -> bool:
    """Whether `data` is padding, or tags that players append."""
    return data.startswith((b"TAG", b"APETAGEX", b"LYRICS", b"ID3")) or not any(data)


def _chunks(source: ByteSource, start: int, form: str) -> Iterator[tuple[int, bytes, int, int]]:
    """(offset, name, offset of the content, size) of the chunks from `start` on, by a `struct` format of name and size;
    ends at the first bytes that are not a chunk, such as another file."""
    size_of_header = struct.calcsize(form)
    position = start
    for _ in range(MAX_CHUNKS):
        header = source.exactly(position, size_of_header)
        if len(header) < size_of_header:
            return
        name, size = struct.unpack(form, header)
        if name in (b"RIFF", b"RF64", b"BW64", b"FORM", b"caff") or not all(32 <= byte < 127 for byte in name):
            return
        yield position, name, position + size_of_header, size
        position += size_of_header + size + (size % 2 if form != ">4sq" else 0)
        if size < 0 or (source.size is not None and position > source.size):
            return


def _wav(source: ByteSource, start: int) -> Layout:
    found = Layout(end=start + 12)
    long_size = None
    (riff_size,) = struct.unpack("<I", source.exactly(start + 4, 4))
    data = None
    for offset, name, content, size in _chunks(source, start + 12, "<4sI"):
        if name == b"ds64":
            sizes = source.exactly(content, 16)
            riff_size, long_size = struct.unpack("<QQ", sizes) if len(sizes) == 16 else (riff_size, None)
        elif name in (b"LIST", b"id3 ", b"ID3 ") and size > MAX_TAG_BYTES:
            found.patches[offset] = b"JUNK"
        found.end = content + size + size % 2
        if name != b"data" or data is not None:
            continue
        if size == 0xFFFFFFFF and long_size is not None:
            size = long_size
        elif size >= STREAMED or size == 0:
            return Layout(patches=found.patches)
        data = offset
        found.samples = content, content + size
        found.end = max(content + size, start + 8 + riff_size) if riff_size < STREAMED else content + size
        if source.size is None or size >= STREAMED or found.end > source.size:
            return found  # cannot read further
        found.end = content + size
    return _with_stale_size_mended(source, found, data, start + 8 + riff_size)


def _with_stale_size_mended(source: ByteSource, found: Layout, data: int | None, riff_end: int) -> Layout:
    """Extend the samples to the end of the file if the size of their chunk is stale and that of the file is right."""
    if data is None or found.samples is None:
        return Layout(patches=found.patches)
    rest = source.exactly(found.samples[1], 1 << 12) if found.end == found.samples[1] else b""
    if riff_end != source.size or are_tags(rest):
        return found
    size = struct.pack("<I", riff_end - data - 8)
    return Layout((data + 8, riff_end), riff_end, found.patches | {data + 4: size})


def _avi(source: ByteSource, start: int) -> Layout:
    found = Layout()
    (size,) = struct.unpack("<I", source.exactly(start + 4, 4))
    for _, name, content, length in _chunks(source, start + 12, "<4sI"):
        if name == b"LIST" and source.exactly(content, 4) == b"movi":
            if 4 < length < STREAMED:
                found.samples = content + 4, content + length
            break
    end = start + 8 + size + size % 2
    if source.size is None or found.samples is None or size >= STREAMED or not found.samples[1] <= end <= source.size:
        return found
    for _ in range(MAX_CHUNKS):  # a long file continues in further RIFFs
        head = source.exactly(end, 12)
        if head[:4] != b"RIFF" or head[8:] != b"AVIX":
            break
        end += 8 + int.from_bytes(head[4:8], "little")
    found.end = end
    return found


def _matroska_end(source: ByteSource, start: int) -> int | None:
    """Where the segment of a Matroska file ends, None if it does not state that."""
    position = start
    for name in (_MATROSKA, _SEGMENT):
        head = source.exactly(position, 12)
        width = 9 - head[4].bit_length() if len(head) == 12 else 9
        size = int.from_bytes(head[4 : 4 + width], "big") & (1 << 7 * width) - 1
        if head[:4] != name or width > 8 or size == (1 << 7 * width) - 1:
            return None
        position += 4 + width + size
    return position


def _aiff(source: ByteSource, start: int) -> Layout:
    (size,) = struct.unpack(">I", source.exactly(start + 4, 4))
    found = Layout(end=start + 8 + size + size % 2 if 0 < size < STREAMED else None)
    for offset, name, content, length in _chunks(source, start + 12, ">4sI"):
        if found.end is not None and offset >= found.end:
            break
        if name == b"ID3 " and length > MAX_TAG_BYTES:
            found.patches[offset] = b"JUNK"
        elif name == b"SSND":
            found.samples = content + 8, content + length
            if source.size is None:
                break
    return found


def _au(source: ByteSource, start: int) -> Layout:
    header = source.exactly(start + 4, 8)
    offset, size = struct.unpack(">II", header) if len(header) == 8 else (0, 0)
    if size == 0 or size >= STREAMED:
        return Layout()
    return Layout((start + offset, start + offset + size), start + offset + size)


def _caf(source: ByteSource, start: int) -> Layout:
    found = Layout()
    for offset, name, content, size in _chunks(source, start + 8, ">4sq"):
        if name == b"info" and size > MAX_TAG_BYTES:
            found.patches[offset] = b"free"
        if name == b"data":
            if size <= 0:
                return Layout(patches=found.patches)
            found.samples = content + 4, content + size
        found.end = content + size
        if name == b"data" and source.size is None:
            break
    return found if found.samples else Layout(patches=found.patches)


def _w64(source: ByteSource, start: int) -> Layout:
    (size,) = struct.unpack("<Q", source.exactly(start + 16, 8).ljust(8, b"\0"))
    found = Layout(end=start + size if 40 < size < 1 << 62 else None)
    position = start + 40
    for _ in range(MAX_CHUNKS):
        header = source.exactly(position, 24)
        if len(header) < 24:
            break
        (size,) = struct.unpack_from("<Q", header, 16)
        if header.startswith(_W64_DATA):
            found.samples = position + 24, position + size
            break
        position += max(24, size + 7 & ~7)
    return found


def _joined_boxes(source: ByteSource, start: int) -> int | None:
    """Where the boxes of another MP4 begin."""
    position, complete = start, False
    for _ in range(10 * MAX_CHUNKS):
        header = source.exactly(position, 16)
        if len(header) < 8:
            return None
        size, name = struct.unpack_from(">I4s", header)
        if name == b"ftyp" and complete:
            return position
        complete |= name == b"moov"
        if size == 1 and len(header) == 16:
            (size,) = struct.unpack_from(">Q", header, 8)
        if size < 8:
            return None
        position += size
    return None


def _asf_end(source: ByteSource, start: int) -> int | None:
    """Where the objects of an ASF file end, None if it does not state that or nothing follows."""
    position, complete = start, False
    for _ in range(MAX_CHUNKS):
        header = source.exactly(position, 24)
        if len(header) < 24:
            return None
        if complete and header[:16] not in _ASF_INDICES:
            return position
        (size,) = struct.unpack_from("<Q", header, 16)
        if size < 24:  # a broadcast, which continues to the end
            return None
        complete |= header.startswith(_ASF_DATA)
        position += size
    return None


def _transport_packet(source: ByteSource, start: int) -> tuple[int, int] | None:
    """Packet size of an MPEG transport stream and offset of the sync byte, None for anything else."""
    head = source.exactly(start, 4 + 3 * 204)
    for size, sync in _TRANSPORT_PACKETS:
        if len(head) > sync + 2 * size and all(head[sync + i * size] == _SYNC for i in range(3)):
            return size, sync
    return None


def _transport_end(source: ByteSource, start: int, size: int, packet: int, sync: int) -> int | None:
    """Where the packets of a transport stream in a source of `size` bytes end. None if only a cut packet follows, or if
    the last packets are not at multiples of their size, as after damage."""
    last = (size - start) // packet - 1
    for index in range(last, max(2, last - MAX_CHUNKS), -1):
        if all(source.exactly(start + (index - i) * packet + sync, 1) == bytes([_SYNC]) for i in range(3)):
            end = start + (index + 1) * packet
            rest = source.exactly(end, packet)
            cut = len(rest) < packet and rest[sync : sync + 1] in (b"", bytes([_SYNC]))
            return None if cut else end
    return None


def _flac_comments(source: ByteSource, start: int) -> dict[int, bytes]:
    """Patches that turn too many comments into padding."""
    patches = {}
    position = start + 4
    for _ in range(MAX_CHUNKS):
        header = source.exactly(position, 4)
        if len(header) < 4:
            break
        kind, size = header[0], int.from_bytes(header[1:], "big")
        if kind & 0x7F == 4 and size > MAX_TAG_BYTES:
            vendor = int.from_bytes(source.exactly(position + 4, 4), "little")
            count = (
                int.from_bytes(source.exactly(position + 8 + vendor, 4), "little") if vendor < size else MAX_TAGS + 1
            )
            if count > MAX_TAGS:
                patches[position] = bytes([kind & 0x80 | 1])
        position += 4 + size
        if kind & 0x80:
            break
    return patches


def _id3_tags(source: ByteSource, start: int) -> list[tuple[int, int]]:
    """Where the ID3v2 tags at `start` begin and end."""
    tags: list[tuple[int, int]] = []
    while len(tags) < MAX_CHUNKS:
        begin = tags[-1][1] if tags else start
        head = source.exactly(begin, 10)
        if len(head) < 10 or not head.startswith(b"ID3") or (source.size is None and tags):
            break
        end = begin + 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        tags.append((begin, end))
    return tags


def _mp3_seconds(frame: bytes) -> float | None:
    """The length stated by the first frame of an MP3, if that frame is a header."""
    found = [(frame.find(tag), offset) for tag, offset in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)) if tag in frame]
    version, rate_index = (frame[1] >> 3 & 3, frame[2] >> 2 & 3) if len(frame) > 2 else (1, 3)
    if not found or version == 1 or rate_index == 3:
        return None
    position, offset = found[0]
    if offset == 8 and not int.from_bytes(frame[position + 4 : position + 8], "big") & 1:
        return None
    frames = int.from_bytes(frame[position + offset : position + offset + 4], "big")
    rate = (44_100, 48_000, 32_000)[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    return frames * (1152 if version == 3 else 576) / rate
