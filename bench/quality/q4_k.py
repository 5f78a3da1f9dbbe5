"""Weights rounded to Q4_K by llama.cpp, to compare its loss with that of afnext's schemes. Needs llama.cpp and `gguf`.

ggml rounds runs of 256 weights, in which groups of 32 have 6-bit scales and minimums. If a channel is not a multiple of
a run, as in Whisper tiny, a run extends into the next channel; groups do not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from ...kernels.packed_weight import Packed
from ...quant.ggml import FORMATS, packed_codes, packed_scales
from ...quant.scheme import Int4, SchemeError
from ..model.llama_cpp import library

KIND = "Q4_K"
_RUN = 256
_CHUNK = 1 << 16  # runs at a time


@dataclass(frozen=True)
class Q4K(Int4):
    """Q4_K's values in the scheme that holds them, `int4-g32-zeros-f32`; in a GGUF file they take 4.5 bits."""

    group_size: int = 32
    symmetric: bool = False
    float32_scales: bool = True

    def __str__(self) -> str:
        return KIND

    def quantize(
        self,
        weight: Tensor,
        importance: Tensor | None = None,
        device: torch.device | str | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Packed:
        """See `Scheme`. Raises SchemeError if the weight has no whole runs or an importance is given."""
        if weight.numel() % _RUN or weight.shape[1] % self.group_size or importance is not None:
            raise SchemeError(f"{KIND} takes runs of {_RUN} weights and no importance, not {tuple(weight.shape)}")
        data = torch.cat([_blocks(runs) for runs in weight.float().reshape(-1, _RUN).split(_CHUNK)])
        scales, zeros = packed_scales(KIND, data)
        assert zeros is not None
        progress(len(weight))
        return Packed(*(part.reshape(len(weight), -1) for part in (packed_codes(KIND, data), scales, zeros)))


def _blocks(runs: Tensor) -> Tensor:
    """A block for each of some runs [n, 256]: [n, 144] uint8."""
    runs = runs.contiguous()
    data = torch.empty(len(runs), FORMATS[KIND].nbytes, dtype=torch.uint8)
    kind = gguf.GGMLQuantizationType[KIND].value
    written = library().ggml_quantize_chunk(kind, runs.data_ptr(), data.data_ptr(), 0, len(runs), _RUN, None)
    assert written == data.numel(), f"ggml wrote {written} bytes of {data.numel()}"
    return data
