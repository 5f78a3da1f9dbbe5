"""The decoder's layers on a CPU, as native calls that are recorded once and replayed.

See `kernels.native.recording` for the time saved, and for what can be recorded: weights, packed or dense, that the
native kernels multiply. Other steps run unrecorded, and the log says so.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels import native
from ...kernels.dispatch import forced_backend
from ...kernels.native.recording import Recording, recording
from ...kernels.native.threads import limited_threads, thread_count
from ...kernels.spread import spread
from ..model.decoder import CacheView, Decoder

_log = logging.getLogger("afnext.engine")


MOST_TOKENS = 8
"""The most new tokens, of all sequences together, for which a step is recorded. With more, products take so long that
the calls between them do not matter, and a recording keeps the results of every call: at full size 2.9 MB per token."""


class RepeatedCalls:
    """Runs the decoder's layers on inputs of one shape, over pools and a page table at fixed addresses.

    Must always be called under the same backend. A recording is used only with torch's number of threads, or fewer
    (`kernels.native.threads`), and the instruction-set level it was made with. Each call starts with one thread on each
    core (`kernels.spread`).
    """

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._runs = 0
        self._conditions: tuple[int, str] | None = None
        self._calls: Recording | None = None
        self._inputs: list[Tensor] = []
        self._out = torch.empty(0)

    def __call__(self, x: Tensor, positions: Tensor, cache: CacheView) -> Tensor:
        """Same as `decoder(x, positions, cache)`. The result and the contents of `x` are valid until the next call.

        The page table must hold pages of the cache; only the first run checks that.
        """
        rotation = self._decoder.rotation(positions)
        inputs = [x, cache.slots, cache.key_lengths, *rotation.cos_sin]
        conditions = (torch.get_num_threads(), native.isa())
        threads = thread_count()
        spread(threads)
        if self._calls is not None and self._conditions == conditions:
            for kept, new in zip(self._inputs, inputs, strict=True):
                kept.copy_(new)
            self._calls(threads)
            return self._out
        if self._runs == 1:  # the first run did all checks, logging and one-time preparations
            self._conditions = conditions
            self._record(inputs, lambda: self._decoder.transformed(x, rotation, cache))
        else:
            self._out = self._decoder.transformed(x, rotation, cache)
        self._runs += 1
        return self._out

    def _record(self, inputs: list[Tensor], run: Callable[[], Tensor]) -> None:
        with limited_threads(None), recording() as calls:  # scratch memory for all threads
            self._out = run()
        if calls.obstacle is None:
            self._calls, self._inputs = calls, inputs
            _log.info("decoding repeats %d recorded native calls", len(calls))
        else:
            _log.info("decoding is not recorded, as %s is computed between the native calls", calls.obstacle)


def repeatable(device: torch.device, tokens: int = 1) -> bool:
    """Whether the layers on `device` may be recordable for `tokens` new tokens of all sequences together."""
    return device.type == "cpu" and native.AVAILABLE and forced_backend() in (None, "native") and tokens <= MOST_TOKENS
