"""Modules without training code: their tensors are buffers, empty until the checkpoint fills them."""

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def empty(*shape: int) -> Tensor:
    """A placeholder of the given shape that takes no memory."""
    return torch.empty(shape, device="meta")


class Norm(nn.Module):
    """The parameters of a LayerNorm (weight and bias) or an RMSNorm (weight only), each [channels]."""

    weight: Tensor
    bias: Tensor

    def __init__(self, channels: int, *, bias: bool):
        super().__init__()
        self.register_buffer("weight", empty(channels))
        if bias:
            self.register_buffer("bias", empty(channels))


class Conv(nn.Module):
    """The parameters of a one-dimensional convolution: weight [out, in, kernel] and bias [out]."""

    weight: Tensor
    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.register_buffer("weight", empty(out_channels, in_channels, kernel))
        self.register_buffer("bias", empty(out_channels))


class Embedding(nn.Module):
    """A table of vectors: weight [rows, channels]."""

    weight: Tensor

    def __init__(self, rows: int, channels: int):
        super().__init__()
        self.register_buffer("weight", empty(rows, channels))


def fill(module: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replace the buffer of each name in `module` by the named tensor.

    Raises CheckpointError when a name is unknown, a shape differs, or a buffer stays empty.
    """
    for name, tensor in tensors:
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
            expected = owner.get_buffer(leaf)
        except AttributeError:
            raise CheckpointError(f"the checkpoint's tensor {name} does not belong to the model") from None
        if expected.shape != tensor.shape:
            raise CheckpointError(
                f"the tensor {name} has the shape {tuple(tensor.shape)}, the config asks for {tuple(expected.shape)}"
            )
        owner.register_buffer(leaf, tensor)
    missing = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing from the checkpoint, the first is {missing[0]}")


def on_device(module: ModuleT, device: torch.device) -> ModuleT:
    """`module` itself if all its tensors are on `device`, otherwise a copy of it there.

    The module is not changed, so several threads may use it.
    """
    if all(buffer.device == device for buffer in module.buffers()):
        return module
    lent = copy.copy(module)
    buffers, children = module.named_buffers(recurse=False), module.named_children()
    lent._buffers = module._buffers | {name: buffer.to(device, non_blocking=True) for name, buffer in buffers}
    lent._modules = module._modules | {name: on_device(child, device) for name, child in children}
    return lent
