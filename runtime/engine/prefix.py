"""Keys and values of a prompt's beginning, computed once and shared by every prompt that begins with it."""

import weakref
from collections.abc import Callable

from ...kernels.errors import AfnextError


class Prefix:
    """The pages that hold the first `len(token_ids)` tokens of a prompt, held until `close` or until it is dropped.

    Nobody writes into the pages. Who continues the prompt shares the full ones and copies the last one if it is partly
    filled.
    """

    def __init__(self, token_ids: list[int], pages: list[int], release: Callable[[list[int]], None]):
        """release: takes the pages back, from any thread and at any time."""
        self.token_ids = token_ids
        self._pages = pages
        self._close = weakref.finalize(self, release, pages)
        self._close.atexit = False

    @property
    def pages(self) -> list[int]:
        """The pages in order. Raises AfnextError once closed."""
        if self.closed:
            raise AfnextError("the context has been closed; listen again")
        return self._pages

    @property
    def closed(self) -> bool:
        """Whether the pages have been given back."""
        return not self._close.alive

    def close(self) -> None:
        """Give the pages back; those that a running request shares stay until it ends. Closing again does nothing."""
        self._close()
