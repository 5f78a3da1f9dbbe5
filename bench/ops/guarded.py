"""Tensors that end where readable memory ends: a kernel that reads or writes one byte too far crashes."""

import ctypes
import mmap

import torch
from torch import Tensor

_PROT_NONE = 0


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy whose last byte is the last of its page, before a page that may not be touched.

    Its first element is aligned to nothing but its own size.
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
