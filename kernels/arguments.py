"""The check that public operations share: tensors on one device, each of a dtype that the operation takes."""

from collections.abc import Collection

import torch
from torch import Tensor

FLOATING = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
FLOAT32 = frozenset({torch.float32})
INTEGERS = frozenset({torch.int32, torch.int64})
INT64 = frozenset({torch.int64})


def check_tensors(x: Tensor, dtypes: Collection[torch.dtype], /, **tensors: Tensor | None) -> None:
    """Raise ValueError, naming the tensor, unless each one is on the device of x and has one of `dtypes`.

    None stands for an argument that is not given. A Triton kernel would misread a tensor of another device or dtype
    without an error.
    """
    device = x.device
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and the other tensors are on {device}")
        if tensor.dtype not in dtypes:
            known = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it must be one of {known}")
