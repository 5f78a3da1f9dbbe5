"""Which cases of the interpreted Triton kernels are run: the interpreter is a thousand times slower than a kernel.

A test that takes a dtype and other parameters pairs them there: each combination of the others is tried in one dtype,
in turn, so that every value and every dtype is tried. Compiled kernels and all other backends run the whole product.
"""

from collections import defaultdict
from typing import Any

import pytest


def interpreted_repetitions(items: list[pytest.Item]) -> set[pytest.Item]:
    """The items that repeat a combination of parameters in a further dtype, for Triton's kernels on the CPU."""
    groups = defaultdict(list)
    for item in items:
        given = _parameters(item) if hasattr(item, "callspec") else {}
        if given.get("backend") == "triton" and "dtype" in given:
            groups[item.nodeid.partition("[")[0]].append(item)
    return {item for group in groups.values() for item in _repetitions(group)}


def _repetitions(group: list[pytest.Item]) -> list[pytest.Item]:
    cases = [_places(item, group) for item in group]
    dtypes, others = sorted({dtype for dtype, _ in cases}), sorted({other for _, other in cases})
    kept = {(dtypes[place % len(dtypes)], other) for place, other in enumerate(others)}
    if len(others) < len(dtypes) or not kept <= set(cases):
        return []  # a dtype would be left out, or the parameters are no product
    return [item for item, case in zip(group, cases, strict=True) if case not in kept]


def _places(item: pytest.Item, group: list[pytest.Item]) -> tuple[int, tuple[int, ...]]:
    """The places of an item's dtype and of its other parameters among the values of the group."""

    def place(name: str) -> int:
        values = list(dict.fromkeys(id(_parameters(each)[name]) for each in group))
        return values.index(id(_parameters(item)[name]))

    return place("dtype"), tuple(place(name) for name in sorted(_parameters(item)) if name not in ("backend", "dtype"))


def _parameters(item: pytest.Item) -> dict[str, Any]:
    parameters: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
    return parameters
