"""Imports weights that other libraries quantized to the 8-bit float e4m3: the same codes, a scale for each channel.

    W = weight_scale * weight;  weight [out, in] e4m3;  weight_scale [out, 1] or [out], or one for the whole weight

as compressed-tensors (format float-quantized) and NVIDIA's ModelOpt (FP8, FP8_PER_CHANNEL_PER_TOKEN) store them. Scales
of activations (input_scale, output_scale) and of KV caches (k_scale, v_scale) are not used: activations get a scale per
token while the model runs, and keys and values are rounded as `kv` says.

Source: the checkpoints and documentation of compressed-tensors 0.20 and ModelOpt 0.40.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.quantize_rows import E4M3
from .importers import ForeignFormat, ImportFormatError
from .nvfp4_importer import COMPRESSED_FORMAT, MODELOPT_ALGORITHM, Nvfp4Format, compressed_nvfp4, modelopt_nvfp4

WEIGHT, SCALE = "weight", "weight_scale"
_UNUSED = ("input_scale", "output_scale", "k_scale", "v_scale")
_NAN = 127  # the bits of NaN, without the sign
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")


@dataclass(frozen=True)
class Fp8Format:
    """How another library stored its e4m3 weights."""

    method: Literal["compressed-tensors", "modelopt"]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names that tensors of a layer may have, after the layer's name."""
        return WEIGHT, SCALE, *_UNUSED

    @property
    def mark(self) -> str:
        """The part that every quantized layer has, and no other."""
        return SCALE

    @property
    def codes(self) -> str:
        """The part that holds the codes."""
        return WEIGHT

    def weight(self, layer: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, None]:
        """The weight of a layer in the layout of `fp8`: codes as they are, scales [out] float32, no zeros.

        layer: its name, for errors; tensors: by part. Raises ImportFormatError.
        """
        missing = [part for part in (WEIGHT, SCALE) if part not in tensors]
        if missing:
            raise ImportFormatError(f"{layer} of a {self.method} checkpoint lacks {missing}")
        codes, scales = tensors[WEIGHT], tensors[SCALE]
        if codes.dtype != E4M3 or codes.ndim != 2:
            raise ImportFormatError(f"{layer}.{WEIGHT} is {codes.dtype} {list(codes.shape)}, not a matrix in e4m3")
        if not scales.is_floating_point() or scales.numel() not in (1, len(codes)) or scales.shape[1:].numel() > 1:
            raise ImportFormatError(
                f"{layer}.{SCALE} is {scales.dtype} {list(scales.shape)}; a weight {list(codes.shape)} can be imported "
                "with one scale, or one for each output"
            )
        if bool((codes.view(torch.uint8) & _NAN == _NAN).any()) or not scales.isfinite().all():
            raise ImportFormatError(f"{layer} has weights or scales that are not finite; the file is damaged")
        return codes, scales.float().flatten().expand(len(codes)).contiguous(), None

    def shape(self, layer: str, stored: tuple[int, ...]) -> tuple[int, int]:
        """[out, in] of a layer whose codes have the shape `stored`. Raises ImportFormatError."""
        if len(stored) != 2:
            raise ImportFormatError(f"{layer}.{WEIGHT} has the shape {list(stored)}; two dimensions were expected")
        return stored[0], stored[1]


def foreign_format(values: Any) -> ForeignFormat | Fp8Format | Nvfp4Format:
    """Read the quantization_config of a config.json. Raises ImportFormatError for unsupported formats."""
    if isinstance(values, Mapping):
        if values.get("quant_method") == "modelopt":
            return _modelopt_format(values)
        if values.get("quant_method") == "compressed-tensors" and values.get("format") == "float-quantized":
            return _compressed_format(values)
        if values.get("quant_method") == "compressed-tensors" and values.get("format") == COMPRESSED_FORMAT:
            return compressed_nvfp4(values)
    return ForeignFormat.from_config(values)


def _modelopt_format(values: Mapping[str, Any]) -> Fp8Format | Nvfp4Format:
    if values.get("quant_algo") == MODELOPT_ALGORITHM:
        return modelopt_nvfp4(values)
    if values.get("quant_algo") not in _MODELOPT:
        raise ImportFormatError(
            f"ModelOpt's weights in {str(values.get('quant_algo'))[:40]!r} cannot be imported, only in "
            f"{', '.join(_MODELOPT)} or {MODELOPT_ALGORITHM}; use the dense ones"
        )
    return Fp8Format("modelopt")


def _compressed_format(values: Mapping[str, Any]) -> Fp8Format:
    groups = values.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [scheme.get("weights") if isinstance(scheme, Mapping) else None for scheme in schemes]
    for found in weights or [None]:
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
