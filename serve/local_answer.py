"""An answer of the engine in this process."""

import time
from collections.abc import AsyncIterator
from typing import Any

from ..runtime.app.answer import Answer, Piece
from ..runtime.app.async_model import AsyncStream, Listened

_COMMENT_SECONDS = 5.0


class LocalAnswering:
    """An answer of the engine in this process."""

    def __init__(self, stream: AsyncStream, details: dict[str, Any]):
        self._stream = stream
        self._details = details

    @property
    def details(self) -> dict[str, Any]:
        """See `Answering`."""
        return self._details

    async def events(self) -> AsyncIterator[Piece | str]:
        """See `Answering`."""
        commented = time.monotonic()
        async for update in self._stream.updates():
            if isinstance(update, Piece):
                yield update
            elif isinstance(update, Listened) and time.monotonic() > commented + _COMMENT_SECONDS:
                commented = time.monotonic()
                yield f"listening {update.done}/{update.total}"

    async def finish(self) -> Answer:
        """See `Answering`."""
        return await self._stream.finish()

    async def close(self) -> None:
        """See `Answering`."""
        await self._stream.aclose()
