"""Who says what, and when, read from the text that the model writes.

A transcript is text with markers: a time (`[00:12.3]`, `[1:02:03 - 1:02:05]`, `[12.5s]`), a speaker (`[Speaker 1]`), or
both in one bracket; round brackets, `Speaker 1:` and `00:12 - 00:15:` at the start of a line, and SRT's arrows are
understood as well. What follows a marker, further lines included, belongs to it, up to the next one. A model may write
anything, so nothing is lost and nothing trusted: a time that cannot be (beyond the recording, or 00:75) stays in the
text, times that are missing are estimated from the lengths of the texts, and both are told.
"""

import re
from dataclasses import dataclass, replace

_CLOCK = r"(?:\d{1,3}:)?\d{1,3}:\d{1,2}(?:[.,]\d{1,6})?"
_UNIT = r"\d{1,6}(?:\.\d{1,6})?\s*(?:seconds|sec|s)\b"
_TO = r"\s*(?:-->|->|→|[-–—~]|to)\s*"
_SPEAKER = r"(?:speaker|spk)(?:[ _-]+\w{1,20}|\d{1,4})"
_TIME = rf"(?:{_CLOCK}|{_UNIT}|\d{{1,6}}\.\d{{1,6}})"
_SURE = rf"(?:{_CLOCK}|{_UNIT})"  # a time also without square brackets around it


def _marker(time: str) -> str:
    """A time, a range, a speaker, or a time and a speaker in either order."""
    times = rf"{time}(?:{_TO}{time})?"
    return rf"(?:{times}(?:[\s,:;|]+{_SPEAKER})?|{_SPEAKER}(?:[\s,:;|]+{times})?)"


_INDEX = rf"(?:\d{{1,6}}[ \t]*\n[ \t]*(?={_CLOCK}{_TO}{_CLOCK}))?"  # SRT numbers its cues
_NAMED = rf"{_SPEAKER}[ \t]*:"
_BARE = rf"(?:{_SURE}(?:{_TO}{_SURE})?[ \t]+)?{_NAMED}|{_SURE}{_TO}{_SURE}:?|{_CLOCK}[ \t]*(?:[:|]|[-–—](?=\s))"
_MARKER = re.compile(
    rf"[*_]{{0,2}}\[\s*{_marker(_TIME)}\s*\][*_]{{0,2}}[ \t]*:?(?:[ \t]*{_NAMED})?"
    rf"|^[ \t]*(?:[-*•][ \t]+)?(?:[*_]{{0,2}}\(\s*{_marker(_SURE)}\s*\)[*_]{{0,2}}[ \t]*:?(?:[ \t]*{_NAMED})?"
    rf"|{_INDEX}(?:{_BARE}))",
    re.IGNORECASE | re.MULTILINE,
)
_LATE = 1.0  # seconds that a time may lie beyond the end: models round


