"""A file, memory-mapped read-only, as one tensor of bytes."""

import mmap
import warnings
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files import open_regular


class MappedFile:
    """A regular file, memory-mapped read-only, as the uint8 tensor `bytes`.

    label: its name in errors. Raises CheckpointError for anything but a readable, non-empty regular file.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.label = label
        try:
            with open_regular(path, label, CheckpointError) as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as problem:
            raise CheckpointError(f"{label} cannot be mapped into memory: {problem}.") from None
        with warnings.catch_warnings():
            # torch warns that the memory is read-only, which is intended.
            warnings.simplefilter("ignore", UserWarning)
            self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def release(self, start: int, end: int) -> None:
        """Release the whole pages within bytes `start..end`; a later read maps them again."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED, first, length)
