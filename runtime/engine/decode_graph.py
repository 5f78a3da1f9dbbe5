"""One decode step with everything at fixed addresses, so that a CUDA graph can record it once and repeat it.

At one token a sequence, a step is some three hundred small kernels, and launching them one by one from Python takes
longer than they run. A graph launches them all at once. It repeats exactly the memory accesses that it recorded, so the
step takes its inputs from tensors that stay: the host writes the newest tokens into one of them, the positions move on
by themselves, and slots and key lengths are computed from the positions on the device. Nothing in a step waits for the
device; the one wait is the caller's, who reads back the tokens chosen from the scores.
"""

import logging

import torch
from torch import Tensor

from ...kernels.dispatch import forced_backend
from ...kernels.triton_language import AVAILABLE as TRITON_AVAILABLE
from ..model.audio_flamingo import AudioFlamingo
from .kv_cache import KVCache, page_table

_log = logging.getLogger("afnext.engine")


class DecodeStep:
    """Decodes one token of each sequence of a batch at a time.

    The batch stays as it is: when a sequence ends, make a new step for those that remain.
    """

    def __init__(
        self, model: AudioFlamingo, cache: KVCache, pages: list[list[int]], positions: list[int], *, cuda_graph: bool
    ):
        """pages, positions: of each sequence, its pages in `cache` and the index of its next token.

        cuda_graph: record the step and repeat it, where the device and the kernels allow it.
        """
        self._model = model
        self._cache = cache
        self._table = page_table(pages, model.device)
        self._positions = torch.tensor(positions, device=model.device)[:, None]
        self._tokens = torch.zeros_like(self._positions)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capturable = cuda_graph and capturable(model.device)

    def __call__(self, tokens: list[int]) -> Tensor:
        """Decode the newest token of each sequence, writing its keys and values INTO the cache.

        Returns the scores of the tokens that follow, [batch, vocab] float32, valid until the next call.
        """
        self._tokens.copy_(torch.tensor(tokens)[:, None], non_blocking=True)
        if self._capturable and self._logits is not None and self._graph is None:
            self._capture()
        if self._graph is None:
            self._logits = self._step()
        else:
            self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _step(self) -> Tensor:
        decoder = self._model.decoder
        view = self._cache.view(self._table, self._positions)
        hidden = decoder(decoder.embed(self._tokens), self._positions, view)
        self._positions += 1
        return decoder.logits(hidden[:, -1])

    def _capture(self) -> None:
        """Record the step, which does not run it. The first one ran without, and compiled and loaded every kernel."""
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._logits = self._step()
        _log.info("decoding %d sequences a step in a CUDA graph", len(self._tokens))


def capturable(device: torch.device) -> bool:
    """Whether a decode step on `device` can be recorded: the kernels of the torch backend wait for key lengths."""
    return device.type == "cuda" and TRITON_AVAILABLE and forced_backend() in (None, "triton")
