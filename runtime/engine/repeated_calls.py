"""The decoder's layers on a CPU, as native calls that are recorded once and repeated.

See `kernels.native.recording` for what that saves, and what can be recorded: packed weights in a dtype that the native
kernels cover. Whatever cannot goes the usual way, which the log says.
"""

import logging

import torch
from torch import Tensor

from ...kernels import native
from ...kernels.dispatch import forced_backend
from ...kernels.native.recording import Recording, recording
from ..model.decoder import CacheView, Decoder

_log = logging.getLogger("afnext.engine")


class RepeatedCalls:
    """Runs the decoder's layers on inputs of one shape, over pools and a page table that stay where they are."""

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._runs = 0
        self._threads = 0
        self._calls: Recording | None = None
        self._inputs: list[Tensor] = []
        self._out = torch.empty(0)

    def __call__(self, x: Tensor, positions: Tensor, cache: CacheView) -> Tensor:
        """As `decoder(x, positions, cache)`. The result is valid until the next call.

        What the page table says has to be pages of the cache: that is checked in the first run alone.
        """
        rotation = self._decoder.rotation(positions)
        inputs = [x, cache.slots, cache.key_lengths, *rotation.cos_sin]
        self._runs += 1
        if self._calls is not None and self._threads == torch.get_num_threads():
            for kept, new in zip(self._inputs, inputs, strict=True):
                kept.copy_(new)
            self._calls()
            return self._out
        if self._runs != 2:  # the first run checks, logs and prepares what is made once
            return self._decoder.transformed(x, rotation, cache)
        self._threads = torch.get_num_threads()
        with recording() as calls:
            self._out = self._decoder.transformed(x, rotation, cache)
        if calls.obstacle is None:
            self._calls, self._inputs = calls, inputs
            _log.info("decoding repeats %d recorded native calls", len(calls))
        else:
            _log.info("decoding is not recorded, as %s is computed between the native calls", calls.obstacle)
        return self._out


def repeatable(device: torch.device) -> bool:
    """Whether the layers on `device` may be recordable."""
    return device.type == "cpu" and native.AVAILABLE and forced_backend() in (None, "native")
