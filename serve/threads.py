"""Calls in threads that are not left behind."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def to_its_end(call: Callable[P, T], *given: P.args, **options: P.kwargs) -> T:
    """`asyncio.to_thread`, but a caller that is cancelled waits for the thread, so that it may remove what it wrote."""
    task = asyncio.ensure_future(asyncio.to_thread(call, *given, **options))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
