"""The weight of a product with packed weights, in any format."""

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """A quantized weight [out, in]: tensors with a row for each output, whose shapes and dtypes the format defines.

    zeros: like scales; None in formats without zero points and where all zero points are the format's default.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def named(self, weight: str = "weight") -> dict[str, Tensor]:
        """The tensors by their names in a checkpoint, such as X.weight_codes for `weight` X.weight."""
        parts = zip(self._fields, self, strict=True)
        return {f"{weight}_{field}": tensor for field, tensor in parts if tensor is not None}

    def rows(self, chosen: slice | Tensor) -> "Packed":
        """The weight of some outputs."""
        return Packed(*(None if part is None else part[chosen] for part in self))  # type: ignore[arg-type]

    def wide(self) -> "Packed":
        """The weight with its scales in float64."""
        return self._replace(scales=self.scales.to(torch.float64))
