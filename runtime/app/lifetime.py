"""The base of models, contexts and live recordings: they cannot be copied, and are closed when no longer needed."""

from typing import NoReturn, SupportsIndex

from ...kernels.errors import AfnextError


class CopyError(AfnextError, TypeError):
    """An attempt to pickle or copy a model, context or live recording. Also a TypeError, like pickle's own errors."""


class NotCopyable:
    """A base for objects that hold weights or KV pages, whose copies by pickle or copy would be broken."""

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        raise CopyError(f"a {type(self).__name__} cannot be pickled or copied: {self._instead()}")

    def _instead(self) -> str:
        """What to do instead."""
        raise NotImplementedError
