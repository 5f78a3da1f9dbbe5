"""Imports weights that other libraries quantized to nvfp4: the same codes and blocks' scales, a scale for each channel.

    compressed-  W = e2m1(weight_packed) * weight_scale / weight_global_scale
    tensors
    ModelOpt     W = e2m1(weight) * weight_scale * weight_scale_2

codes [out, in / 2] uint8, the even input in the low four bits; weight_scale [out, in / 16] e4m3; the last factor one
float32 for the whole weight, whose float32 reciprocal takes the place of weight_global_scale, as in other runtimes.
compressed-tensors calls the format nvfp4-pack-quantized, ModelOpt NVFP4. Scales of activations (input_global_scale,
input_scale) and of KV caches (k_scale, v_scale) are not used: activations are not rounded, and keys and values are
rounded as `kv` says.

Source: the checkpoints and documentation of compressed-tensors 0.20 and ModelOpt 0.40.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.linear_nvfp4 import NVFP4_BLOCK
from ..kernels.quantize_rows import E4M3
from .float_importer import CACHE_SCALES, SCALE, FloatFormat, has_nan, weights_of_groups
from .importers import ImportFormatError

COMPRESSED_FORMAT, MODELOPT_ALGORITHM = "nvfp4-pack-quantized", "NVFP4"


@dataclass(frozen=True)
class Nvfp4Format(FloatFormat):
    """How another library stored its nvfp4 weights, which become codes and scales as they are, and channels [out]
    float32."""

    codes_per_byte = 2

    @property
    def codes(self) -> str:
        """See `FloatFormat`."""
        return "weight_packed" if self.method == "compressed-tensors" else "weight"

    @property
    def mark(self) -> str:
        """See `FloatFormat`: the scale of the whole weight."""
        return "weight_global_scale" if self.method == "compressed-tensors" else "weight_scale_2"

    @property
    def parts(self) -> tuple[str, ...]:
        """See `FloatFormat`."""
        unused = "input_global_scale" if self.method == "compressed-tensors" else "input_scale"
        return self.codes, SCALE, self.mark, unused, *CACHE_SCALES

    def weight(self, layer: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """See `FloatFormat`."""
        codes, scales, whole = self._required(layer, tensors, self.codes, SCALE, self.mark)
        if codes.dtype != torch.uint8 or codes.ndim != 2:
            raise ImportFormatError(
                f"{layer}.{self.codes} is {codes.dtype} {list(codes.shape)}, not a matrix of two codes per byte"
            )
        wanted = [len(codes), 2 * codes.shape[1] // NVFP4_BLOCK]
        if scales.dtype != E4M3 or list(scales.shape) != wanted:
            raise ImportFormatError(
                f"{layer}.{SCALE} is {scales.dtype} {list(scales.shape)}; codes {list(codes.shape)} need {E4M3} "
                f"{wanted}"
            )
        if whole.dtype != torch.float32 or whole.numel() != 1:
            raise ImportFormatError(f"{layer}.{self.mark} is {whole.dtype} {list(whole.shape)}, not one float32")
        factor = whole.reciprocal() if self.method == "compressed-tensors" else whole
        if has_nan(scales) or not factor.isfinite().all():
            raise ImportFormatError(f"{layer} has scales that are not finite; the file is damaged")
        return codes, scales, factor.reshape(1).expand(len(codes)).contiguous()


def compressed_nvfp4(values: Mapping[str, Any]) -> Nvfp4Format:
    """The format that a quantization_config of compressed-tensors describes. Raises ImportFormatError."""
    wanted = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NVFP4_BLOCK}
    for found in weights_of_groups(values):
        if not isinstance(found, Mapping) or any(found.get(key) != value for key, value in wanted.items()):
            raise ImportFormatError(
                f"{COMPRESSED_FORMAT} weights can be imported if all groups of the quantization_config have "
                f"{', '.join(f'{key} {value}' for key, value in wanted.items())}"
            )
    return Nvfp4Format("compressed-tensors")


def modelopt_nvfp4(values: Mapping[str, Any]) -> Nvfp4Format:
    """The format that ModelOpt's quantization with the algorithm NVFP4 describes. Raises ImportFormatError."""
    size = values.get("group_size", NVFP4_BLOCK)
    if size != NVFP4_BLOCK:
        raise ImportFormatError(f"ModelOpt's NVFP4 has blocks of {NVFP4_BLOCK} inputs, not of {str(size)[:40]}")
    return Nvfp4Format("modelopt")
