"""Every kind of work once, on silence and zeros, so that no request waits while kernels are compiled.

Which kernel an operation launches follows from its dtypes and from how many rows it is given, but not from how long a
recording or a prompt is. So a few sizes of each kind of work launch every kernel. What Triton compiled it keeps on
disk, by chip, version and source: the next process only loads it.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch

from ...kernels.audio_format import WINDOW_SAMPLES
from ...kernels.row_groups import row_invariant
from ..model.encoder import token_count
from .decode_steps import MAX_SPECULATING
from .executor import Executor
from .options import EngineOptions
from .prefill import PlacedWindow
from .sampler import Sampler, SamplingParams, choose
from .timings import Timings

ROWS = (16, 32, 64, 128)  # up to which products with packed weights have kernels of their own
_SAMPLES_PER_POSITION = 320  # of the encoder


@torch.inference_mode()
def rehearse(
    executor: Executor, options: EngineOptions, pages: list[int], progress: Callable[[int, int], None]
) -> None:
    """Run each kind of work. pages: of the cache, as many as a chunk takes, or as there are; what they hold is
    overwritten. progress: called with (done, total)."""
    works = list(_works(executor, options, pages))
    for done, work in enumerate(works):
        progress(done, len(works))
        work()
    progress(len(works), len(works))


def _works(executor: Executor, options: EngineOptions, pages: list[int]) -> Iterator[Callable[[], object]]:
    for positions in ROWS:
        yield partial(_encode, executor, 1, positions * _SAMPLES_PER_POSITION)
    for windows in sorted({1, options.windows_at_once}):
        yield partial(_encode, executor, windows, WINDOW_SAMPLES)
    most = min(options.chunk_size, len(pages) * options.page_size)
    for tokens in sorted({min(rows, most) for rows in (*ROWS, most)}):
        yield partial(_prefill, executor, pages, tokens)
    if options.batch_invariant:
        shapes = {(1, 1)}  # every token is a row of its own, computed like one alone
    else:
        speculating = min(options.max_batch, MAX_SPECULATING)
        shapes = {(rows, 1) for rows in (1, *ROWS) if rows <= options.max_batch} | {(options.max_batch, 1)}
        shapes |= {(rows, 1 + options.draft_tokens) for rows in (1, 2, 4, 8) if rows <= speculating}
    for rows, time in sorted(shapes):
        yield partial(_decode, executor, options, pages, rows, time)


def _encode(executor: Executor, windows: int, samples: int) -> None:
    window = PlacedWindow(0, token_count(samples), torch.zeros(samples), 0)
    executor.encode([window] * windows, Timings())


def _prefill(executor: Executor, pages: list[int], tokens: int) -> None:
    x = executor.embed(torch.zeros(tokens, dtype=torch.int64, device=executor.model.device))
    executor.logits(executor.prefill(x[None], pages, 0)[:, -1])


def _decode(executor: Executor, options: EngineOptions, pages: list[int], rows: int, time: int) -> None:
    """Rows of the same sequence: each writes what it reads, so that it does not matter which one is the last."""
    vocabulary, device = executor.model.config.decoder.vocab_size, executor.model.device
    kinds = (SamplingParams(1), SamplingParams(1, temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=0))
    with row_invariant() if options.batch_invariant else nullcontext():
        scores = executor.decode([[0] * time] * rows, [0] * rows, [pages] * rows).flatten(0, 1)
        for params in kinds:
            choose(scores, [Sampler(params, [0], vocabulary, device)] * len(scores), [0] * len(scores))
