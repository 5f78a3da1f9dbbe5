"""Scheduling: the order of requests, which of them run, and which are preempted.

A request waits until there are pages for its prompt and its longest answer, so it never runs out of pages later.
Waiting requests are ordered by arrival; one unit of priority moves a request ahead of up to `OVERTAKEN` earlier ones.
If the cache is full, the first waiting request may preempt running requests that come after it in that order: their
pages are released and their tokens kept, and their keys and values are recomputed when pages are free again.
"""

from collections import deque

from .page_manager import PageManager
from .request import SequenceState

OVERTAKEN = 32  # earlier requests that one unit of priority overtakes


class Scheduler:
    """The sequences in the engine, in queues by state. Only the thread that steps the engine may change it."""

    def __init__(self, pages: PageManager, max_batch: int):
        self._pages = pages
        self._max_batch = max_batch
        self.unfinished: dict[SequenceState, None] = {}
        self.waiting: list[SequenceState] = []
        self.prefilling: deque[SequenceState] = deque()
        self.decoding: list[SequenceState] = []
        self.preemptions = 0

    def add(self, sequence: SequenceState) -> None:
        """Queue a new sequence."""
        self.unfinished[sequence] = None
        if sequence not in self.waiting:
            self.waiting.append(sequence)
            self.waiting.sort(key=lambda other: other.order)

    def remove(self, sequence: SequenceState) -> None:
        """Take a sequence out of all queues."""
        for queue in (self.waiting, self.prefilling, self.decoding):
            if sequence in queue:
                queue.remove(sequence)

    def next_admissible(self) -> SequenceState | None:
        """The next waiting sequence to start, after its pages are free and its cached pages are shared.

        None if all must wait. If a sequence cannot get its pages although nothing else runs, its `error` is set.
        """
        sequence = self._next() if len(self.prefilling) + len(self.decoding) < self._max_batch else None
        if sequence is None:
            return None
        self._pages.match(sequence)
        if self._make_room(sequence):
            return sequence
        needed = self._pages.needed(sequence)
        self._pages.release(sequence, keep_prefix=True)
        if self.prefilling or self.decoding:
            return None
        sequence.error = self._pages.shortage(sequence.request, needed)
        return sequence

    def start(self, sequence: SequenceState) -> None:
        """Move an admitted sequence to the prefill queue."""
        self.prefilling.append(sequence)
        self.waiting.remove(sequence)

    def rotate(self, sequence: SequenceState) -> None:
        """Move a sequence to the end of the prefill queue after a chunk of its prompt."""
        self.prefilling.remove(sequence)
        self.prefilling.append(sequence)

    def finish_prefill(self, sequence: SequenceState) -> None:
        """Move a sequence whose prompt is computed to the decode queue."""
        self.decoding.append(sequence)
        self.prefilling.remove(sequence)

    def _next(self) -> SequenceState | None:
        """The first waiting sequence whose prompt does not begin like one in progress. Those that do wait to share
        pages."""
        begun = {first for sequence in self.prefilling if (first := _first_key(sequence)) is not None}
        return next((s for s in self.waiting if _first_key(s) not in begun and _beginning_ended(s)), None)

    def _make_room(self, sequence: SequenceState) -> bool:
        """Grow the cache, evict cached pages or preempt later sequences until a sequence's pages are free.

        Returns whether they are.
        """
        pool, needed = self._pages.cache.pool, self._pages.needed(sequence)
        if needed > pool.free:
            wanted = sum(self._pages.wanted(other) for other in self.waiting[: self._max_batch])
            idle = not (self.prefilling or self.decoding)
            whole = sequence.request.expected is None
            self._pages.make_free(needed, wanted, retry=idle, beginnings=whole)
        later = [other for other in (*self.prefilling, *self.decoding) if other.order > sequence.order]
        if pool.free + sum(len(other.private_pages) for other in later) < needed:
            return False
        for other in sorted(later, key=lambda other: other.order, reverse=True):
            if pool.free < needed:
                self._preempt(other)
        return pool.free >= needed  # pages of preempted sequences that the prefix cache shares stay in use

    def _preempt(self, sequence: SequenceState) -> None:
        """Release the pages of a running sequence and queue it again."""
        self.remove(sequence)
        self._pages.release(sequence, keep_prefix=True)
        sequence.embeddings = None
        self.preemptions += 1
        self.add(sequence)


def _beginning_ended(sequence: SequenceState) -> bool:
    beginning = sequence.request.beginning
    return beginning is None or beginning.ended


def _first_key(sequence: SequenceState) -> bytes | None:
    keys = [] if sequence.keys is None else sequence.keys.of(sequence.request.token_ids)
    return keys[0] if keys else None
