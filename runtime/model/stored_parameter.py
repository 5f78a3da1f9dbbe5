"""Where one parameter of a checkpoint is stored, and how its tensor is read."""

import math
from abc import ABC, abstractmethod

from torch import Tensor

from ...quant.convert import TORCH_DTYPES
from ..files import shown
from .mapped_file import MappedFile
from .safetensors_header import StoredTensor


class StoredParameter(ABC):
    """One parameter. file: the mapped file; stored_name: its name there; shape: of its tensor."""

    file: MappedFile
    stored_name: str
    shape: tuple[int, ...]

    @property
    def is_mapped(self) -> bool:
        """Whether the tensor is a view of the mapped file, which costs no memory."""
        return False

    @property
    @abstractmethod
    def dtype(self) -> str:
        """The dtype of the tensor as safetensors spells it, such as BF16."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the tensor."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """The parameter on the CPU, in a dtype that torch has: read-only memory of the file, or a copy."""

    @abstractmethod
    def release(self, nbytes: int) -> None:
        """Release the memory of the first `nbytes` of the tensor; reading it again reads the file again."""

    @property
    def elements(self) -> int:
        """Number of elements of the parameter."""
        return math.prod(self.shape)

    @property
    def origin(self) -> str:
        """File and stored name, for error messages."""
        return f"{self.file.label}: tensor {shown(self.stored_name)}"


class MappedParameter(StoredParameter):
    """A parameter whose bytes in the file are those of its tensor."""

    def __init__(self, file: MappedFile, stored_name: str, stored: StoredTensor) -> None:
        self.file = file
        self.stored_name = stored_name
        self.shape = stored.shape
        self._stored = stored

    @property
    def is_mapped(self) -> bool:
        """See `StoredParameter`."""
        return True

    @property
    def dtype(self) -> str:
        """See `StoredParameter`."""
        return self._stored.dtype

    @property
    def nbytes(self) -> int:
        """See `StoredParameter`."""
        return self._stored.end - self._stored.start

    def tensor(self) -> Tensor:
        """A view of the mapped file, or a copy if it is unaligned there."""
        dtype = TORCH_DTYPES[self.dtype]
        flat = self.file.bytes[self._stored.start : self._stored.end]
        if self._stored.start % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).view(self.shape)

    def release(self, nbytes: int) -> None:
        """See `StoredParameter`."""
        self.file.release(self._stored.start, min(self._stored.end, self._stored.start + nbytes))


class ReshapedParameter(StoredParameter):
    """A parameter whose tensor has another shape than the stored one, with as many elements."""

    def __init__(self, source: StoredParameter, shape: tuple[int, ...]) -> None:
        self.file, self.stored_name, self.shape = source.file, source.stored_name, shape
        self._source = source

    @property
    def is_mapped(self) -> bool:
        """See `StoredParameter`."""
        return self._source.is_mapped

    @property
    def dtype(self) -> str:
        """See `StoredParameter`."""
        return self._source.dtype

    @property
    def nbytes(self) -> int:
        """See `StoredParameter`."""
        return self._source.nbytes

    def tensor(self) -> Tensor:
        """See `StoredParameter`."""
        return self._source.tensor().view(self.shape)

    def release(self, nbytes: int) -> None:
        """See `StoredParameter`."""
        self._source.release(nbytes)
