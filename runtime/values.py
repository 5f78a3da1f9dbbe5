"""Checks of numbers from callers and settings files: returns the expected type or raises a clear error."""

import math
import numbers
from typing import Any

import numpy as np

from ..kernels.errors import AfnextError
from .files import shown

SMALLEST_FLOAT32 = float(np.finfo(np.float32).tiny)
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def whole(name: str, value: Any, error: type[AfnextError], *, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int. Ints and numpy integers are whole numbers; bools, floats and strings are not.

    Raises `error`, naming `name` and what is allowed, for another type or a value below `least` or above `most`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise error(f"{name} is {shown(value)}; it must be a whole number{_between(least, most)}")
    result = int(value)
    if (least is not None and result < least) or (most is not None and result > most):
        raise error(f"{name} is {shown(result)}; it must be a whole number{_between(least, most)}")
    return result


def real(name: str, value: Any, error: type[AfnextError], allowed: str) -> float:
    """`value` as a finite float. Ints, floats and numpy's are numbers; bools and strings are not.

    Raises `error` with `allowed`, the values that the caller accepts, for another type, NaN, or a value that float32
    cannot hold.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise error(f"{name} is {shown(value)}; it must be {allowed}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not abs(result) <= LARGEST_FLOAT32:
        raise error(f"{name} is {shown(value)}; it must be {allowed}")
    return result


def flag(name: str, value: Any, error: type[AfnextError]) -> bool:
    """`value` as a bool. Raises `error` unless it is one, Python's or numpy's."""
    if not isinstance(value, bool | np.bool_):
        raise error(f"{name} is {shown(value)}; it must be True or False")
    return bool(value)


def _between(least: int | None, most: int | None) -> str:
    if least is None and most is None:
        return ""
    if most is None:
        return f", at least {least}"
    return f", at most {most}" if least is None else f" from {least} to {most}"
