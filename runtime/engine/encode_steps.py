"""Encodes batches of audio windows; on a GPU, batches of whole windows replay a CUDA graph.

Most windows of a recording last 30 s, so most batches have one of a few shapes: 1 to `encode_batch` whole windows. Each
is recorded on its second use; `graphs` has the details. Other batches, shorter windows among them, are computed as they
are, since padding would cost more than launching. The graphs have a memory pool of their own, because they run beside
the decoder's. They are made only if the encoder has a stream of its own, where the memory plan counts that pool, and
not for layers in host memory, which are copied on yet another stream.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ...kernels.audio_format import WINDOW_SAMPLES
from ...kernels.device_state import sent
from ...kernels.dispatch import forced_backend
from ...kernels.log_mel import frame_count
from ..model.audio_flamingo import AudioFlamingo
from ..model.encoder import Windows, token_count
from .graphs import GraphMemory, RepeatedWork, capturable
from .prefill import PlacedWindow, encode_windows
from .timings import Timings


class EncodeSteps:
    """Encodes batches of windows, for the stream that is current at each call."""

    def __init__(self, model: AudioFlamingo, *, cuda_graphs: bool, most_windows: int):
        """cuda_graphs: record batches of up to `most_windows` whole windows where device and kernels allow it."""
        self._model = model
        self._cuda_graphs = cuda_graphs
        self._most_windows = most_windows
        self._memory = GraphMemory()
        self._steps: dict[tuple[int, str | None], _WholeWindows] = {}

    @property
    def recordable(self) -> bool:
        """Whether batches of whole windows become CUDA graphs."""
        return self._cuda_graphs and capturable(self._model.device)

    def __call__(self, windows: list[PlacedWindow], timings: Timings) -> list[Tensor]:
        """The audio embeddings of windows, as the decoder takes them: one [tokens, hidden] per window."""
        whole = all(window.waveform.numel() == WINDOW_SAMPLES for window in windows)
        if not (whole and self.recordable and len(windows) <= self._most_windows):
            return encode_windows(self._model, windows, timings)
        return encode_windows(self._model, windows, timings, self._step(len(windows)))

    def works(self) -> list[Callable[[], object]]:
        """Functions that record the batches, the largest first, so that smaller ones reuse their memory."""
        counts = range(self._most_windows, 0, -1) if self.recordable else ()
        return [partial(self._warm_up, count) for count in counts]

    def _warm_up(self, count: int) -> None:
        self._step(count).warm_up()

    def _step(self, count: int) -> "_WholeWindows":
        key = (count, forced_backend())
        if key not in self._steps:
            self._steps[key] = _WholeWindows(self._model, count, self._memory)
        return self._steps[key]


class _WholeWindows:
    """Encodes `count` whole windows, from tensors at fixed addresses."""

    def __init__(self, model: AudioFlamingo, count: int, memory: GraphMemory):
        self._model = model
        config, device = model.config.encoder, model.device
        self._mel = torch.zeros(count, config.mel_bins, frame_count(WINDOW_SAMPLES), dtype=model.dtype, device=device)
        batch = model.encoder.windows([WINDOW_SAMPLES] * count, list(range(count)), device)
        # The table of angles may be replaced by a larger one. So each row here has the angles of one window.
        angles = None if batch.angles is None else batch.angles[:count].clone()
        self._batch = Windows(batch.positions, batch.key_lengths, angles, batch.indices)
        self._work = RepeatedWork(f"encoding {count} whole windows", device, memory)

    def __call__(self, mel: Tensor, samples: list[int], windows: list[int]) -> list[Tensor]:
        """See `AudioFlamingo.encode`; samples: WINDOW_SAMPLES of each."""
        self._mel.copy_(mel)
        embedding = self._model.encoder.time_embedding
        if embedding is not None:
            table = embedding.table(max(windows) + 1, mel.device)
            torch.index_select(table, 0, sent(torch.tensor(windows), mel.device), out=self._batch.angles)
        tokens = self._work(self._encode).clone()  # the next batch overwrites it
        return list(tokens.split(token_count(WINDOW_SAMPLES)))

    def warm_up(self) -> None:
        """Encode what is there, and record that."""
        self._work(self._encode)
        self._work.capture(self._encode)

    def _encode(self) -> Tensor:
        return self._model.adaptor(self._model.encoder.tokens(self._mel, self._batch).flatten(0, 1))
