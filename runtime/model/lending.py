"""Layers that stay in host memory and are copied to a GPU each time they compute.

There are two buffers on the GPU: while a layer computes in one, the next is copied to the other, on a separate stream.
The host's copies are pinned, because unpinned copies are synchronous, and contiguous for each layer.
"""

import copy
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels.device_state import current

_ALIGNMENT = 256  # alignment of a tensor in a block, in bytes, as in the allocators
_PLACES = 2


class LentLayers:
    """Runs layers whose tensors are in host memory on a GPU. The tensors stay there and are pinned."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device):
        sizes = [sum(map(_aligned, layer.buffers())) for layer in layers]
        self._device = device
        self._lock = threading.Lock()  # two threads may encode; each buffer holds one layer at a time
        with current(device):
            self._copies = torch.cuda.Stream()
            self._places = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(_PLACES)]
            self._copies.wait_stream(torch.cuda.current_stream())  # earlier work may still use the memory of the places
            self._ready = [torch.cuda.Event() for _ in range(_PLACES)]
            self._free = [torch.cuda.Event() for _ in range(_PLACES)]
        self._blocks = [_pin(layer, size) for layer, size in zip(layers, sizes, strict=True)]
        self._lent = [_with_block(layer, self._places[at % _PLACES]) for at, layer in enumerate(layers)]

    def __call__(self, x: Tensor, *arguments: Tensor) -> Tensor:
        """The last layer's output; each layer takes the output of the previous one, and `arguments`."""
        with self._lock, current(self._device):
            computing = torch.cuda.current_stream()
            for number, (block, layer) in enumerate(zip(self._blocks, self._lent, strict=True)):
                at = number % _PLACES
                with torch.cuda.stream(self._copies):
                    self._copies.wait_event(self._free[at])
                    self._places[at][: len(block)].copy_(block, non_blocking=True)
                    self._ready[at].record(self._copies)
                computing.wait_event(self._ready[at])
                x = layer(x, *arguments)
                self._free[at].record(computing)
            return x


def _aligned(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _pin(layer: nn.Module, size: int) -> Tensor:
    """Move a layer's tensors to a pinned block of `size` bytes, and return the block."""
    block, start = _pinned(size), 0
    for module in layer.modules():
        for name, buffer in module.named_buffers(recurse=False):
            placed = _view(block, start, buffer)
            placed.copy_(buffer)
            module.register_buffer(name, placed)
            start += _aligned(buffer)
    return block


def _with_block(layer: nn.Module, block: Tensor) -> nn.Module:
    """A copy of a pinned layer with its tensors at the same offsets of another block."""
    lent, start = copy.deepcopy(layer, {id(buffer): buffer for buffer in layer.buffers()}), 0
    for module in lent.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, _view(block, start, buffer))
            start += _aligned(buffer)
    return lent


def _view(block: Tensor, start: int, like: Tensor) -> Tensor:
    return block[start : start + like.nbytes].view(like.dtype).view(like.shape)
