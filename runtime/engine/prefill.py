"""Chunked prefill: a prompt of any length goes through the decoder in chunks, its audio encoded just ahead of them.

At no time are the activations of more than one chunk and the encoder outputs of more than one batch of windows alive,
so 30 minutes of audio (60 windows, 45 000 tokens) need no more working memory than 30 seconds.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.audio_flamingo import AudioFlamingo
from ..model.encoder import token_count
from .kv_cache import KVCache, page_table
from .timings import Timings


@dataclass(frozen=True)
class AudioInput:
    """One recording in a prompt. position: index of its first placeholder; windows: 1-D float32 waveforms, mono at
    16 kHz, each of at most 30 s and all but the last of exactly that."""

    position: int
    windows: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Window:
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
    ):
        """start: the first token that will be asked for; audio that ends before it is not encoded."""
        self._model = model
        self._token_ids = torch.tensor(token_ids, device=model.device)
        self._encode_batch = encode_batch
        self._timings = timings
        self._waiting = deque(window for window in _place(audio) if window.start + window.tokens > start)
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
            with self._timings.measure("log_mel", self._model.device):
                mel = self._model.log_mel([window.waveform for window in batch])
            with self._timings.measure("encode", self._model.device):
                samples = [window.waveform.numel() for window in batch]
                tokens = self._model.encode(mel, samples, [window.index for window in batch])
            self._encoded.extend((window.start, rows) for window, rows in zip(batch, tokens, strict=True))


def _place(audio: tuple[AudioInput, ...]) -> list[_Window]:
    placed = []
    for recording in audio:
        start = recording.position
        for index, waveform in enumerate(recording.windows):
            tokens = token_count(waveform.numel())
            if tokens:
                placed.append(_Window(start, tokens, waveform, index))
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
