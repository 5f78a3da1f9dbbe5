"""The interface between the engine, which decides what is computed next, and the `Executor` that computes it.

`LocalExecutor` runs one model over one KV cache in this process. `ParallelExecutor` runs the same in several processes,
each with a shard of the model and of the cache. The engine alone manages requests, pages, sampling and time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ...kernels.compilation import Uncompiled, compile_all
from ...kernels.device_state import runs_triton
from ..errors import EngineDeadError
from ..model.audio_flamingo import AudioFlamingo
from ..model.fingerprint import model_fingerprint
from .decode_steps import DecodeSteps
from .encode_steps import EncodeSteps
from .encoder_stream import EncoderStream
from .kv_cache import KVCache
from .options import EngineOptions
from .prefill import PlacedWindow, run_chunk
from .timings import Timings


class Executor(ABC):
    """Computes for one engine. Only the engine's thread may call it; any thread may read `failure`.

    model: of this process; its `config` is that of the whole model. cache: of this process; page numbers are the same
    in every process. encoder_stream: where `encode` should queue its work. size: number of processes.
    """

    model: AudioFlamingo
    cache: KVCache
    encoder_stream: EncoderStream
    size: int = 1

    @property
    @abstractmethod
    def recordings(self) -> int:
        """Number of decode steps that have been set up."""

    @property
    @abstractmethod
    def recordable(self) -> bool:
        """Whether decode steps become CUDA graphs."""

    @property
    def failure(self) -> EngineDeadError | None:
        """Why the executor cannot compute any more, or None."""
        return None

    @abstractmethod
    def set_threads(self, count: int) -> None:
        """Compute with `count` CPU threads in all."""

    @abstractmethod
    def resize(self, pages: int) -> None:
        """See `KVCache.resize`. Recorded decode steps, which refer to the cache's tensors by address, are dropped."""

    @abstractmethod
    def copy_page(self, source: int, target: int) -> None:
        """See `KVCache.copy_page`."""

    @abstractmethod
    def encode(self, windows: list[PlacedWindow], timings: Timings) -> list[Tensor]:
        """The audio embeddings of windows, as the decoder takes them: one [tokens, hidden] per window."""

    @abstractmethod
    def embed(self, token_ids: Tensor) -> Tensor:
        """See `Decoder.embed`."""

    @abstractmethod
    def prefill(self, x: Tensor, pages: list[int], start: int) -> Tensor:
        """Run tokens of a prompt from `start` on through the decoder; see `run_chunk`."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder.logits`."""

    @abstractmethod
    def decode(self, tokens: list[list[int]], positions: list[int], pages: list[list[int]]) -> Tensor:
        """Decode the newest tokens of several sequences; see `DecodeStep`."""

    @abstractmethod
    def compile(self, kernels: Sequence[Uncompiled], progress: Callable[[int, int], None]) -> None:
        """Compile the kernels that operations collected: `kernels` in this process, and in each other process its own.
        progress: called with (done, total) kernels of this process."""

    @abstractmethod
    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Record the decode steps of every size, and batches of windows. progress: called with (done, total)."""

    @abstractmethod
    def read(self, index: int, pages: list[int]) -> Tensor:
        """The contents of `pages` of the pool `KVCache.pools[index]`: [tokens, all KV heads, ...]."""

    @abstractmethod
    def write(self, index: int, pages: list[int], rows: Tensor) -> None:
        """Write `rows`, [tokens, all KV heads, ...], into `pages` of the pool `KVCache.pools[index]`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the model that computes keys and values; see `model_fingerprint`."""

    def close(self) -> None:  # noqa: B027 - most executors have nothing to end
        """End the other processes. No method may be called afterwards."""


class LocalExecutor(Executor):
    """One model over one KV cache, in this process."""

    def __init__(self, model: AudioFlamingo, options: EngineOptions):
        self.model = model
        self.cache = KVCache(
            model.decoder.config,
            pages=0,
            page_size=options.page_size,
            device=model.device,
            dtype=options.cache_dtype(model.dtype),
            padded=runs_triton(model.device),
            rounds_attention=options.attention == "int8",
        )
        self.encoder_stream = EncoderStream(
            model.device, apart=options.encode_ahead and model.device.type == "cuda" and model.shard is None
        )
        graphs = options.cuda_graphs and self.encoder_stream.apart and not options.release_encoder
        self._encode = EncodeSteps(model, cuda_graphs=graphs, most_windows=options.windows_at_once)
        self._steps = DecodeSteps(model, self.cache, options)

    @property
    def recordings(self) -> int:
        """See `Executor`."""
        return self._steps.recordings

    @property
    def recordable(self) -> bool:
        """See `Executor`."""
        return self._steps.recordable

    def set_threads(self, count: int) -> None:
        """See `Executor`."""
        if count != torch.get_num_threads():
            torch.set_num_threads(count)

    def resize(self, pages: int) -> None:
        """See `Executor`."""
        self._steps.clear()
        self.cache.resize(pages)

    def copy_page(self, source: int, target: int) -> None:
        """See `Executor`."""
        self.cache.copy_page(source, target)

    def encode(self, windows: list[PlacedWindow], timings: Timings) -> list[Tensor]:
        """See `Executor`."""
        return self._encode(windows, timings)

    def embed(self, token_ids: Tensor) -> Tensor:
        """See `Executor`."""
        return self.model.decoder.embed(token_ids)

    def prefill(self, x: Tensor, pages: list[int], start: int) -> Tensor:
        """See `Executor`."""
        return run_chunk(self.model, self.cache, pages, x, start)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Executor`."""
        return self.model.decoder.logits(hidden)

    def decode(self, tokens: list[list[int]], positions: list[int], pages: list[list[int]]) -> Tensor:
        """See `Executor`."""
        return self._steps.step(len(tokens), len(tokens[0]), max(map(len, pages)))(tokens, positions, pages)

    def compile(self, kernels: Sequence[Uncompiled], progress: Callable[[int, int], None]) -> None:
        """See `Executor`."""
        compile_all(kernels, progress)

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """See `Executor`."""
        encoding, decoding = self._encode.works(), self._steps.works()
        total = len(encoding) + len(decoding)
        for done, record in enumerate((*encoding, *decoding)):
            progress(done, total)
            with self.encoder_stream.current() if done < len(encoding) else nullcontext():
                record()
        progress(total, total)

    def read(self, index: int, pages: list[int]) -> Tensor:
        """See `Executor`."""
        pool = self.cache.pools[index]
        return torch.cat([pool[page] for page in pages])

    @torch.inference_mode()
    def write(self, index: int, pages: list[int], rows: Tensor) -> None:
        """See `Executor`."""
        pool, size = self.cache.pools[index], self.cache.page_size
        for start, page in zip(range(0, len(rows), size), pages, strict=True):
            part = rows[start : start + size]
            pool[page, : len(part)] = part.to(pool.device)

    def fingerprint(self) -> str:
        """See `Executor`."""
        return model_fingerprint(self.model)
