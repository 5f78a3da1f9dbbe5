"""The stream on which audio is encoded: the decoder's own, or on a GPU a second one, ahead of the decoder.

    decoder's stream                     | chunk 0                | chunk 1      ...
    encoder's stream    windows of chunk 0 | windows of chunk 1 |    windows of chunk 2 ...

The host queues the windows of a chunk after the chunk before it, and the GPU computes both at the same time. The
encoder's stream never waits for the decoder's: it reads only waveforms and its own weights. Events make the decoder's
stream wait for the windows that it reads. The allocator keeps their memory until that stream has read them.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Queued:
    """Audio embeddings of some windows, [tokens, hidden] each. done: the event after them on another stream, or None if
    they are computed on the reader's stream."""

    tokens: list[Tensor]
    done: torch.cuda.Event | None = None


class EncoderStream:
    """Queues the encoder's work. apart: on a stream of its own, which needs a GPU."""

    def __init__(self, device: torch.device, *, apart: bool):
        """The current stream must be the one on which the weights were copied to the GPU."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if apart:
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @property
    def apart(self) -> bool:
        """Whether the encoder has a stream of its own."""
        return self._stream is not None

    def current(self) -> AbstractContextManager[Any]:
        """Makes it the current stream inside a `with` block."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def queue(self, encode: Callable[[], list[Tensor]]) -> Queued:
        """Call a function that queues the encoding of windows. Read its results with `read`."""
        if self._stream is None:
            return Queued(encode())
        with self.current():
            tokens = encode()
            return Queued(tokens, self._stream.record_event())

    def read(self, queued: Queued) -> list[Tensor]:
        """The embeddings of windows, which work queued later on the current stream may read. Does not wait itself."""
        if queued.done is not None:
            reader = torch.cuda.current_stream(self._device)
            reader.wait_event(queued.done)
            for tokens in queued.tokens:
                tokens.record_stream(reader)
        return queued.tokens
