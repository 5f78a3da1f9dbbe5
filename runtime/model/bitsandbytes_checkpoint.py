"""Checkpoints that transformers saved with bitsandbytes: NF4, with nested scales or without, and LLM.int8.

    NF4       X.weight uint8 [out * in / 2, 1], the even input in a byte's high four bits; X.weight.absmax, a scale for
              each 64 weights; X.weight.quant_map, the 16 levels; X.weight.quant_state.bitsandbytes__nf4, JSON in bytes
    nested    X.weight.absmax uint8, of which each is an index into X.weight.nested_quant_map [256], times one of
              X.weight.nested_absmax for each 256 of them, plus the nested_offset of the JSON
    LLM.int8  X.weight int8 [out, in]; X.SCB [out], the largest weight of each channel; X.weight_format 0, for row-major

Codes and scales are copied bit by bit; only nested scales and those of LLM.int8, SCB / 127, are computed. LLM.int8
rounds inputs below a threshold and computes the others separately; the runtime's product rounds no inputs.

Source: the serialization of bitsandbytes 0.50.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...quant.nf4 import BLOCK_SIZE, LEVELS
from ...quant.recipe import Recipe, fewest_rules
from ...quant.scheme import NF4, PARTS, Int8, Scheme
from ..checkpoint_folder import CheckpointFolder
from ..errors import CheckpointError
from ..files import parse_json_object, shown
from .checkpoint import Checkpoint
from .quantized import is_matrix
from .safetensors_header import MAX_ELEMENTS
from .stored_parameter import ReshapedParameter, StoredParameter

METHOD = "bitsandbytes"
_STATE = "quant_state.bitsandbytes__nf4"
_NF4_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", _STATE)
_MAX_STATE_BYTES = 1 << 12


def is_bitsandbytes(files: CheckpointFolder) -> bool:
    """Whether the config.json says that bitsandbytes quantized the weights."""
    stated = files.settings("config.json").get("quantization_config")
    return isinstance(stated, dict) and stated.get("quant_method") == METHOD


def from_bitsandbytes(stored: Checkpoint) -> tuple[Checkpoint, Recipe]:
    """The checkpoint with codes and scales in the runtime's format, and the recipe that describes it.

    Raises CheckpointError for tensors that are damaged, or quantized in a way that the runtime does not support.
    """
    parameters: dict[str, StoredParameter] = {}
    schemes: dict[str, Scheme | None] = {}
    for name in stored.names:
        layer = name.removesuffix(".weight")
        if name == f"{layer}.weight" and f"{name}.absmax" in stored:
            schemes[layer] = NF4()
            parameters |= _nf4(stored, layer)
        elif name == f"{layer}.weight" and f"{layer}.SCB" in stored:
            schemes[layer] = Int8()
            parameters |= _int8(stored, layer)
        elif not _belongs(name, stored):
            parameters[name] = stored.parameters[name]
            if is_matrix(name, stored.shape(name)):
                schemes[layer] = None
    if not any(schemes.values()):
        raise CheckpointError(f"{stored.folder} says {METHOD} but has no weights in NF4 or LLM.int8.")
    return Checkpoint(stored.folder, parameters, stored.files, metadata={}), Recipe(METHOD, fewest_rules(schemes))


def _belongs(name: str, stored: Checkpoint) -> bool:
    """Whether the tensor is part of a quantized weight rather than a parameter."""
    weight, found, part = name.rpartition(".weight.")
    if found:
        return part in _NF4_PARTS and f"{weight}.weight.absmax" in stored
    layer, _, part = name.rpartition(".")
    return part in ("SCB", "weight_format") and f"{layer}.SCB" in stored


def _nf4(stored: Checkpoint, layer: str) -> dict[str, StoredParameter]:
    name = f"{layer}.weight"
    parts = {part: stored.parameters[f"{name}.{part}"] for part in _NF4_PARTS if f"{name}.{part}" in stored}
    where = stored.origin(name)
    state = _state(parts.get(_STATE), where)
    shape: Any = state.get("shape")
    if not _is_matrix(shape) or shape[1] % BLOCK_SIZE:
        raise CheckpointError(
            f"{where} has the shape {shown(str(shape))}; NF4 takes [out, in] with in divisible by 64."
        )
    if state.get("blocksize") != BLOCK_SIZE or state.get("quant_type") != "nf4":
        raise CheckpointError(
            f"{where} is {shown(state.get('quant_type'))} in blocks of {shown(state.get('blocksize'))}; this runtime "
            f"reads nf4 in blocks of {BLOCK_SIZE}."
        )
    _expect(parts.get("quant_map"), (len(LEVELS),), "F32", f"{where}: quant_map")
    if parts["quant_map"].tensor().tolist() != torch.tensor(LEVELS).tolist():
        raise CheckpointError(f"{where} has other levels than NF4; it cannot be read.")
    out, inner = shape
    blocks = out * inner // BLOCK_SIZE
    codes, absmax = stored.parameters[name], parts["absmax"]
    _expect(codes, (out * inner // 2, 1), "U8", where)
    nested = absmax.dtype == "U8"
    _expect(absmax, (blocks,), "U8" if nested else "F32", f"{where}: absmax")
    grid = (out, inner // BLOCK_SIZE)
    scales: StoredParameter = ReshapedParameter(absmax, grid)
    if nested:
        scales = _NestedScales(absmax, parts, state, grid, where)
    return {f"{layer}.{PARTS[0]}": ReshapedParameter(codes, (out, inner // 2)), f"{layer}.{PARTS[1]}": scales}


def _int8(stored: Checkpoint, layer: str) -> dict[str, StoredParameter]:
    codes, where = stored.parameters[f"{layer}.weight"], stored.origin(f"{layer}.weight")
    if codes.dtype != "I8" or len(codes.shape) != 2:
        raise CheckpointError(f"{where} is {codes.dtype} {list(codes.shape)}; LLM.int8 has int8 [out, in].")
    _expect(stored.parameters[f"{layer}.SCB"], codes.shape[:1], "F32", f"{where}: SCB")
    order = stored.parameters.get(f"{layer}.weight_format")
    if order is not None and (order.elements != 1 or int(order.tensor().flatten()[0]) != 0):
        raise CheckpointError(f"{where} is not in row-major order; save it with bitsandbytes 0.45 or later.")
    return {f"{layer}.{PARTS[0]}": codes, f"{layer}.{PARTS[1]}": _ChannelScales(stored.parameters[f"{layer}.SCB"])}


class _ComputedScales(StoredParameter):
    """Scales that are computed from stored tensors."""

    dtype = "F32"

    def __init__(self, source: StoredParameter, shape: tuple[int, ...]) -> None:
        self.file, self.stored_name, self.shape = source.file, source.stored_name, shape
        self._source = source

    @property
    def nbytes(self) -> int:
        """See `StoredParameter`."""
        return 4 * self.elements

    def release(self, nbytes: int) -> None:
        """See `StoredParameter`."""
        self._source.release(self._source.nbytes)


class _ChannelScales(_ComputedScales):
    def __init__(self, largest: StoredParameter) -> None:
        super().__init__(largest, largest.shape)

    def tensor(self) -> Tensor:
        """See `StoredParameter`."""
        return self._source.tensor() / 127


class _NestedScales(_ComputedScales):
    def __init__(
        self,
        absmax: StoredParameter,
        parts: Mapping[str, StoredParameter],
        state: Mapping[str, Any],
        shape: tuple[int, ...],
        where: str,
    ) -> None:
        super().__init__(absmax, shape)
        group, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(group) is not int or not 0 < group <= MAX_ELEMENTS or not isinstance(offset, float):
            raise CheckpointError(f"{where} has nested scales without a block size and an offset; it is damaged.")
        self._group, self._offset = group, offset
        groups = -(-absmax.elements // group)
        _expect(parts.get("nested_absmax"), (groups,), "F32", f"{where}: nested_absmax")
        _expect(parts.get("nested_quant_map"), (256,), "F32", f"{where}: nested_quant_map")
        self._largest, self._levels = parts["nested_absmax"], parts["nested_quant_map"]

    def tensor(self) -> Tensor:
        """See `StoredParameter`."""
        codes = self._source.tensor().long()
        largest = self._largest.tensor().repeat_interleave(self._group)[: len(codes)]
        return (self._levels.tensor()[codes] * largest + self._offset).view(self.shape)


def _state(stored: StoredParameter | None, where: str) -> Mapping[str, Any]:
    if stored is None or stored.dtype != "U8" or len(stored.shape) != 1 or stored.elements > _MAX_STATE_BYTES:
        raise CheckpointError(f"{where} has no quant_state of nf4; other 4-bit types are not read.")
    return parse_json_object(bytes(stored.tensor().tolist()), f"{where}: quant_state", CheckpointError)


def _expect(stored: StoredParameter | None, shape: tuple[int, ...], dtype: str, where: str) -> None:
    if stored is None or stored.shape != shape or stored.dtype != dtype:
        found = "missing" if stored is None else f"{stored.dtype} {list(stored.shape)[:8]}"
        raise CheckpointError(f"{where} is {found} where {dtype} {list(shape)} was expected; the file is damaged.")


def _is_matrix(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and size > 0 for size in shape)
        and math.prod(shape) <= MAX_ELEMENTS
    )
