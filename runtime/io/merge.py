"""The segments of overlapping windows of a long recording, joined to one transcript."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from .segments import Segment

_ALIKE = 0.6  # share of the shorter text's words that two hearings of one sentence have in common
_NEAR = 1.0  # seconds between two hearings of one sentence


@dataclass(frozen=True)
class Heard:
    """What was heard in one window of a recording. All times count from the start of the recording."""

    start: float
    end: float
    segments: tuple[Segment, ...]


def merge(windows: Sequence[Heard]) -> list[Segment]:
    """The segments of consecutive windows as one list by start, each sentence once.

    Where two windows overlap, segments that agree in time and text are one, of which the hearing farther from its
    window's edge is kept. Of the rest, the window that is closer to its edge yields where the other has heard
    something at that time. Windows number their speakers each anew: agreeing segments tell who is who, and a speaker of
    a later window whom none does gets the next free number.
    """
    merged: list[Segment] = []
    for index, window in enumerate(windows):
        here = list(window.segments)
        before = windows[index - 1].end if index else window.start
        if before <= window.start:
            merged += _renamed(here, merged, [])
            continue
        old = [i for i, segment in enumerate(merged) if segment.end > window.start - _NEAR]
        new = [i for i, segment in enumerate(here) if segment.start < before + _NEAR]
        pairs = [(old[a], new[b]) for a, b in _agreeing([merged[i] for i in old], [here[i] for i in new])]
        here = _renamed(here, merged, pairs)
        merged = _joined(merged, here, pairs, (window.start, before))
    return sorted(merged, key=lambda segment: segment.start)


def _joined(
    old: list[Segment], new: list[Segment], pairs: list[tuple[int, int]], overlap: tuple[float, float]
) -> list[Segment]:
    first, last = overlap
    middle = (first + last) / 2
    dropped_old, dropped_new = set(), set()
    for a, b in pairs:
        # The one that its window cuts off has fewer words; of equals, the one farther from its window's edge.
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
    """Whether one of the others was heard during at least half of the segment."""
    length = segment.end - segment.start
    return any(
        min(segment.end, other.end) - max(segment.start, other.start) >= length / 2
        and other.start <= _center(segment) <= other.end
        for other in others
    )


def _words(segment: Segment) -> list[str]:
    return re.findall(r"\w+", segment.text.casefold()) or [segment.text]


def _agreeing(old: list[Segment], new: list[Segment]) -> list[tuple[int, int]]:
    """Pairs of indices of segments that are one sentence heard twice: alike in text, close in time, in one order."""
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
    """Seconds between two hearings, of which one window may have cut off one end; it decides among equal texts."""
    return min(abs(one.start - other.start), abs(one.end - other.end))


def _likeness(one: list[str], other: list[str]) -> float:
    """The share of the shorter text's words that are in the other, in order."""
    if one == other:
        return 1.0
    blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / min(len(one), len(other))


def _renamed(new: list[Segment], old: list[Segment], pairs: list[tuple[int, int]]) -> list[Segment]:
    """The new segments with the speakers' names that the old ones have for them."""
    votes: Counter[tuple[str, str]] = Counter()
    for a, b in pairs:
        mine, theirs = new[b].speaker, old[a].speaker
        if mine is not None and theirs is not None:
            votes[mine, theirs] += 1
    names: dict[str, str] = {}
    for (mine, theirs), _ in sorted(votes.items(), key=lambda vote: -vote[1]):
        if mine not in names and theirs not in names.values():
            names[mine] = theirs
    known = {segment.speaker for segment in old} - {None}
    for segment in new:
        if segment.speaker is not None and segment.speaker not in names:
            names[segment.speaker] = segment.speaker if not known else _fresh(known | set(names.values()))
    return [segment if segment.speaker is None else replace(segment, speaker=names[segment.speaker]) for segment in new]


def _fresh(taken: set[str | None]) -> str:
    numbers = (int(match[1]) for name in taken if (match := re.fullmatch(r"Speaker (\d{1,9})", name or "")))
    return f"Speaker {max(numbers, default=0) + 1}"
