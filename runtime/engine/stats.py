"""Statistics of the engine, for monitoring."""

from dataclasses import dataclass
from typing import Literal

STEP_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Bounds of `EngineStats.step_counts`."""
Phase = Literal["waiting", "prefilling", "decoding"]


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine; its numbers may be one step apart from each other.

    alive: false after an error that ended the engine. Requests: waiting, prefilling, decoding.
    queued_tokens: prompt tokens not computed yet. Pages: free_pages, private_pages of running requests, prefix_pages of
    open contexts, cached_pages that only the prefix cache uses, max_pages that the cache may grow to. steps,
    step_seconds: number and time of all steps; step_counts: a histogram of step times with the upper bounds
    `STEP_SECONDS`, and the number of longer steps last; last_step_seconds: time of the last step; idle_seconds: time
    since it ended. speculative_tokens, accepted_tokens: verified, and accepted. preemptions: number of preempted
    requests. resizes: of the KV cache; decode_steps: decode steps set up, each of which is recorded where that is
    possible.
    """

    alive: bool
    waiting: int
    prefilling: int
    decoding: int
    queued_tokens: int
    free_pages: int
    private_pages: int
    prefix_pages: int
    cached_pages: int
    max_pages: int
    steps: int
    step_counts: tuple[int, ...]
    step_seconds: float
    last_step_seconds: float
    idle_seconds: float
    speculative_tokens: int
    accepted_tokens: int
    preemptions: int
    resizes: int
    decode_steps: int


@dataclass(frozen=True)
class RequestStats:
    """A request in the engine. prompt_tokens, computed_tokens: length of the prompt, and how much of it is computed;
    new_tokens: of the answer so far; seconds: since the request was made."""

    phase: Phase
    prompt_tokens: int
    computed_tokens: int
    new_tokens: int
    seconds: float
