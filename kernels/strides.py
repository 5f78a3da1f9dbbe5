"""Layouts that kernels take: the elements of the last dimension side by side, whatever the strides before it."""

from torch import Tensor


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, or a copy of it where the elements of its last dimension are apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strided_rows(x: Tensor) -> Tensor:
    """`x` as [rows, columns], with unit stride: a view wherever its strides allow, as for the halves of one product's
    output."""
    return with_unit_stride(x.reshape(-1, x.shape[-1]))


def as_rows(x: Tensor) -> Tensor:
    """x [..., channels] as a contiguous [rows, channels]; no copy if it is contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()
