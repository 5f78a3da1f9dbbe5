"""4-bit weights as GPTQ, AWQ and compressed-tensors store them, packed here from the formats' definitions."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def words(codes: np.ndarray, axis: int, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Tensor:
    """Eight neighbouring codes along `axis` to an int32; order[i] is the code in the i-th lowest four bits."""
    moved = np.moveaxis(codes.astype(np.uint64), axis, -1)
    packed = np.zeros((*moved.shape[:-1], moved.shape[-1] // 8), np.uint64)
    for place, index in enumerate(order):
        packed |= moved[..., index::8] << np.uint64(4 * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis)))


def example(out: int, inputs: int, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [out, in], scales [out, groups] float16 and zeros [out, groups], from 1 to 15."""
    codes = np.random.randint(0, 16, (out, inputs))
    scales = np.random.rand(out, inputs // group).astype(np.float16) + np.float16(0.1)
    zeros = np.full(scales.shape, 8) if symmetric else np.random.randint(1, 16, scales.shape)
    return codes, scales, zeros


def as_gptq(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, less: int) -> dict[str, Tensor]:
    group = codes.shape[1] // scales.shape[1]
    return {
        "qweight": words(codes.T, axis=0),
        "qzeros": words(zeros.T - less, axis=1),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // group,
    }


def as_awq(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(codes.T, axis=1, order=order),
        "qzeros": words(zeros.T, axis=1, order=order),
        "scales": torch.from_numpy(scales.T.copy()),
    }


def as_compressed(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": words(codes, axis=1),
        "weight_scale": torch.from_numpy(scales.copy()),
        "weight_shape": torch.tensor(codes.shape),
    }
    return tensors if zeros is None else {**tensors, "weight_zero_point": words(zeros, axis=0)}


def stored_as(
    method: str, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, symmetric: bool
) -> dict[str, Tensor]:
    """The tensors of a layer in the format `method`, as `configs` has them."""
    if method == "awq":
        return as_awq(codes, scales, zeros)
    if method == "compressed-tensors":
        return as_compressed(codes, scales, None if symmetric else zeros)
    return as_gptq(codes, scales, zeros, less=1 if method == "gptq" else 0)


def compressed_config(group: int, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": False, **changes}
    groups = {"group_0": {"weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def configs(group: int) -> dict[str, dict[str, Any]]:
    return {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": group, "checkpoint_format": "gptq"},
        "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": group, "checkpoint_format": "gptq_v2"},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True},
        "compressed-tensors": compressed_config(group),
    }
