"""Generation: prefill every request, then decode all of them together, one token each a step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from ..errors import ContextLengthError, OutOfPagesError
from ..model.audio_flamingo import AudioFlamingo
from .decode_graph import DecodeStep
from .kv_cache import KV_STORAGE, KVCache, pages_for
from .prefill import AudioInput, PromptEmbeddings, prefill
from .sampler import Sampler, SamplingParams
from .timings import Timings

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class EngineOptions:
    """What trades memory, speed and precision.

    page_size: tokens a KV page; chunk_size: prompt tokens a prefill step; encode_batch: audio windows encoded at once;
    cuda_graphs: on a GPU, launch each decode step as one CUDA graph. None of these changes an answer.
    max_kv_tokens: tokens that the cache may hold at most, None for any number. release_encoder: on a GPU, keep the
    encoder's layers in the host's memory and copy each to the GPU when it is used.
    kv: what keys and values are stored in, "auto" (the model's dtype) or "int8": half the memory, and rounded.
    Raises ValueError for values out of range.
    """

    page_size: int = 256
    chunk_size: int = 1024
    encode_batch: int = 4
    cuda_graphs: bool = True
    kv: str = "auto"
    max_kv_tokens: int | None = None
    release_encoder: bool = False

    def __post_init__(self) -> None:
        for name in ("page_size", "chunk_size", "encode_batch", "max_kv_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.kv not in KV_STORAGE:
            raise ValueError(f"kv must be one of {', '.join(KV_STORAGE)}, got {self.kv!r}")

    def cache_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the KV cache of a model that computes in `model_dtype`."""
        return torch.int8 if self.kv == "int8" else model_dtype


@dataclass(frozen=True)
class Request:
    """A prompt with its recordings, and how to answer it. The clock of `timings` runs from its making."""

    token_ids: list[int]
    audio: tuple[AudioInput, ...]
    sampling: SamplingParams
    timings: Timings = field(default_factory=Timings)


@dataclass
class Sequence:
    """The state of one request."""

    request: Request
    pages: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return len(self.request.token_ids) + len(self.tokens)


def check_context(model: AudioFlamingo, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise ContextLengthError unless prompt and answer fit the decoder's context together."""
    limit = model.config.decoder.max_positions
    if prompt_tokens + max_new_tokens > limit:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens and up to {max_new_tokens} are asked for, "
            f"but the model's context ends at {limit}. Shorten the prompt or lower max_new_tokens."
        )


def check_room(tokens: int, options: EngineOptions) -> None:
    """Raise OutOfPagesError where the cache would hold more tokens than the options allow."""
    room = options.max_kv_tokens
    if room is not None and tokens > room:
        raise OutOfPagesError(
            f"prompts and answers take {tokens:,} tokens of the KV cache, and the memory that was there at loading has "
            f"room for {room:,}. Give less audio, lower max_new_tokens, ask fewer questions at once, or load with "
            'kv="int8" or a smaller scheme; `afnext plan` shows what fits.'
        )


class Generation:
    """A batch of requests on their way to answers. Iterate to get (request index, token id) as tokens come.

    Each sequence in `sequences` ends with a finish_reason: "stop" at a stop token (kept as its last token), "length",
    or "cancelled". Leaving the loop early and dropping the object frees everything it holds.
    """

    def __init__(
        self,
        model: AudioFlamingo,
        requests: list[Request],
        options: EngineOptions,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
        cancelled: Callable[[], bool] = lambda: False,
    ):
        """`progress`: called with (prompt tokens prefilled, prompt tokens of all requests). `cancelled`: polled between
        steps; once true, every unfinished request ends. Raises ContextLengthError when a request cannot fit the
        context, and OutOfPagesError when all of them do not fit the memory."""
        for request in requests:
            check_context(model, len(request.token_ids), request.sampling.max_new_tokens)
        self.sequences = [Sequence(request) for request in requests]
        self._model = model
        self._options = options
        self._progress = progress
        self._cancelled = cancelled
        budget = [len(request.token_ids) + request.sampling.max_new_tokens for request in requests]
        pages = sum(pages_for(tokens, options.page_size) for tokens in budget)
        check_room(pages * options.page_size, options)
        self._cache = KVCache(
            model.config.decoder,
            pages=pages,
            page_size=options.page_size,
            device=model.device,
            dtype=options.cache_dtype(model.dtype),
        )
        for sequence, tokens in zip(self.sequences, budget, strict=True):
            sequence.pages = self._cache.allocate(tokens)
        self._sampler = Sampler(
            [request.sampling for request in requests],
            [request.token_ids for request in requests],
            model.config.decoder.vocab_size,
            model.device,
        )
        self._step: DecodeStep | None = None
        self._step_rows: list[int] = []

    def finish(self, index: int, reason: FinishReason) -> None:
        """End a request early; its tokens so far stay."""
        self._finish(self.sequences[index], reason)

    @torch.inference_mode()
    def __iter__(self) -> Iterator[tuple[int, int]]:
        try:
            yield from self._prefill_all()
            while active := [i for i, sequence in enumerate(self.sequences) if sequence.finish_reason is None]:
                if self._cancelled():
                    break
                yield from self._decode_step(active)
        finally:
            self._step = None
            for sequence in self.sequences:
                self._finish(sequence, "cancelled")

    def _prefill_all(self) -> Iterator[tuple[int, int]]:
        total = sum(len(sequence.request.token_ids) for sequence in self.sequences)
        done = 0
        for index, sequence in enumerate(self.sequences):
            if sequence.finish_reason is not None:
                continue
            length = len(sequence.request.token_ids)
            embeddings = PromptEmbeddings(
                self._model,
                sequence.request.token_ids,
                sequence.request.audio,
                encode_batch=self._options.encode_batch,
                timings=sequence.request.timings,
            )
            logits = prefill(
                self._model,
                self._cache,
                sequence.pages,
                embeddings,
                length,
                chunk_size=self._options.chunk_size,
                timings=sequence.request.timings,
                progress=lambda chunk, _, before=done: self._progress(before + chunk, total),  # type: ignore[misc]
                cancelled=self._cancelled,
            )
            if logits is None:
                return
            done += length
            yield from self._accept(self._sampler.choose(logits, [index]), [index])

    def _decode_step(self, active: list[int]) -> Iterator[tuple[int, int]]:
        sequences = [self.sequences[i] for i in active]
        if self._step is None or active != self._step_rows:
            pages, positions = [s.pages for s in sequences], [s.length - 1 for s in sequences]
            self._step_rows = active
            self._step = DecodeStep(self._model, self._cache, pages, positions, cuda_graph=self._options.cuda_graphs)
        logits = self._step([sequence.tokens[-1] for sequence in sequences])
        yield from self._accept(self._sampler.choose(logits, active), active)

    def _accept(self, tokens: list[int], indices: list[int]) -> Iterator[tuple[int, int]]:
        for index, token in zip(indices, tokens, strict=True):
            sequence = self.sequences[index]
            sampling = sequence.request.sampling
            sequence.tokens.append(token)
            sequence.request.timings.token(len(sequence.tokens))
            if token in sampling.stop_token_ids:
                self._finish(sequence, "stop")
            elif len(sequence.tokens) == sampling.max_new_tokens:
                self._finish(sequence, "length")
        for index, token in zip(indices, tokens, strict=True):
            yield index, token

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.finish_reason is None:
            sequence.finish_reason = reason
            self._cache.pool.release(sequence.pages)
            sequence.pages = []
