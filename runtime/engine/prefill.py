"""Chunked prefill: a prompt of any length goes through the decoder in chunks, its audio encoded just ahead of them.

At no time are the activations of more than one chunk and the encoder outputs of more than one batch of windows alive,
so 30 minutes of audio (60 windows, 45 000 tokens) need no more working memory than 30 seconds.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.audio_flamingo import AudioFlamingo
from ..model.encoder import token_count
from .kv_cache import KVCache, page_table
from .timings import Timings


@dataclass(frozen=True)
class AudioInput:
    """One recording in a prompt, or what of it has not been heard. windows: 1-D float32 waveforms, mono at 16 kHz, each
    of at most 30 s and all but the last of exactly that; position: index of the first one's first placeholder; first:
    index of the first one in its recording."""

    position: int
    windows: tuple[Tensor, ...]
    first: int = 0


@dataclass(frozen=True)
class PlacedWindow:
    """A window that gives tokens: where they start in the prompt, its waveform, its index in its audio."""

    start: int
    tokens: int
    waveform: Tensor
    index: int


class PromptEmbeddings:
    """The decoder's input for a prompt, made in order, piece by piece."""

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
    ):
        """start: the first token that will be asked for; audio that ends before it is not encoded. encode: does that,
        if not `encode_windows`."""
        self._encode = encode or encode_windows
        self._model = model
        self._token_ids = torch.tensor(token_ids, device=model.device)
        self._encode_batch = encode_batch
        self._timings = timings
        self._waiting = deque(window for window in placed_windows(audio) if window.start + window.tokens > start)
        self._encoded: deque[tuple[int, Tensor]] = deque()

    def piece(self, start: int, stop: int) -> Tensor:
        """Embeddings of the prompt's tokens start .. stop - 1: [1, stop - start, hidden]. Pieces come in order."""
        x = self._model.decoder.embed(self._token_ids[start:stop])
        self._encode_until(stop)
        while self._encoded and self._encoded[0][0] < stop:
            first, tokens = self._encoded[0]
            begin, end = max(first, start), min(first + len(tokens), stop)
            x[begin - start : end - start] = tokens[begin - first : end - first]
            if end < first + len(tokens):
                break
            self._encoded.popleft()
        return x[None]

    def _encode_until(self, stop: int) -> None:
        while self._waiting and self._waiting[0].start < stop:
            batch = [self._waiting.popleft() for _ in range(min(self._encode_batch, len(self._waiting)))]
            tokens = self._encode(self._model, batch, self._timings)
            self._encoded.extend((window.start, rows) for window, rows in zip(batch, tokens, strict=True))


Encode = Callable[[AudioFlamingo, list[PlacedWindow], Timings], list[Tensor]]


def encode_windows(model: AudioFlamingo, batch: list[PlacedWindow], timings: Timings) -> list[Tensor]:
    """The audio tokens of some windows, as the decoder reads them: one [tokens, hidden] each."""
    with timings.measure("log_mel", model.device):
        mel = model.log_mel([window.waveform for window in batch])
    with timings.measure("encode", model.device):
        return model.encode(mel, [window.waveform.numel() for window in batch], [window.index for window in batch])


def placed_windows(audio: tuple[AudioInput, ...]) -> list[PlacedWindow]:
    """The windows of a prompt that give tokens, in order."""
    placed = []
    for recording in audio:
        start = recording.position
        for index, waveform in enumerate(recording.windows, recording.first):
            tokens = token_count(waveform.numel())
            if tokens:
                placed.append(PlacedWindow(start, tokens, waveform, index))
            start += tokens
    return placed


def prefill_chunk(
    model: AudioFlamingo,
    cache: KVCache,
    pages: list[int],
    embeddings: PromptEmbeddings,
    start: int,
    stop: int,
    timings: Timings,
) -> Tensor:
    """Run the tokens start .. stop - 1 of a prompt through the decoder, their keys and values going INTO `pages` of the
    cache, where those before are. Returns their normed hidden states, [1, stop - start, hidden]."""
    x = embeddings.piece(start, stop)
    with timings.measure("prefill", model.device):
        positions = torch.arange(start, stop, device=model.device)[None]
        return model.decoder(x, positions, cache.view(page_table([pages], model.device), positions))


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
    """Run a whole prompt of `length` tokens, as `prefill_chunk` does a piece of it. Returns the scores of the token
    that follows, [1, vocab] float32."""
    for start in range(0, length, chunk_size):
        stop = min(start + chunk_size, length)
        hidden = prefill_chunk(model, cache, pages, embeddings, start, stop, timings)
    return model.decoder.logits(hidden[:, -1])
