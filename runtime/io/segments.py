"""Parses segments (speaker, text, times) from the model's text.

A transcript is text with markers: times, speakers, or both (see `markers`). A marker precedes its text, which may
continue on further lines; if every time is at the end of its line, times follow their texts. A model may write
anything, so no text is lost and times are checked: a time beyond the recording, or an invalid one such as 00:75, stays
in the text; missing times are estimated from the lengths of the texts. Both are reported, and so are possible markers
in unknown layouts.
"""

import re
import unicodedata
from dataclasses import dataclass, replace
from itertools import accumulate

from .markers import Marker, find_markers, suspects
from .scripts import joined
from .transcript import CLOSE, OPEN

_LATE = 1.0  # seconds that a time may exceed the end, because models round
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # except white space
_SEPARATOR_AT_END = re.compile(r"(?<=.) [-–—|;,:]$")
_TAG = re.compile(
    r"(</?(?:think|sound|s|unk|pad)>|\[(?:BOS|EOS|PAD)\]|<\|(?! *(?:\d|speaker|spk))[\w /-]{1,40}\|>)", re.IGNORECASE
)


@dataclass(frozen=True)
class Segment:
    """A segment of speech: start and end in seconds, its text on one line, and its speaker ("Speaker 1") if known.

    start_stated, end_stated: whether the model stated the time; otherwise it is estimated.
    """

    start: float
    end: float
    text: str
    speaker: str | None = None
    start_stated: bool = True
    end_stated: bool = True


@dataclass
class _Draft:
    start: float | None = None
    end: float | None = None
    speaker: str | None = None
    text: str = ""


def parse_segments(text: str, duration: float) -> tuple[list[Segment], list[str]]:
    """The segments in the model's `text` about a recording of `duration` seconds, and the problems found.

    Segments are ordered by start, within 0 .. duration, and have text.
    """
    problems: list[str] = []
    text = _without_tags(text, problems)
    markers = _sound_markers(text, duration, problems)
    pieces = _between(text, markers)
    behind = _times_are_behind(pieces, markers)
    drafts = (_with_times_behind if behind else _drafts)(pieces, markers)
    if drafts and markers and not clean(pieces[-1]) and _needs_text(markers[-1], behind, pieces):
        problems.append(f"nothing is said there: {_some([text[markers[-1].start : markers[-1].end]])}")
    untimed = sum(draft.start is None for draft in drafts)
    if untimed:
        problems.append(f"{untimed} of {len(drafts)} segments have no time; it is estimated")
    segments = [
        Segment(
            start,
            max(start, draft.end or 0.0),
            draft.text,
            draft.speaker,
            start_stated=draft.start is not None,
            end_stated=draft.end is not None,
        )
        for draft, start in zip(drafts, _starts(drafts, duration), strict=True)
    ]
    segments.sort(key=lambda segment: segment.start)
    return _with_ends(segments, duration), problems


def clean(text: str) -> str:
    """The text on one line, without control characters; empty if no character is visible.

    Any run of white space becomes one space, or nothing for a line break between Chinese or Japanese text.
    """
    lines = _CONTROL.sub("", text).splitlines()
    line = joined(" ".join(line.split()) for line in lines)
    return line if any(char != " " and unicodedata.category(char) != "Cf" for char in line) else ""


def _without_tags(text: str, problems: list[str]) -> str:
    """The text without thinking between `<think>` and `</think>`, and without stray tags of the model's format."""
    kept: list[str] = []
    left_out: list[str] = []
    opened: int | None = None  # index in `kept` where thinking began
    for index, part in enumerate(_TAG.split(text)):
        if index % 2 == 0:
            kept.append(part)
        elif part.casefold() == OPEN and opened is None:
            opened = len(kept)
            left_out.append(part)
        elif part.casefold() == CLOSE and opened is not None:
            left_out[-1] += "".join(kept[opened:]) + part
            del kept[opened:]
            opened = None
        else:
            left_out.append(part)
        if index % 2:
            kept.append(" ")
    if left_out:
        problems.append(f"left out, not speech: {_some(left_out)}")
    return "".join(kept)


def _sound_markers(text: str, duration: float, problems: list[str]) -> list[Marker]:
    """The markers with times within the recording; other possible markers stay in the text."""
    found = list(find_markers(text))
    sound, impossible, backwards = [], [], []
    for marker in found:
        written = clean(text[marker.start : marker.end])
        times = [min(time, duration) for time in marker.times if time <= duration + _LATE]
        if len(times) < len(marker.times):
            impossible.append(written)
            continue
        if times != sorted(times):
            backwards.append(written)
            times.pop()
        sound.append(replace(marker, times=tuple(times)))
    unknown = [suspect for piece in _between(text, found) for suspect in suspects(piece)]
    if impossible:
        problems.append(f"no time in a recording of {duration:.1f} s, left in the text: {_some(impossible)}")
    if backwards:
        problems.append(f"ends before it starts; the end is estimated: {_some(backwards)}")
    if unknown:
        problems.append(f"a time or speaker in an unknown layout, left in the text: {_some(unknown)}")
    return sound


