"""What a faster operation is worth in the whole: seconds of a 30-minute prefill, or of a decode step.

The prefill of a recording encodes all its windows and computes all its tokens in chunks, each behind the tokens before
it. The problems have chunks at a few depths; a chunk between two of them counts for both, by how near it is, since the
time of attention grows linearly with the keys. A last, shorter chunk counts by its tokens.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ...kernels.audio_format import SAMPLE_RATE
from ...kernels.rote import pooled_length
from .problems import FULL, SCHEMES, Problem, Sizes, Stage, stages

SECONDS = 1800.0
Calls = Mapping[Problem, float]


@dataclass(frozen=True)
class Whole:
    """Something that a user waits for, and how often it makes each call."""

    name: str
    calls: Calls


def prefill(
    scheme: str = "dense", kv8: bool = False, *, seconds: float = SECONDS, sizes: Sizes = FULL, dtype: str = "bfloat16"
) -> Whole:
    """The prefill of a recording of so many seconds: its windows encoded, its tokens computed in chunks."""
    windows = -(-int(seconds * SAMPLE_RATE) // sizes.window_samples)
    calls: defaultdict[Problem, float] = defaultdict(float)
    for problem, count in Stage("encode", sizes.encode_batch, scheme=scheme).calls(sizes, dtype).items():
        calls[problem] += count * windows / sizes.encode_batch
    tokens = windows * pooled_length(sizes.positions)
    chunks: defaultdict[int, float] = defaultdict(float)  # by depth
    for start in range(0, tokens, sizes.chunk):
        for depth, weight in _between(start, sizes.prefill_depths):
            chunks[depth] += weight * min(sizes.chunk, tokens - start) / sizes.chunk
    for depth, chunk_count in chunks.items():
        for problem, count in Stage("prefill", sizes.chunk, depth, scheme, kv8).calls(sizes, dtype).items():
            # Only the last token of the prompt is scored.
            is_head = problem.shape.get("out_features") == sizes.vocab
            calls[problem] += count * (chunk_count / sum(chunks.values()) if is_head else chunk_count)
    details = "".join(f", {part}" for part in (scheme if scheme != "dense" else "", "int8 KV" if kv8 else "") if part)
    return Whole(f"a {seconds / 60:g}-minute prefill{details}", dict(calls))


def _between(depth: int, depths: tuple[int, ...]) -> Iterator[tuple[int, float]]:
    """The measured depths around `depth` with the weights of linear interpolation; the nearest one beyond the ends."""
    at = bisect_left(depths, depth)
    if at == len(depths) or depths[at] == depth or at == 0:
        yield depths[min(at, len(depths) - 1)], 1.0
        return
    low, high = depths[at - 1], depths[at]
    share = (depth - low) / (high - low)
    yield low, 1.0 - share
    yield high, share


def wholes(problems: Iterable[Problem], dtype: str, sizes: Sizes = FULL) -> list[Whole]:
    """For each of the problems the first whole that makes its call: a prefill, otherwise a decode step or a choice."""
    found: dict[str, Whole] = {}
    for problem in problems:
        whole = next((one for one in _all(dtype, sizes) if problem in one.calls), None)
        if whole is not None:
            found.setdefault(whole.name, whole)
    return list(found.values())


def _all(dtype: str, sizes: Sizes) -> Iterator[Whole]:
    for scheme in SCHEMES:
        for kv8 in (False, True):
            yield prefill(scheme, kv8, sizes=sizes, dtype=dtype)
    for stage in stages(sizes):
        if stage.kind in ("decode", "choose"):
            yield Whole(f"one step, {stage.name}", dict(stage.calls(sizes, dtype)))


@dataclass(frozen=True)
class Worth:
    """What a candidate saves of a whole. percent: of `total`, the seconds of all its operations; launches: of the
    candidate's operation in it; covered: those at shapes that the candidate was timed at."""

    whole: str
    percent: float
    total: float
    launches: float
    covered: float


def worth(
    whole: Whole,
    operation: str,
    ours: Callable[[Problem], float],
    candidate: Callable[[Problem], float | None],
) -> Worth:
    """Measure a whole. ours, candidate: seconds of a call, None where the candidate saves nothing as it has no time."""
    total = saved = launches = covered = 0.0
    for problem, count in whole.calls.items():
        seconds = ours(problem)
        total += count * seconds
        if problem.operation == operation:
            launches += count
            instead = candidate(problem)
            if instead is not None:
                covered += count
                saved += count * (seconds - instead)
    return Worth(whole.name, 100 * saved / total, total, launches, covered)
