"""What models and what they have heard share: they cannot be copied, and are closed when they are no longer needed."""

from typing import NoReturn, SupportsIndex

from ...kernels.errors import AfnextError


class CopyError(AfnextError, TypeError):
    """A model, context or live recording was to be pickled or copied. A TypeError too, as pickle's own refusals are."""


class NotCopyable:
    """A base for objects that hold weights or KV pages, of which pickle and copy would make a broken double."""

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        raise CopyError(f"a {type(self).__name__} cannot be pickled or copied: {self._instead()}")

    def _instead(self) -> str:
        """What to do instead."""
        raise NotImplementedError
