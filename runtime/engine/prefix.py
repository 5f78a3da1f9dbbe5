"""Keys and values of the beginning of a prompt, computed once and shared by every prompt that begins with it."""

from collections.abc import Callable

from ...kernels.errors import AfnextError


class Prefix:
    """Owns the pages of the first `len(token_ids)` tokens of a prompt until `close` or garbage collection.

    The pages are read-only. A prompt that continues the prefix shares the full pages and copies a partial last one.
    """

    def __init__(
        self, number: int, token_ids: list[int], pages: list[int], wake: Callable[[], None], *, cached: int | None
    ):
        """number: identifies the prefix in `PageManager`, which notices at the next step that it is closed or dropped.
        wake: makes the engine do a step; callable from any thread at any time. cached: for a prefix that the engine may
        close when it needs the pages, how many of its tokens other requests had computed."""
        self.number = number
        self.token_ids = token_ids
        self.cached = cached
        self.closed = False
        self._pages = pages
        self._wake = wake

    @property
    def pages(self) -> list[int]:
        """The pages in order. Raises AfnextError after `close`."""
        if self.closed:
            raise AfnextError(CLOSED)
        return self._pages

    def close(self) -> None:
        """Release the pages before the engine's next step; running requests keep theirs. Idempotent."""
        self.closed = True
        self._wake()


CLOSED = "the context has been closed; listen again"
