"""Merges the segments of overlapping windows of a long recording into one transcript."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import zip_longest

from .scripts import units
from .segments import Segment

_ALIKE = 0.6  # share of the shorter text's words that two transcripts of one sentence have in common
_NEAR = 1.0  # seconds between two transcripts of one sentence


@dataclass(frozen=True)
class Heard:
    """The transcript of one window of a recording. All times count from the start of the recording."""

    start: float
    end: float
    segments: tuple[Segment, ...]


class Merger:
    """Merges the segments of consecutive windows, and returns each as soon as it is final.

    Where two windows overlap, segments that agree in time and text are merged; the one that is less truncated by its
    window is kept. Of the other segments, those closer to their window's edge are dropped if the other window has text
    for that time. Windows number their speakers independently: agreeing segments map one numbering to the other, and a
    speaker of a later window without such a segment gets the next free number.
    """

    def __init__(self) -> None:
        self._pending: list[Segment] = []
        self._speakers: set[str] = set()
        self._end: float | None = None

    def push(self, window: Heard, following: float | None) -> list[Segment]:
        """Add the next window; return the segments that no later window can change, ordered by start.

        following: start of the window after this one, or None if this is the last.
        """
        old, new = self._pending, list(window.segments)
        overlap = (window.start, window.start if self._end is None else self._end)
        pairs: list[tuple[int, int]] = []
        if overlap[0] < overlap[1]:
            late = [a for a, segment in enumerate(old) if segment.end > overlap[0] - _NEAR]
            early = [b for b, segment in enumerate(new) if segment.start < overlap[1] + _NEAR]
            pairs = [(late[a], early[b]) for a, b in _agreeing([old[a] for a in late], [new[b] for b in early])]
        new = _renamed(new, [(old[a], new[b]) for a, b in pairs], self._speakers | _speakers(old))
        merged = _joined(old, new, pairs, overlap) if overlap[0] < overlap[1] else old + new
        merged.sort(key=lambda segment: segment.start)
        self._end = window.end
        final = _count_final(merged, following)
        self._pending = merged[final:]
        self._speakers |= _speakers(merged[:final])
        return merged[:final]


def merge(windows: Sequence[Heard]) -> list[Segment]:
    """The segments of consecutive windows as one list by start, each sentence once; see `Merger`."""
    merger = Merger()
    following = zip_longest(windows, [window.start for window in windows[1:]])
    return [segment for window, start in following for segment in merger.push(window, start)]


def _count_final(segments: list[Segment], following: float | None) -> int:
    """Number of first segments that end before everything that a window starting at `following` can affect."""
    if following is None:
        return len(segments)
    ends = (i for i, segment in enumerate(segments) if segment.end > following - _NEAR)
    return next(ends, len(segments))


def _speakers(segments: Iterable[Segment]) -> set[str]:
    return {segment.speaker for segment in segments if segment.speaker is not None}


def _joined(
    old: list[Segment], new: list[Segment], pairs: list[tuple[int, int]], overlap: tuple[float, float]
) -> list[Segment]:
    first, last = overlap
    middle = (first + last) / 2
    dropped_old, dropped_new = set(), set()
    for a, b in pairs:
        # A truncated segment has fewer words; among equals, keep the one farther from its window's edge.
        longer_old = len(_words(old[a])) - len(_words(new[b]))
        keep_old = longer_old > 0 or (longer_old == 0 and _center(old[a]) < middle)
        (dropped_new.add(b) if keep_old else dropped_old.add(a))
    paired_old, paired_new = {a for a, _ in pairs}, {b for _, b in pairs}
    kept_old = [segment for a, segment in enumerate(old) if a not in dropped_old]
    kept_new = [segment for b, segment in enumerate(new) if b not in dropped_new]
    for a, segment in enumerate(old):
        if a not in paired_old and _center(segment) >= middle and _covered(segment, kept_new):
            dropped_old.add(a)
    for b, segment in enumerate(new):
        if b not in paired_new and _center(segment) < middle and _covered(segment, kept_old):
            dropped_new.add(b)
    return [s for a, s in enumerate(old) if a not in dropped_old] + [
        s for b, s in enumerate(new) if b not in dropped_new
    ]


def _center(segment: Segment) -> float:
    return (segment.start + segment.end) / 2


def _covered(segment: Segment, others: Iterable[Segment]) -> bool:
    """Whether one of the others covers at least half of the segment."""
    length = segment.end - segment.start
    return any(
        min(segment.end, other.end) - max(segment.start, other.start) >= length / 2
        and other.start <= _center(segment) <= other.end
        for other in others
    )


def _words(segment: Segment) -> list[str]:
    return units(segment.text) or [segment.text]


def _agreeing(old: list[Segment], new: list[Segment]) -> list[tuple[int, int]]:
    """Pairs of indices of segments that transcribe one sentence twice: similar in text, close in time, in order."""
    old_words, new_words = [_words(segment) for segment in old], [_words(segment) for segment in new]
    best = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]
    matched: set[tuple[int, int]] = set()
    for a in range(len(old) - 1, -1, -1):
        for b in range(len(new) - 1, -1, -1):
            apart = max(old[a].start - new[b].end, new[b].start - old[a].end, 0.0)
            alike = _likeness(old_words[a], new_words[b]) if apart <= _NEAR else 0.0
            skipped = max(best[a + 1][b], best[a][b + 1])
            together = best[a + 1][b + 1] + alike / (1 + _distance(old[a], new[b]))
            best[a][b] = skipped
            if alike >= _ALIKE and together > skipped:
                best[a][b] = together
                matched.add((a, b))
    pairs = []
    a = b = 0
    while a < len(old) and b < len(new):
        if (a, b) in matched:
            pairs.append((a, b))
            a, b = a + 1, b + 1
        elif best[a + 1][b] >= best[a][b + 1]:
            a += 1
        else:
            b += 1
    return pairs


def _distance(one: Segment, other: Segment) -> float:
    """Seconds between two segments, of which a window may have cut off one end; a tie-breaker for equal texts."""
    return min(abs(one.start - other.start), abs(one.end - other.end))


def _likeness(one: list[str], other: list[str]) -> float:
    """The share of the shorter text's words that are in the other, in order."""
    if one == other:
        return 1.0
    blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / min(len(one), len(other))


def _renamed(new: list[Segment], pairs: list[tuple[Segment, Segment]], known: set[str]) -> list[Segment]:
    """The new segments with the speaker names of the transcript so far.

    pairs: an old segment and the new one that agrees with it; known: the speakers so far.
    """
    votes: Counter[tuple[str, str]] = Counter()
    for old, own in pairs:
        if own.speaker is not None and old.speaker is not None:
            votes[own.speaker, old.speaker] += 1
    names: dict[str, str] = {}
    for (mine, theirs), _ in sorted(votes.items(), key=lambda vote: -vote[1]):
        if mine not in names and theirs not in names.values():
            names[mine] = theirs
    for segment in new:
        if segment.speaker is not None and segment.speaker not in names:
            names[segment.speaker] = segment.speaker if not known else _fresh(known | set(names.values()))
    return [segment if segment.speaker is None else replace(segment, speaker=names[segment.speaker]) for segment in new]


def _fresh(taken: set[str]) -> str:
    numbers = (int(match[1]) for name in taken if (match := re.fullmatch(r"Speaker (\d{1,9})", name)))
    return f"Speaker {max(numbers, default=0) + 1}"
