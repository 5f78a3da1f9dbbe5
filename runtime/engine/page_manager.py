"""Page management: which pages of the KV cache are used by what, and how large the cache is.

The users of pages are sequences (private pages, which they write; shared pages, which they only read), prefixes that
the caller keeps, and the prefix cache. `PagePool` counts the users of each page. The cache grows when a request needs
more pages than are free, up to a limit, and shrinks when `trim` is called.
"""

import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterable

from ...kernels.errors import AfnextError
from ..errors import OutOfPagesError
from ..model.config import DecoderConfig
from .executor import Executor
from .kv_cache import PagePool, pages_for
from .options import EngineOptions
from .prefix import CLOSED, Prefix
from .prefix_cache import PrefixCache
from .request import Request, SequenceState

_FIRST_RETRY, _LAST_RETRY = 0.1, 10.0  # seconds after failed allocations
_log = logging.getLogger("afnext.engine")


class PageManager:
    """Assigns pages to sequences and prefixes. Only the thread that steps the engine may call it."""

    def __init__(
        self,
        config: DecoderConfig,
        options: EngineOptions,
        executor: Executor,
        *,
        wake: Callable[[], None],
    ):
        """executor: resizes the cache, and copies pages in it. wake: makes the engine do a step, from any thread and at
        any time."""
        self._executor = executor
        self.cache = executor.cache
        self._page_size = options.page_size
        self._page_multiple = options.page_multiple
        self._cache_answers = not options.batch_invariant
        self._wake = wake
        most = config.max_positions * options.max_batch
        self.limit = max(1, min(options.max_kv_tokens or most, most) // options.page_size)
        self._capacity = options.prefix_cache_bytes // self.cache.page_nbytes
        self.prefix_cache = PrefixCache(self.cache.pool, self._capacity)
        self._prefixes: dict[int, list[int]] = {}
        self._open: dict[int, weakref.ref[Prefix]] = {}
        self._numbers = itertools.count()
        self._retry_at, self._retry_after = 0.0, _FIRST_RETRY
        self._kept = 0

    @property
    def prefixes(self) -> dict[int, list[int]]:
        """The pages of every open prefix, by its number."""
        return self._prefixes

    def needed(self, sequence: SequenceState) -> int:
        """Private pages that a sequence needs."""
        return pages_for(sequence.request.budget, self._page_size) - self._full_shared(sequence)

    def wanted(self, sequence: SequenceState) -> int:
        """Private pages that a sequence, and the requests that continue its prompt, will need."""
        request = sequence.request
        return pages_for(max(request.budget, request.expected or 0), self._page_size) - self._full_shared(sequence)

    def _full_shared(self, sequence: SequenceState) -> int:
        """Number of full pages of its prefix, which a sequence uses without a copy."""
        prefix = sequence.request.prefix
        return len(sequence.shared_pages) if prefix is None else len(prefix.token_ids) // self._page_size

    def share_prefix(self, sequence: SequenceState) -> None:
        """Let a new sequence use the pages of its request's prefix. Raises AfnextError if the prefix is closed."""
        prefix = sequence.request.prefix
        if prefix is not None and not sequence.shared_pages:
            if prefix.number not in self._prefixes:
                raise AfnextError(CLOSED)
            pages = self._prefixes[prefix.number]
            self.cache.pool.share(pages)
            sequence.shared_pages = list(pages)

    def match(self, sequence: SequenceState) -> None:
        """Share the pages of a sequence's prompt that are computed: those of its beginning, or of the prefix cache if
        that has more. The page of the last token is not shared if its scores are needed."""
        request = sequence.request
        if request.prefix is not None:
            sequence.cached = len(request.prefix.token_ids)
            return
        pages: list[int] = []
        if sequence.keys is not None:
            ids = request.token_ids if request.sampling is None else request.token_ids[:-1]
            pages = self.prefix_cache.match(sequence.keys.of(ids), self._page_multiple)
        cached = len(pages) * self._page_size
        beginning = request.beginning.prefix if request.beginning is not None else None
        if beginning is not None and not beginning.closed and len(beginning.pages) >= len(pages):
            self.cache.pool.share(beginning.pages)
            self.cache.pool.release(pages)
            pages, cached = list(beginning.pages), beginning.cached or 0
        sequence.shared_pages = pages
        if not sequence.tokens:
            sequence.cached = cached

    def insert(self, sequence: SequenceState) -> None:
        """Add the full pages of a sequence to the prefix cache.

        With batch_invariant only those of whole chunks of the prompt: keys and values of other tokens could differ in
        bits from those of a longer prompt.
        """
        if sequence.keys is not None:
            tokens = sequence.request.token_ids + (sequence.tokens if self._cache_answers else [])
            filled = sequence.keys.of(tokens[: sequence.computed])
            filled = filled[: len(filled) - len(filled) % self._page_multiple]
            self.prefix_cache.insert(filled, sequence.pages[: len(filled)])

    def reserve(self, sequence: SequenceState) -> None:
        """Give a sequence its pages: the shared ones, a copy of a partial last one, and private ones.

        Raises OutOfPagesError if too few are free.
        """
        prefix, shared = sequence.request.prefix, self._full_shared(sequence)
        sequence.private_pages = self.cache.pool.allocate(self.needed(sequence))
        sequence.computed = shared * self._page_size if prefix is None else len(prefix.token_ids)
        sequence.pages = sequence.shared_pages[:shared] + sequence.private_pages
        if shared < len(sequence.shared_pages):
            self._executor.copy_page(sequence.shared_pages[shared], sequence.private_pages[0])

    def release(self, sequence: SequenceState, *, keep_prefix: bool = False) -> None:
        """Release the pages of a sequence. keep_prefix: all but those of its request's prefix or beginning."""
        self.cache.pool.release(sequence.private_pages)
        sequence.private_pages, sequence.pages, sequence.computed = [], [], 0
        if sequence.request.prefix is None or not keep_prefix:
            self.cache.pool.release(sequence.shared_pages)
            sequence.shared_pages = []
        beginning = sequence.request.beginning
        if beginning is not None and beginning.prefix is not None and not keep_prefix:
            self._drop(beginning.prefix)

    def new_prefix(self, token_ids: list[int], pages: list[int], cached: int | None = None) -> Prefix:
        """A prefix that shares `pages`, which are in use. cached: see `Prefix`."""
        wake = self._wake
        prefix = Prefix(next(self._numbers), token_ids, list(pages), wake, cached=cached)
        self._open[prefix.number] = weakref.ref(prefix, lambda _: wake())
        self.cache.pool.share(pages)
        self._prefixes[prefix.number] = list(pages)
        return prefix

    def copy_prefix(self, prefix: Prefix) -> Prefix:
        """Another prefix with the same pages. Raises AfnextError if it is closed."""
        return self.new_prefix(prefix.token_ids, prefix.pages)

    def empty_prefix(self, token_ids: list[int]) -> Prefix:
        """A prefix whose pages the caller fills. Raises OutOfPagesError if it does not fit."""
        needed = pages_for(len(token_ids), self._page_size)
        self.make_free(needed, needed, retry=True)
        pages = self.cache.pool.allocate(needed)
        prefix = self.new_prefix(token_ids, pages)
        self.cache.pool.release(pages)
        return prefix

    def drop_closed_prefixes(self) -> None:
        """Release the pages of prefixes that have been closed or dropped."""
        for number, reference in list(self._open.items()):
            prefix = reference()
            if prefix is None or prefix.closed:
                self._forget(number)

    def _drop(self, prefix: Prefix) -> None:
        """Close a prefix and release its pages now."""
        prefix.closed = True
        if prefix.number in self._open:
            self._forget(prefix.number)

    def _forget(self, number: int) -> None:
        self.cache.pool.release(self._prefixes.get(number, []))
        self._prefixes.pop(number, None)
        del self._open[number]

    def _drop_beginnings(self, needed: int) -> None:
        """Close beginnings of prompts, the latest first, until `needed` pages are free."""
        for reference in reversed(list(self._open.values())):
            prefix = reference()
            if prefix is not None and prefix.cached is not None and self.cache.pool.free < needed:
                self._drop(prefix)

    def make_free(self, needed: int, wanted: int, *, retry: bool, beginnings: bool = True) -> bool:
        """Grow the cache so that `wanted` pages are free, or evict from the prefix cache so that `needed` are.

        retry: try to grow even if an allocation failed a moment ago. beginnings: whether to close beginnings of other
        prompts at last. Returns whether `needed` pages are free.
        """
        pool = self.cache.pool
        if needed > pool.free and (retry or time.monotonic() >= self._retry_at):
            self._grow(needed, max(needed, wanted))
        if needed > pool.free:
            self.prefix_cache.evict(needed - pool.free)
        if needed > pool.free and beginnings:
            self._drop_beginnings(needed)
        return needed <= pool.free

    def _grow(self, needed: int, wanted: int) -> None:
        """Grow by at least half, so that growing is rare, or by `needed` pages if memory is short."""
        pool = self.cache.pool
        sizes = (pool.pages + max(wanted - pool.free, pool.pages // 2), pool.pages + needed - pool.free)
        for pages in dict.fromkeys(min(self.limit, size) for size in sizes):
            if pages == pool.pages:
                return
            try:
                self._executor.resize(pages)
            except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
                _log.warning("no memory for %d KV pages (%s); the cache has %d of at most %d", pages, error, pool.pages,
                             self.limit)  # fmt: skip
            else:
                self._retry_after = _FIRST_RETRY
                return
        self._retry_at = time.monotonic() + self._retry_after
        self._retry_after = min(_LAST_RETRY, 2 * self._retry_after)

    def preallocate(self) -> None:
        """Grow the cache to its limit and keep that size. Logs a warning if memory is short."""
        self._grow(0, self.limit)
        self._kept = self.cache.pool.pages

    def trim(self) -> None:
        """Release the memory after the last page in use, except memory that was preallocated."""
        pages = max(self.cache.pool.end, self._kept)
        if pages < self.cache.pool.pages:
            self._executor.resize(pages)

    def shortage(self, request: Request, needed: int) -> OutOfPagesError:
        """The error of a request that cannot get its pages although nothing else runs."""
        pool = self.cache.pool
        in_contexts = len({page for pages in self._prefixes.values() for page in pages})
        if pool.pages < self.limit:
            return OutOfPagesError(
                f"{needed} KV pages of {self._page_size} tokens are needed, and the device has memory for "
                f"{pool.pages} now, {in_contexts} of them used by open contexts. Free memory, close contexts, give "
                "less audio or lower max_new_tokens."
            )
        return OutOfPagesError(
            f"{needed} KV pages are needed, and contexts leave {self.limit - in_contexts} of {self.limit}. Close some."
        )

    def rebuild(self, waiting: Iterable[SequenceState]) -> None:
        """Recount the users of all pages: open prefixes, and waiting sequences, which share the pages of their
        prefixes.

        All other pages are released, those of the prefix cache too. For use after an error at an unknown point.
        """
        pages = self.cache.allocated_pages
        self.cache.pool = pool = PagePool(pages)
        self.prefix_cache = PrefixCache(pool, self._capacity)
        for users in (*self._prefixes.values(), *(sequence.shared_pages for sequence in waiting)):
            pool.use(users)
        self._executor.resize(pages)