def _some(examples: list[str]) -> str:
    more = f" and {len(examples) - 3} more" if len(examples) > 3 else ""
    return ", ".join(repr(shown[:80]) for shown in map(clean, examples[:3])) + more


def _between(text: str, markers: list[Marker]) -> list[str]:
    """The text before the first marker, between each two, and after the last."""
    edges = [0, *(edge for marker in markers for edge in (marker.start, marker.end)), len(text)]
    return [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _drafts(pieces: list[str], markers: list[Marker]) -> list[_Draft]:
    """The segments of a text in which markers precede their texts."""
    drafts = [_Draft(text=line) for line in _lines(pieces[0])]
    draft = _Draft()
    for marker, piece in zip(markers, pieces[1:], strict=True):
        if draft.text or (marker.times and not _continues(draft, marker)):
            _close(draft, drafts)
            draft = _Draft(speaker=draft.speaker)
        if marker.times and draft.start is not None:
            draft.end = marker.times[0]  # two times in a row: start, end
        elif marker.times:
            draft.start, draft.end = (*marker.times, None)[:2]
        draft.speaker = marker.speaker or draft.speaker
        draft.text = clean(piece)
    _close(draft, drafts)
    return drafts


def _continues(draft: _Draft, marker: Marker) -> bool:
    """Whether the marker's time belongs to the draft: it has no text yet, and no time or no end."""
    start, *rest = marker.times
    return draft.start is None or (draft.end is None and not rest and start > draft.start)


def _close(draft: _Draft, drafts: list[_Draft]) -> None:
    """Add the draft; a draft with a time and no text ends the previous one."""
    before = drafts[-1] if drafts else _Draft()
    if draft.text:
        drafts.append(draft)
    elif draft.start is not None and before.start is not None and before.end is None and draft.start > before.start:
        before.end = draft.start


def _times_are_behind(pieces: list[str], markers: list[Marker]) -> bool:
    """Whether each time follows its text on the same line."""
    timed = [piece for piece, marker in zip(pieces, markers, strict=False) if marker.times]
    return bool(timed) and not clean(pieces[-1]) and all(clean(f"{piece}.".splitlines()[-1][:-1]) for piece in timed)


def _with_times_behind(pieces: list[str], markers: list[Marker]) -> list[_Draft]:
    """The segments of a text in which each time follows its text.

    A speaker directly after a time belongs to the same text at the end of a line, and everywhere if the text ends that
    way.
    """
    drafts: list[_Draft] = []
    speaker = None
    always = not markers[-1].times and not pieces[-2]
    for piece, marker, following in zip(pieces, markers, pieces[1:], strict=False):
        drafts += [_Draft(text=line, speaker=speaker) for line in _lines(piece)]
        if marker.times:
            drafts[-1].start, drafts[-1].end = (*marker.times, None)[:2]
            drafts[-1].speaker = marker.speaker or speaker
            drafts[-1].text = _SEPARATOR_AT_END.sub("", drafts[-1].text)
        elif drafts and not piece and (always or not clean(f".{following}".splitlines()[0][1:])):
            drafts[-1].speaker = marker.speaker
        else:
            speaker = marker.speaker
    return drafts


def _needs_text(last: Marker, behind: bool, pieces: list[str]) -> bool:
    """Whether the last marker, which no text follows, does not belong to the text before it either."""
    if behind:
        return not last.times and bool(pieces[-2])
    return last.speaker is not None or len(last.times) > 1


def _lines(text: str) -> list[str]:
    return [line for line in map(clean, text.splitlines()) if line]


def _starts(drafts: list[_Draft], duration: float) -> list[float]:
    """Starts of all drafts; drafts without one share the time up to the next start by the lengths of their texts."""
    starts = [draft.start for draft in drafts]
    first = 0
    while first < len(drafts):
        if starts[first] is not None:
            first += 1
            continue
        stop = next((i for i in range(first, len(drafts)) if drafts[i].start is not None), len(drafts))
        until = duration if stop == len(drafts) else drafts[stop].start or 0.0
        leader = drafts[first - 1] if first else _Draft(0.0, 0.0)
        shares = [len(draft.text) for draft in drafts[first:stop]]
        since = leader.end
        if since is None:  # the previous draft has no end either, so it gets a share, too
            since = starts[first - 1] or 0.0
            since += max(0.0, until - since) * len(leader.text) / (len(leader.text) + sum(shares))
        pace = max(0.0, until - since) / sum(shares)
        starts[first:stop] = [since + pace * share for share in accumulate(shares[:-1], initial=0)]
        first = stop
    return [min(start or 0.0, duration) for start in starts]


def _with_ends(segments: list[Segment], duration: float) -> list[Segment]:
    """The segments, sorted by start; ends that were not stated are set to the next later start."""
    ended: list[Segment] = []
    later = duration
    for i in range(len(segments) - 1, -1, -1):
        segment = segments[i]
        if i + 1 < len(segments) and segments[i + 1].start > segment.start:
            later = segments[i + 1].start
        ended.append(segment if segment.end_stated else replace(segment, end=max(segment.start, later)))
    return ended[::-1]
