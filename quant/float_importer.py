"""What imports of weights in floats of 8 and 4 bits share: one format per library and dtype, codes that stay as they
are. `fp8_importer` and `nvfp4_importer` have the formats."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .importers import ImportFormatError

SCALE = "weight_scale"
CACHE_SCALES = ("k_scale", "v_scale")
_NAN = 127  # the bits of NaN in e4m3, without the sign


@dataclass(frozen=True)
class FloatFormat(ABC):
    """How another library stored its weights in floats."""

    method: Literal["compressed-tensors", "modelopt"]
    codes_per_byte: ClassVar[int]

    @property
    @abstractmethod
    def codes(self) -> str:
        """The part that holds the codes."""

    @property
    @abstractmethod
    def mark(self) -> str:
        """The part that every quantized layer has, and no other."""

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """The names that tensors of a layer may have, after the layer's name."""

    @abstractmethod
    def weight(self, layer: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weight of a layer in this runtime's layout: codes, scales, and zeros if the scheme has them.

        layer: its name, for errors; tensors: by part. Raises ImportFormatError.
        """

    def shape(self, layer: str, stored: tuple[int, ...]) -> tuple[int, int]:
        """[out, in] of a layer whose codes have the shape `stored`. Raises ImportFormatError."""
        if len(stored) != 2:
            raise ImportFormatError(f"{layer}.{self.codes} has the shape {list(stored)}; two dimensions were expected")
        return stored[0], self.codes_per_byte * stored[1]

    def _required(self, layer: str, tensors: Mapping[str, Tensor], *parts: str) -> tuple[Tensor, ...]:
        missing = [part for part in parts if part not in tensors]
        if missing:
            raise ImportFormatError(f"{layer} of a {self.method} checkpoint lacks {missing}")
        return tuple(tensors[part] for part in parts)


def has_nan(e4m3: Tensor) -> bool:
    """Whether a tensor in e4m3 holds NaN."""
    return bool((e4m3.view(torch.uint8) & _NAN == _NAN).any())


def weights_of_groups(values: Mapping[str, Any]) -> list[Any]:
    """What a quantization_config of compressed-tensors says of the weights of each group of layers, not yet checked;
    [None] without groups."""
    groups = values.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    return [scheme.get("weights") if isinstance(scheme, Mapping) else None for scheme in schemes] or [None]