@dataclass(frozen=True)
class Segment:
    """A stretch of speech: start and end in seconds, its text on one line, and its speaker ("Speaker 1") if known.

    start_stated, end_stated: whether the model said so; otherwise the time is estimated.
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
    """The segments that the model's `text` about a recording of `duration` seconds tells, and what was wrong with it.

    Segments come in the order of their starts, within 0 .. duration, none without text.
    """
    drafts, problems = _drafts(text, duration)
    untimed = sum(draft.start is None for draft in drafts)
    if untimed:
        problems.append(f"{untimed} of {len(drafts)} segments have no time of their own; theirs are estimated")
    starts = _starts(drafts, duration)
    segments = [
        Segment(
            start,
            max(start, draft.end or 0.0),
            draft.text,
            draft.speaker,
            start_stated=draft.start is not None,
            end_stated=draft.end is not None,
        )
        for draft, start in zip(drafts, starts, strict=True)
    ]
    segments.sort(key=lambda segment: segment.start)
    return _with_ends(segments, duration), problems


def _drafts(text: str, duration: float) -> tuple[list[_Draft], list[str]]:
    """The segments as written, times unchecked against each other."""
    drafts: list[_Draft] = []
    problems: list[str] = []
    draft = _Draft()

    def close() -> None:
        nonlocal draft
        if draft.text:
            drafts.append(draft)
        elif draft.start is not None and drafts and drafts[-1].end is None and _follows(drafts[-1], draft.start):
            drafts[-1].end = draft.start  # a time with nothing after it ends what was said before
        draft = _Draft(speaker=draft.speaker)

    def say(words: str) -> None:
        """Add text; without any marker before it, each line stands for itself."""
        nonlocal draft
        for line in words.splitlines() if draft.start is None and draft.speaker is None else [words]:
            said = clean(line)
            if said:
                draft.text = f"{draft.text} {said}".strip()
                if draft.start is None and draft.speaker is None:
                    close()

    end = 0
    for match in _MARKER.finditer(text):
        times, speaker = _read(match.group())
        if any(time is None or time > duration + _LATE for time in times):
            problems.append(f"{clean(match.group())!r} is no time in a recording of {duration:.1f} s")
            continue  # so it stays part of the text
        say(text[end : match.start()])
        end = match.end()
        if times or (speaker is not None and draft.text):
            before = draft.start if not draft.text and len(times) == 1 else None
            if before is not None and times[0] is not None and times[0] >= before and draft.end is None:
                draft.end = min(times[0], duration)  # two times in a row: from, to
                continue
            close()
        if times:
            draft.start, draft.end = _within(times, duration, match.group(), problems)
        if speaker is not None:
            draft.speaker = speaker
    say(text[end:])
    close()
    return drafts, problems


def _follows(draft: _Draft, time: float) -> bool:
    return draft.start is not None and time > draft.start


def _within(
    times: list[float | None], duration: float, marker: str, problems: list[str]
) -> tuple[float | None, float | None]:
    start, *rest = (None if time is None else min(time, duration) for time in times)
    end = rest[0] if rest else None
    if start is not None and end is not None and end < start:
        problems.append(f"{clean(marker)!r} ends before it starts")
        end = None
    return start, end


def _read(marker: str) -> tuple[list[float | None], str | None]:
    """The one or two times of a marker, None for an impossible one, and its speaker."""
    speaker = re.search(_SPEAKER, marker, re.IGNORECASE)
    name = None
    if speaker:
        label = re.sub(r"^(?:speaker|spk)[ _-]*", "", speaker.group(), flags=re.IGNORECASE)
        name = f"Speaker {int(label) if label.isdecimal() else label}"
        marker = marker[: speaker.start()] + marker[speaker.end() :]
    marker = re.sub(r"^[ \t]*(?:[-*•][ \t]+)?\d{1,6}[ \t]*\n", "", marker)
    return [_seconds(time) for time in re.findall(_TIME, marker, re.IGNORECASE)][:2], name


def _seconds(time: str) -> float | None:
    if ":" not in time:
        return float(re.match(r"[\d.]+", time).group())  # type: ignore[union-attr]
    *larger, seconds = time.replace(",", ".").split(":")
    hours, minutes = (int(larger[0]), int(larger[1])) if len(larger) == 2 else (0, int(larger[0]))
    if float(seconds) >= 60 or (len(larger) == 2 and minutes >= 60):
        return None
    return 3600.0 * hours + 60.0 * minutes + float(seconds)


def clean(text: str) -> str:
    """The text on one line: any run of whitespace is one space, and control characters are gone."""
    return " ".join("".join(char for char in text if char.isprintable() or char.isspace()).split())


def _starts(drafts: list[_Draft], duration: float) -> list[float]:
    """Starts of all drafts; those not stated share the time up to the next one by the lengths of their texts."""
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
        if since is None:  # the one before has no end either: it takes its share, too
            since = starts[first - 1] or 0.0
            since += max(0.0, until - since) * len(leader.text) / (len(leader.text) + sum(shares))
        room = max(0.0, until - since)
        for i in range(first, stop):
            starts[i] = since + room * sum(shares[: i - first]) / sum(shares)
        first = stop
    return [min(start or 0.0, duration) for start in starts]


def _with_ends(segments: list[Segment], duration: float) -> list[Segment]:
    """The segments, sorted by start, with each end that was not stated at the next later start."""
    ended: list[Segment] = []
    later = duration
    for i in range(len(segments) - 1, -1, -1):
        segment = segments[i]
        if i + 1 < len(segments) and segments[i + 1].start > segment.start:
            later = segments[i + 1].start
        ended.append(segment if segment.end_stated else replace(segment, end=max(segment.start, later)))
    return ended[::-1]
