"""Imports weights that other libraries quantized to the 8-bit float e4m3: the same codes, a scale for each channel.

    W = weight_scale * weight;  weight [out, in] e4m3;  weight_scale [out, 1] or [out], or one for the whole weight

as compressed-tensors (format float-quantized) and NVIDIA's ModelOpt (FP8, FP8_PER_CHANNEL_PER_TOKEN) store them. Scales
of activations (input_scale, output_scale) and of KV caches (k_scale, v_scale) are not used: activations get a scale per
token while the model runs, and keys and values are rounded as `kv` says.

Source: the checkpoints and documentation of compressed-tensors 0.20 and ModelOpt 0.40.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..kernels.quantize_rows import E4M3
from .float_importer import CACHE_SCALES, SCALE, FloatFormat, has_nan, weights_of_groups
from .importers import ImportFormatError

COMPRESSED_FORMAT, MODELOPT_ALGORITHMS = "float-quantized", ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
_WEIGHT = "weight"


@dataclass(frozen=True)
class Fp8Format(FloatFormat):
    """How another library stored its e4m3 weights, which become codes and scales [out] float32 without zeros."""

    codes_per_byte = 1

    @property
    def codes(self) -> str:
        """See `FloatFormat`."""
        return _WEIGHT

    @property
    def mark(self) -> str:
        """See `FloatFormat`."""
        return SCALE

    @property
    def parts(self) -> tuple[str, ...]:
        """See `FloatFormat`."""
        return _WEIGHT, SCALE, "input_scale", "output_scale", *CACHE_SCALES

    def weight(self, layer: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, None]:
        """See `FloatFormat`."""
        codes, scales = self._required(layer, tensors, _WEIGHT, SCALE)
        if codes.dtype != E4M3 or codes.ndim != 2:
            raise ImportFormatError(f"{layer}.{_WEIGHT} is {codes.dtype} {list(codes.shape)}, not a matrix in e4m3")
        if not scales.is_floating_point() or scales.numel() not in (1, len(codes)) or scales.shape[1:].numel() > 1:
            raise ImportFormatError(
                f"{layer}.{SCALE} is {scales.dtype} {list(scales.shape)}; a weight {list(codes.shape)} can be imported "
                "with one scale, or one for each output"
            )
        if has_nan(codes) or not scales.isfinite().all():
            raise ImportFormatError(f"{layer} has weights or scales that are not finite; the file is damaged")
        return codes, scales.float().flatten().expand(len(codes)).contiguous(), None


def compressed_fp8(values: Mapping[str, Any]) -> Fp8Format:
    """The format that a quantization_config of compressed-tensors describes. Raises ImportFormatError."""
    for found in weights_of_groups(values):
        if not isinstance(found, Mapping) or (found.get("num_bits"), found.get("type")) != (8, "float"):
            raise ImportFormatError(
                "float-quantized weights of compressed-tensors can be imported if they have num_bits 8 and type float"
            )
        if found.get("strategy") not in ("channel", "tensor"):
            raise ImportFormatError(
                f"e4m3 weights with the strategy {str(found.get('strategy'))[:40]!r} cannot be imported, only those "
                "with a scale per channel or tensor; use the dense ones"
            )
    return Fp8Format("compressed-tensors")
