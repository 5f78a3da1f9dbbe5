"""Imports weights that other libraries quantized to 4 bits without changing values: only the order of codes changes.

All three pack eight codes into an int32, the first in the lowest four bits.

    GPTQ        qweight [in / 8, out], along inputs; qzeros [groups, out / 8], along outputs; scales [groups, out];
                g_idx [in], the group of each input. "gptq" stores zero points less one, "gptq_v2" as they are.
    AWQ         qweight [in, out / 8] and qzeros [groups, out / 8], along outputs, of which the eight of an int32 stand
    (GEMM)      in the order 0, 2, 4, 6, 1, 3, 5, 7; scales [groups, out]
    compressed- weight_packed [out, in / 8], along inputs, codes and zero points plus 8; weight_scale [out, groups];
    tensors     weight_zero_point [out / 8, groups], along outputs; weight_shape [2]; weight_g_idx [in]
    (pack-quantized)

Groups larger than those of `int4` become several groups with the same scale. Groups of inputs that are not neighbours,
which GPTQ makes with activation order and without static groups, do not fit the row-major layout and are refused.

Source: the packing code of AutoGPTQ and GPTQModel 7.7, AutoAWQ 0.2.9 and compressed-tensors 0.20.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.errors import AfnextError
from ..kernels.linear_int4 import GROUP_SIZES, SYMMETRIC_ZERO
from .int4 import pack_int4

Method = Literal["gptq", "gptq_v2", "awq", "compressed-tensors"]
PARTS: Mapping[Method, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "gptq_v2": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "compressed-tensors": (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    ),
}
"""The names of a layer's tensors in each format, after the layer's name."""

_OPTIONAL = ("g_idx", "weight_zero_point", "weight_shape", "weight_g_idx")
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # positions of outputs 0 .. 7 in their int32
_PER_WORD = 8


class ImportFormatError(AfnextError):
    """A checkpoint of another library is damaged, or quantized in an unsupported format."""


@dataclass(frozen=True)
class ForeignFormat:
    """How another library stored its weights.

    group_size: inputs that share a scale, None for all of a channel. symmetric: all zero points are 8, by the config.
    """

    method: Method
    group_size: int | None
    symmetric: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The names that tensors of a layer may have, after the layer's name."""
        return PARTS[self.method]

    @property
    def mark(self) -> str:
        """The part that every quantized layer has, and no other."""
        return self.parts[0]

    @property
    def codes(self) -> str:
        """The part that holds the codes."""
        return self.parts[0]

    @classmethod
    def from_config(cls, values: Any) -> "ForeignFormat":
        """Read the quantization_config of a config.json. Raises ImportFormatError for unsupported formats."""
        if not isinstance(values, Mapping):
            raise ImportFormatError("the quantization_config of config.json is not a JSON object; the file is damaged")
        method = values.get("quant_method")
        if method == "gptq":
            return _gptq_format(values)
        if method == "awq":
            _expect(values, "version", ("gemm",), default="gemm")
            _expect(values, "bits", (4,))
            return cls("awq", _group_size(values.get("group_size")), values.get("zero_point") is False)
        if method == "compressed-tensors":
            return _compressed_format(values)
        raise ImportFormatError(
            f"weights quantized by {str(method)[:40]!r} cannot be imported, only those of gptq, awq, "
            "compressed-tensors and modelopt; use the dense ones"
        )

    def weight(self, layer: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weight of a layer in the layout of `int4`: packed, scales in their own dtype, zeros or None if all are 8.

        layer: its name, for errors; tensors: by the names in `PARTS`. Raises ImportFormatError.
        """
        _check_parts(layer, self.method, tensors)
        zeros = self._zeros(layer, tensors)
        if self.method == "compressed-tensors":
            codes, scales = _compressed_codes(layer, tensors), tensors["weight_scale"]
            group_of = tensors.get("weight_g_idx")
        else:
            codes, scales = _column_codes(self.method, tensors), tensors["scales"].T
            group_of = tensors.get("g_idx")
        group = codes.shape[1] if self.group_size is None else self.group_size
        _check_groups(layer, codes, scales, zeros, group, group_of)
        fitting = self.stored_group(layer, codes.shape[1])
        scales = scales.repeat_interleave(group // fitting, 1).contiguous()
        if bool((zeros == SYMMETRIC_ZERO).all()):
            return pack_int4(codes), scales, None
        zeros = zeros.repeat_interleave(group // fitting, 1)
        return pack_int4(codes), scales, zeros.to(scales.dtype).contiguous()

    def shape(self, layer: str, words: tuple[int, ...]) -> tuple[int, int]:
        """[out, in] of a layer whose codes, the first of `PARTS`, have the shape `words`. Raises ImportFormatError."""
        if len(words) != 2:
            raise ImportFormatError(f"{layer} holds codes of shape {list(words)}; two dimensions were expected")
        first, second = words
        if self.method == "awq":
            return _PER_WORD * second, first
        return (first, _PER_WORD * second) if self.method == "compressed-tensors" else (second, _PER_WORD * first)

    def stored_group(self, layer: str, inputs: int) -> int:
        """Inputs per scale in the result of `weight` for a layer of `inputs` inputs. Raises ImportFormatError."""
        group = inputs if self.group_size is None else self.group_size
        fitting = max((size for size in GROUP_SIZES if group % size == 0), default=None)
        if fitting is None:
            raise ImportFormatError(f"{layer} has groups of {group} inputs, and only multiples of 32 can be imported")
        return fitting

    def is_symmetric(self, layer: str, tensors: Mapping[str, Tensor]) -> bool:
        """Whether `weight` returns no zeros for the layer. Reads only the zeros."""
        _check_parts(layer, self.method, tensors)
        return bool((self._zeros(layer, tensors) == SYMMETRIC_ZERO).all())

    def _zeros(self, layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Zero points [out, groups] uint8. Raises ImportFormatError if they contradict a config that says symmetric."""
        zeros = _zeros(layer, self.method, tensors)
        if self.symmetric and bool((zeros != SYMMETRIC_ZERO).any()):
            found = int(zeros[zeros != SYMMETRIC_ZERO][0])
            advice = (
                'the weights are probably in the newer format: set "checkpoint_format" to "gptq_v2"'
                if self.method == "gptq" and bool((zeros == SYMMETRIC_ZERO + 1).all())
                else "use the config that was written with the weights"
            )
            raise ImportFormatError(
                f"{layer} has a zero point of {found}, but the quantization_config says that the weights are "
                f"symmetric, with zero points of {SYMMETRIC_ZERO}; {advice}"
            )
        return zeros


def unpack_words(words: Tensor) -> Tensor:
    """The codes in int32 words, the lowest four bits first: [..., n] int32 to [..., 8 n] uint8."""
    shifts = 4 * torch.arange(_PER_WORD, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(-2)


def _gptq_format(values: Mapping[str, Any]) -> ForeignFormat:
    _expect(values, "bits", (4,))
    stored = values.get("checkpoint_format", values.get("format", "gptq"))
    if stored not in ("gptq", "gptq_v2"):
        raise ImportFormatError(
            f"GPTQ weights in the format {str(stored)[:40]!r} cannot be imported, only in gptq or gptq_v2"
        )
    return ForeignFormat(
        "gptq" if stored == "gptq" else "gptq_v2", _group_size(values.get("group_size")), values.get("sym") is True
    )


def _compressed_format(values: Mapping[str, Any]) -> ForeignFormat:
    _expect(values, "format", ("pack-quantized",))
    groups = values.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    if len(schemes) != 1 or not isinstance(schemes[0], Mapping) or not isinstance(schemes[0].get("weights"), Mapping):
        raise ImportFormatError("compressed-tensors with one config group that has weights can be imported, no other")
    if schemes[0].get("input_activations") is not None:
        raise ImportFormatError("compressed-tensors with quantized activations cannot be imported; use dense weights")
    weights = schemes[0]["weights"]
    _expect(weights, "num_bits", (4,))
    _expect(weights, "type", ("int",), default="int")
    _expect(weights, "strategy", ("group", "channel"))
    group_size = _group_size(weights.get("group_size")) if weights["strategy"] == "group" else None
    return ForeignFormat("compressed-tensors", group_size, weights.get("symmetric") is True)


def _expect(values: Mapping[str, Any], key: str, allowed: tuple[Any, ...], default: Any = None) -> None:
    value = values.get(key, default)
    if (value.lower() if isinstance(value, str) else value) not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise ImportFormatError(
            f"the quantization_config says {key} = {str(value)[:40]!r}; only {wanted} can be imported"
        )


def _group_size(value: Any) -> int | None:
    if value == -1 or value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ImportFormatError(
            f"the quantization_config has group_size = {str(value)[:40]!r}, which is not a number of inputs"
        )
    return value


def _check_parts(layer: str, method: Method, tensors: Mapping[str, Tensor]) -> None:
    missing = [part for part in PARTS[method] if part not in tensors and part not in _OPTIONAL]
    unknown = [part for part in tensors if part not in PARTS[method]]
    if missing or unknown:
        raise ImportFormatError(f"{layer} of a {method} checkpoint lacks {missing} and has, unexpected, {unknown}")
    for part, tensor in tensors.items():
        if part == "weight_shape":
            continue
        floating = part in ("scales", "weight_scale")
        dimensions = 1 if part.endswith("g_idx") else 2
        sound = tensor.is_floating_point() if floating else tensor.dtype == torch.int32
        if tensor.ndim != dimensions or not sound:
            raise ImportFormatError(f"{layer}.{part} is {tensor.dtype} {list(tensor.shape)}, not what {method} stores")


def _column_codes(method: Method, tensors: Mapping[str, Tensor]) -> Tensor:
    """Codes [out, in] uint8 of GPTQ and AWQ."""
    if method == "awq":
        return _in_awq_order(tensors["qweight"]).T.contiguous()
    return unpack_words(tensors["qweight"].T.contiguous())


def _in_awq_order(words: Tensor) -> Tensor:
    return unpack_words(words).unflatten(1, (-1, _PER_WORD))[..., torch.tensor(_AWQ_PLACES)].flatten(1)


def _compressed_codes(layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The same for compressed-tensors, whose packed columns may be padded."""
    codes, shape = unpack_words(tensors["weight_packed"]), tensors.get("weight_shape")
    if shape is None:
        return codes
    sizes = shape.tolist()
    if len(sizes) != 2 or sizes[0] != len(codes) or not 0 <= codes.shape[1] - sizes[1] < _PER_WORD:
        raise ImportFormatError(f"{layer}.weight_packed holds {list(codes.shape)} codes for the weight_shape {sizes}")
    return codes[:, : sizes[1]]


def _zeros(layer: str, method: Method, tensors: Mapping[str, Tensor]) -> Tensor:
    """Zero points [out, groups] uint8."""
    if method == "compressed-tensors":
        scales = tensors["weight_scale"]
        if "weight_zero_point" not in tensors:
            return torch.full(scales.shape, SYMMETRIC_ZERO, dtype=torch.uint8)
        return unpack_words(tensors["weight_zero_point"].T.contiguous()).T[: len(scales)]
    if method == "awq":
        return _in_awq_order(tensors["qzeros"]).T
    zeros = unpack_words(tensors["qzeros"]).T
    if method == "gptq":
        zeros = zeros + 1
        if bool((zeros > 15).any()):
            raise ImportFormatError(
                f"{layer} has zero points of 0, which the format gptq cannot hold and stores as 16; use gptq_v2"
            )
    return zeros


def _check_groups(
    layer: str, codes: Tensor, scales: Tensor, zeros: Tensor, group: int, group_of: Tensor | None
) -> None:
    out, inputs = codes.shape
    if inputs % group or scales.shape != (out, inputs // group) or zeros.shape != scales.shape:
        raise ImportFormatError(
            f"{layer} has a weight {[out, inputs]} with scales {list(scales.shape)} and zero points "
            f"{list(zeros.shape)}, which do not belong to groups of {group}"
        )
    if not scales.isfinite().all():
        raise ImportFormatError(f"{layer} has scales that are not finite; the file is damaged")
    if group_of is not None and not torch.equal(group_of.long(), torch.arange(inputs) // group):
        raise ImportFormatError(
            f"{layer} was quantized in activation order, with groups of inputs that are not neighbours, which have no "
            "place in this layout; quantize it without desc_act, or with static_groups"
        )
