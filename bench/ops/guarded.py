"""Tensors before a guard page: a kernel that reads or writes past their end crashes."""

import ctypes
import mmap

import torch
from torch import Tensor

_PROT_NONE = 0


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy whose last byte is the last of its page, followed by a page without access.

    Its first element is aligned only to its own size.
    """
    nbytes = tensor.numel() * tensor.element_size()
    pages = -(-nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, _PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    first = pages * mmap.PAGESIZE - nbytes
    copy = torch.frombuffer(memory, dtype=tensor.dtype, offset=first, count=tensor.numel()).view(tensor.shape)
    return copy.copy_(tensor)
