"""A request to the engine, and the state of its sequence while the engine works on it."""

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from .prefill import AudioInput, PromptEmbeddings
from .prefix import Prefix
from .prefix_cache import PageKeys
from .repetition import RepetitionGuard
from .sampler import Sampler, SamplingParams
from .speculation import Drafter
from .timings import Timings

FinishReason = Literal["stop", "length", "cancelled", "deadline", "repetition", "error"]
OnUpdate = Callable[[list["SequenceState"]], None]


@dataclass(frozen=True)
class Request:
    """A prompt with its audio, and how to answer it. The clock of `timings` starts when the request is made.

    sampling: None computes the keys and values of the prompt only; the sequence then ends with a `prefix`.
    prefix: keys and values of the prompt's first tokens, computed before.
    beginning: the sequence of a request with `expected`, whose prompt this one continues. This request waits for it,
    shares its pages if they are more than the prefix cache has, and at its end ends it and closes its `prefix`.
    expected: the prompt, of whole pages and with `sampling` None, is the beginning of one that with its answer has
    about this many tokens. The engine closes its `prefix` when other requests need the pages.
    priority: requests with a higher priority are admitted first; one unit overtakes at most 32 earlier requests.
    deadline: seconds after which the answer ends with the tokens that it has.
    salt: requests share cached pages and encoder outputs only with requests of the same salt.
    token_kinds: kind of each token of the vocabulary, for `RepetitionGuard`.
    logprobs: record the log probabilities of the chosen tokens; see `SequenceState.mean_logprob`.

    The engine's thread calls the following, in the context variables of the submitter. They must not wait for the
    engine. An exception in `progress` or `cancelled` ends this request.
    progress: called with (prompt tokens computed, prompt tokens) after each chunk of the prompt.
    cancelled: polled once per step; the request ends when it returns true.
    on_update: called after a step with those sequences that changed in it. Requests with equal `on_update` share one
    call per step.
    """

    token_ids: list[int]
    audio: tuple[AudioInput, ...]
    sampling: SamplingParams | None
    prefix: Prefix | None = None
    beginning: "SequenceState | None" = None
    expected: int | None = None
    priority: int = 0
    deadline: float | None = None
    salt: bytes = b""
    logprobs: bool = False
    progress: Callable[[int, int], None] | None = None
    cancelled: Callable[[], bool] | None = None
    on_update: OnUpdate | None = None
    timings: Timings = field(default_factory=Timings)
    token_kinds: npt.NDArray[np.uint8] | None = None

    @property
    def budget(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.token_ids) + (self.sampling.max_new_tokens if self.sampling else 0)


@dataclass(eq=False)
class SequenceState:
    """One request in the engine. `tokens` grows while the engine runs.

    `finish_reason` is set last, after its pages are released: "stop" at a stop token (kept as the last token),
    "length", "cancelled", "deadline", "repetition" if the request stops at repetition, or "error" with `error` set.

    pages: all pages in order, shared ones first; shared_pages: pages of its prefix, which it only reads; private_pages:
    pages that only this sequence writes; keys: keys of its full pages in the prefix cache, None if it does not use it.
    computed: tokens whose keys and values are in `pages`; cached: prompt tokens that were computed by earlier requests.
    backend, threads, context: the forced backend, torch's number of threads and the context variables of the submitter.
    queued: it is or was in the engine; end_requested: set by any thread to end the sequence before its next step.
    """

    request: Request
    order: tuple[int, int]
    backend: str | None = None
    threads: int | None = None
    context: contextvars.Context = field(default_factory=contextvars.Context)
    listeners: list[OnUpdate] = field(default_factory=list)
    sampler: Sampler | None = None
    drafter: Drafter | None = None
    guard: RepetitionGuard = field(init=False)
    pages: list[int] = field(default_factory=list)
    shared_pages: list[int] = field(default_factory=list)
    private_pages: list[int] = field(default_factory=list)
    keys: PageKeys | None = None
    tokens: list[int] = field(default_factory=list)
    logprob_sum: float = 0.0
    computed: int = 0
    cached: int = 0
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    prefix: Prefix | None = None
    embeddings: PromptEmbeddings | None = None
    queued: bool = False
    end_requested: FinishReason | None = None

    def __post_init__(self) -> None:
        self.guard = RepetitionGuard(self.request.token_kinds)

    @property
    def ended(self) -> bool:
        """Whether it has a `finish_reason`."""
        return self.finish_reason is not None

    @property
    def to_prefill(self) -> int:
        """Tokens to compute before the next one can be decoded: the prompt, and after preemption the answer so far."""
        return len(self.request.token_ids) + max(0, len(self.tokens) - 1)

    @property
    def mean_logprob(self) -> float | None:
        """Mean log probability of the answer's tokens by the model's scores, before penalties, temperature and filters.

        None if the request does not have `logprobs`, or there are no tokens.
        """
        return self.logprob_sum / len(self.tokens) if self.request.logprobs and self.tokens else None

    def due_reason(self) -> FinishReason | None:
        """Why the sequence should end before its next step, or None. Calls `request.cancelled`."""
        if self.end_requested is not None:
            return self.end_requested
        cancelled, deadline = self.request.cancelled, self.request.deadline
        if cancelled is not None and self.context.run(cancelled):
            return "cancelled"
        return "deadline" if deadline is not None and self.request.timings.elapsed >= deadline else None

    def report_progress(self) -> None:
        """Call `request.progress`."""
        if self.request.progress is not None:
            total = len(self.request.token_ids)
            self.context.run(self.request.progress, min(self.computed, total), total)
