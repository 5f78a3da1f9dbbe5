"""Layouts that kernels take: unit stride in the last dimension, any strides in the others."""

from torch import Tensor


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy if its last dimension does not have unit stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strided_rows(x: Tensor) -> Tensor:
    """`x` as [rows, columns] with unit stride: a view where its strides allow, as for the halves of a product's
    output."""
    return with_unit_stride(x.reshape(-1, x.shape[-1]))


def as_rows(x: Tensor) -> Tensor:
    """x [..., channels] as a contiguous [rows, channels]; no copy if it is contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()
