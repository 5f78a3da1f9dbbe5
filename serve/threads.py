"""Calls in threads that the caller always waits for."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def to_its_end(call: Callable[P, T], *given: P.args, **options: P.kwargs) -> T:
    """`asyncio.to_thread`, but a cancelled caller waits for the thread, so that the thread's files can be removed."""
    task = asyncio.ensure_future(asyncio.to_thread(call, *given, **options))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
