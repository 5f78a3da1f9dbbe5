"""Chunked prefill: the decoder processes a prompt in chunks, and its audio is encoded just ahead of them.

Only the activations of one chunk and the encoder outputs of one batch of windows are in memory at a time, so 30 minutes
of audio (60 windows, 45 000 tokens) need no more working memory than 30 seconds. If the encoder has a stream of its
own, the windows of the next chunk are encoded while the decoder computes a chunk; see `encoder_stream`.
"""

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..model import sequence_parallel
from ..model.audio_flamingo import AudioFlamingo
from ..model.encoder import token_count
from .encoder_stream import EncoderStream, Queued
from .kv_cache import KVCache, page_table
from .timings import Timings

KEY_BYTES = 16  # length of the hashes that are the keys of cached results


@dataclass(frozen=True)
class AudioInput:
    """One recording in a prompt, or the rest of one that is partly computed. windows: 1-D float32 waveforms, mono at 16
    kHz, of 30 s each, the last of at most 30 s; position: index of the first window's first placeholder; first: index
    of the first window in its recording; keys: those of the first windows, as far as they are known, see
    `window_key`."""

    position: int
    windows: tuple[Tensor, ...]
    first: int = 0
    keys: tuple[bytes, ...] = ()

    @cached_property
    def placed(self) -> "list[PlacedWindow]":
        """The windows that have tokens, in order."""
        placed, start = [], self.position
        for number, waveform in enumerate(self.windows):
            key = self.keys[number] if number < len(self.keys) else None
            tokens = token_count(waveform.numel())
            if tokens:
                placed.append(PlacedWindow(start, tokens, waveform, self.first + number, key))
            start += tokens
        return placed


@dataclass(frozen=True)
class PlacedWindow:
    """A window that has tokens: where they start in the prompt, its waveform, its index in its audio, and its key if
    that is known."""

    start: int
    tokens: int
    waveform: Tensor
    index: int
    known_key: bytes | None = None

    @property
    def stop(self) -> int:
        """The token of the prompt after the window's last one."""
        return self.start + self.tokens

    @cached_property
    def key(self) -> bytes:
        """See `window_key`."""
        return self.known_key or window_key(self.waveform, self.index)


def window_key(waveform: Tensor, index: int) -> bytes:
    """A hash of all that the encoder output depends on: the samples, and the window's index in its audio."""
    samples: Any = waveform.contiguous().numpy()  # a buffer, but numpy's types do not declare it
    return hashlib.blake2b(samples, digest_size=KEY_BYTES, salt=index.to_bytes(8, "little")).digest()


class PromptEmbeddings:
    """The decoder's input for a prompt, made in order, piece by piece.

    A batch has the same windows wherever the prompt starts, except those that are not needed.
    """

    def __init__(
        self,
        model: AudioFlamingo,
        token_ids: list[int],
        audio: tuple[AudioInput, ...],
        *,
        encode_batch: int,
        timings: Timings,
        start: int = 0,
        encode: "Encode | None" = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        stream: EncoderStream | None = None,
    ):
        """start: the first token that `piece` will be called for; audio that ends before it is not encoded. encode,
        embed: compute the embeddings of audio and of token ids; by default the model in this process. stream: where
        `encode` queues its work; by default the current stream."""
        self._encode = encode or partial(encode_windows, model)
        self._stream = stream or EncoderStream(model.device, apart=False)
        self._embed = embed or model.decoder.embed
        self._token_ids = torch.tensor(token_ids, device=model.device)
        self._timings = timings
        placed = placed_windows(audio)
        batches = (placed[first : first + encode_batch] for first in range(0, len(placed), encode_batch))
        needed = ([window for window in batch if window.stop > start] for batch in batches)
        self._waiting = deque(batch for batch in needed if batch)
        self._encoded: deque[tuple[list[PlacedWindow], Queued]] = deque()

    def piece(self, start: int, stop: int) -> Tensor:
        """Embeddings of the prompt's tokens start .. stop - 1: [1, stop - start, hidden]. Pieces come in order."""
        x = self._embed(self._token_ids[start:stop])
        self.encode_until(stop)
        for batch, queued in self._encoded:
            if batch[0].start >= stop:
                break
            for window, tokens in zip(batch, self._stream.read(queued), strict=True):
                begin, end = max(window.start, start), min(window.stop, stop)
                if begin < end:
                    x[begin - start : end - start] = tokens[begin - window.start : end - window.start]
        while self._encoded and self._encoded[0][0][-1].stop <= stop:
            self._encoded.popleft()
        return x[None]

    def encode_until(self, stop: int) -> None:
        """Queue the encoding of the windows that begin before token `stop`, except those that are queued already."""
        while self._waiting and self._waiting[0][0].start < stop:
            batch = self._waiting.popleft()
            queued = self._stream.queue(partial(self._encode, batch, self._timings))
            self._encoded.append((batch, queued))


Encode = Callable[[list[PlacedWindow], Timings], list[Tensor]]


def encode_windows(
    model: AudioFlamingo,
    batch: list[PlacedWindow],
    timings: Timings,
    encode: Callable[[Tensor, list[int], list[int]], list[Tensor]] | None = None,
) -> list[Tensor]:
    """The audio embeddings of windows, as the decoder takes them: one [tokens, hidden] per window.

    encode: computes what `model.encode` does.
    """
    encode = encode or model.encode
    with timings.measure("log_mel", model.device):
        mel = model.log_mel([window.waveform for window in batch])
    with timings.measure("encode", model.device):
        return encode(mel, [window.waveform.numel() for window in batch], [window.index for window in batch])


def placed_windows(audio: tuple[AudioInput, ...]) -> list[PlacedWindow]:
    """The windows of a prompt that have tokens, in order."""
    return [window for recording in audio for window in recording.placed]


def run_chunk(model: AudioFlamingo, cache: KVCache, pages: list[int], x: Tensor, start: int) -> Tensor:
    """Run the embedded tokens x, [1, count, hidden], of a prompt from `start` on through the decoder. Writes their keys
    and values INTO `pages` of the cache, which hold those of earlier tokens. Returns normed hidden states, like x."""
    positions = torch.arange(start, start + x.shape[1], device=model.device)[None]
    several, long = model.sequence_parallel, x.shape[1] >= sequence_parallel.LONG
    decoder = model.decoder if several is None or not long else several
    return decoder(x, positions, cache.view(page_table([pages], model.device), positions))


def prefill(
    model: AudioFlamingo,
    cache: KVCache,
    pages: list[int],
    embeddings: PromptEmbeddings,
    length: int,
    *,
    chunk_size: int,
    timings: Timings,
) -> Tensor:
    """Run a whole prompt of `length` tokens by `run_chunk`. Returns the scores of the next token, [1, vocab]
    float32."""
    for start in range(0, length, chunk_size):
        x = embeddings.piece(start, min(start + chunk_size, length))
        with timings.measure("prefill", model.device):
            hidden = run_chunk(model, cache, pages, x, start)
    return model.decoder.logits(hidden[:, -1])
