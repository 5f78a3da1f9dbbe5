"""The audio of a request: from base64, uploaded files, stored files or allowed hosts to samples."""

import binascii
from pathlib import Path
from typing import Any

from ..runtime.io.audio import Audio
from .decoding import DecodePool
from .errors import ApiError
from .fetch import Fetcher
from .http import Exchange
from .threads import to_its_end
from .worker import decoded_base64

MAX_RECORDINGS = 16


class AudioReader:
    """Decodes the recordings of one request."""

    def __init__(self, exchange: Exchange, pool: DecodePool, *, max_seconds: float, truncate: bool):
        self._exchange = exchange
        self._pool = pool
        self._max_seconds = max_seconds
        self._truncate = truncate
        self._count = 0

    async def from_base64(self, data: Any, param: str) -> Audio:
        """A recording in base64 or a data: URL, or one that `worker.extract` moved to a file."""
        if isinstance(data, dict) and Path(str(data.get("spooled"))) in self._exchange.files:  # not the client's path
            return await self.from_file(Path(data["spooled"]), self._name(), param)
        if not isinstance(data, str) or not data:
            raise ApiError(400, "invalid_audio", f"{param} has to be audio in base64", param=param)
        path = self._exchange.temporary()
        self._exchange.reserve(len(data) * 3 // 4)
        try:
            await to_its_end(lambda: path.write_bytes(decoded_base64(data)))
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, "invalid_audio", f"{param} is not valid base64 ({error})", param=param) from None
        return await self.from_file(path, self._name(), param)

    async def from_url(self, url: str, fetcher: Fetcher, param: str) -> Audio:
        """A recording from an allowed host."""
        path = self._exchange.temporary()
        most = self._exchange.settings.max_upload_bytes
        await fetcher.fetch(url, path, most=most, reserve=self._exchange.reserve, param=param)
        return await self.from_file(path, self._name(), param)

    async def from_file(self, path: Path, name: str, param: str) -> Audio:
        """A recording in a file; `name` is what errors and warnings call it."""
        self._count += 1
        if self._count > MAX_RECORDINGS:
            raise ApiError(400, "invalid_value", f"a request may hold {MAX_RECORDINGS} recordings", param=param)
        try:
            audio = await self._pool.decode(
                path, name, spool=self._exchange.spool, max_seconds=self._max_seconds, truncate=self._truncate
            )
        except ApiError as error:
            error.param = param
            raise
        self._exchange.reserve(audio.samples.nbytes)  # the samples keep the deleted file's bytes on disk
        return audio

    def _name(self) -> str:
        return f"audio {self._count + 1}"
