"""What the engine is asked for, and the state of it on its way."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .prefill import AudioInput, PromptEmbeddings
from .prefix import Prefix
from .prefix_cache import PageKeys
from .repetition import RepetitionGuard
from .sampler import Sampler, SamplingParams
from .speculation import Drafter
from .timings import Timings

FinishReason = Literal["stop", "length", "cancelled", "deadline", "repetition", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt with its recordings, and how to answer it. The clock of `timings` runs from its making.

    sampling: None to compute the keys and values of the prompt alone, which the sequence then holds as `prefix`.
    prefix: computed already, of the prompt's first tokens. priority: who waits for room goes first with a higher one,
    overtaking at most 32 others for each unit; deadline: seconds from the making after which the answer ends as it is.
    progress: called with (prompt tokens done, prompt tokens); cancelled: polled between steps; both by whichever thread
    runs the engine.
    """

    token_ids: list[int]
    audio: tuple[AudioInput, ...]
    sampling: SamplingParams | None
    prefix: Prefix | None = None
    priority: int = 0
    deadline: float | None = None
    progress: Callable[[int, int], None] = lambda done, total: None
    cancelled: Callable[[], bool] = lambda: False
    timings: Timings = field(default_factory=Timings)

    @property
    def budget(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return len(self.token_ids) + (self.sampling.max_new_tokens if self.sampling else 0)


@dataclass(eq=False)
class Sequence:
    """One request in the engine. `tokens` grows as they come; it ends with a `finish_reason`: "stop" at a stop token
    (kept as its last token), "length", "cancelled", "deadline", "repetition" where the request says to stop at it, or
    "error" with the `error` that broke it off.

    pages: all of them in order; held: those of its prefix; own: those that only it writes into; keys: of its full pages
    in the prefix cache, None if it is not to be found or kept there.
    computed: tokens whose keys and values are in `pages`; cached: prompt tokens that another request had computed.
    """

    request: Request
    order: tuple[int, int]
    sampler: Sampler | None = None
    drafter: Drafter | None = None
    guard: RepetitionGuard = field(default_factory=RepetitionGuard)
    pages: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    keys: PageKeys | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    prefix: Prefix | None = None
    embeddings: PromptEmbeddings | None = None
    to_end: FinishReason | None = None

    @property
    def to_prefill(self) -> int:
        """Tokens to compute before the next one can be decoded: the prompt, and what an interruption threw away."""
        return len(self.request.token_ids) + max(0, len(self.tokens) - 1)

    @property
    def ending(self) -> FinishReason | None:
        """Why the sequence should end before its next step, if so."""
        if self.to_end is not None:
            return self.to_end
        if self.request.cancelled():
            return "cancelled"
        deadline = self.request.deadline
        return "deadline" if deadline is not None and self.request.timings.elapsed >= deadline else None
